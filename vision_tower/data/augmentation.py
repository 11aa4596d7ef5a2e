"""Training augmentation: crop, color jitter, grayscale; no flip, since captions mention left and right.

Random draws and pixels are bit-identical to torchvision's v2 transforms in a `Compose`. The operations are called
directly, since at these image sizes the dispatch of v2 costs as much as the operations.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from vision_tower.data.recipe import Augmentation


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Adjust the contrast as torchvision does, but compute the mean with numpy, not from Pillow's histogram."""
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


JITTERS = (F.adjust_brightness, adjust_contrast, F.adjust_saturation, F.adjust_hue)  # torchvision's order
FACTORS = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")


def min_decoded_size(augmentation: Augmentation, size: int) -> int:
    """Return the image side at which the smallest square crop is still `size` pixels wide."""
    return math.ceil(size / augmentation.smallest_crop**0.5)


class TrainingTransform:
    """RGB image -> (3, size, size) uint8. Draws from torch's generator."""

    def __init__(self, augmentation: Augmentation, size: int) -> None:
        self.augmentation, self.size = augmentation, size
        strength = augmentation.jitter
        self.crop = v2.RandomResizedCrop(size, scale=(augmentation.smallest_crop, 1.0))
        self.jitter = v2.ColorJitter(strength, strength, strength, strength / 4)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Augment one image."""
        if self.augmentation.smallest_crop < 1:
            box = self.crop.make_params([image])
            left, top = box["left"], box["top"]
            image = image.crop((left, top, left + box["width"], top + box["height"]))
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if self.augmentation.jitter > 0 and torch.rand(1) < self.augmentation.jitter_probability:
            image = self._jittered(image)
        if self.augmentation.gray_probability > 0 and torch.rand(1) < self.augmentation.gray_probability:
            image = image.convert("L").convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _jittered(self, image: Image.Image) -> Image.Image:
        drawn = self.jitter.make_params([image])
        for number in drawn["fn_idx"].tolist():
            image = JITTERS[number](image, drawn[FACTORS[number]])
        return image
