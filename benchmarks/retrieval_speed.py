"""Speed of recall@k compared with CLIP_benchmark's function, on the same embeddings.

    python benchmarks/retrieval_speed.py                                   # COCO's size: 5,000 images, 25,000 texts
    python benchmarks/retrieval_speed.py --images 200 --repeats 1          # quick check that it runs

The two alternate, so that changes in the load of the machine affect both. Seconds depend on the machine; compare the
ratio. Needs `clip-benchmark` (a development dependency) and about 6 GB for CLIP_benchmark's matrices.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_retrieval

from vision_tower.evaluation.recall import recall_at_k

Recalls = dict[str, float]


class Lookup(torch.nn.Module):
    """Model whose inputs are indices into embedding tables, to pass our embeddings to CLIP_benchmark."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        super().__init__()
        self.images, self.texts = images, texts

    def encode_image(self, rows: torch.Tensor) -> torch.Tensor:
        return self.images[rows]

    def encode_text(self, rows: torch.Tensor) -> torch.Tensor:
        return self.texts[rows]


def embeddings(images: int, per_image: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return unit-norm images (N, D), noisy copies as texts (M, D), and the image of each text (M,)."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(images, width, generator=random)
    owner = torch.arange(images).repeat_interleave(per_image)
    texts = rows[owner] + 0.3 * width**0.5 * torch.randn(len(owner), width, generator=random)
    return F.normalize(rows, dim=1), F.normalize(texts, dim=1), owner


def clip_benchmark(
    images: torch.Tensor, texts: torch.Tensor, per_image: int, ks: list[int], batch_size: int
) -> Recalls:
    """Run CLIP_benchmark's `evaluate` without automatic mixed precision."""
    loader = [
        (part, [list(range(row * per_image, (row + 1) * per_image)) for row in part.tolist()])
        for part in torch.arange(len(images)).split(batch_size)
    ]
    found = zeroshot_retrieval.evaluate(Lookup(images, texts), loader, torch.tensor, "cpu", amp=False, recall_k_list=ks)
    ways = {"i2t": "text_retrieval", "t2i": "image_retrieval"}
    return {f"{way}_r{k}": found[f"{name}_recall@{k}"] for way, name in ways.items() for k in ks}


def timed(run: Callable[[], Recalls]) -> tuple[float, Recalls]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--per_image", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--batch_size", type=int, default=64, help="batch size of CLIP_benchmark; 64 is its default")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    images, texts, owner = embeddings(args.images, args.per_image, args.width)
    runs: dict[str, Callable[[], Recalls]] = {
        "clips-mllm": lambda: recall_at_k(images, texts, owner, ks=args.ks),
        "CLIP_benchmark": lambda: clip_benchmark(images, texts, args.per_image, args.ks, args.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    recalls: dict[str, Recalls] = {}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            spent, recalls[name] = timed(run)
            if repeat:  # the first repeat is warm-up
                seconds[name].append(spent)
                print(f"{name:15} {spent:8.3f} s", flush=True)
    if recalls["clips-mllm"] != recalls["CLIP_benchmark"]:
        raise SystemExit(f"the recalls differ: {recalls}")
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    size = f"{len(images)} images, {len(texts)} texts, width {args.width}"
    print(f"{size}, k = {args.ks}, {torch.get_num_threads()} threads")
    print(f"recalls are bit-identical: {recalls['clips-mllm']}")
    print(f"ratio {statistics.median(ratios):.1f} (each repeat: {', '.join(f'{ratio:.1f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
