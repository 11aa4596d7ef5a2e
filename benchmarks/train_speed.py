"""Speed of LLaVA training compared with TRL's `SFTTrainer`: same checkpoint, data, batch, order and seed.

    python benchmarks/train_speed.py                     # both stages, bf16, 10 steps of 8; use an idle machine
    python benchmarks/train_speed.py --compile none      # without torch.compile on our side; `both`: on both sides
    python benchmarks/train_speed.py --agreement         # compare only the losses, step by step in fp32
    python benchmarks/train_speed.py --world DIR         # use this sample world (with SmolLM2) instead of building one

Every measurement runs in its own process, and the sides alternate. Samples per second are measured between optimizer
steps, without the first three, in which torch.compile compiles. Memory is the peak resident size of the process. The
tower has the quickstart's sizes and random weights, because speed does not depend on the weights. Both sides use one
process without DeepSpeed, fp32 weights for the trained parts under bf16 autocast, no gradient checkpointing (TRL
enables it by default), no loader process, fused AdamW and a constant learning rate. Our side also uses
`training.compile` and holds a frozen LLM in bf16. Our stage 1 runs two epochs, with the feature cache empty at first.

Needs trl, which is not a dependency of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM_STEPS = 3
RATES = {"align": 1e-3, "finetune": 1e-4}


# --- data and model of both sides


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write a stock checkpoint of SmolLM2 and a random tower, and for each stage a JSON of samples with one image."""
    import torch

    from clips_mllm.model.build import build_mllm
    from clips_mllm.model.checkpoint import save_mllm
    from clips_mllm.prompts.render import load_template
    from clips_mllm.sample.build import main as build

    world = Path(args.world or folder / "world")
    if not world.is_dir():
        counts = {"pretrain_scenes": 60, "pretrain_shapes": 20, "retrieval_scenes": 10, "easy_vqa_questions": 20}
        build(["--output_dir", str(world), *(f"--{name}={value}" for name, value in counts.items())])
    torch.manual_seed(0)
    save_tower(folder / "tower")
    model, processor = build_mllm(
        str(folder / "tower"), str(world / "llm"), feature_layer=-2, feature_select="full", dtype=torch.float32
    )
    processor.chat_template = processor.tokenizer.chat_template = load_template("chatml")
    save_mllm(model, processor, folder / "mllm")
    for stage, name in (("align", "stage1"), ("finetune", "stage2")):
        rows = json.loads((world / "llava" / f"{name}.json").read_text())
        kept = [row for row in rows if sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1]
        (folder / f"{stage}.json").write_text(json.dumps(kept[: args.batch * args.steps]))
    (folder / "images").symlink_to((world / "llava" / "images").resolve())


def save_tower(folder: Path) -> None:
    """Save a random tower of the quickstart's sizes."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from vision_tower.data.images import evaluation_processor

    config = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=96,
        patch_size=16,
        vision_use_head=False,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    evaluation_processor(96).save_pretrained(folder)


# --- the two sides, each in its own process


def train_ours(args: argparse.Namespace, stage: str, shared: Path, folder: Path) -> None:
    """Train with `clips-mllm train`."""
    from clips_mllm.train import main

    cached = stage == "align" and not args.agreement
    values: dict[str, Any] = {
        "output_dir": folder / "run",
        "model.checkpoint": shared / "mllm",
        "data.file": shared / f"{stage}.json",
        "data.images": shared / "images",
        "data.template": "chatml",
        "data.max_bad_fraction": 0.0,
        "stage.llm": "true" if stage == "finetune" else "false",
        "training.global_batch_size": args.batch,
        "training.device_batch_size": args.batch,
        "training.epochs": 2 if cached else 1,
        "training.learning_rate": RATES[stage],
        "training.schedule": "constant_with_warmup",
        "training.precision": args.precision,
        "training.log_every": 1,
        "training.workers": 0,
        "training.compile": "true" if args.compile != "none" and not args.agreement else "false",
        "training.extra": '{"train_sampling_strategy": "sequential"}',
    }
    if cached:
        values["data.feature_cache"] = folder / "cache"
    main([f"--{name}={value}" for name, value in values.items()])


def train_theirs(args: argparse.Namespace, stage: str, shared: Path, folder: Path) -> None:
    """Train with TRL on the same conversations in its format; the checkpoint's template marks the supervised tokens."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import SFTConfig, SFTTrainer

    model = LlavaForConditionalGeneration.from_pretrained(shared / "mllm", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(shared / "mllm")
    model.requires_grad_(stage == "finetune")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    config = SFTConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=args.batch,
        num_train_epochs=1,
        learning_rate=RATES[stage],
        lr_scheduler_type="constant",
        bf16=args.precision == "bf16",
        gradient_checkpointing=False,
        torch_compile=args.compile == "both",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
        max_length=None,
        assistant_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=their_dataset(stage, shared), processing_class=processor
    )
    trainer.train()
    lines = [json.dumps(line) for line in trainer.state.log_history if "loss" in line]
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "metrics.jsonl").write_text("\n".join(lines))


