"""Prompts and metrics of our lmms-eval tasks, where lmms-eval's own are missing or count something else.

`process` functions get a document and the list of its answers and return {metric: row}; `aggregate` functions get all
rows of a metric and return a fraction in [0, 1], or None if there is nothing to count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

LETTERS = "ABCDE"
# "B", "(B)", "B.", "B:" or "B. a cat": a letter that stands for an option, not the article of "A cat".
LETTER_ANSWER = re.compile(r"\(?([A-E])(?:\)?[.:]?$|[.):]\s)")


# --- POPE: prompt, images and accuracy are lmms-eval's own ---------------------------------------------------------


def pope_recall(rows: Sequence[Row]) -> float:
    """Found objects over objects that are there.

    lmms-eval's function leaves out the documents answered with neither yes nor no, which flatters a model that rambles;
    here an answer that is not "yes" has not found the object (arXiv 2305.10355).
    """
    there = [row for row in rows if row["ground_truth"] == "yes"]
    return _share(row["prediction"] == "yes" for row in there) or 0.0


def pope_precision(rows: Sequence[Row]) -> float:
    """Of the documents answered with yes, those where the object is there; 0 if the model never says yes."""
    return _share(row["ground_truth"] == "yes" for row in rows if row["prediction"] == "yes") or 0.0


def pope_f1(rows: Sequence[Row]) -> float:
    """Harmonic mean of `pope_precision` and `pope_recall`."""
    precision, recall = pope_precision(rows), pope_recall(rows)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def pope_yes_ratio(rows: Sequence[Row]) -> float:
    """How often the model says yes (lmms-eval counts the ground truth instead)."""
    return _share(row["prediction"] == "yes" for row in rows) or 0.0


# --- MMBench ----------------------------------------------------------------------------------------------------------


def mmbench_options(doc: Row) -> dict[str, str]:
    """The options that a question has; missing ones are the string "nan", None or NaN."""
    return {letter: str(doc[letter]) for letter in LETTERS if _given(doc.get(letter))}


def mmbench_doc_to_text(doc: Row, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Hint, question and options as LLaVA-1.5 asks them (haotian-liu/LLaVA, model_vqa_mmbench.py)."""
    hint = [str(doc["hint"])] if _given(doc["hint"]) else []
    options = [f"{letter}. {text}" for letter, text in mmbench_options(doc).items()]
    post_prompt = (lmms_eval_specific_kwargs or {}).get("post_prompt", "")
    return "\n".join([*hint, str(doc["question"]), *options]) + post_prompt


def mmbench_letter(answer: str, options: Iterable[str]) -> str:
    """The option that an answer names, or "" if it names none: no judge model and no guessing."""
    match = LETTER_ANSWER.match(answer.strip())
    return match[1] if match and match[1] in set(options) else ""


def mmbench_process_results(doc: Row, results: Sequence[str]) -> dict[str, Row]:
    """One row {index, score, prediction, ground_truth}."""
    letter = mmbench_letter(results[0], mmbench_options(doc))
    truth = str(doc["answer"]).strip()
    row = {"index": int(doc["index"]), "score": float(letter == truth), "prediction": letter, "ground_truth": truth}
    return {"accuracy": row}


def mmbench_accuracy(rows: Sequence[Row]) -> float | None:
    """Share of questions answered rightly in every rotation of their options.

    MMBench's circular evaluation (arXiv 2307.06281, section 4.1): rotations of question i have the indices
    i + k * 1,000,000. Data without rotations gives plain accuracy.
    """
    rotations: defaultdict[int, list[bool]] = defaultdict(list)
    for row in rows:
        rotations[row["index"] % 1_000_000].append(row["score"] == 1.0)
    return _share(all(right) for right in rotations.values())


# --- easy-VQA ---------------------------------------------------------------------------------------------------------


def plain_word(text: str) -> str:
    """Lower case, without surrounding blanks and the final period."""
    return text.strip().lower().removesuffix(".").strip()


def easy_vqa_process_results(doc: Row, results: Sequence[str]) -> dict[str, Row]:
    """The same row {score, kind, prediction, ground_truth} for each metric; the aggregates choose by kind."""
    prediction, truth = plain_word(results[0]), plain_word(doc["answer"])
    row = {
        "score": float(prediction == truth),
        "kind": doc["kind"],
        "prediction": prediction,
        "ground_truth": truth,
    }
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
