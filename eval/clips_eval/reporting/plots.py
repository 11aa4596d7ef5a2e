"""Plots of the report as SVG text: training curves, and scores with chance and the shuffled control.

Each plot is drawn for light and for dark mode. No date or random id is written, so the same run gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clips_eval.reporting.mllm import LABELS, main_metric
from clips_eval.reporting.numbers import CHANCE, OWN_TASKS, numbers, recall_chance, recall_span, span, under
from clips_eval.reporting.read import RECALLS, Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 240  # per curve, more than a screen can show
WIDTH = 4.4  # inches; text stays readable on a phone
CURVE_NAMES = {"loss": "total", "loss_web": "web", "loss_sub": "sub-caption", "loss_caption": "caption"}


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colors of light or dark mode, as in report.css."""

    text: str
    faint: str
    grid: str
    ours: str
    control: str
    series: tuple[str, ...]


LIGHT = Theme(
    text="#1c2733",
    faint="#5d6b7a",
    grid="#e3e8ed",
    ours="#6db0b7",
    control="#b3bec9",
    series=("#1f6f78", "#c8783c", "#6a5acd", "#8a9a3b"),
)
DARK = Theme(
    text="#e6ebf0",
    faint="#9aa8b6",
    grid="#2b3642",
    ours="#2f7a83",
    control="#566473",
    series=("#5bb8c1", "#e2a06c", "#a99cf0", "#bccb72"),
)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot in both modes, with its alt text in `summary`."""

    title: str
    summary: str
    light: str
    dark: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A proportion to draw, with interval, chance level and control if known."""

    label: str
    share: float
    ends: tuple[float, float] | None
    chance: float | None
    control: float | None


def curve_plots(run: Run) -> list[Plot]:
    """Return a loss plot for each stage with metrics."""
    plots = []
    for curve in run.curves:
        total = curve.losses.get("loss") or next(iter(curve.losses.values()))
        (first, start), (last, end) = total[0], total[-1]
        summary = f"Training loss of {curve.stage}: {start:.3g} at step {first}, {end:.3g} at step {last}"
        plots.append(_plot(f"Loss, {curve.stage}", summary, 2.6, _draw_curve(curve)))
    return plots


def benchmark_plot(run: Run) -> Plot | None:
    """Return a bar plot of the accuracy of each benchmark, or None if there is none."""
    tree = numbers(run)["mllm"]
    stock = {task: main_metric(task, found) for task, found in tree.items() if task not in OWN_TASKS and found}
    bars = [
        Bar(
            label=label,
            share=tree[name][metric],
            ends=span(run.lmms, name, metric),
            chance=CHANCE.get(name),
            control=under(run, "shuffled", name, metric),
        )
        for (name, metric), label in LABELS.items()
        if tree[name] is not None
    ]
    bars += [
        Bar(
            label=task,
            share=tree[task][metric],
            ends=span(run.lmms, task, metric),
            chance=None,
            control=under(run, "shuffled", task, metric),
        )
        for task, metric in stock.items()
        if metric is not None
    ]
    return _bar_plot("Benchmarks of the MLLM", "accuracy, %", bars)


def retrieval_plot(run: Run) -> Plot | None:
    """Return a bar plot of recall@k in both directions, or None if not measured."""
    retrieval = run.retrieval
    if retrieval is None:
        return None
    names = {"i2t": "image to text", "t2i": "text to image"}
    bars = [
        Bar(
            label=f"{names[key[:3]]}, R@{key.partition('_r')[2]}",
            share=retrieval.recalls[key],
            ends=recall_span(retrieval, key),
            chance=recall_chance(retrieval, key),
            control=None,
        )
        for key in RECALLS
    ]
    return _bar_plot("Retrieval of the encoder", "recall, %", bars)


def inverse_plot(run: Run) -> Plot | None:
    """Return recall by caption length from `clips-mllm ablate`, or None if it was not run."""
    if run.ablation is None:
        return None
    rows = [row for row in run.ablation["settings"] if row["objective"] in ("clip-web", "clip-synthetic")]
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    if not budgets:
        return None
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["budget"] is not None:
            name = "web" if row["objective"] == "clip-web" else row["reduction"]
            curves.setdefault(name, []).append(row)
    for name, points in curves.items():
        uncut = "clip-web" if name == "web" else "clip-synthetic"
        points.sort(key=lambda row: row["budget"])
        points += [row for row in rows if row["objective"] == uncut and row["budget"] is None]
    values = "; ".join(
        f"{name} " + ", ".join(f"{100 * row['value']:.1f} at {row['budget'] or 'uncut'}" for row in points)
        for name, points in curves.items()
    )
    metric = f"R@{run.ablation.get('metric', 'r1')[1:]}"
    return _plot(
        "Inverse effect: recall by caption length",
        f"{metric} in %: {values}",
        3.0,
        _draw_inverse(curves, budgets, metric),
    )


