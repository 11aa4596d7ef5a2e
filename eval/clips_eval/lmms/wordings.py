"""The line that asks for an answer's form, in other words: how much of a score hangs on the wording.

LLaVA's models are trained and measured with one such line for each kind of answer. A score that falls when it is worded
otherwise is in part a score for knowing the line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.api.task import Task

WORD = ("Reply with one word or a short phrase.", "Give your answer in as few words as you can.")
LETTER = ("Reply only with the letter of the right option.", "Which option is right? Give just its letter.")
WORDINGS: dict[str, tuple[str, str]] = {
    "Answer the question using a single word or phrase.": WORD,
    "Answer the question with a single word.": WORD,
    "Answer with the option's letter from the given choices directly.": LETTER,
    "Answer with the option letter only.": LETTER,
}


def reword(task: Task, wording: int) -> bool:
    """Put the line in its `wording`-th other words, in place; False where the task has no line that is known."""
    if wording == 0:
        return True
    settings = task.lmms_eval_specific_kwargs or {}
    given = settings.get("post_prompt", "")
    line = given.strip()
    if line not in WORDINGS:
        return False
    task.lmms_eval_specific_kwargs = {**settings, "post_prompt": given.replace(line, WORDINGS[line][wording - 1])}
    return True
