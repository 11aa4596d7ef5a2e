"""`clips-mllm chat`: talk to a multimodal LLM in the terminal.

clips-mllm chat runs/quickstart/finetune --image photo.png --question "What is this?"
clips-mllm chat runs/quickstart/finetune            # several turns; /image FILE, /reset, /quit
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vision_tower.errors import UserError, run_command
from vision_tower.files import write_text
from vision_tower.recipe import parse_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRecipe:
    """Talk to a multimodal LLM: one question, or a conversation.

    Args:
        model: folder or hub id of a LLaVA checkpoint.
        image: picture to talk about.
        question: ask this and exit; without it a conversation starts.
        examples: JSON list of {"image", "question"}; ask each by itself, print and exit.
        output: JSON file to keep the examples' answers in.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 answers greedily, more samples.
        device: auto, cpu, cuda or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.
    """

    model: str
    image: str | None = None
    question: str | None = None
    examples: str | None = None
    output: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def main(argv: list[str]) -> None:
    """Answer one question, or start a conversation."""
    recipe = parse_recipe(ChatRecipe, argv, command="chat", positional=("model",))
    if recipe.image is not None:
        check_image(recipe.image)
    examples = read_examples(Path(recipe.examples)) if recipe.examples is not None else []
    conversation = Conversation(recipe)
    if examples:
        answer_examples(conversation, examples, recipe.output)
        return
    if recipe.image is not None:
        conversation.add_image(recipe.image)
    if recipe.question is not None:
        stream_to(sys.stdout, conversation.ask(recipe.question))
    else:
        talk(conversation)


def read_examples(file: Path) -> list[dict[str, str]]:
    """Questions about pictures; the pictures' paths are relative to the file. Raises UserError on bad input."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        examples = [{"image": str(file.parent / row["image"]), "question": str(row["question"])} for row in rows]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check --examples") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f'{file}: expected a JSON list of {{"image", "question"}} ({error}); mend the file') from error
    for example in examples:
        check_image(example["image"])
    return examples


def answer_examples(conversation: Conversation, examples: list[dict[str, str]], output: str | None) -> None:
    """Ask each question in a conversation of its own; print, and keep the answers where asked to."""
    answered = []
    for example in examples:
        conversation.reset()
        conversation.add_image(example["image"])
        print(f"{example['image']}\n  you> {example['question']}\n  model> ", end="", flush=True)
        pieces = list(conversation.ask(example["question"]))
        stream_to(sys.stdout, iter(pieces))
        answered.append(example | {"answer": "".join(pieces).strip()})
    if output is not None:
        write_text(Path(output), json.dumps(answered, indent=1))


def check_image(file: str) -> None:
    """Raise UserError, before the model is loaded, where the file is no readable picture."""
    from vision_tower.images import BadImage, decode_image

    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{file}: no such picture; check the path")
    try:
        decode_image(path.read_bytes())
    except BadImage as error:
        raise UserError(f"{file}: not a readable picture ({error}); convert it to PNG or JPEG") from error


class Conversation:
    """Turns with a loaded model. Pictures added before a question belong to that question."""

    def __init__(self, recipe: ChatRecipe) -> None:
        from clips_mllm.checkpoint import load_mllm

        self.recipe = recipe
        self.mllm = load_mllm(recipe.model, device=recipe.device, dtype=recipe.dtype)
        self.reset()

    def reset(self) -> None:
        """Forget everything said and shown."""
        self.messages: list[dict[str, Any]] = []
        self.images: list[Any] = []
        self.waiting = 0

    def add_image(self, file: str) -> None:
        """Show a picture with the next question."""
        from vision_tower.images import decode_image

        check_image(file)
        self.images.append(decode_image(Path(file).expanduser().read_bytes()))
        self.waiting += 1

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces, as they are generated; the turn is remembered once it is complete."""
        from clips_mllm.prompts import IMAGE

        if IMAGE in question:
            raise UserError(f"{IMAGE} in a question stands for a picture; show one by /image FILE or --image instead")
        content = [{"type": "image"}] * self.waiting + [{"type": "text", "text": question}]
        asked = [*self.messages, {"role": "user", "content": content}]
        pieces: list[str] = []
        for piece in generate(self.mllm, asked, self.images, self.recipe):
            pieces.append(piece)
            yield piece
        self.waiting = 0
        answer = [{"type": "text", "text": "".join(pieces)}]
        self.messages = [*asked, {"role": "assistant", "content": answer}]


def generate(mllm: Any, messages: list[dict[str, Any]], images: list[Any], recipe: ChatRecipe) -> Iterator[str]:
    """Stream the answer to the last message. What the generating thread raises is raised here."""
    from transformers import TextIteratorStreamer

    text = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    if not text:
        raise UserError(
            f"{recipe.model}: its template has room for pictures only, as after stage 1; show one, or use a checkpoint "
            "of stage 2"
        )
    inputs = mllm.processor(text=text, images=images or None, return_tensors="pt").to(mllm.device, mllm.model.dtype)
    streamer = TextIteratorStreamer(mllm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": recipe.temperature} if recipe.temperature else {"do_sample": False}
    failure: list[BaseException] = []

    def work() -> None:
        try:
            mllm.model.generate(**inputs, max_new_tokens=recipe.max_new_tokens, streamer=streamer, **sampling)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def stream_to(out: Any, pieces: Iterator[str]) -> None:
    """Print an answer as it comes."""
    for piece in pieces:
        print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)


def talk(conversation: Conversation) -> None:
    """Several turns, until /quit or the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("Ask a question. /image FILE shows a picture, /reset starts over, /quit ends.", flush=True)
    while True:
        try:
            line = input("you> " if terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            obey(conversation, line)
        except UserError as error:  # a slip of the finger does not end the talk
            print(f"error: {error}", file=sys.stderr, flush=True)


def obey(conversation: Conversation, line: str) -> None:
    """One line of a talk: a command or a question."""
    command, _, rest = line.partition(" ")
    match command:
        case "":
            pass
        case "/reset":
            conversation.reset()
        case "/image" if not rest.strip():
            raise UserError("/image: name a file, as in '/image photo.png'")
        case "/image":
            conversation.add_image(rest.strip().strip("'\""))
        case _ if command.startswith("/"):
            raise UserError(f"{command}: no such command; there are /image FILE, /reset and /quit")
        case _:
            stream_to(sys.stdout, conversation.ask(line))


if __name__ == "__main__":
    sys.exit(run_command(main))
