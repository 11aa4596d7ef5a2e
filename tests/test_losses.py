"""Every loss by hand, by a naive double loop, and on two ranks against one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from vision_tower.losses import Losses, caption_cross_entropy, clips_losses, info_nce
from vision_tower.pretrain_recipe import LossWeights
from vision_tower.tokenizer import IGNORED

ONE = torch.tensor(1.0)


def naive_info_nce(image: torch.Tensor, text: torch.Tensor, scale: float) -> float:
    count, total = len(image), 0.0
    for i in range(count):
        row = [scale * float(image[i] @ text[j]) for j in range(count)]
        column = [scale * float(image[j] @ text[i]) for j in range(count)]
        for scores in (row, column):
            total += math.log(sum(math.exp(score) for score in scores)) - scores[i]
    return total / (2 * count)


def naive_caption(logits: torch.Tensor, labels: torch.Tensor) -> float:
    total, count = 0.0, 0
    for scores, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for row, target in zip(scores, targets, strict=True):
            if target != IGNORED:
                total += math.log(sum(math.exp(score) for score in row)) - row[target]
                count += 1
    return total / count


def case(batch: int = 8, queries: int = 5, vocabulary: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def unit() -> torch.Tensor:
        return F.normalize(torch.randn(batch, 6, generator=generator), dim=-1)

    labels = torch.randint(0, vocabulary, (batch, queries), generator=generator)
    for row in range(batch):  # captions of 1 to 5 targets: the halves of the batch count differently
        labels[row, 1 + row // 2 :] = IGNORED
    logits = torch.randn(batch, queries, vocabulary, generator=generator)
    return {"image": unit(), "web": unit(), "sub": unit(), "caption_logits": logits, "caption_labels": labels}


def test_info_nce_by_hand() -> None:
    # Scores are the identity: each of the four softmaxes has e / (e + 1) on its own pair.
    eye = torch.eye(2)
    assert float(info_nce(eye, eye, ONE)) == pytest.approx(math.log(1 + math.exp(-1)))
    # Pairs swapped: 1 / (e + 1).
    assert float(info_nce(eye, eye.flip(0), ONE)) == pytest.approx(math.log(1 + math.e))
    # All alike: chance.
    assert float(info_nce(torch.ones(4, 3), torch.ones(4, 3), 7 * ONE)) == pytest.approx(math.log(4))


def test_info_nce_against_a_double_loop() -> None:
    given = case()
    loss = float(info_nce(given["image"], given["web"], torch.tensor(9.0)))
    assert loss == pytest.approx(naive_info_nce(given["image"], given["web"], 9.0), abs=1e-5)


def test_info_nce_is_symmetric_and_exact_in_bf16_inputs() -> None:
    image, web = case()["image"], case()["web"]
    assert float(info_nce(image, web, 9 * ONE)) == pytest.approx(float(info_nce(web, image, 9 * ONE)), abs=1e-6)
    low = info_nce(image.bfloat16(), web.bfloat16(), 9 * ONE)
    assert low.dtype == torch.float32
    wide = info_nce(image.bfloat16().float(), web.bfloat16().float(), 9 * ONE)
    assert float(low) == float(wide)


def test_caption_cross_entropy_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = math.log(5)  # probability 5 / 8
    labels = torch.tensor([[0, 2, IGNORED]])
    expected = (math.log(4) + math.log(8 / 5)) / 2
    assert float(caption_cross_entropy(logits, labels)) == pytest.approx(expected)


def test_caption_cross_entropy_against_a_double_loop_and_blind_to_padding() -> None:
    given = case()
    logits, labels = given["caption_logits"].clone(), given["caption_labels"]
    loss = float(caption_cross_entropy(logits, labels))
    assert loss == pytest.approx(naive_caption(logits, labels), abs=1e-5)
    logits[labels == IGNORED] = 1e4
    assert float(caption_cross_entropy(logits, labels)) == pytest.approx(loss)
    nothing = caption_cross_entropy(logits, torch.full_like(labels, IGNORED))
    assert float(nothing) == 0.0


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(contrastive=0.5, caption=3.0)])
def test_the_total_by_formula(weights: LossWeights) -> None:
    given = case()
    losses: Losses = clips_losses(**given, scale=torch.tensor(10.0), weights=weights)
    web = naive_info_nce(given["image"], given["web"], 10.0)
    sub = naive_info_nce(given["image"], given["sub"], 10.0)
    caption = naive_caption(given["caption_logits"], given["caption_labels"])
    expected = weights.contrastive * (web + sub) / 2 + weights.caption * caption
    assert float(losses.total) == pytest.approx(expected, abs=1e-5)
    reported = {name: float(value) for name, value in losses.report.items()}
    named = {"loss_web": web, "loss_sub": sub, "loss_caption": caption, "temperature": 0.1}
    assert reported == pytest.approx(named, abs=1e-5)
    assert not any(value.requires_grad for value in losses.report.values())


class Toy(torch.nn.Module):
    """Linear towers and a linear captioner: enough for every gradient path of the losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image, self.text = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        self.words = torch.nn.Linear(11, 11)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            "image": F.normalize(self.image(given["image"]), dim=-1),
            "web": F.normalize(self.text(given["web"]), dim=-1),
            "sub": F.normalize(self.text(given["sub"]), dim=-1),
            "scale": self.scale.exp(),
            "caption_logits": self.words(given["caption_logits"]),
        }


def _step(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = clips_losses(**model(given), caption_labels=given["caption_labels"], weights=LossWeights())
    losses.total.backward()
    return losses.total.detach()


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    toy = Toy()
    given = {name: value.chunk(world)[rank] for name, value in case().items()}
    loss = _step(torch.nn.parallel.DistributedDataParallel(toy), given)
    dist.all_reduce(loss)
    if rank == 0:
        gradients = {name: value.grad for name, value in toy.named_parameters()}
        torch.save({"loss": loss / world, "gradients": gradients}, f"{folder}/result.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_at_the_same_global_batch(tmp_path: Path) -> None:
    """Loss and gradients under DistributedDataParallel; the ranks hold different numbers of target tokens."""
    given = case()
    counts = [int((part != IGNORED).sum()) for part in given["caption_labels"].chunk(2)]
    assert counts[0] != counts[1]
    toy = Toy()
    loss = _step(toy, given)
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    result: dict[str, Any] = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(result["loss"], loss, atol=1e-5, rtol=0)
    for name, value in toy.named_parameters():
        torch.testing.assert_close(result["gradients"][name], value.grad, atol=1e-5, rtol=0, msg=name)
