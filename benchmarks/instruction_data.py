"""Conversations at scale: how long N rows take to convert and to open, what a rank then holds, and the doctor.

python benchmarks/instruction_data.py memory --rows 1000000
python benchmarks/instruction_data.py doctor --rows 100000

`memory` opens the set in a fresh process, reads samples all over it and draws an epoch's order. Memory is what the
process has for itself (anonymous pages): those of the mapped file belong to all ranks together, and to nobody when
memory is short. The first process converts; the second is a rank that finds the cache.
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
IMAGES = 2000  # of `memory`; rows share them. The doctor has a file a row.
DISTINCT = 500  # the other files are links to them


def write_world(folder: Path, rows: int, images: int) -> None:
    """A LLaVA JSON like mix665k's: one to four questions, one row in ten without an image."""
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
                shown = "<image>\n" if turn == 0 and number % 10 else ""
                turns.append({"from": "human", "value": shown + question})
                turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(1, 80)))})
            row: dict[str, object] = {"id": str(number), "conversations": turns}
            if number % 10:
                row["image"] = f"images/{number % images:06d}.jpg"
            out.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
        out.write("\n]\n")


def private_megabytes() -> float:
    """Anonymous memory of this process (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def open_set(file: Path) -> None:
    """In a process of its own: open, read 2,000 samples, draw an order; prints a line of JSON."""
    import itertools

    import datasets  # noqa: F401  its import is not the rows' memory

    from clips_mllm.data.dataset import Examples
    from clips_mllm.data.recipe import InstructionRecipe
    from clips_mllm.data.sampler import LengthGroupedSampler

    before = private_megabytes()
    begin = time.perf_counter()
    examples = Examples(InstructionRecipe(file=str(file), template="chatml"))
    opened = time.perf_counter() - begin
    for at in random.Random(0).sample(range(len(examples)), 2000):
        examples[at]
    read = private_megabytes()
    list(itertools.islice(LengthGroupedSampler(examples.lengths(), 128, seed=0), 1000))
    found = {"rows": len(examples), "seconds": opened, "rows_mb": read - before, "order_mb": private_megabytes() - read}
    print(json.dumps(found))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "doctor", "open"))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--file", type=Path, help="of `open`, which `memory` calls")
    parser.add_argument("--model", help="of the doctor: count tokens with this LLM's tokenizer")
    given = parser.parse_args()
    if given.what == "open":
        open_set(given.file)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = min(given.rows, given.rows if given.what == "doctor" else IMAGES)
        write_world(folder, given.rows, images)
        size = (folder / "rows.json").stat().st_size / 2**20
        print(f"{given.rows:,} rows, {size:.0f} MB of JSON, {images:,} images, {os.cpu_count()} cores")
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        if given.what == "doctor":
            words = ["data", "doctor", str(folder / "rows.json"), "--output", str(folder / "doctor.json")]
            words += ["--model", given.model] if given.model else []
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "clips_mllm.cli", *words], env=environment, check=True)
            print(f"doctor: {time.perf_counter() - begin:.0f} s")
            return
        for what in ("first rank, converts", "another rank"):
            words = [sys.executable, __file__, "open", "--file", str(folder / "rows.json")]
            done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{what}: opened in {found['seconds']:.1f} s; private memory: {found['rows_mb']:.0f} MB for the rows, "
                f"{found['order_mb']:.0f} MB for an epoch's order"
            )


if __name__ == "__main__":
    main()
