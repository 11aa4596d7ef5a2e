"""Sampling of the next token, and incremental detokenization."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from clips_mllm.prompts.conversation import EMPTY_THOUGHTS
from vision_tower.common.recipe import check_ranges

if TYPE_CHECKING:  # commands validate their sampling parameters before these are imported
    import torch
    from transformers import PreTrainedTokenizerFast

MIN_TEMPERATURE = 1e-4  # lower values decode greedily: logits divided by them would overflow fp32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of an answer.

    Args:
        max_new_tokens: maximum length of an answer in tokens.
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: sample from the smallest set of most likely tokens with this total probability.
        repetition_penalty: values above 1 make tokens that occurred before less likely.
        seed: seed of the random numbers; default: a different one for each answer.
        stop: strings that end the answer; they are not part of it.
    Raises:
        UserError: a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, max_new_tokens="[1, inf)", temperature="[0, 100]", top_p="(0, 1]")
        check_ranges(self, repetition_penalty="(0, 10]")  # 1 has no effect


class TokenSampler:
    """Samples the tokens of one answer with transformers' logits processors and its own random generator."""

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
        if sampling.temperature > MIN_TEMPERATURE:
            self.processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self.processors.append(TopPLogitsWarper(sampling.top_p))
            self.generator = torch.Generator()
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed)

    def sample(self, ids: list[int], logits: torch.Tensor) -> int:
        """Return the token after `ids`, given its logits (vocabulary)."""
        import torch

        scores = logits.float()[None]
        if self.processors:
            scores = self.processors(torch.tensor([ids], device=scores.device), scores)
        if self.generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator))


class IncrementalDetokenizer:
    """Converts tokens to text as soon as the text is final: complete characters, and no prefix of a stop string.

    A leading empty thought block (Qwen3) is removed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: list[int] = []
        self.stopped = False
        self._start = 0  # decode from here: one step back, because a token's text depends on the token before
        self._decoded = 0  # number of ids whose text is in `_text`
        self._text = ""
        self._emitted = 0  # number of characters of `_text` that were returned

    def push(self, token: int) -> str:
        """Append a token and return the text that became final, possibly none."""
        self.ids.append(token)
        new = self._new_text()
        if not new or new.endswith("\ufffd"):  # an incomplete character
            return ""
        self._text += new
        self._start, self._decoded = self._decoded, len(self.ids)
        return self._emit(last=False)

    def flush(self) -> str:
        """Return the remaining text."""
        self._text += self._new_text()
        self._decoded = len(self.ids)
        return self._emit(last=True)

    def _new_text(self) -> str:
        before, after = self._decode(self.ids[self._start : self._decoded]), self._decode(self.ids[self._start :])
        return after[len(before) :]

    def _emit(self, *, last: bool) -> str:
        if self.stopped:
            return ""
        if not self._emitted:
            if self._text.startswith(EMPTY_THOUGHTS):
                self._emitted = len(EMPTY_THOUGHTS)
            elif not last and EMPTY_THOUGHTS.startswith(self._text):
                return ""
        stops = [index for index in (self._text.find(stop) for stop in self.stop) if index >= 0]
        end = len(self._text)
        if stops:
            self.stopped, end = True, min(stops)
        elif not last:
            # The text may end with the beginning of a stop string.
            end -= max(
                (size for stop in self.stop for size in range(1, len(stop)) if self._text.endswith(stop[:size])),
                default=0,
            )
        text = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
