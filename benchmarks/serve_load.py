"""Load on the endpoint: many clients for a while, each answer checked against its own single-request run.

python benchmarks/serve_load.py runs/smoke/finetune --clients 16 --seconds 120

A real server process on this machine's loopback, real HTTP. Prints requests, errors, mixed-up answers and the server's
resident memory over time, and leaves them as JSON with --output. Ends with code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

COLORS = ("red", "green", "blue", "yellow", "white", "black")
QUESTIONS = ("What is this?", "Which colour do you see?", "Tell me all about it, please.", "Why?")


def requests() -> list[dict[str, Any]]:
    """Different images, questions and lengths, a third of them without an image."""
    found = []
    for number, (color, text) in enumerate((color, text) for color in COLORS for text in QUESTIONS):
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if number % 3:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(color, 32 + 8 * (number % 5))}})
        found.append({"messages": [{"role": "user", "content": content}], "max_tokens": 4 + number % 21})
    return found


def data_url(color: str, side: int) -> str:
    """An image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), color).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


class Server:
    """`clips-mllm serve` as a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        words = [sys.executable, "-m", "clips_mllm.serve", model, "--port", "0", "--name", "model", *options]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- a line for each request
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at http" not in line:
            self.log.seek(0)
            sys.exit(f"the server did not start: {line}{self.log.read()}")
        self.address = line.split()[3]

    def ask(self, client: httpx.Client, body: dict[str, Any]) -> str:
        """One answer. Raises httpx.HTTPStatusError."""
        found = client.post(f"{self.address}/chat/completions", json={"model": "model"} | body, timeout=300)
        found.raise_for_status()
        return str(found.json()["choices"][0]["message"]["content"])

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> int:
        """Ask it to stop; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def run(model: str, clients: int, seconds: float, options: list[str]) -> dict[str, Any]:
    """Load for `seconds`; what happened."""
    server = Server(model, *options)
    bodies = requests()
    memory: list[tuple[float, float]] = []
    counts = {"requests": 0, "errors": 0, "mixed_up": 0}
    # One for all threads: each of its own would spend the first seconds on reading certificates.
    client = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=clients))
    try:
        alone = [server.ask(client, body) for body in bodies]
        start = time.monotonic()

        def work(number: int) -> dict[str, int]:
            draw, mine = random.Random(number), dict.fromkeys(counts, 0)
            while time.monotonic() - start < seconds:
                place = draw.randrange(len(bodies))
                mine["requests"] += 1
                try:
                    mine["mixed_up"] += server.ask(client, bodies[place]) != alone[place]
                except httpx.HTTPError as error:
                    print(f"client {number}: {error}", file=sys.stderr)
                    mine["errors"] += 1
            return mine

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            futures = [pool.submit(work, number) for number in range(clients)]
            while not all(future.done() for future in futures):
                memory.append((round(time.monotonic() - start, 1), round(server.megabytes, 1)))
                time.sleep(max(0.5, seconds / 40))
            for future in futures:
                for name, count in future.result().items():
                    counts[name] += count
        elapsed = time.monotonic() - start
    finally:
        client.close()
        code = server.stop()
    # Warm-up ends after a third: allocators and kept prefixes have reached their size.
    warm = [size for moment, size in memory if moment > seconds / 3]
    growth = sum(warm[len(warm) // 2 :]) / len(warm[len(warm) // 2 :]) - sum(warm[: len(warm) // 2]) / max(
        1, len(warm[: len(warm) // 2])
    )
    return counts | {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "requests_per_second": round(counts["requests"] / elapsed, 2),
        "growth_after_warm_up_mb": round(growth, 1),
        "memory_mb": memory,
        "exit_code": code,
    }


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--output", type=Path)
    parser.add_argument("options", nargs="*", help="options of the server, after --")
    arguments = parser.parse_args()
    found = run(arguments.model, arguments.clients, arguments.seconds, ["--dtype", "float32", *arguments.options])
    print(json.dumps(found, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1))
    return int(bool(found["errors"] or found["mixed_up"] or found["exit_code"]))


if __name__ == "__main__":
    sys.exit(main())
