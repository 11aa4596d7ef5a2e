"""`clips-mllm chat`: chat with a multimodal LLM in the terminal.

clips-mllm chat runs/my_model --image photo.png --question "What is this?"
clips-mllm chat runs/my_model            # several turns; /help lists the commands
echo "What is this?" | clips-mllm chat runs/my_model --image photo.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.talk.images import read_examples, read_image
from clips_mllm.talk.recipe import ChatRecipe
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.start import check_model, start_engine
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import write_text
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from clips_mllm.talk.terminal import Terminal


def main(argv: list[str]) -> None:
    """Answer one question, or start a conversation."""
    recipe = parse_recipe(ChatRecipe, argv, command="chat", positional=("model",))
    check_model(recipe.model, recipe)
    check_questions(recipe)
    sampling = Sampling(max_new_tokens=recipe.max_new_tokens, temperature=recipe.temperature)
    for file in recipe.image:
        read_image(Path(file))
    examples = read_examples(Path(recipe.examples)) if recipe.examples is not None else []
    with start_engine(recipe.model, recipe) as engine:
        from clips_mllm.talk.terminal import Terminal

        terminal = Terminal(engine, sampling, system=recipe.system)
        if examples:
            answer_examples(terminal, examples, recipe.output)
            return
        terminal.attach(recipe.image)
        if recipe.question is not None:
            terminal.answer(recipe.question)
        else:
            terminal.run()


def check_questions(recipe: ChatRecipe) -> None:
    """Raise UserError if there is no source of questions, or options contradict each other."""
    if recipe.question is not None and not recipe.question.strip():
        raise UserError("empty", key="--question", remedy="write a question, or leave it out for a conversation")
    if recipe.examples is not None and (recipe.question is not None or recipe.image):
        raise UserError("has its own questions and images", key="--examples", remedy="remove --question and --image")
    if recipe.output is not None and recipe.examples is None:
        raise UserError("only for --examples", key="--output", remedy="redirect stdout, or use /save in a conversation")
    if recipe.question is None and recipe.examples is None and sys.stdin is None:
        raise UserError("no question: stdin is closed", remedy="ask with --question")


def answer_examples(terminal: Terminal, examples: list[dict[str, str]], output: str | None) -> None:
    """Ask each question in a new conversation, print the answers, and write them to `output`."""
    answered = []
    for example in examples:
        terminal.conversation.reset()
        terminal.attach([example["image"]])
        print(f"{example['image']}\n  you> {example['question']}\n  model> ", end="", flush=True)
        answered.append(example | {"answer": terminal.answer(example["question"]).strip()})
    if output is not None:
        write_text(Path(output), json.dumps(answered, indent=1))


if __name__ == "__main__":
    sys.exit(run_command(main))
