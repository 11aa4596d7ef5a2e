"""Prompts and metrics of our lmms-eval tasks, if lmms-eval's own are missing or defined differently.

`*_process_results` functions get a document and the list of its answers and return {metric: row}. Metric functions get
all rows of a metric and return a fraction in [0, 1], or None if there is nothing to count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

LETTERS = "ABCDE"
# Matches "B", "(B)", "B.", "B:" and "B. a cat", but not the article in "A cat".
LETTER_ANSWER = re.compile(r"\(?([A-E])(?:\)?[.:]?$|[.):]\s)")


# --- POPE: prompt, images and accuracy are lmms-eval's own ---------------------------------------------------------


def pope_recall(rows: Sequence[Row]) -> float:
    """Return the share of present objects that are answered with yes (arXiv 2305.10355).

    lmms-eval's function leaves out answers that are neither yes nor no, which favors a model that does not follow the
    instruction; here any answer but "yes" counts as not found.
    """
    present = [row for row in rows if row["ground_truth"] == "yes"]
    return _share(row["prediction"] == "yes" for row in present) or 0.0


def pope_precision(rows: Sequence[Row]) -> float:
    """Return the share of yes answers about present objects; 0 if the model never answers yes."""
    return _share(row["ground_truth"] == "yes" for row in rows if row["prediction"] == "yes") or 0.0


def pope_f1(rows: Sequence[Row]) -> float:
    """Return the harmonic mean of `pope_precision` and `pope_recall`."""
    precision, recall = pope_precision(rows), pope_recall(rows)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def pope_yes_ratio(rows: Sequence[Row]) -> float:
    """Return the share of yes answers (lmms-eval counts the ground truth instead)."""
    return _share(row["prediction"] == "yes" for row in rows) or 0.0


# --- MMBench ----------------------------------------------------------------------------------------------------------


def mmbench_options(doc: Row) -> dict[str, str]:
    """Return a question's options by letter; missing ones are the string "nan", None or NaN."""
    return {letter: str(doc[letter]) for letter in LETTERS if _given(doc.get(letter))}


def mmbench_doc_to_text(doc: Row, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return hint, question and options in LLaVA-1.5's form (haotian-liu/LLaVA, model_vqa_mmbench.py)."""
    hint = [str(doc["hint"])] if _given(doc["hint"]) else []
    options = [f"{letter}. {text}" for letter, text in mmbench_options(doc).items()]
    post_prompt = (lmms_eval_specific_kwargs or {}).get("post_prompt", "")
    return "\n".join([*hint, str(doc["question"]), *options]) + post_prompt


def mmbench_letter(answer: str, options: Iterable[str]) -> str:
    """Return the option letter that an answer begins with, or "": no judge model and no guessing."""
    match = LETTER_ANSWER.match(answer.strip())
    return match[1] if match and match[1] in set(options) else ""


def mmbench_process_results(doc: Row, results: Sequence[str]) -> dict[str, Row]:
    """Return one row {index, score, prediction, ground_truth}."""
    letter = mmbench_letter(results[0], mmbench_options(doc))
    truth = str(doc["answer"]).strip()
    row = {"index": int(doc["index"]), "score": float(letter == truth), "prediction": letter, "ground_truth": truth}
    return {"accuracy": row}


def mmbench_accuracy(rows: Sequence[Row]) -> float | None:
    """Return the share of questions that are correct in every rotation of their options.

    MMBench's circular evaluation (arXiv 2307.06281, section 4.1): rotations of question i have the indices
    i + k * 1,000,000. Without rotations it is plain accuracy.
    """
    rotations: defaultdict[int, list[bool]] = defaultdict(list)
    for row in rows:
        rotations[row["index"] % 1_000_000].append(row["score"] == 1.0)
    return _share(all(right) for right in rotations.values())


# --- easy-VQA ---------------------------------------------------------------------------------------------------------


def plain_word(text: str) -> str:
    """Return the text in lower case, without surrounding blanks and final period."""
    return text.strip().lower().removesuffix(".").strip()


def easy_vqa_process_results(doc: Row, results: Sequence[str]) -> dict[str, Row]:
    """Return the same row {score, kind, prediction, ground_truth} for each metric, which filters by kind."""
    prediction, truth = plain_word(results[0]), plain_word(doc["answer"])
    row = {"score": float(prediction == truth), "kind": doc["kind"], "prediction": prediction, "ground_truth": truth}
    return {"accuracy": row, "open_accuracy": row, "yes_no_accuracy": row}


def easy_vqa_accuracy(rows: Sequence[Row]) -> float | None:
    return _share(row["score"] == 1.0 for row in rows)


def easy_vqa_open_accuracy(rows: Sequence[Row]) -> float | None:
    return easy_vqa_accuracy([row for row in rows if row["kind"] == "open"])


def easy_vqa_yes_no_accuracy(rows: Sequence[Row]) -> float | None:
    return easy_vqa_accuracy([row for row in rows if row["kind"] == "yes_no"])


def _given(value: Any) -> bool:
    return value is not None and str(value) not in ("", "nan")


def _share(facts: Iterable[bool]) -> float | None:
    values = list(facts)
    return sum(values) / len(values) if values else None
