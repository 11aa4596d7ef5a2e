"""Embed images and captions with a CLIPS encoder and print their cosine similarities.

python docs/examples/embed_images.py runs/quickstart/encoder one.png two.png --captions "a cat" "a red car"
"""

from __future__ import annotations

import argparse
import sys

from PIL import Image

from vision_tower import load_encoder


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", help="folder of `clips-mllm pretrain` or `clips-mllm convert --to clips`")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--captions", nargs="+", required=True)
    args = parser.parse_args(argv)

    encoder = load_encoder(args.encoder)
    images = encoder.embed_images([Image.open(file).convert("RGB") for file in args.images])  # (N, D), unit norm
    texts = encoder.embed_texts(args.captions)  # (M, D), unit norm
    similarity = images @ texts.T  # (N, M)

    for file, row in zip(args.images, similarity, strict=True):
        best = int(row.argmax())
        print(f"{file}: {args.captions[best]} ({row[best]:.3f})")


if __name__ == "__main__":
    main(sys.argv[1:])