def _draw_inverse(
    curves: dict[str, list[dict[str, Any]]], budgets: list[int], metric: str
) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        for number, (name, points) in enumerate(curves.items()):
            places = [len(budgets) if row["budget"] is None else budgets.index(row["budget"]) for row in points]
            axes.errorbar(
                places,
                [100 * row["value"] for row in points],
                yerr=[100 * row["error"] for row in points],
                color=theme.series[number % len(theme.series)],
                linestyle="--" if name == "web" else "-",
                marker="o",
                ms=3.5,
                capsize=2.5,
                linewidth=1.4,
                label=name,
            )
        axes.set_xticks(range(len(budgets) + 1), [*map(str, budgets), "uncut"])
        axes.set_xlabel("word pieces per caption")
        axes.set_ylabel(f"{metric}, %")
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        axes.legend(frameon=False, labelcolor=theme.faint, ncols=2)

    return draw


def _bar_plot(title: str, unit: str, bars: list[Bar]) -> Plot | None:
    if not bars:
        return None
    summary = f"{title}: " + "; ".join(f"{bar.label} {100 * bar.share:.1f} %" for bar in bars)
    return _plot(title, summary, 0.8 + 0.42 * len(bars), _draw_bars(bars, unit))


def _draw_curve(curve: Curve) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        several = len(curve.losses) > 1
        for number, (name, points) in enumerate(curve.losses.items()):
            color = theme.series[number % len(theme.series)]
            if not several:
                axes.plot(*zip(*_thin(points), strict=True), color=color, linewidth=0.8, alpha=0.35)
            smooth = _thin(_running_mean(points))
            axes.plot(*zip(*smooth, strict=True), color=color, linewidth=1.6, label=CURVE_NAMES.get(name, name))
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        if several:
            axes.legend(frameon=False, labelcolor=theme.faint, ncols=2)

    return draw


def _draw_bars(bars: list[Bar], unit: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        for place, bar in enumerate(bars):
            axes.barh(place, 100 * bar.share, height=0.5, color=theme.ours, label="this run" if place == 0 else None)
            right = bar.share
            if bar.ends is not None:
                low, high = (100 * bound for bound in bar.ends)
                axes.plot([low, high], [place, place], color=theme.text, linewidth=1.4)
                axes.plot([low, high], [place, place], "|", color=theme.text, ms=7, mew=1.4)
                right = high / 100
            axes.text(100 * right + 1.5, place, f"{100 * bar.share:.1f}", va="center", color=theme.text)
        controls = [(100 * bar.control, place) for place, bar in enumerate(bars) if bar.control is not None]
        chances = [(100 * bar.chance, place) for place, bar in enumerate(bars) if bar.chance is not None]
        if controls:
            axes.plot(
                *zip(*controls, strict=True), "D", color=theme.control, ms=6, mec=theme.text, mew=0.7, label="shuffled"
            )
        if chances:
            axes.plot(*zip(*chances, strict=True), "|", color=theme.series[1], ms=15, mew=2, label="chance")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel(unit)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=theme.grid, linewidth=0.8)
        axes.legend(frameon=False, labelcolor=theme.faint, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))

    return draw


def _plot(title: str, summary: str, height: float, draw: Callable[[Axes, Theme], None]) -> Plot:
    light, dark = (_svg(height, theme, draw) for theme in (LIGHT, DARK))
    return Plot(title=title, summary=summary, light=light, dark=dark)


def _svg(height: float, theme: Theme, draw: Callable[[Axes, Theme], None]) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # pyplot would look for a display
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "clips-mllm",
        "font.size": 9,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "text.color": theme.text,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), theme)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # matplotlib puts its own fonts first; use the font of the page.
    return stream.getvalue().replace("'DejaVu Sans', ", "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', ")


def _running_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Smooth with a running mean over a twentieth of the points; NaN stays a gap."""
    window = max(1, len(points) // 20)
    values = [value for _, value in points]
    sums = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [(step, sum(part) / len(part)) for (step, _), part in zip(points, sums, strict=True)]


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Thin to about POINTS points, keeping the last."""
    stride = max(1, math.ceil(len(points) / POINTS))
    return points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
