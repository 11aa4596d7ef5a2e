"""`clips-mllm data doctor`: check every row and image before training, and write a clean copy.

clips-mllm data doctor llava_v1_5_mix665k.json --images data/LLaVA-Instruct --model lmsys/vicuna-7b-v1.5
clips-mllm data doctor rows.json --images images --fix rows_clean.json
clips-mllm data doctor '/data/recap/*.tar'
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.checks.recipe import DoctorRecipe
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from clips_mllm.checks.report import Summary

SHARD_SUFFIXES = (".tar", ".tgz", ".gz")
CONVERSATION_COLUMNS = {"conversations", "messages", "texts"}
ROWS_PER_CHUNK = 200

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Check the data, print the table, and write the report and the clean copy."""
    recipe = parse_recipe(DoctorRecipe, argv, command="data doctor", positional=("file",))
    recipe.check()
    shards = _are_shards(recipe)

    from clips_mllm.checks.fix import check_copy
    from vision_tower.common.files import write_text

    if recipe.fix is not None:
        check_copy(recipe.source, Path(recipe.fix), shards)
    begin = time.monotonic()
    summary = check_shards(recipe) if shards else check_rows(recipe)
    report = summary.report() | {"seconds": round(time.monotonic() - begin, 1)}
    write_text(Path(recipe.output), json.dumps(report, indent=1, ensure_ascii=False))
    print(summary.table())
    logger.info("report in %s", recipe.output)
    if recipe.fix is not None:
        logger.info("clean copy in %s", recipe.fix)


def check_rows(recipe: DoctorRecipe) -> Summary:
    """Check conversations, and copy the usable ones if --fix is given."""
    from tqdm import tqdm

    from clips_mllm.checks.fix import copy_rows
    from clips_mllm.checks.report import Summary
    from clips_mllm.checks.rows import check_chunk, start_worker
    from clips_mllm.data.parallel import spread
    from clips_mllm.data.row_source import image_folder, is_json, json_chunks, open_table, table_chunks

    source = recipe.source
    base = None if is_json(source) else open_table(source)
    rows = json_chunks(source, ROWS_PER_CHUNK) if base is None else table_chunks(base)
    folder = image_folder(source)

    def chunks() -> Iterator[tuple[Path, int, list[Any]]]:
        begin = 0
        for chunk in rows:
            yield folder, begin, chunk
            begin += len(chunk)

    summary = Summary(recipe.file, recipe.max_length)
    bad: set[int] = set()
    files: dict[int, list[str]] = {}
    total = None if base is None else len(base)
    with tqdm(desc="Checking", unit=" rows", total=total, delay=3, file=sys.stderr) as bar:
        for verdicts in spread(check_chunk, chunks(), workers=recipe.workers, start=start_worker, arguments=(recipe,)):
            for verdict in verdicts:
                summary.add(verdict)
                if verdict.cause:
                    bad.add(verdict.number)
                elif verdict.files is not None:
                    files[verdict.number] = verdict.files
            bar.update(len(verdicts))
    if recipe.fix is not None:
        copy_rows(source, Path(recipe.fix), bad, files)
    return summary


def check_shards(recipe: DoctorRecipe) -> Summary:
    """Check pretraining pairs, and copy the usable ones if --fix is given."""
    from tqdm import tqdm

    from clips_mllm.checks.fix import copy_shard, refuse_same_names
    from clips_mllm.checks.report import Summary
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
    summary = Summary(recipe.file, recipe.max_length)
    results = spread(check_shard, ((shard, source) for shard in shards), workers=recipe.workers)
    with tqdm(desc="Checking", unit=" shards", total=len(shards), delay=3, file=sys.stderr) as bar:
        for shard, verdicts in zip(shards, results, strict=True):
            for verdict in verdicts:
                summary.add(verdict, shard)
            if recipe.fix is not None:
                bad = {verdict.number for verdict in verdicts if verdict.cause}
                copy_shard(shard, Path(recipe.fix), source.names, bad)
            bar.update()
    return summary


def _are_shards(recipe: DoctorRecipe) -> bool:
    """Return True for pretraining shards: by the suffix, or by the columns of a Parquet file."""
    if Path(recipe.file).suffix in SHARD_SUFFIXES:
        return True
    if Path(recipe.file).suffix != ".parquet":
        return False
    import pyarrow.parquet as pq

    from vision_tower.data.shards import find_shards

    return not CONVERSATION_COLUMNS & set(pq.ParquetFile(find_shards(recipe.file)[0]).schema_arrow.names)


if __name__ == "__main__":
    sys.exit(run_command(main))
