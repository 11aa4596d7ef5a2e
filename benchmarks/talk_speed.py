"""Speed of the chat engine compared with plain `generate`, in one process.

python benchmarks/talk_speed.py runs/quickstart/finetune --clients 8

* time to the first token of a later turn: the engine with its prefix cache, and `generate` on the whole conversation
* tokens/s of one answer: the engine with streaming, and `generate` without
* answers/s of the engine: many clients at once, and the same requests one after the other
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
from clips_mllm.talk.conversation import text_message, user_message
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage
from clips_mllm.talk.requests import Answer
from clips_mllm.talk.sampling import Sampling


def main() -> None:
    """Run the three measurements, alternating between both sides, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=1, help="turns before the timed one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with Engine(load_mllm(args.model, device=args.device, dtype=args.dtype), max_batch_size=args.clients) as engine:
        results = {"first_token": first_token(engine, args.turns, args.rounds)}
        engine.eos_tokens = set()  # so that all answers have the same length
        results |= {
            "tokens_per_second": tokens_per_second(engine, args.tokens, args.rounds),
            "clients": throughput(engine, args.clients, args.tokens, max(2, args.rounds // 2)),
        }
    print(json.dumps({"torch_threads": torch.get_num_threads(), **results}, indent=1))


def generate(engine: Engine, messages: list[Any], images: list[InputImage], tokens: int) -> None:
    """Run plain `generate` on the whole conversation, including its images."""
    mllm = engine.mllm
    text = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    decoded = [image.image for image in images]
    inputs = mllm.processor(text=text, images=decoded or None, return_tensors="pt").to(mllm.device, mllm.model.dtype)
    with torch.inference_mode():
        mllm.model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)


def seconds(call: Callable[[], Any]) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def image(number: int) -> InputImage:
    """Return a different image for each number, so that no cache contains it."""
    return InputImage(Image.new("RGB", (336, 336), (number * 37 % 256, number * 91 % 256, number * 53 % 256)))


def first_token(engine: Engine, turns: int, rounds: int) -> dict[str, float]:
    """Measure the seconds to the first token of a turn after `turns` others."""
    ours, peer = [], []
    for number in range(rounds + 1):
        images = [image(number)]
        messages: list[Any] = [user_message(f"What is in the image? Number {number}.", 1)]
        for turn in range(turns):
            if turn:
                messages.append(user_message(f"Tell me more about it, in the way of turn {turn}.", 0))
            answer = "".join(engine.answer(engine.prompt(messages, images), Sampling(max_new_tokens=32)))
            messages.append(text_message("assistant", answer))
        asked = [*messages, user_message("And what else?", 0)]
        ours.append(
            seconds(lambda: list(engine.answer(engine.prompt(asked, images), Sampling(max_new_tokens=1))))  # noqa: B023
        )
        fresh = image(number)  # without a cached tower input
        peer.append(seconds(lambda: generate(engine, asked, [fresh], 1)))  # noqa: B023
    return ratio(statistics.median(ours[1:]), statistics.median(peer[1:]), "seconds")


def tokens_per_second(engine: Engine, tokens: int, rounds: int) -> dict[str, float]:
    """Measure tokens per second after the first; the time of a run with one token is subtracted."""
    ours, peer = [], []
    for number in range(rounds + 1):
        messages, images = [user_message(f"Tell me all. Number {number}.", 1)], [image(100 + number)]

        def answer(length: int) -> None:
            list(engine.answer(engine.prompt(messages, images), Sampling(max_new_tokens=length)))  # noqa: B023

        answer(1)  # fills the prefix cache for both runs below
        one, many = seconds(lambda: answer(1)), seconds(lambda: answer(tokens))
        ours.append((tokens - 1) / (many - one))
        one = seconds(lambda: generate(engine, messages, images, 1))  # noqa: B023
        many = seconds(lambda: generate(engine, messages, images, tokens))  # noqa: B023
        peer.append((tokens - 1) / (many - one))
    return ratio(statistics.median(ours[1:]), statistics.median(peer[1:]), "tokens_per_second")


def throughput(engine: Engine, clients: int, tokens: int, rounds: int) -> dict[str, float]:
    """Measure answers per second of concurrent and of sequential requests about different images."""
    sampling = Sampling(max_new_tokens=tokens)
    concurrent, sequential = [], []
    for number in range(rounds + 1):

        def ask(client: int) -> Answer:
            images = [image(1000 + number * 100 + client)]  # noqa: B023
            return engine.answer(engine.prompt([user_message(f"What is it? {client}", 1)], images), sampling)

        concurrent.append(clients / seconds(lambda: [list(answer) for answer in [ask(i) for i in range(clients)]]))
        sequential.append(clients / seconds(lambda: [list(ask(50 + i)) for i in range(clients)]))
    return ratio(statistics.median(concurrent[1:]), statistics.median(sequential[1:]), "answers_per_second")


def ratio(ours: float, peer: float, unit: str) -> dict[str, float]:
    """Return both values and their ratio."""
    return {f"{unit}": round(ours, 4), f"{unit}_peer": round(peer, 4), "ratio": round(ours / peer, 3)}


if __name__ == "__main__":
    sys.exit(main())
