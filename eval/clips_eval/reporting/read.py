"""Read and check a run folder: parts may be missing, but not malformed.

RUN/steps/*.json  RUN/encoder/{retrieval,zeroshot}.json  RUN/finetune/lmms.json (+ samples)
RUN/*/metrics.jsonl --> Run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clips_eval.reporting.benchmarks import Benchmarks, read_benchmarks
from clips_eval.reporting.encoder import check_breakdowns, check_geometry, check_hits, read_spans
from clips_eval.stats.json_files import count_in, number_in, read_lines
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_json, read_object
from vision_tower.common.provenance import read_provenance

CONTROLS = ("shuffled", "blank", "no_image")
STAGES = ("encoder", "align", "finetune")
FORMAT = 1  # of retrieval.json and zeroshot.json
RECALLS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One pipeline step: wall time in seconds, peak memory in bytes if recorded."""

    name: str
    command: str
    seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Content of retrieval.json: recalls as fractions (`i2t_r1` ...) and example queries."""

    recalls: dict[str, float]
    n_images: int
    n_texts: int | None
    data: str
    folder: Path
    examples: dict[str, list[dict[str, Any]]]
    about: dict[str, Any] = field(default_factory=dict)  # the rest of the file


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Content of zeroshot.json: accuracies as fractions; `top5` is None below five classes."""

    top1: float
    top5: float | None
    mean_per_class: float
    n_images: int
    n_classes: int
    n_texts: int
    data: str
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # the whole file


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Training losses of a stage: `losses[name]` is a list of (step, value)."""

    stage: str
    losses: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One example question of `clips-mllm chat --examples`."""

    image: Path | None
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """Content of a run folder; missing parts are None or empty."""

    root: Path
    retrieval: Retrieval | None = None
    zeroshot: ZeroShot | None = None
    lmms: Benchmarks | None = None
    controls: dict[str, Benchmarks] = field(default_factory=dict)
    wordings: dict[int, Benchmarks] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    chat: list[Answer] = field(default_factory=list)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)  # provenance.json of each stage
    ablation: dict[str, Any] | None = None
    baselines: dict[str, Benchmarks] = field(default_factory=dict)  # by model name
    encoders: dict[str, Retrieval] = field(default_factory=dict)  # other encoders, by name


def read_run(root: Path, baselines: Sequence[Path] = ()) -> Run:
    """Read a run folder.

    Args:
        baselines: lmms.json files of other models and retrieval.json files of other encoders.
    Raises:
        UserError: the folder does not exist, has nothing to report, or has a malformed file.
    """
    if not root.is_dir():
        raise UserError("no such folder", file=root, remedy="give a run folder")
    run = Run(
        root=root,
        retrieval=_read_retrieval(root / "encoder" / "retrieval.json"),
        zeroshot=_read_zeroshot(root / "encoder" / "zeroshot.json"),
        lmms=read_benchmarks(_lmms(root), control="none"),
        controls={name: found for name in CONTROLS if (found := read_benchmarks(_lmms(root, name), control=name))},
        wordings={n: found for n in (1, 2) if (found := read_benchmarks(_lmms(root, f"wording{n}"), "none", n))},
        curves=[curve for stage in STAGES if (curve := _read_curve(root / stage / "metrics.jsonl", stage))],
        steps=[_read_step(file) for file in sorted((root / "steps").glob("*.json"), key=_step_order)],
        chat=_read_chat(root / "chat.json"),
        provenance={stage: tree for stage in STAGES if (tree := read_provenance(root / stage))},
        ablation=_read_ablation(root / "ablate" / "ablation.json"),
    )
    if run == Run(root=root):
        raise UserError("nothing to report", file=root, remedy="give a folder with encoder/, finetune/ or steps/")
    others = [_read_baseline(file) for file in baselines]
    titles = [_title(one) for one in others]
    named = {  # results of the same model get their file name
        title if titles.count(title) == 1 else f"{title} ({file})": one
        for title, file, one in zip(titles, baselines, others, strict=True)
    }
    return replace(
        run,
        baselines={title: one for title, one in named.items() if isinstance(one, Benchmarks)},
        encoders={title: one for title, one in named.items() if isinstance(one, Retrieval)},
    )


def _read_baseline(file: Path) -> Benchmarks | Retrieval:
    tree = read_object(file) if file.is_file() else {}
    found: Benchmarks | Retrieval | None = None
    if "tasks" in tree:
        found = read_benchmarks(file, control="none")
    elif RECALLS[0] in tree:
        found = _read_retrieval(file)
    if found is None:
        raise UserError("not a result file", file=file, remedy="give an lmms.json or a retrieval.json")
    return found


def _title(result: Benchmarks | Retrieval) -> str:
    if isinstance(result, Retrieval):
        return str(result.about.get("encoder", result.folder))
    name, engine = str(result.about.get("model", "baseline")), result.about.get("engine", "clips_mllm")
    return name if engine == "clips_mllm" else f"{name} ({engine})"


