"""Load test of the endpoint: concurrent clients; each answer is compared with the answer to a single request.

python benchmarks/serve_load.py runs/smoke/finetune --clients 16 --seconds 120

Starts a server process on the loopback address. Prints the numbers of requests, errors and wrong answers and the
server's resident memory over time as JSON, and writes them to --output. Exits with code 1 after any error.
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
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

COLORS = ("red", "green", "blue", "yellow", "white", "black")
QUESTIONS = ("What is this?", "Which color do you see?", "Tell me all about it, please.", "Why?")


def requests() -> list[dict[str, Any]]:
    """Return requests with different images, questions and lengths; a third of them has no image."""
    bodies = []
    for number, (color, text) in enumerate((color, text) for color in COLORS for text in QUESTIONS):
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if number % 3:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(color, 32 + 8 * (number % 5))}})
        bodies.append({"messages": [{"role": "user", "content": content}], "max_tokens": 4 + number % 21})
    return bodies


def data_url(color: str, side: int) -> str:
    """Return a PNG of one color."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), color).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


class Server:
    """A `clips-mllm serve` process."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "clips_mllm.serve", model, "--port", "0", "--name", "model", *options]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # one line per request
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at http" not in line:
            self.log.seek(0)
            sys.exit(f"the server did not start: {line}{self.log.read()}")
        self.address = line.split()[3]

    def ask(self, client: httpx.Client, body: dict[str, Any]) -> str:
        """Return one answer. Raises httpx.HTTPStatusError."""
        response = client.post(f"{self.address}/chat/completions", json={"model": "model"} | body, timeout=300)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def run(model: str, clients: int, seconds: float, options: list[str]) -> dict[str, Any]:
    """Run the load for `seconds` and return counts and memory."""
    server = Server(model, *options)
    bodies = requests()
    memory: list[tuple[float, float]] = []
    counts = {"requests": 0, "errors": 0, "wrong_answers": 0}
    # One client for all threads: creating one takes long, because it reads certificates.
    client = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=clients))
    try:
        expected = [server.ask(client, body) for body in bodies]
        start = time.monotonic()

        def work(number: int) -> dict[str, int]:
            rng, own = random.Random(number), dict.fromkeys(counts, 0)
            while time.monotonic() - start < seconds:
                index = rng.randrange(len(bodies))
                own["requests"] += 1
                try:
                    own["wrong_answers"] += server.ask(client, bodies[index]) != expected[index]
                except httpx.HTTPError as error:
                    print(f"client {number}: {error}", file=sys.stderr)
                    own["errors"] += 1
            return own

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
    # The first third is warm-up: allocators and the prefix cache reach their final size.
    warm = [size for moment, size in memory if moment > seconds / 3]
    middle = len(warm) // 2
    growth = statistics.mean(warm[middle:]) - statistics.mean(warm[:middle] or [0.0])
    return counts | {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "requests_per_second": round(counts["requests"] / elapsed, 2),
        "growth_after_warm_up_mb": round(growth, 1),
        "memory_mb": memory,
        "exit_code": code,
    }


def main() -> int:
    """Parse the command line, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--output", type=Path)
    parser.add_argument("options", nargs="*", help="options of the server, after --")
    arguments = parser.parse_args()
    report = run(arguments.model, arguments.clients, arguments.seconds, ["--dtype", "float32", *arguments.options])
    print(json.dumps(report, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1))
    return int(bool(report["errors"] or report["wrong_answers"] or report["exit_code"]))


if __name__ == "__main__":
    sys.exit(main())