def their_dataset(stage: str, shared: Path) -> Any:
    """Return a data set with the columns `messages` and `images`; images are decoded on access."""
    from datasets import Dataset, Image, List

    rows = json.loads((shared / f"{stage}.json").read_text())
    messages = []
    for row in rows:
        turns = []
        for turn in row["conversations"]:
            text = turn["value"].replace("<image>", "").strip("\n")
            parts = [{"type": "image", "text": None}] if "<image>" in turn["value"] else []
            role = {"human": "user", "gpt": "assistant"}[turn["from"]]
            turns.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
        messages.append(turns)
    files = [[str(shared / "images" / row["image"])] for row in rows]
    return Dataset.from_dict({"messages": messages, "images": files}).cast_column("images", List(Image()))


def child(args: argparse.Namespace) -> None:
    """Run one measurement and write the result to a file, because both sides print to stdout."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times: list[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    stage, side = args.child.split("-")
    shared, folder = Path(args.shared), Path(args.folder)
    (train_ours if side == "ours" else train_theirs)(args, stage, shared, folder)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = {
        "rate": rate(times[WARM_STEPS : args.steps], args.batch),
        "later": rate(times[args.steps + WARM_STEPS :], args.batch),
        "memory": peak_memory(),
        "losses": [json.loads(line)["loss"] for line in lines][: args.steps],
    }
    (folder / "found.json").write_text(json.dumps(found))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes. `ru_maxrss` would include the peak of its parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def rate(times: list[float], batch: int) -> float | None:
    """Return the samples per second between the first and the last of these step times."""
    return batch * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


# --- comparison


def measure(args: argparse.Namespace, what: str, shared: Path) -> dict[str, Any]:
    """Run one measurement in a child process; show its output only if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--child", what, "--shared", str(shared), "--folder", folder]
        words += [f"--{name}={getattr(args, name)}" for name in ("batch", "steps", "precision", "compile")]
        words += ["--agreement"] if args.agreement else []
        environment = os.environ | {
            "OMP_NUM_THREADS": str(args.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        found = Path(folder) / "found.json"
        if done.returncode or not found.is_file():
            raise SystemExit(f"{what} failed:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
        return dict(json.loads(found.read_text()))


def compare(args: argparse.Namespace, shared: Path) -> None:
    """Run all measurements alternately, then print the ratios and the losses."""
    found: dict[str, list[dict[str, Any]]] = {}
    names = [f"{stage}-{side}" for stage in args.stages for side in ("theirs", "ours")]
    start = time.monotonic()
    for repeat in range(args.repeats):
        for index, name in enumerate(names):
            found.setdefault(name, []).append(measure(args, name, shared))
            done = repeat * len(names) + index + 1
            left = (time.monotonic() - start) / done * (args.repeats * len(names) - done)
            print(f"{name} done, about {left / 60:.1f} minutes left", file=sys.stderr, flush=True)
    print(f"SmolLM2-135M, {args.precision}, batch {args.batch}, {args.steps} steps an epoch, {args.threads} threads")
    for stage in args.stages:
        ours, theirs = found[f"{stage}-ours"], found[f"{stage}-theirs"]
        pairs = list(zip(ours, theirs, strict=True))
        gap = max(abs(a - b) for mine, other in pairs for a, b in zip(mine["losses"], other["losses"], strict=True))
        print(f"{stage}: largest difference of a step's loss {gap:.1e} (goal in fp32: 1e-4)")
        if args.agreement:
            print(f"  ours   {ours[0]['losses']}\n  theirs {theirs[0]['losses']}")
            continue
        measures = [("samples per second", [mine["rate"] / other["rate"] for mine, other in pairs], "at least 2")]
        if stage == "align":
            later = [mine["later"] / other["rate"] for mine, other in pairs]
            measures.append(("samples per second from the second epoch", later, "at least 3"))
        measures.append(("peak memory", [mine["memory"] / other["memory"] for mine, other in pairs], "at most 0.7"))
        for what, ratios, goal in measures:
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{stage}: {what}, ours / theirs: {statistics.median(ratios):.2f} (each: {each}; goal: {goal})")
        for side, runs in (("ours", ours), ("theirs", theirs)):
            rates = ", ".join(f"{run['rate']:.2f}" for run in runs)
            print(f"  {side}: {rates} samples/s, {max(run['memory'] for run in runs) / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", help="folder of `clips-mllm data sample`")
    parser.add_argument("--stages", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", choices=("none", "ours", "both"), default="ours")
    parser.add_argument("--agreement", action="store_true", help="compare only the losses, in fp32")
    parser.add_argument("--shared", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.agreement:
        args.precision = "fp32"
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
