"""Speed of talking against plain `generate`, in one process and one run.

python benchmarks/talk_speed.py runs/quickstart/finetune --clients 8

* time to the first token of a later turn: the engine, which kept the others, against `generate` on the whole of it
* tokens/s of one answer: the engine, streaming, against `generate`, not streaming
* answers/s of the engine with many clients at once against one after the other
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.talk.answer import Answer
from clips_mllm.talk.conversation import question, statement
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.prompt import InputImage
from clips_mllm.talk.sampling import Sampling


def main() -> None:
    """Measure all three, interleaved with their peers, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=1, help="turns before the one that is timed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    with Engine(load_mllm(given.model, device=given.device, dtype=given.dtype), max_batch_size=given.clients) as engine:
        found = {"first_token": first_token(engine, given.turns, given.rounds)}
        engine.ends = set()  # answers of one length, however the model was trained
        found |= {
            "tokens_per_second": tokens_per_second(engine, given.tokens, given.rounds),
            "clients": throughput(engine, given.clients, given.tokens, max(2, given.rounds // 2)),
        }
    print(json.dumps({"torch_threads": torch.get_num_threads(), **found}, indent=1))


def generate(engine: Engine, messages: list[Any], images: list[InputImage], tokens: int) -> None:
    """Plain `generate` on the whole conversation, images and all."""
    mllm = engine.mllm
    text = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    decoded = [image.image for image in images]
    inputs = mllm.processor(text=text, images=decoded or None, return_tensors="pt").to(mllm.device, mllm.model.dtype)
    with torch.inference_mode():
        mllm.model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def image(number: int) -> InputImage:
    """Different images: none is known from before."""
    return InputImage(Image.new("RGB", (336, 336), (number * 37 % 256, number * 91 % 256, number * 53 % 256)))


def first_token(engine: Engine, turns: int, rounds: int) -> dict[str, float]:
    """Seconds to the first token of a turn after `turns` others."""
    ours, peer = [], []
    for number in range(rounds + 1):
        images = [image(number)]
        messages: list[Any] = [question(f"What is in the image? Number {number}.", 1)]
        for turn in range(turns):
            if turn:
                messages.append(question(f"Tell me more about it, in the way of turn {turn}.", 0))
            answer = "".join(Answer(engine, engine.prompt(messages, images), Sampling(max_new_tokens=32)))
            messages.append(statement("assistant", answer))
        asked = [*messages, question("And what else?", 0)]
        ours.append(
            seconds(lambda: list(Answer(engine, engine.prompt(asked, images), Sampling(max_new_tokens=1))))  # noqa: B023
        )
        fresh = image(number)  # prepared anew
        peer.append(seconds(lambda: generate(engine, asked, [fresh], 1)))  # noqa: B023
    return ratio(statistics.median(ours[1:]), statistics.median(peer[1:]), "seconds")


def tokens_per_second(engine: Engine, tokens: int, rounds: int) -> dict[str, float]:
    """Tokens after the first, each second; the prompt's time is taken out by a run of one token."""
    ours, peer = [], []
    for number in range(rounds + 1):
        messages, images = [question(f"Tell me all. Number {number}.", 1)], [image(100 + number)]

        def answer(length: int) -> None:
            list(Answer(engine, engine.prompt(messages, images), Sampling(max_new_tokens=length)))  # noqa: B023

        answer(1)  # so that both runs below find the same prefix
        one, many = seconds(lambda: answer(1)), seconds(lambda: answer(tokens))
        ours.append((tokens - 1) / (many - one))
        one = seconds(lambda: generate(engine, messages, images, 1))  # noqa: B023
        many = seconds(lambda: generate(engine, messages, images, tokens))  # noqa: B023
        peer.append((tokens - 1) / (many - one))
    return ratio(statistics.median(ours[1:]), statistics.median(peer[1:]), "tokens_per_second")


def throughput(engine: Engine, clients: int, tokens: int, rounds: int) -> dict[str, float]:
    """Answers a second, of `clients` at once and of one after the other, about different images."""
    sampling = Sampling(max_new_tokens=tokens)
    together, alone = [], []
    for number in range(rounds + 1):

        def ask(place: int) -> Answer:
            shown = [image(1000 + number * 100 + place)]  # noqa: B023
            return Answer(engine, engine.prompt([question(f"What is it? {place}", 1)], shown), sampling)

        together.append(clients / seconds(lambda: [list(answer) for answer in [ask(i) for i in range(clients)]]))
        alone.append(clients / seconds(lambda: [list(ask(50 + i)) for i in range(clients)]))
    return ratio(statistics.median(together[1:]), statistics.median(alone[1:]), "answers_per_second")


def ratio(ours: float, peer: float, unit: str) -> dict[str, float]:
    """Ours, the peer's, and how many times the peer's ours is."""
    return {f"{unit}": round(ours, 4), f"{unit}_peer": round(peer, 4), "ratio": round(ours / peer, 3)}


if __name__ == "__main__":
    sys.exit(main())
