"""Texts of a pair by stream: captions, reduced and tokenized as the objective and the recipe define.

(web caption, synthetic caption) --CaptionSampler--> {"web": pieces, "sub": pieces, "mix": pieces, "target": pieces}

Runs in the loader processes.
"""

from __future__ import annotations

import random

from vision_tower.text.captions import block_mask, draw_sentences, random_mask, split_sentences, sub_caption, truncation
from vision_tower.text.objectives import CaptionRecipe, Objective
from vision_tower.text.tokenizer import ClipsTokenizer

TARGET = "target"


class CaptionSampler:
    """Draws the texts of one pair.

    Args:
        room: word pieces that fit the text tower in addition to the three special ones.
    """

    def __init__(self, tokenizer: ClipsTokenizer, objective: Objective, recipe: CaptionRecipe, room: int) -> None:
        self.tokenizer = tokenizer
        self.objective = objective
        self.recipe = recipe
        self.budget = recipe.budget or room
        self.web_budget = recipe.web_budget or room

    def __call__(self, web: str, full: str, rng: random.Random) -> dict[str, list[int]]:
        """Return word pieces without special ones, by stream; "target" is the captioner's."""
        drawn = {stream: self._draw(stream, web, full, rng) for stream in self.objective.streams}
        if self.objective.captioned:
            drawn[TARGET] = drawn["mix"] if self.objective.teacher_forced else self._pieces(full)
        return drawn

    def _draw(self, stream: str, web: str, full: str, rng: random.Random) -> list[int]:
        match stream:
            case "web":
                return truncation(self._pieces(web), self.web_budget)
            case "sub":
                return self._reduced(full, rng)
            case "mix":
                take_web = rng.random() < self.recipe.web_share and web
                return self._draw("web" if take_web else "sub", web, full, rng)
        raise AssertionError(stream)

    def _reduced(self, caption: str, rng: random.Random) -> list[int]:
        match self.recipe.reduction or self.objective.reduction:
            case "truncation":
                return truncation(self._pieces(caption), self.budget)
            case "random":
                return random_mask(self._pieces(caption), self.budget, rng)
            case "block":
                return block_mask(self._pieces(caption), self.budget, rng)
            case "sub-caption":
                sentences = split_sentences(caption) or [caption]  # a caption without a sentence, such as an emoji
                return sub_caption(self.tokenizer.pieces(sentences), self.budget, rng)
            case "sentences":
                drawn = draw_sentences(split_sentences(caption) or [caption], self.recipe.sentences, rng)
                return truncation(self._pieces(" ".join(drawn)), self.budget)

    def _pieces(self, text: str) -> list[int]:
        return self.tokenizer.pieces([text])[0]
