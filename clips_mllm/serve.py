"""`clips-mllm serve`: an OpenAI-compatible endpoint for a multimodal LLM.

clips-mllm serve runs/quickstart/finetune --port 8000
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.talk.recipes import ServeRecipe
from clips_mllm.talk.start import bound_socket, check_model, read_token, start_engine
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    import socket

    from clips_mllm.talk.engine import Engine

SLOW_READERS = 5  # seconds that clients get to take the end of their answers


def main(argv: list[str]) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers are then completed."""
    recipe = parse_recipe(ServeRecipe, argv, command="serve", positional=("model",))
    check_model(recipe.model, recipe)
    recipe.limits.check()
    if recipe.patience < 0:
        raise UserError(f"patience={recipe.patience}: at least 0 seconds")
    token = read_token(recipe.token_file)
    require_packages()
    limits = recipe.limits
    with bound_socket(recipe.host, recipe.port) as address:
        engine = start_engine(recipe.model, recipe, max_batch_size=limits.rows, max_waiting=limits.waiting)
        try:
            run_server(engine, recipe, token, address)
        finally:
            engine.close()


def require_packages() -> None:
    """Raise UserError where the extra is not installed."""
    import importlib.util

    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed", remedy="pip install 'clips-mllm[serve]'")


def run_server(engine: Engine, recipe: ServeRecipe, token: str | None, address: socket.socket) -> None:
    """Listen, and say where; requests are taken from then on. Each is a line on stderr: client, path, status.

    stdout has the address alone: a program that reads no more than that must not fill a pipe: the server would wait.
    """
    import copy
    import logging
    import signal

    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    from clips_mllm.talk.serve.app import make_app
    from clips_mllm.talk.serve.server import Server

    name = recipe.name or Path(recipe.model).name
    log = copy.deepcopy(LOGGING_CONFIG)
    log["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config = uvicorn.Config(
        make_app(engine, name, recipe.limits, token),
        log_config=log,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(recipe.patience) + SLOW_READERS,
        server_header=False,
    )
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # above it, only what goes wrong
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them once more when it has ended in good order
        signal.signal(stop, lambda *_: None)
    address.listen(config.backlog)
    port = address.getsockname()[1]
    print(f"serving '{name}' at http://{recipe.host}:{port}/v1 (Ctrl-C stops)", flush=True)
    Server(config, engine, recipe.patience).run(sockets=[address])


if __name__ == "__main__":
    sys.exit(run_command(main))
