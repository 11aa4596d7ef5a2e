"""Speed of evaluation compared with lmms-eval's `llava_hf`: documents per second, same checkpoint and questions.

    python benchmarks/evaluate_speed.py --checkpoint runs/quickstart/finetune --world runs/quickstart/data
    python benchmarks/evaluate_speed.py --build TOWER LLM --world runs/quickstart/data    # without a trained checkpoint
    python benchmarks/evaluate_speed.py … --documents 500 --modes chat simple --batches 1 16
    python benchmarks/evaluate_speed.py … --startup                                        # time to the first answer

Both engines answer 500 yes/no questions in POPE's format about 100 images (five each) with greedy decoding, through
lmms-eval's `simple_evaluate`. The answers must be identical. `--startup` compares the import of `lmms_eval.evaluator`
with a complete `clips-mllm evaluate --limit 1`, each in a new process. Seconds depend on the machine; compare ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PER_IMAGE = 5


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = args.checkpoint or build(*args.build, folder / "checkpoint")
        data = questions(args.world, folder / "questions.parquet", args.documents)
        if args.startup:
            startup(checkpoint, data, args.repeats)
        else:
            compare(checkpoint, data, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a LLaVA checkpoint")
    parser.add_argument("--build", nargs=2, metavar=("TOWER", "LLM"), help="join these with a random projector instead")
    parser.add_argument("--world", type=Path, required=True, help="folder of 'clips-mllm data sample'")
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--modes", nargs="+", default=["chat"], choices=["chat", "simple"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of --startup; the fastest one counts")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.build is None):
        parser.error("give either --checkpoint or --build")
    return args


def build(tower: str, llm: str, folder: Path) -> Path:
    """Save a checkpoint with a random projector: as much work as a trained one, but other answers."""
    import torch

    from clips_mllm.model.build import build_mllm
    from clips_mllm.model.checkpoint import save_mllm
    from clips_mllm.prompts.render import load_template

    torch.manual_seed(0)
    folder.mkdir()
    model, processor = build_mllm(tower, llm, feature_layer=-2, feature_select="full", dtype=torch.float32)
    processor.chat_template = processor.tokenizer.chat_template = load_template("chatml")
    save_mllm(model, processor, folder)
    return folder


def questions(world: Path, file: Path, count: int) -> Path:
    """Write `count` questions in POPE's format about test scenes of the sample world, five per image."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    texts = pq.read_table(world / "eval" / "pope_random.parquet", columns=["question"])["question"].to_pylist()
    images = sorted((world / "retrieval" / "images").glob("*.png"))[: -(-count // PER_IMAGE)]
    rng = random.Random(0)
    rows = []
    for number in range(count):
        content = io.BytesIO(images[number // PER_IMAGE].read_bytes()).getvalue()
        row = {"question": rng.choice(texts), "answer": "yes", "image": {"bytes": content, "path": None}}
        rows.append({"id": str(number), "question_id": str(number), **row, "image_source": "s", "category": "random"})
    names = ("id", "question_id", "question", "answer", "image_source", "category")
    schema = Features({**{name: Value("string") for name in names}, "image": Image()}).arrow_schema
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file


def compare(checkpoint: Path, data: Path, args: argparse.Namespace) -> None:
    """Measure `llava_hf`, then ours at each batch size, in each mode."""
    for mode in args.modes:
        stock, expected = measure(checkpoint, data, args, mode, engine="llava_hf", batch_size=1)
        print(f"{mode:7} llava_hf    batch  1: {args.documents / stock.wall:6.2f} documents/s", flush=True)
        for batch_size in args.batches:
            ours, answers = measure(checkpoint, data, args, mode, engine="clips_mllm", batch_size=batch_size)
            same = sum(a == b for a, b in zip(answers, expected, strict=True))
            print(
                f"{mode:7} clips_mllm  batch {batch_size:2}: {args.documents / ours.wall:6.2f} documents/s, ratio "
                f"{stock.wall / ours.wall:5.2f} (of processor time {stock.processor / ours.processor:5.2f}), "
                f"{same} of {args.documents} answers identical",
                flush=True,
            )


@dataclass(frozen=True)
class Seconds:
    """Wall time and processor time. On a busy machine with one thread, processor time is the more reliable."""

    wall: float
    processor: float


def measure(
    checkpoint: Path, data: Path, args: argparse.Namespace, mode: str, *, engine: str, batch_size: int
) -> tuple[Seconds, list[str]]:
    """Return the time from requests to scored answers, without loading the model, and the answers."""
    from clips_eval.lmms.answer_cache import AnswerCache
    from clips_eval.lmms.engines import load, model_for
    from clips_eval.lmms.recipe import EvaluateRecipe, TaskSpec
    from clips_eval.lmms.run import evaluate_task, log_warnings_only
    from clips_eval.lmms.tasks import index_tasks, load_task

    spec = TaskSpec(task="clips_pope_random", data=str(data))
    recipe: Any = EvaluateRecipe(
        checkpoint=str(checkpoint),
        tasks=[spec],
        model=engine,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        batch_size=batch_size,
        dtype=args.dtype,
        device="cpu",
    )
    log_warnings_only()
    with tempfile.TemporaryDirectory() as cache:
        manager = index_tasks([spec])
        (task,) = load_task(spec, manager, Path(cache), recipe.mode).values()
        model = model_for(recipe, load(recipe), recipe.variants[0], AnswerCache(Path(cache) / "answers", {}))
        start, processor_start = time.perf_counter(), time.process_time()
        result = evaluate_task(model, task, manager, recipe, Path(cache) / "out.json")
        seconds = Seconds(time.perf_counter() - start, time.process_time() - processor_start)
    samples = sorted(result["samples"]["clips_pope_random"], key=lambda sample: sample["doc_id"])
    return seconds, [str(sample["filtered_resps"][0]) for sample in samples]


def startup(checkpoint: Path, data: Path, repeats: int) -> None:
    """Measure both in new processes, alternately."""
    folder = data.parent
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"tasks": [{"task": "clips_pope_random", "data": str(data)}], "device": "cpu"}))
    output = ["--output", str(folder / "lmms.json")]
    commands = {
        "import lmms_eval.evaluator": [sys.executable, "-c", "import lmms_eval.evaluator"],
        "clips-mllm evaluate --limit 1": [
            *(sys.executable, "-m", "clips_mllm.cli", "evaluate", str(checkpoint)),
            *("--config", str(recipe), "--limit", "1", *output),
        ],
    }
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(repeats):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            best[name] = min(best[name], time.perf_counter() - start)
    import_seconds, command_seconds = best.values()
    for name, seconds in best.items():
        print(f"{name:32} {seconds:6.2f} s")
    print(f"ratio {command_seconds / import_seconds:.2f}")


if __name__ == "__main__":
    main()
