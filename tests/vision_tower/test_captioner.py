"""The captioner against stock blocks with a dense mask, and against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from vision_tower.model.captioner import Captioner
from vision_tower.model.config import ClipsConfig
from vision_tower.model.modeling import ClipsModel
from vision_tower.text.tokenizer import IGNORED

PATCHES, WORDS, QUERIES, VOCABULARY = 9, 7, 6, 50


IDS = torch.full((1, WORDS), 5)


def build(**options: Any) -> ClipsModel:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    config = ClipsConfig(
        vision_config=tower | {"image_size": 24, "patch_size": 8, "vision_use_head": False},
        text_config=tower
        | {"max_position_embeddings": WORDS, "vocab_size": VOCABULARY, "projection_size": 12, "bos_token_id": 1},
        **{
            "captioner_width": 24,
            "captioner_layers": 2,
            "captioner_heads": 2,
            "captioner_mlp": 32,
            "captioner_queries": QUERIES,
        }
        | options,
        projection_dim=12,
    )
    model = ClipsModel.from_scratch(config)
    with torch.no_grad():
        for value in model.captioner.layers.parameters():
            value.mul_(8)  # initial weights are too small for attention to have a measurable effect
        model.text_model.embeddings.token_embedding.weight.mul_(50)
    return model


def prefix(batch: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"patches": torch.randn(batch, PATCHES, 16), "words": torch.randn(batch, WORDS, 16)}


def combination_mask(before: int, queries: int) -> torch.Tensor:
    """Build the dense mask element by element; True allows attention."""
    mask = torch.zeros(before + queries, before + queries, dtype=torch.bool)
    for row in range(before + queries):
        for column in range(before + queries):
            mask[row, column] = column < before or (row >= before and column <= row)
    return mask


def naive(captioner: Captioner, patches: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Compute the logits of all queries with stock blocks and a dense mask, every row in every layer."""
    hidden = torch.cat(
        [
            captioner.image_projection(patches),
            captioner.text_projection(words),
            captioner.queries.expand(len(patches), -1, -1),
        ],
        dim=1,
    )
    allowed = combination_mask(hidden.shape[1] - QUERIES, QUERIES)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    for layer in captioner.layers:
        hidden = SiglipEncoderLayer.forward(layer, hidden, mask)
    return F.linear(captioner.norm(hidden[:, -QUERIES:]), captioner.head.weight)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("layers", [1, 3])
def test_equals_stock_blocks_under_the_dense_mask(layers: int) -> None:
    """Compares loss and gradients, although vocabulary layer and queries are computed at targets only."""
    model = build(captioner_layers=layers)
    captioner: Captioner = model.captioner
    given = {name: value.requires_grad_() for name, value in prefix().items()}
    labels = torch.tensor([[3, 4, IGNORED, IGNORED], [5, 2, 7, 1], [2, IGNORED, IGNORED, IGNORED]])
    padded = F.pad(labels, (0, QUERIES - labels.shape[1]), value=IGNORED)
    logits = naive(captioner, given["patches"], given["words"])
    expected = F.cross_entropy(logits.flatten(0, 1), padded.flatten(), ignore_index=IGNORED, reduction="sum")
    wanted = gradients(captioner, expected)
    inputs = {name: value.grad.clone() for name, value in given.items() if value.grad is not None}
    for value in given.values():
        value.grad = None
    loss = model.caption_sum(given["patches"], given["words"], IDS, labels)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    found = gradients(captioner, loss)
    assert set(found) == set(wanted)
    close = 5e-5  # relative; gradients reach 200, and the order of sums differs between CPUs
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= close * max(1, value.abs().max()), name
    for name, value in given.items():
        assert (value.grad - inputs[name]).abs().max() <= close * max(1, inputs[name].abs().max()), name


