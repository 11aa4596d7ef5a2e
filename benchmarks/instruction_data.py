"""Large instruction data: time to convert and open N rows, memory per rank, and time of `data doctor`.

python benchmarks/instruction_data.py memory --rows 1000000
python benchmarks/instruction_data.py doctor --rows 100000

`memory` opens the data set in a new process, reads random samples and draws the order of an epoch. It does this twice:
the first process converts the file, the second one finds the cache, like a second rank. Only anonymous pages are
counted: pages of the mapped file are shared by all ranks, and the kernel drops them if memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

WORDS = ("the", "a", "cat", "dog", "on", "red", "table", "of", "and", "is", "what", "where", "many", "shows", "left")
IMAGES = 2000  # of `memory`, where rows share images; for `doctor` every row has its own file
DISTINCT = 500  # different images; the other files are hard links to these


def write_world(folder: Path, rows: int, images: int) -> None:
    """Write a LLaVA JSON like mix665k's: one to four questions per row, one row in ten without an image."""
    rng = random.Random(0)
    (folder / "images").mkdir()
    for number in range(images):
        file = folder / "images" / f"{number:06d}.jpg"
        if number < DISTINCT:
            Image.effect_noise((224, 224), 60).convert("RGB").save(file, quality=80)
        else:
            os.link(folder / "images" / f"{number % DISTINCT:06d}.jpg", file)
    with (folder / "rows.json").open("w") as out:
        for number in range(rows):
            turns = []
            for turn in range(rng.randint(1, 4)):
                question = " ".join(rng.choices(WORDS, k=12))
                placeholder = "<image>\n" if turn == 0 and number % 10 else ""
                turns.append({"from": "human", "value": placeholder + question})
                turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(1, 80)))})
            row: dict[str, object] = {"id": str(number), "conversations": turns}
            if number % 10:
                row["image"] = f"images/{number % images:06d}.jpg"
            out.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
        out.write("\n]\n")


def private_megabytes() -> float:
    """Return the anonymous memory of this process (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def open_set(file: Path) -> None:
    """Open the data set, read 2,000 samples and draw an order, in a process of its own; print a line of JSON."""
    import itertools

    import datasets  # noqa: F401  imported first: its memory does not count

    from clips_mllm.data.dataset import Examples
    from clips_mllm.data.recipe import InstructionRecipe
    from clips_mllm.data.sampler import LengthGroupedSampler

    before = private_megabytes()
    begin = time.perf_counter()
    examples = Examples(InstructionRecipe(file=str(file), template="chatml"))
    opened = time.perf_counter() - begin
    for index in random.Random(0).sample(range(len(examples)), 2000):
        examples[index]
    read = private_megabytes()
    list(itertools.islice(LengthGroupedSampler(examples.lengths(), 128, seed=0), 1000))
    result = {
        "rows": len(examples),
        "seconds": opened,
        "rows_mb": read - before,
        "order_mb": private_megabytes() - read,
    }
    print(json.dumps(result))


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "doctor", "open"))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--file", type=Path, help="data file for `open`, which `memory` calls")
    parser.add_argument("--model", help="LLM whose tokenizer `doctor` counts tokens with")
    args = parser.parse_args()
    if args.what == "open":
        open_set(args.file)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = min(args.rows, args.rows if args.what == "doctor" else IMAGES)
        write_world(folder, args.rows, images)
        size = (folder / "rows.json").stat().st_size / 2**20
        print(f"{args.rows:,} rows, {size:.0f} MB of JSON, {images:,} images, {os.cpu_count()} cores")
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        if args.what == "doctor":
            words = ["data", "doctor", str(folder / "rows.json"), "--output", str(folder / "doctor.json")]
            words += ["--model", args.model] if args.model else []
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "clips_mllm.cli", *words], env=environment, check=True)
            print(f"doctor: {time.perf_counter() - begin:.0f} s")
            return
        for what in ("first rank, converts", "another rank"):
            words = [sys.executable, __file__, "open", "--file", str(folder / "rows.json")]
            done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{what}: opened in {result['seconds']:.1f} s; private memory: {result['rows_mb']:.0f} MB for rows, "
                f"{result['order_mb']:.0f} MB for an epoch's order"
            )


if __name__ == "__main__":
    main()