def _lmms(root: Path, variant: str = "") -> Path:
    return root / "finetune" / (f"lmms_{variant}.json" if variant else "lmms.json")


def _step_order(file: Path) -> tuple[int, str]:
    number = file.stem.partition("-")[0]
    return (int(number) if number.isdecimal() else 10**6, file.stem)


def _read_step(file: Path) -> Step:
    tree = read_object(file)
    peak = None if tree.get("peak_memory_bytes") is None else int(number_in(file, tree, "peak_memory_bytes"))
    return Step(
        name=_text(file, tree, "name"),
        command=_text(file, tree, "command"),
        seconds=number_in(file, tree, "seconds"),
        peak_memory_bytes=peak,
    )


def _read_retrieval(file: Path) -> Retrieval | None:
    if not file.exists():
        return None
    tree = read_object(file)
    _check_format(file, tree, "retrieve")
    examples = tree.get("examples") or {}
    known = {"text_to_image": ("query", "images", "correct"), "image_to_text": ("query", "texts", "correct")}
    for way, keys in known.items():
        rows = examples.get(way, []) if isinstance(examples, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= set(row) for row in rows):
            raise UserError(f"'examples.{way}' is malformed", file=file, remedy="run `clips-mllm retrieve` again")
    n_images = count_in(file, tree, "n_images")
    n_texts = count_in(file, tree, "n_texts") if "n_texts" in tree else None
    check_hits(file, tree, RECALLS, n_images, n_texts)
    check_geometry(file, tree)
    check_breakdowns(file, tree)
    return Retrieval(
        recalls={key: number_in(file, tree, key, fraction=True) for key in RECALLS},
        n_images=n_images,
        n_texts=n_texts,
        data=str(tree.get("data", "")),
        folder=file.parent,
        examples={way: examples.get(way, []) for way in known},
        about={key: value for key, value in tree.items() if key != "examples"},
    )


def _read_zeroshot(file: Path) -> ZeroShot | None:
    if not file.exists():
        return None
    tree = read_object(file)
    _check_format(file, tree, "zeroshot")
    return ZeroShot(
        top1=number_in(file, tree, "top1", fraction=True),
        top5=None if tree.get("top5") is None else number_in(file, tree, "top5", fraction=True),
        mean_per_class=number_in(file, tree, "mean_per_class", fraction=True),
        n_images=count_in(file, tree, "n_images"),
        n_classes=count_in(file, tree, "n_classes"),
        n_texts=count_in(file, tree, "n_texts"),
        data=str(tree.get("data", "")),
        intervals=read_spans(file, tree, ("top1", "top5", "mean_per_class")),
        about=tree,
    )


def _check_format(file: Path, tree: dict[str, Any], command: str) -> None:
    if tree.get("format") != FORMAT:
        raise UserError(
            f"{tree.get('format')!r}, expected {FORMAT}",
            file=file,
            key="format",
            remedy=f"run `clips-mllm {command}` again",
        )


def _read_ablation(file: Path) -> dict[str, Any] | None:
    """Read ablation.json of `clips-mllm ablate`."""
    if not file.exists():
        return None
    tree = read_object(file)
    known = ("name", "objective", "reduction", "budget", "value", "error")
    rows = tree.get("settings")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(known) <= set(row) for row in rows):
        raise UserError("'settings' is malformed", file=file, remedy="run `clips-mllm ablate` again")
    return tree


def _read_curve(file: Path, stage: str) -> Curve | None:
    if not file.exists():
        return None
    losses: dict[str, list[tuple[int, float]]] = {}
    for line, row in read_lines(file):
        # A diverged run logs NaN; its curve shows a gap.
        for name in (key for key in row if key == "loss" or key.startswith("loss_")):
            if not isinstance(row[name], int | float) or not isinstance(row.get("step"), int):
                raise UserError(f"line {line}: 'step' and '{name}' must be numbers", file=file, remedy="train it again")
            losses.setdefault(name, []).append((row["step"], float(row[name])))
    return Curve(stage=stage, losses=losses) if losses else None


def _read_chat(file: Path) -> list[Answer]:
    if not file.exists():
        return []
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError("expected a list of {image, question, answer}", file=file, remedy="run the chat step again")
    return [
        Answer(
            image=_find(file.parent, row["image"]) if isinstance(row.get("image"), str) else None,
            question=_text(file, row, "question"),
            answer=_text(file, row, "answer"),
        )
        for row in rows
    ]


def _find(folder: Path, name: str) -> Path:
    """Return the path of an image that is named relative to the run or to the working directory."""
    return folder / name if (folder / name).exists() else Path(name)


def _text(file: Path, tree: dict[str, Any], key: str) -> str:
    value = tree.get(key)
    if not isinstance(value, str):
        raise UserError(f"'{key}' is {value!r}, expected text", file=file, remedy="run its step again")
    return value
