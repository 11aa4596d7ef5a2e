"""Metadata block of report.md: a Hugging Face model card with the scores as model index."""

from __future__ import annotations

from typing import Any

from clips_eval.reporting.mllm import LABELS
from clips_eval.reporting.numbers import OWN_TASKS, is_share, numbers
from clips_eval.reporting.read import RECALLS, Run

TAGS = ["clips", "llava", "multimodal", "vision-language"]


def metadata(run: Run) -> str:
    """Return the YAML front matter. License and base model are left for the author to add."""
    import yaml

    card: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": TAGS}
    results = [*_retrieval(run), *_benchmarks(run)]
    if results:
        card["model-index"] = [{"name": run.root.resolve().name, "results": results}]
    return f"---\n{yaml.safe_dump(card, sort_keys=False, allow_unicode=True)}---"


def _retrieval(run: Run) -> list[dict[str, Any]]:
    if run.retrieval is None:
        return []
    metrics = [
        {"type": "recall", "name": f"{key[:3].upper()} R@{key.partition('_r')[2]}", "value": _percent(value)}
        for key, value in run.retrieval.recalls.items()
        if key in RECALLS
    ]
    return [_result("zero-shot-image-retrieval", "Image-text retrieval", run.retrieval.data or "retrieval", metrics)]


def _benchmarks(run: Run) -> list[dict[str, Any]]:
    tree = numbers(run)["mllm"]
    results = []
    for name in dict.fromkeys(name for name, _ in LABELS):
        found = tree[name]
        if found is not None:
            metrics = [
                {"type": "accuracy", "name": LABELS[name, metric], "value": _percent(found[metric])}
                for own, metric in LABELS
                if own == name
            ]
            results.append(_result("visual-question-answering", "Visual question answering", name, metrics))
    for task, found in tree.items():
        if task not in OWN_TASKS and found is not None:
            metrics = [
                {"type": metric, "name": metric, "value": _percent(value) if is_share(metric, value) else value}
                for metric, value in found.items()
                if metric != "n"
            ]
            results.append(_result("visual-question-answering", "Visual question answering", task, metrics))
    return results


def _result(kind: str, title: str, data: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": kind, "name": title}, "dataset": {"type": data, "name": data}, "metrics": metrics}


def _percent(share: float) -> float:
    return round(100 * share, 2)
