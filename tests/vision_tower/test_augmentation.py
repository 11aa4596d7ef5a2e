"""Augmentation is bit-identical to torchvision."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vision_tower.data.augmentation import TrainingTransform
from vision_tower.data.recipe import Augmentation

SIDE = 24


@pytest.mark.parametrize(
    "recipe",
    [
        Augmentation(),
        Augmentation(smallest_crop=1.0, jitter=0.0, gray_probability=0.0),
        Augmentation(smallest_crop=0.2, jitter=0.9, jitter_probability=1.0, gray_probability=0.5),
    ],
)
def test_pixels_and_draws_equal_torchvision(recipe: Augmentation) -> None:
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = [v2.Resize((SIDE, SIDE), antialias=True)]
    if recipe.smallest_crop < 1:
        steps = [v2.RandomResizedCrop(SIDE, scale=(recipe.smallest_crop, 1.0), antialias=True)]
    if recipe.jitter:
        jitter = v2.ColorJitter(recipe.jitter, recipe.jitter, recipe.jitter, recipe.jitter / 4)
        steps.append(v2.RandomApply([jitter], recipe.jitter_probability))
    if recipe.gray_probability:
        steps.append(v2.RandomGrayscale(recipe.gray_probability))
    theirs, ours = v2.Compose([*steps, v2.PILToTensor()]), TrainingTransform(recipe, SIDE)
    drawn = set()
    for seed, size in enumerate([(40, 30), (30, 40), (24, 24), (9, 90), (90, 9), (25, 23)] * 8):
        noise = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        image = Image.fromarray(noise.numpy()).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        torch.manual_seed(seed)
        expected, state = theirs(image), torch.get_rng_state()
        torch.manual_seed(seed)
        found = ours(image)
        assert found.dtype == torch.uint8 and torch.equal(found, expected), (seed, size)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.add(bool((found[0] == found[1]).all()))
    assert drawn == ({True, False} if recipe.gray_probability else {False})
