"""Speed of CLIPS pretraining compared with CoCa in `open_clip_train`: same tars, tower sizes and batch.

    python benchmarks/pretrain_speed.py                      # 3 repeats, Ti towers, batch 64; use an idle machine
    python benchmarks/pretrain_speed.py --size S             # larger towers
    python benchmarks/pretrain_speed.py --padding masked     # trim our texts to the longest of a batch
    python benchmarks/pretrain_speed.py --tiny               # quick check that it runs; its ratios mean nothing
    python benchmarks/pretrain_speed.py --profile train      # profile our training step (torch.profiler)
    python benchmarks/pretrain_speed.py --profile data       # profile our data loader (cProfile)

Every measurement runs in its own process. The two sides alternate, so that changes in the load of the machine affect
both; compare the ratios. Samples per second are measured between optimizer steps, without the first ones. Memory is the
peak resident size of the process plus that of its largest loader process. "Data alone" iterates over the loader without
training. Both sides use bf16, one loader process, the same augmentation, vocabularies of 49,408 rows, and AdamW with
clipping. CoCa is the objective of open_clip that is most similar to CLIPS, which does more work per pair: two texts of
80 pieces and a target of 128, against one text of 76.

Needs open_clip_torch (its trainer is the package `open_clip_train`) and webdataset.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = {  # width, layers, heads and embed_dim of all three transformers
    "tiny": (64, 2, 1, 64),
    "Ti": (192, 12, 3, 192),
    "S": (384, 12, 6, 384),
}
VOCABULARY = 49_408
WARM_STEPS = 2
DATA_STEPS = 4  # multiple of the training steps: the loader alone is fast, and its buffers must empty and fill again
WORDS = (
    "a the of in on with and large small red blue green old young white black dog cat woman man child street car tree"
)
WORDS += " tree house table sky water standing sitting holding near behind front left right background bright image"
WORDS += " shows photograph wooden plate food flowers building window light shadow grass mountain road people group"


def write_shards(folder: Path, count: int, shards: int, side: int) -> None:
    """Write JPEGs with both captions as json, and the web caption as txt for open_clip_train."""
    from PIL import Image

    rng = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=words)).capitalize() + "."

    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(shard, count, shards):
                coarse = Image.frombytes("RGB", (24, 18), rng.randbytes(24 * 18 * 3))
                image = io.BytesIO()
                coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(image, format="JPEG", quality=90)
                web = sentence(rng.randint(5, 15))
                full = " ".join(sentence(rng.randint(8, 20)) for _ in range(rng.randint(3, 6)))
                row = json.dumps({"web_caption": web, "synthetic_caption": full})
                add(tar, f"{number:06d}.jpg", image.getvalue())
                add(tar, f"{number:06d}.txt", web.encode())
                add(tar, f"{number:06d}.json", row.encode())


# --- the two sides, each in its own process


def our_arguments(args: argparse.Namespace, shards: Path, folder: Path) -> list[str]:
    """Return the options of `clips-mllm pretrain`."""
    width, layers, heads, embed_dim = SIZES[args.size]
    values: dict[str, Any] = {
        "output_dir": folder,
        "data.shards": shards / "*.tar",
        "data.shuffle_buffer": 1000,
        "model.embed_dim": embed_dim,
        "model.image_size": args.image_size,
        "model.patch_size": 16,
        "model.vocabulary_size": VOCABULARY,
        "model.padding": args.padding,
        "training.global_batch_size": args.batch,
        "training.device_batch_size": args.batch,
        "training.max_steps": args.steps,
        "training.precision": "bf16",
        "training.weight_decay": 0.2,
        "training.beta2": 0.95,
        "training.log_every": 5,
        "training.workers": args.workers,
    }
    for tower in ("image", "text", "captioner"):
        shape = {"width": width, "layers": layers, "mlp": 4 * width, "heads": heads}
        values |= {f"model.{tower}.{name}": value for name, value in shape.items()}
    return [f"--{name}={value}" for name, value in values.items()]


def their_arguments(args: argparse.Namespace, shards: Path, folder: Path) -> list[str]:
    """Return the options of `python -m open_clip_train.main`; write the model config that they name."""
    import open_clip

    width, layers, heads, embed_dim = SIZES[args.size]
    vision = {"image_size": args.image_size, "layers": layers, "width": width, "head_width": width // heads}
    vision |= {"patch_size": 16, "attentional_pool": True, "attn_pooler_heads": heads, "output_tokens": True}
    text = {"context_length": 76, "vocab_size": VOCABULARY, "width": width, "heads": heads, "layers": layers}
    config = {
        "embed_dim": embed_dim,
        "vision_cfg": vision,
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text | {"attn_pooler_heads": heads},
        "custom_text": True,
    }
    file = folder / "coca_bench.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    count = len(list(shards.glob("*.tar")))
    words = f"--model coca_bench --dataset-type webdataset --train-data {shards}/{{0000..{count - 1:04d}}}.tar"
    words += f" --train-num-samples {args.batch * args.steps} --batch-size {args.batch} --epochs 1 --workers 1"
    words += " --precision amp_bf16 --device cpu --lr 1e-3 --beta1 0.9 --beta2 0.95 --wd 0.2 --grad-clip-norm 1"
    words += f" --warmup 1 --logs {folder} --name run --save-frequency 0 --coca-caption-loss-weight 2"
    words += " --aug-cfg scale=(0.4,1.0) color_jitter=(0.32,0.32,0.32,0.08) color_jitter_prob=0.8 gray_scale_prob=0.2"
    return words.split()


def train_ours(args: argparse.Namespace, shards: Path, folder: Path) -> None:
    from vision_tower.pretrain import main

    main(our_arguments(args, shards, folder))


def train_theirs(args: argparse.Namespace, shards: Path, folder: Path) -> None:
    from open_clip_train import data
    from open_clip_train.main import main

    # webdataset 1.0 marks the end of a shard with an empty sample, which open_clip_train 3.3 does not know.
    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    main(their_arguments(args, shards, folder))


def load_ours(args: argparse.Namespace, shards: Path, folder: Path, around: Any = None) -> list[float]:
    """Return the arrival times of batches from the command's loader, without training; iterate inside `around`."""
    from vision_tower.pretraining import trainer as pretrain_trainer

    found: list[float] = []

    def iterate(trainer: Any, **_: Any) -> None:
        with around or contextlib.nullcontext():
            found.extend(arrivals(trainer.get_train_dataloader(), args.steps))
        raise SystemExit

    pretrain_trainer.PretrainTrainer.train = iterate  # type: ignore[method-assign]
    with contextlib.suppress(SystemExit):
        train_ours(args, shards, folder)
    return found


