"""How the next token is chosen, and how tokens become text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from clips_mllm.prompts.conversation import EMPTY_THOUGHTS
from vision_tower.common.errors import UserError

if TYPE_CHECKING:  # a command checks its sampling before these are imported
    import torch
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn.

    Args:
        max_new_tokens: longest answer, in tokens.
        temperature: 0 answers greedily, more samples.
        top_p: sample among the likeliest tokens that hold this share together.
        repetition_penalty: above 1 makes tokens that stood before less likely.
        seed: draws the same sample again.
        stop: texts that end the answer; they are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError for values without a meaning."""
        if self.max_new_tokens < 1:
            raise UserError("at least 1", key="max_new_tokens", value=self.max_new_tokens)
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature={self.temperature}: from 0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            raise UserError("above 0, at most 1", key="top_p", value=self.top_p)
        if not 0 < self.repetition_penalty <= 10:
            raise UserError(
                "above 0, at most 10",
                key="repetition_penalty",
                value=self.repetition_penalty,
                remedy="1 changes nothing",
            )


GREEDY = 1e-4  # below this the likeliest token is the answer, and scores divided by it leave the range of fp32


class Chooser:
    """Chooses one answer's tokens from logits, with transformers' own processors and its own random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        import torch
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        self.processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self.generator: torch.Generator | None = None
        if sampling.temperature > GREEDY:
            self.processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self.processors.append(TopPLogitsWarper(sampling.top_p))
            self.generator = torch.Generator()
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed)

    def choose(self, ids: list[int], logits: torch.Tensor) -> int:
        """The next token after `ids`, from its logits (vocabulary)."""
        import torch

        scores = logits.float()[None]
        if self.processors:
            scores = self.processors(torch.tensor([ids], device=scores.device), scores)
        if self.generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator))


class TextStream:
    """Tokens in, text out as soon as it is certain: whole characters, and no beginning of a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.start = 0  # decoding begins here: one step back, since a token's text depends on the one before
        self.told = 0  # ids whose text is in `text`
        self.text = ""
        self.out = 0  # characters of `text` handed out
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that this token makes certain; may be empty."""
        self.ids.append(token)
        before, after = self._decode(self.ids[self.start : self.told]), self._decode(self.ids[self.start :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self.text += after[len(before) :]
        self.start, self.told = self.told, len(self.ids)
        return self._hand_out(last=False)

    def end(self) -> str:
        """What was held back."""
        before, after = self._decode(self.ids[self.start : self.told]), self._decode(self.ids[self.start :])
        self.text += after[len(before) :]
        self.told = len(self.ids)
        return self._hand_out(last=True)

    def _hand_out(self, *, last: bool) -> str:
        if self.stopped:
            return ""
        if not self.out:
            if self.text.startswith(EMPTY_THOUGHTS):
                self.out = len(EMPTY_THOUGHTS)
            elif not last and EMPTY_THOUGHTS.startswith(self.text):
                return ""
        found = [place for place in (self.text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, end = True, min(found)
        elif last:
            end = len(self.text)
        else:
            end = len(self.text) - max(
                (size for stop in self.stop for size in range(1, len(stop)) if self.text.endswith(stop[:size])),
                default=0,
            )
        piece = self.text[self.out : end]
        self.out = max(self.out, end)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
