"""Classify images without training: the class whose prompts are nearest wins.

python docs/examples/zero_shot.py runs/quickstart/encoder photo.png --classes cat dog car
"""

from __future__ import annotations

import argparse
import sys

import torch
from PIL import Image

from vision_tower import load_encoder

TEMPLATES = ("a photo of a {}.", "an image of a {}.", "a {}.")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--classes", nargs="+", required=True)
    args = parser.parse_args(argv)

    encoder = load_encoder(args.encoder)
    prompts = [template.format(name) for name in args.classes for template in TEMPLATES]
    classes = encoder.embed_texts(prompts).view(len(args.classes), len(TEMPLATES), -1).mean(dim=1)
    classes = torch.nn.functional.normalize(classes, dim=-1)  # (C, D)

    images = encoder.embed_images([Image.open(file).convert("RGB") for file in args.images])  # (N, D)
    scale = encoder.model.logit_scale.exp().detach().cpu()  # the temperature that the encoder was trained with
    for file, row in zip(args.images, (scale * images @ classes.T).softmax(dim=-1), strict=True):
        ranked = sorted(zip(row.tolist(), args.classes, strict=True), reverse=True)
        print(f"{file}: " + ", ".join(f"{name} {share:.1%}" for share, name in ranked))


if __name__ == "__main__":
    main(sys.argv[1:])
