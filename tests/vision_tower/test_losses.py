"""Losses against hand calculations and naive loops; accumulation and two ranks against one large batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from vision_tower.model import losses as module
from vision_tower.model.gradient_cache import first_pass
from vision_tower.model.losses import caption_term, contrastive_terms, info_nce, summed_cross_entropy, weighted_losses
from vision_tower.model.modeling import ClipsOutput
from vision_tower.text.tokenizer import IGNORED

ONE = torch.tensor(1.0)


def naive_info_nce(image: torch.Tensor, text: torch.Tensor, scale: float) -> float:
    count, total = len(image), 0.0
    for i in range(count):
        row = [scale * float(image[i] @ text[j]) for j in range(count)]
        column = [scale * float(image[j] @ text[i]) for j in range(count)]
        for scores in (row, column):
            total += math.log(sum(math.exp(score) for score in scores)) - scores[i]
    return total / (2 * count)


def case(batch: int = 8, queries: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def unit() -> torch.Tensor:
        return F.normalize(torch.randn(batch, 6, generator=generator), dim=-1)

    labels = torch.randint(0, 11, (batch, queries), generator=generator)
    for row in range(batch):  # captions of 1 to 5 targets, so the halves of the batch have different counts
        labels[row, 1 + row // 2 :] = IGNORED
    return {
        "image": unit(),
        "web": unit(),
        "sub": unit(),
        "hidden": torch.randn(batch, queries, 6, generator=generator),
        "labels": labels,
    }


def test_info_nce_equals_hand_calculation() -> None:
    # Scores are the identity: each of the four softmaxes assigns e / (e + 1) to its pair.
    eye = torch.eye(2)
    assert float(info_nce(eye, eye, ONE)) == pytest.approx(math.log(1 + math.exp(-1)))
    # Pairs swapped: 1 / (e + 1).
    assert float(info_nce(eye, eye.flip(0), ONE)) == pytest.approx(math.log(1 + math.e))
    # Equal embeddings: chance.
    assert float(info_nce(torch.ones(4, 3), torch.ones(4, 3), 7 * ONE)) == pytest.approx(math.log(4))


def test_info_nce_equals_naive_loop() -> None:
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


@pytest.mark.parametrize("at_once", [1, 16, 24, 2**24])
def test_info_nce_in_blocks_equals_full_matrix(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Compares loss and gradients, also with a shorter last block."""
    given = case()

    def run(limit: int) -> list[torch.Tensor]:
        monkeypatch.setattr(module, "LOGITS_CHUNK", limit)
        image, text = (given[name].clone().requires_grad_() for name in ("image", "web"))
        scale = torch.tensor(9.0, requires_grad=True)
        loss = info_nce(image, text, scale)
        return [loss.detach(), *torch.autograd.grad(loss, (image, text, scale))]

    for found, expected in zip(run(at_once), run(2**24), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_saved_tensors_do_not_include_the_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_CHUNK", 512)
    image, text = (torch.randn(256, 6, requires_grad=True) for _ in range(2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: (kept.append(value.numel()), value)[1], lambda v: v):
        loss = info_nce(image, text, 9 * ONE)
    assert max(kept) <= 256 * 6
    loss.backward()


def test_summed_cross_entropy_equals_hand_calculation() -> None:
    hidden = torch.tensor([[math.log(5), 0.0], [0.0, 0.0]])
    weight = torch.tensor([[0.0, 0], [1, 0], [0, 1], [0, 1]])  # probabilities 5 / 8 and 1 / 4
    total = summed_cross_entropy(hidden, weight, torch.tensor([1, 2]))
    assert float(total) == pytest.approx(math.log(8 / 5) + math.log(4))


@pytest.mark.parametrize("at_once", [1, 40, 2**24])
def test_summed_cross_entropy_equals_torch(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Compares value and gradients, also with one of the gradients disabled, and for zero tokens."""
    monkeypatch.setattr(module, "LOGITS_CHUNK", at_once)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.randint(0, 11, (9,))
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum") * 3, (hidden, weight))
    for wanted in ((0, 1), (0,), (1,)):
        given = [value if place in wanted else value.detach() for place, value in enumerate((hidden, weight))]
        total = summed_cross_entropy(*given, labels)
        found = torch.autograd.grad(total * 3, [given[place] for place in wanted])
        for place, value in zip(wanted, found, strict=True):
            torch.testing.assert_close(value, expected[place], atol=1e-5, rtol=1e-5)
    nothing = summed_cross_entropy(hidden[:0], weight, labels[:0])
    assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, weight)[0].any()


def test_bf16_gradients_do_not_change_the_loss() -> None:
    """The loss is bit-identical to fp32; gradients differ by bf16 rounding."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(0, 30, (40,))
    exact, rounded = (summed_cross_entropy(hidden, weight, labels, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact, rounded)
    for right, near in zip(
        torch.autograd.grad(exact, (hidden, weight)), torch.autograd.grad(rounded, (hidden, weight)), strict=True
    ):
        assert near.dtype == torch.float32 and not torch.equal(near, right)
        assert (near - right).norm() < 0.01 * right.norm()


def test_caption_term_divides_by_targets_of_all_micro_batches() -> None:
    labels = case()["labels"]
    halves = labels.chunk(2)
    count = int((labels != IGNORED).sum())
    assert float(caption_term(6 * ONE, [labels])) == pytest.approx(6 / count)
    assert float((caption_term(2 * ONE, halves) + caption_term(4 * ONE, halves)) / 2) == pytest.approx(6 / count)
    assert float(caption_term(0 * ONE, [torch.full_like(labels, IGNORED)])) == 0.0


def test_total_is_the_weighted_sum() -> None:
    terms = {"web": 2 * ONE, "sub": 3 * ONE, "caption": (5 * ONE).requires_grad_()}
    losses = weighted_losses(terms, 10 * ONE, {"web": 0.5, "sub": 0.25, "caption": 2.0})
    assert losses.total.item() == pytest.approx(0.5 * 2 + 0.25 * 3 + 2 * 5)
    reported = {name: float(value) for name, value in losses.report.items()}
    assert reported == pytest.approx({"loss_web": 2, "loss_sub": 3, "loss_caption": 5, "temperature": 0.1})
    assert losses.total.requires_grad and not any(value.requires_grad for value in losses.report.values())
    assert set(weighted_losses(terms, ONE, {"web": 1.0}).report) == {"loss_web", "temperature"}


WEIGHTS = {"web": 0.5, "sub": 0.5, "caption": 2.0}


class Toy(torch.nn.Module):
    """Linear towers and captioner, with all gradient paths of the losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image, self.text = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        self.words = torch.nn.Linear(6, 11, bias=False)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(
        self,
        image: torch.Tensor,
        web: torch.Tensor,
        sub: torch.Tensor,
        hidden: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> ClipsOutput:
        captioned = None
        if hidden is not None and labels is not None:
            wanted = labels != IGNORED
            captioned = summed_cross_entropy(hidden[wanted], self.words.weight, labels[wanted])
        return ClipsOutput(
            image=F.normalize(self.image(image), dim=-1),
            texts={name: F.normalize(self.text(value), dim=-1) for name, value in (("web", web), ("sub", sub))},
            scale=self.scale.exp(),
            caption_sum=captioned,
        )


def _step(model: Callable[..., ClipsOutput], given: dict[str, torch.Tensor], parts: int = 1) -> torch.Tensor:
    """Run forward and backward of one step, as one batch or with gradient cache."""
    batches = [
        dict(zip(given, part, strict=True)) for part in zip(*(v.chunk(parts) for v in given.values()), strict=True)
    ]
    labels = [batch["labels"] for batch in batches]
    towers = [{name: batch[name] for name in ("image", "web", "sub")} for batch in batches]
    grads = first_pass(model, towers, WEIGHTS) if parts > 1 else None
    losses = []
    for number, batch in enumerate(batches):
        waiting = isinstance(model, DistributedDataParallel) and number < parts - 1
        with model.no_sync() if waiting else contextlib.nullcontext():
            out = model(**batch)
            assert out.caption_sum is not None
            terms = grads.terms if grads else contrastive_terms(out.image, out.texts, out.scale, WEIGHTS)
            terms = terms | {"caption": caption_term(out.caption_sum, labels)}
            loss = weighted_losses(terms, out.scale, WEIGHTS).total
            ((loss + grads.surrogate_loss(number, out) if grads else loss) / parts).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def _rank(rank: int, world: int, folder: str, every: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    given = {name: value.chunk(world)[rank] for name, value in case().items()}
    for parts in every:
        toy = Toy()
        loss = _step(DistributedDataParallel(toy), given, parts)
        dist.all_reduce(loss)
        if rank == 0:
            gradients = {name: value.grad for name, value in toy.named_parameters()}
            torch.save({"loss": loss / world, "gradients": gradients}, f"{folder}/result{parts}.pt")
    dist.destroy_process_group()


def _whole() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    toy = Toy()
    loss = _step(toy, case())
    return loss, {name: value.grad for name, value in toy.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_full_batch(parts: int) -> None:
    loss, gradients = _whole()
    toy = Toy()
    torch.testing.assert_close(_step(toy, case(), parts), loss, atol=1e-6, rtol=0)
    for name, value in toy.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], atol=1e-6, rtol=0, msg=name)


def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path: Path) -> None:
    """Loss and gradients under DistributedDataParallel, with and without accumulation.

    The ranks, and the micro-batches, hold different numbers of target tokens.
    """
    counts = [int((part != IGNORED).sum()) for part in case()["labels"].chunk(4)]
    assert len(set(counts)) == 4
    loss, gradients = _whole()
    mp.spawn(_rank, args=(2, str(tmp_path), (1, 2)), nprocs=2)
    for parts in (1, 2):
        result: dict[str, Any] = torch.load(tmp_path / f"result{parts}.pt")
        torch.testing.assert_close(result["loss"], loss, atol=1e-5, rtol=0)
        for name, value in gradients.items():
            torch.testing.assert_close(result["gradients"][name], value, atol=1e-5, rtol=0, msg=name)
