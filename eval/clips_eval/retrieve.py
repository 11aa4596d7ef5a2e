"""`clips-mllm retrieve ENCODER --data test.json`: recall@1/5/10 between images and captions.

Karpathy JSON --load--> Pairs(files, texts, owner) --encoder--> embeddings --recall_at_k--> retrieval.json
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clips_eval.embeddings import KS, embed, examples, score
from clips_eval.report_files import write_json
from vision_tower.errors import UserError, run_command
from vision_tower.karpathy import load_pairs
from vision_tower.recipe import parse_recipe


@dataclass(frozen=True, kw_only=True)
class RetrieveRecipe:
    """Measure an encoder's retrieval on a Karpathy-style JSON (COCO, Flickr30K, the sample world).

    Args:
        encoder: folder of a ClipsModel checkpoint.
        data: the JSON; its images carry "filename", "split", "sentences" and, as COCO's do, a folder "filepath".
        images: folder of the pictures; the JSON's own folder if not given.
        split: which of the file's splits to measure.
        output: where the scores go; ENCODER/retrieval.json if not given.
        batch_size: pictures, or captions, at a time.
        device: auto, cpu or cuda.
    """

    encoder: Path
    data: Path
    images: Path | None = None
    split: str = "test"
    output: Path | None = None
    batch_size: int = 64
    device: str = "auto"


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: bad JSON, no picture of the split, a missing or corrupt picture, an unusable encoder.
    """
    recipe = parse_recipe(RetrieveRecipe, argv, command="retrieve", positional=("encoder",))
    if recipe.batch_size < 1:
        raise UserError(f"--batch_size {recipe.batch_size}: at least 1 is needed")
    pairs = load_pairs(recipe.data, recipe.images or recipe.data.parent, recipe.split)
    digest = checkpoint_digest(recipe.encoder)

    from vision_tower.encoder import load_encoder

    encoder = load_encoder(recipe.encoder, recipe.device)
    output = recipe.output or recipe.encoder / "retrieval.json"
    images, texts = embed(encoder, pairs, recipe.batch_size)
    result = {
        **score(recipe.encoder, images, texts, pairs),
        "n_images": len(pairs.files),
        "n_texts": len(pairs.texts),
        "data": str(recipe.data),
        "split": recipe.split,
        "encoder": str(recipe.encoder),
        "sha256": digest,
        "command": shlex.join(["clips-mllm", "retrieve", *argv]),
        "versions": _versions(),
        "examples": examples(images, texts, pairs, output.parent),
    }
    write_json(output, result)
    print(_table(result, output))


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of `model.safetensors`; of all shards in the order of their names where the weights are sharded.

    Raises:
        UserError: the folder holds no weights.
    """
    single = folder / "model.safetensors"
    shards = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not shards:
        raise UserError(f"{folder}: no model.safetensors here; give the folder that 'clips-mllm pretrain' wrote")
    digest = hashlib.sha256()
    for shard in shards:
        with shard.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("clips-mllm", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that was never installed
            found[package] = "not installed"
    return found


def _table(result: dict[str, Any], output: Path) -> str:
    head = f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS)
    names = {"i2t": "image to text", "t2i": "text to image"}
    body = [f"{name:16}" + "".join(f"{result[f'{way}_r{k}']:8.1%}" for k in KS) for way, name in names.items()]
    return "\n".join([head, *body, f"{result['n_images']} images, {result['n_texts']} texts; written to {output}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
