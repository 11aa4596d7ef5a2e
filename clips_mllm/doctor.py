"""`clips-mllm data doctor`: every row and image looked at before a night is spent on them.

clips-mllm data doctor llava_v1_5_mix665k.json --images data/LLaVA-Instruct --model lmsys/vicuna-7b-v1.5
clips-mllm data doctor rows.json --images images --fix rows_clean.json
clips-mllm data doctor '/data/recap/*.tar'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clips_mllm.checks.recipe import DoctorRecipe
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe

SHARD_ENDINGS = (".tar", ".tgz", ".gz")
CONVERSATIONS = {"conversations", "messages", "texts"}


def main(argv: list[str]) -> None:
    """Look, tell, and write a clean copy where that is asked for."""
    recipe = parse_recipe(DoctorRecipe, argv, command="data doctor", positional=("file",))
    recipe.check()
    shards = _are_shards(recipe)

    from clips_mllm.checks.fix import check_copy
    from vision_tower.common.files import write_text

    if recipe.fix is not None:
        check_copy(recipe.source, Path(recipe.fix), shards)
    begin = time.monotonic()
    report, table = examine_shards(recipe) if shards else examine_rows(recipe)
    seconds = time.monotonic() - begin
    write_text(Path(recipe.output), json.dumps(report | {"seconds": round(seconds, 1)}, indent=1, ensure_ascii=False))
    print(table)
    print(f"{seconds:.0f} s; report in {recipe.output}", file=sys.stderr)
    if recipe.fix is not None:
        print(f"clean copy in {recipe.fix}", file=sys.stderr)


def examine_rows(recipe: DoctorRecipe) -> tuple[dict[str, Any], str]:
    """(report, table) of conversations."""
    from tqdm import tqdm

    from clips_mllm.checks.fix import copy_rows
    from clips_mllm.checks.report import Findings
    from clips_mllm.checks.rows import check_chunk, start
    from clips_mllm.data.parallel import spread
    from clips_mllm.data.row_source import image_folder, is_json, json_chunks, open_table, table_chunks

    source = recipe.source
    base = None if is_json(source) else open_table(source)
    rows = json_chunks(source, 200) if base is None else table_chunks(base)
    folder = image_folder(source)

    def chunks() -> Iterator[tuple[Path, int, list[Any]]]:
        begin = 0
        for chunk in rows:
            yield folder, begin, chunk
            begin += len(chunk)

    findings = Findings(recipe.file, recipe.max_length)
    bad: set[int] = set()
    files: dict[int, list[str]] = {}
    total = None if base is None else len(base)
    with tqdm(desc="Looking", unit=" rows", total=total, delay=3, file=sys.stderr) as bar:
        for verdicts in spread(check_chunk, chunks(), workers=recipe.workers, start=start, arguments=(recipe.render,)):
            for verdict in verdicts:
                findings.add(verdict)
                if verdict.cause:
                    bad.add(verdict.number)
                elif verdict.files is not None:
                    files[verdict.number] = verdict.files
            bar.update(len(verdicts))
    if recipe.fix is not None:
        copy_rows(source, Path(recipe.fix), bad, files)
    return findings.report(), findings.table()


def examine_shards(recipe: DoctorRecipe) -> tuple[dict[str, Any], str]:
    """(report, table) of pretraining pairs."""
    from tqdm import tqdm

    from clips_mllm.checks.fix import copy_shard, refuse_same_names
    from clips_mllm.checks.report import Findings
    from clips_mllm.checks.rows import check_shard
    from clips_mllm.data.parallel import spread
    from vision_tower.data.recipe import SourceRecipe
    from vision_tower.data.shards import find_shards

    source = SourceRecipe(
        shards=recipe.file, web_caption=recipe.web_caption, synthetic_caption=recipe.synthetic_caption
    )
    shards = find_shards(recipe.file)
    if recipe.fix is not None:
        refuse_same_names(shards)
    findings = Findings(recipe.file, recipe.max_length)
    found = spread(check_shard, ((shard, source) for shard in shards), workers=recipe.workers)
    with tqdm(desc="Looking", unit=" shards", total=len(shards), delay=3, file=sys.stderr) as bar:
        for shard, verdicts in zip(shards, found, strict=True):
            for verdict in verdicts:
                findings.add(verdict, shard)
            if recipe.fix is not None:
                bad = {verdict.number for verdict in verdicts if verdict.cause}
                copy_shard(shard, Path(recipe.fix), source.names, bad)
            bar.update()
    return findings.report(), findings.table()


def _are_shards(recipe: DoctorRecipe) -> bool:
    """By the ending; Parquet by its columns."""
    if Path(recipe.file).suffix in SHARD_ENDINGS:
        return True
    if Path(recipe.file).suffix != ".parquet":
        return False
    import pyarrow.parquet as pq

    from vision_tower.data.shards import find_shards

    return not CONVERSATIONS & set(pq.ParquetFile(find_shards(recipe.file)[0]).schema_arrow.names)


if __name__ == "__main__":
    sys.exit(run_command(main))
