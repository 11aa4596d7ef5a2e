"""Read and check a result of `clips-mllm evaluate`: scores, intervals and single answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clips_eval.stats.json_files import number_in, read_lines
from clips_eval.stats.uncertainty import Interval
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

FORMAT = 2  # of lmms.json


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One evaluated question.

    Attributes:
        correct: None if the task does not judge single answers.
        image: None if the question has none, or if it was not saved.
        cluster: digest of the image; questions about one image are resampled together.
        scores: metric to [numerator, denominator] or [numerator, denominator, stratum].
    """

    task: str
    doc_id: int | None
    prompt: str
    answer: str
    target: str
    correct: bool | None
    image: Path | None
    cluster: str | None = None
    scores: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Content of an lmms.json file.

    Attributes:
        tasks: task to metric to value, with the names of lmms.json.
        intervals: the same keys to 95 % intervals.
        skipped, failed: task to the reason why it has no score.
        about: the rest of the file: model, recipe, versions, command.
    """

    tasks: dict[str, dict[str, float]]
    samples: list[Sample]
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def read_benchmarks(file: Path, control: str, wording: int = 0) -> Benchmarks | None:
    """Read an lmms.json file; return None if it does not exist.

    Raises:
        UserError: malformed, written by another version, or of another control or wording than its name says.
    """
    if not file.exists():
        return None
    tree = read_object(file)
    if tree.get("format") != FORMAT:
        raise UserError(f"{tree.get('format')!r}, expected {FORMAT}", file=file, key="format", remedy="evaluate again")
    # A renamed control file would pass as the result, so the field in the file is checked.
    if tree.get("control", control) != control:
        raise UserError(f"expected {control}", file=file, key="control", value=tree["control"], remedy="evaluate again")
    if tree.get("wording", wording) != wording:
        raise UserError(f"expected {wording}", file=file, key="wording", value=tree["wording"], remedy="evaluate again")
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
        raise UserError("malformed", file=file, key="intervals", remedy="evaluate again") from error
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
            raise UserError(f"line {line}: 'task' or 'correct' is malformed", file=file, remedy="evaluate again")
        doc_id = row.get("doc_id")
        if isinstance(doc_id, int) and row.get("scores") is not None:
            if (row["task"], doc_id) in seen:
                raise UserError(
                    f"line {line}: document {doc_id} of {row['task']} appears twice", file=file, remedy="evaluate again"
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