def test_masked_prompt_equals_absent_prompt() -> None:
    """Masked rows affect neither the other rows of the prefix nor the queries."""
    captioner: Captioner = build(captioner_layers=3).captioner
    given = prefix()
    seen = torch.tensor([True, True, False, False, True, False, True]).expand(3, -1)
    with torch.no_grad():
        masked = captioner(**given, seen=seen)
        absent = captioner(given["patches"], words=given["words"][:, seen[0]])
        all_seen = captioner(**given, seen=torch.ones_like(seen))
        plain = captioner(**given)
    torch.testing.assert_close(masked, absent, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(all_seen, plain, atol=1e-5, rtol=1e-5)
    assert (masked - plain).abs().max() > 1e-3


def test_queries_attend_to_prefix_and_earlier_queries_only() -> None:
    captioner: Captioner = build().captioner
    given = prefix()
    with torch.no_grad():
        before = captioner(**given)
        captioner.queries[4] *= -1  # LayerNorm would remove a shift
        after = captioner(**given)
        captioner.queries[4] *= -1
        other_prefix = captioner(given["patches"], words=given["words"] + torch.eye(WORDS)[0][:, None] * 3)
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=0, rtol=0)
    assert all((before[:, t] - after[:, t]).abs().max() > 1e-4 for t in (4, 5))
    assert all((before[:, t] - other_prefix[:, t]).abs().max() > 1e-5 for t in range(QUERIES))


def test_prefix_does_not_attend_to_queries() -> None:
    captioner: Captioner = build().captioner
    given = prefix()
    seen: list[torch.Tensor] = []
    captioner.layers[0].register_forward_hook(lambda *call: seen.append(call[2][:, : PATCHES + WORDS]))
    with torch.no_grad():
        captioner(**given)
        captioner.queries += torch.randn_like(captioner.queries)
        captioner(**given)
    torch.testing.assert_close(seen[0], seen[1], atol=0, rtol=0)


def test_clips_captioner_has_no_access_to_targets() -> None:
    """Without teacher forcing the loss depends neither on earlier targets nor on the sub-caption."""
    model = build()
    torch.manual_seed(2)
    batch = {
        "pixel_values": torch.randn(2, 3, 24, 24),
        "web_ids": torch.randint(3, VOCABULARY, (2, WORDS)),
        "sub_ids": torch.randint(3, VOCABULARY, (2, WORDS)),
    }
    labels = torch.randint(3, VOCABULARY, (2, 4))
    last = torch.full_like(labels, IGNORED)
    last[:, -1] = labels[:, -1]
    first = labels.clone()
    first[:, -1] = IGNORED
    with torch.no_grad():
        whole, alone, rest = (model(**batch, labels=some).caption_sum for some in (labels, last, first))
        other_sub = model(**batch | {"sub_ids": batch["web_ids"]}, labels=labels).caption_sum
    torch.testing.assert_close(alone + rest, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other_sub, whole, atol=1e-5, rtol=1e-5)


def test_coca_captioner_has_access_to_previous_tokens_only() -> None:
    model = build(teacher_forced=True)
    torch.manual_seed(2)
    given = {
        "pixel_values": torch.randn(1, 3, 24, 24),
        "mix_ids": torch.randint(3, VOCABULARY, (1, WORDS)),
    }
    labels = torch.randint(3, VOCABULARY, (1, QUERIES))
    states: list[torch.Tensor] = []
    model.captioner.register_forward_hook(lambda *call: states.append(call[2]))

    def changed(position: int) -> torch.Tensor:
        other = labels.clone()
        other[:, position] = (labels[:, position] + 1) % VOCABULARY
        model(**given, labels=other)
        return (states[-1] != states[0]).any(dim=2)[0]

    with torch.no_grad():
        model(**given, labels=labels)
        for position in range(QUERIES):
            queries = changed(position).tolist()
            assert not any(queries[: position + 1]) and all(queries[position + 1 : position + 2])
        model(**given | {"mix_ids": given["mix_ids"].flip(1)}, labels=labels)
    assert torch.equal(states[-1], states[0])  # the text tower does not leak the caption


def test_saved_tensors_include_neither_dense_mask_nor_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the shapes of all tensors saved for the backward pass."""
    from vision_tower.model import losses

    monkeypatch.setattr(losses, "LOGITS_CHUNK", 4 * VOCABULARY)
    model = build()
    kept: list[torch.Size] = []
    labels = torch.randint(0, VOCABULARY, (8, QUERIES))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: (kept.append(value.shape), value)[1], lambda value: value
    ):
        model.caption_sum(*prefix(8).values(), IDS, labels)
    size = PATCHES + WORDS + QUERIES
    assert kept and not [shape for shape in kept if shape[-2:] == (size, size)]
    assert not [shape for shape in kept if VOCABULARY in shape and 8 * QUERIES in shape]
