"""A result of `clips-mllm evaluate`, read and checked: scores, intervals, and the answers behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clips_eval.stats.json_files import number_in, read_lines
from clips_eval.stats.uncertainty import Interval
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

FORMATS = (1, 2)  # of lmms.json; 1 has no intervals


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One evaluated question.

    `correct` is None where the task has no right or wrong; `image` is None where there is none or it was not kept.
    """

    task: str
    doc_id: int | None
    prompt: str
    answer: str
    target: str
    correct: bool | None
    image: Path | None
    cluster: str | None = None  # its image
    scores: dict[str, list[Any]] = field(default_factory=dict)  # metric -> numerator, denominator, perhaps a stratum


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Metrics by task, under the names lmms.json gives them, and the samples behind them.

    `intervals` are by task and metric; `skipped` and `failed` say why a task has no score; `about` is the rest of the
    file: what it was measured with.
    """

    tasks: dict[str, dict[str, float]]
    samples: list[Sample]
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def read_benchmarks(file: Path, control: str, wording: int = 0) -> Benchmarks | None:
    """A result of 'clips-mllm evaluate'; None if there is no such file.

    Raises:
        UserError: of another version, of another control or wording, or malformed.
    """
    if not file.exists():
        return None
    tree = read_object(file)
    if tree.get("format", 1) not in FORMATS:
        raise UserError(
            f"format {tree['format']!r}, of another version of clips-mllm (this one reads "
            f"{' and '.join(map(str, FORMATS))})",
            file=file,
            remedy="evaluate again",
        )
    # Swapped files would turn the control into the result, so the file's own word is checked.
    if tree.get("control", control) != control:
        raise UserError(
            f"'control' is {tree['control']!r}, here '{control}' is expected", file=file, remedy="evaluate again"
        )
    if tree.get("wording", wording) != wording:
        raise UserError(
            f"'wording' is {tree['wording']!r}, here {wording} is expected", file=file, remedy="evaluate again"
        )
    tasks = tree.get("tasks")
    if not isinstance(tasks, dict) or not all(isinstance(metrics, dict) for metrics in tasks.values()):
        raise UserError("no 'tasks' of named metrics", file=file, remedy="run 'clips-mllm evaluate' again")
    checked = {
        task: {key: number_in(file, metrics, key, f"tasks.{task}") for key in metrics}
        for task, metrics in tasks.items()
    }  # fmt: skip
    name = tree.get("samples_file")
    samples = _read_samples(file.parent / name) if isinstance(name, str) and (file.parent / name).exists() else []
    try:
        intervals = {
            task: {metric: Interval(**found) for metric, found in metrics.items()}
            for task, metrics in tree.get("intervals", {}).items()
        }
    except (TypeError, AttributeError) as error:
        raise UserError(
            "'intervals' are not as 'clips-mllm evaluate' writes them", file=file, remedy="run it again"
        ) from error
    about = {key: value for key, value in tree.items() if key not in ("tasks", "intervals", "failed", "skipped")}
    return Benchmarks(
        tasks=checked,
        samples=samples,
        intervals=intervals,
        skipped=tree.get("skipped", {}),
        failed=tree.get("failed", {}),
        about=about,
    )


def _read_samples(file: Path) -> list[Sample]:
    samples = []
    seen: set[tuple[str, int]] = set()
    for line, row in read_lines(file):
        if not isinstance(row.get("correct"), bool | None) or not isinstance(row.get("task"), str):
            raise UserError(
                f"line {line}: needs 'task' and a 'correct' of true, false or null", file=file, remedy="evaluate again"
            )
        doc_id = row.get("doc_id")
        if isinstance(doc_id, int) and row.get("scores") is not None:
            if (row["task"], doc_id) in seen:
                raise UserError(
                    f"line {line}: document {doc_id} of {row['task']} is there twice",
                    file=file,
                    remedy="evaluate again",
                )
            seen.add((row["task"], doc_id))
        samples.append(
            Sample(
                task=row["task"],
                doc_id=doc_id if isinstance(doc_id, int) else None,
                prompt=str(row.get("prompt", "")),
                answer=str(row.get("answer", "")),
                target=str(row.get("target", "")),
                correct=row["correct"],
                image=file.parent / row["image"] if isinstance(row.get("image"), str) else None,
                cluster=row.get("cluster"),
                scores=row.get("scores") or {},
            )
        )
    return samples