def load_theirs(args: argparse.Namespace, shards: Path, folder: Path) -> list[float]:
    """Return the same for open_clip_train."""
    import open_clip_train.main as open_clip_main

    found: list[float] = []

    def iterate(model: Any, data: Any, *_: Any, **__: Any) -> None:
        data["train"].set_epoch(0)
        found.extend(arrivals(data["train"].dataloader, args.steps))
        raise SystemExit

    open_clip_main.train_one_epoch = iterate
    with contextlib.suppress(SystemExit):
        train_theirs(args, shards, folder)
    return found


def arrivals(loader: Iterable[Any], count: int) -> list[float]:
    """Return the arrival time of each batch."""
    return [time.perf_counter() for _ in islice(loader, count)]


def child(args: argparse.Namespace) -> None:
    """Run one measurement and write the result to a file, because both sides print to stdout."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times: list[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    shards, folder = Path(args.shards), Path(args.folder)
    match args.child:
        case "train-ours":
            train_ours(args, shards, folder)
        case "train-theirs":
            train_theirs(args, shards, folder)
        case "data-ours":
            times = load_ours(args, shards, folder)
        case "data-theirs":
            times = load_theirs(args, shards, folder)
    assert len(times) > WARM_STEPS + 1, f"{args.child}: {len(times)} steps"
    rate = args.batch * (len(times) - 1 - WARM_STEPS) / (times[-1] - times[WARM_STEPS])
    kilobytes = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    (folder / "found.json").write_text(json.dumps({"rate": rate, "memory": kilobytes * 1024}))


# --- comparison


def measure(args: argparse.Namespace, what: str, shards: Path) -> dict[str, float]:
    """Run one measurement in a child process; show its output only if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--child", what, "--shards", str(shards), "--folder", folder]
        steps = args.steps * (DATA_STEPS if what.startswith("data") else 1)
        words += [f"--{name}={getattr(args, name)}" for name in ("size", "batch", "image_size", "padding")]
        words.append(f"--steps={steps}")
        threads = str(args.threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        found = Path(folder) / "found.json"
        if done.returncode or not found.is_file():
            raise SystemExit(f"{what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        return dict(json.loads(found.read_text()))


def compare(args: argparse.Namespace, shards: Path) -> None:
    """Run all measurements alternately, then print the ratios."""
    sides, kinds = ("ours", "theirs"), ("train", "data")
    found: dict[str, list[dict[str, float]]] = {f"{kind}-{side}": [] for kind in kinds for side in sides}
    total, start, done = args.repeats * len(found), time.monotonic(), 0
    for _ in range(args.repeats):
        for what in found:
            found[what].append(measure(args, what, shards))
            done += 1
            left = (time.monotonic() - start) / done * (total - done)
            rate, memory = found[what][-1]["rate"], found[what][-1]["memory"] / 1e9
            progress = f"{what} {rate:.1f} samples/s, {memory:.2f} GB; about {left / 60:.1f} minutes left"
            print(f"{done} of {total}: {progress}", file=sys.stderr, flush=True)
    print(
        f"{args.size} towers, {args.image_size} pixels, batch {args.batch}, {args.steps} steps, {args.threads} threads,"
        f" padding {args.padding}"
    )
    for name, kind, key, goal in (
        ("samples per second, training", "train", "rate", "at least 1.5"),
        ("peak memory, training", "train", "memory", "at most 0.8"),
        ("samples per second, data alone", "data", "rate", "at least 1.2"),
    ):
        turns = zip(found[f"{kind}-ours"], found[f"{kind}-theirs"], strict=True)
        ratios = [ours[key] / theirs[key] for ours, theirs in turns]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name}, ours / theirs: {statistics.median(ratios):.2f} (each repeat: {each}; goal: {goal})")


# --- profiling


def profile(args: argparse.Namespace, shards: Path) -> None:
    """Print the most expensive operators of a few steps, or functions of the loader, all in this process."""
    import cProfile
    import pstats

    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    torch.set_num_threads(args.threads)
    args.workers = 0
    with tempfile.TemporaryDirectory() as folder:
        if args.profile == "train":
            with record(activities=[ProfilerActivity.CPU]) as recorded:
                train_ours(args, shards, Path(folder))
            print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=60))
        else:
            profiler = cProfile.Profile()
            load_ours(args, shards, Path(folder), around=profiler)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="Ti")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--padding", choices=("attended", "masked"), default="attended", help="padding of our texts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check that it runs")
    parser.add_argument("--profile", choices=("train", "data"), help="profile our side instead of comparing")
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    if args.tiny:
        args.size, args.batch, args.steps, args.image_size, args.repeats = "tiny", 8, 5, 64, 1
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder)
        write_shards(shards, count=max(256, args.batch * args.steps * DATA_STEPS), shards=4, side=256)
        if args.profile:
            profile(args, shards)
        else:
            compare(args, shards)


if __name__ == "__main__":
    main()
