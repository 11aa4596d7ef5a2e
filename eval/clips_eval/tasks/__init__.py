"""Our lmms-eval tasks: the YAML files of this folder, and the columns of their data.

Each has the form of a known benchmark, over a local parquet file. Their names differ from lmms-eval's own tasks, since
it ignores a second task with the same name.
"""

from __future__ import annotations

from pathlib import Path

TASKS_DIR = Path(__file__).parent

POPE_COLUMNS = ("question_id", "question", "answer", "image")
MMBENCH_COLUMNS = ("index", "question", "hint", "answer", "A", "B", "C", "D", "category", "image", "source", "split")
EASY_VQA_COLUMNS = ("question_id", "question", "answer", "kind", "image")

OWN_TASKS: dict[str, tuple[str, ...]] = {
    "clips_pope_random": POPE_COLUMNS,
    "clips_pope_popular": POPE_COLUMNS,
    "clips_pope_adversarial": POPE_COLUMNS,
    "clips_mmbench": MMBENCH_COLUMNS,
    "clips_easy_vqa": EASY_VQA_COLUMNS,
}

# lmms-eval's own tasks whose local copies are checked for missing columns.
STOCK_COLUMNS: dict[str, tuple[str, ...]] = {
    "pope": POPE_COLUMNS,
    "pope_random": POPE_COLUMNS,
    "pope_pop": POPE_COLUMNS,
    "pope_adv": POPE_COLUMNS,
    "mmbench_en_dev": (*MMBENCH_COLUMNS, "L2-category"),
    "mmbench_en_dev_static": (*MMBENCH_COLUMNS, "L2-category"),
}
