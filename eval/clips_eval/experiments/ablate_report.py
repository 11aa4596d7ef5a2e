"""Write ablation.json, ablation.md and two plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.experiments.ablate_grid import AblateRecipe, Setting, length_curves, objective_bars, settings
from clips_eval.experiments.ablate_results import Scores, directions, mean
from clips_eval.reporting.cells import plain_table
from clips_eval.reporting.markdown import table
from clips_eval.stats.json_files import write_json
from vision_tower.common.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNCUT = "uncut"
PLOTS = {"length.png": "Retrieval by caption length", "objectives.png": "Retrieval by objective"}


def write_report(recipe: AblateRecipe, scores: Scores, samples_seen: int, command: str) -> str:
    """Write all files into the output folder and return the Markdown.

    Args:
        samples_seen: pairs per run.
    """
    folder = Path(recipe.output_dir)
    text = markdown(recipe, scores, samples_seen, command)
    write_json(folder / "ablation.json", tree(recipe, scores, samples_seen, command))
    if recipe.reductions:
        draw_lengths(recipe, scores, folder / "length.png")
    if recipe.objectives:
        draw_objectives(recipe, scores, folder / "objectives.png")
    write_text(folder / "ablation.md", text)
    return text


def tree(recipe: AblateRecipe, scores: Scores, samples_seen: int, command: str) -> dict[str, Any]:
    """Return the content of ablation.json; recalls are fractions."""
    rows = [
        {"name": setting.name, **dataclasses.asdict(setting), "scores": list(scores[setting])}
        | dataclasses.asdict(mean(scores[setting]))
        for setting in settings(recipe)
    ]
    return {
        "metric": recipe.metric,
        "seeds": list(recipe.seeds),
        "samples_seen": samples_seen,
        "settings": rows,
        "directions": [dataclasses.asdict(direction) for direction in directions(recipe, scores)],
        "command": command,
    }


def markdown(recipe: AblateRecipe, scores: Scores, samples_seen: int, command: str) -> str:
    """Return tables and verdicts as Markdown."""
    name = f"R@{recipe.metric[1:]}"
    parts = [
        "# Ablations",
        f"{name} in %, averaged over both directions; mean ± standard error over {len(recipe.seeds)} seeds. "
        f"Each run saw {samples_seen:,} pairs.\n\n`{command}`",
    ]
    curves = length_curves(recipe)
    if curves:
        lengths = _lengths(recipe)
        rows = []
        for kind, curve in curves.items():
            at = {_length(setting): _cell(scores, setting) for setting in curve}
            rows.append([_curve(kind), *(at.get(length, "") for length in lengths)])
        parts += [
            "## Caption length",
            table(plain_table(["word pieces kept", *lengths], rows)),
            "![caption length](length.png)",
        ]
    bars = objective_bars(recipe)
    if bars:
        rows = [[kind, _cell(scores, setting)] for kind, setting in bars.items()]
        parts += ["## Objectives", table(plain_table(["objective", name], rows)), "![objectives](objectives.png)"]
    rows = [
        [found.claim, found.measured, _points(found.difference.value, found.difference.error), f"**{found.verdict}**"]
        for found in directions(recipe, scores)
    ]
    parts += [
        "## The paper's directions",
        table(plain_table(["claim", "measured here", "difference", "here"], rows)),
        "Held / did not hold: the 95 % interval of the difference over seeds (Student's t) is above / below zero. "
        "Undecided: it contains zero.",
    ]
    return "\n\n".join(parts) + "\n"


def _lengths(recipe: AblateRecipe) -> list[str]:
    """Return the labels of all budgets in ascending order, then the uncut caption."""
    found = {setting.budget for curve in length_curves(recipe).values() for setting in curve}
    return [*(str(budget) for budget in sorted(budget for budget in found if budget is not None)), UNCUT]


def _length(setting: Setting) -> str:
    return UNCUT if setting.budget is None else str(setting.budget)


def _curve(kind: str) -> str:
    return "web, truncated" if kind == "web" else f"synthetic, {kind}"


def _cell(scores: Scores, setting: Setting) -> str:
    found = mean(scores[setting])
    return _points(found.value, found.error)


def _points(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def draw_lengths(recipe: AblateRecipe, scores: Scores, file: Path) -> None:
    """Plot recall by caption length, one line per reduction; web captions are dashed."""

    labels = _lengths(recipe)

    def draw(axes: Axes) -> None:
        for kind, curve in length_curves(recipe).items():
            found = [mean(scores[setting]) for setting in curve]
            axes.errorbar(
                [labels.index(_length(setting)) for setting in curve],
                [100 * one.value for one in found],
                yerr=[100 * one.error for one in found],
                label=_curve(kind),
                linestyle="--" if kind == "web" else "-",
                marker="o",
                capsize=3,
            )
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("word pieces per caption")
        axes.legend(frameon=False)

    _figure(recipe, draw, file)


def draw_objectives(recipe: AblateRecipe, scores: Scores, file: Path) -> None:
    """Plot the recall of each objective."""

    def draw(axes: Axes) -> None:
        bars = objective_bars(recipe)
        found = [mean(scores[setting]) for setting in bars.values()]
        heights, errors = [100 * one.value for one in found], [100 * one.error for one in found]
        axes.bar(range(len(bars)), heights, yerr=errors, width=0.6, capsize=3)
        axes.set_xticks(range(len(bars)), list(bars))

    _figure(recipe, draw, file)


def _figure(recipe: AblateRecipe, draw: Any, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot would look for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(PLOTS[file.name])
    axes.set_ylabel(f"R@{recipe.metric[1:]}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=150)
