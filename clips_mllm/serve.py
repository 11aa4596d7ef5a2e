"""`clips-mllm serve`: an OpenAI-compatible endpoint for a multimodal LLM.

clips-mllm serve runs/my_model --port 8000
"""

from __future__ import annotations

import logging
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.talk.recipe import ServeRecipe
from clips_mllm.talk.start import bound_socket, check_model, read_token, start_engine
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import check_ranges, parse_recipe

if TYPE_CHECKING:
    import socket

    from clips_mllm.talk.engine import Engine

logger = logging.getLogger(__name__)

SLOW_CLIENT_SECONDS = 5  # for clients to receive the end of their answers during shutdown


def main(argv: list[str]) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers are then completed."""
    recipe = parse_recipe(ServeRecipe, argv, command="serve", positional=("model",))
    check_model(recipe.model, recipe)
    recipe.limits.check()
    check_ranges(recipe, shutdown_seconds="[0, inf)")
    token = read_token(recipe.token_file)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", remedy="pip install 'clips-mllm[serve]'") from error
    limits = recipe.limits
    with (
        bound_socket(recipe.host, recipe.port) as bound,
        start_engine(recipe.model, recipe, max_batch_size=limits.batch_size, max_waiting=limits.queue_size) as engine,
    ):
        run_server(engine, recipe, token, bound)


def run_server(engine: Engine, recipe: ServeRecipe, token: str | None, bound: socket.socket) -> None:
    """Listen, print the address, and serve. Each request is logged on stderr: client, path, status.

    stdout gets the address only, so that a program that reads just this line does not block the server by a full pipe.
    """
    import uvicorn

    from clips_mllm.talk.serve.app import Server, make_app

    name = recipe.name or Path(recipe.model).name
    config = uvicorn.Config(
        make_app(engine, name, recipe.limits, token),
        log_config={
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"stderr": {"class": "logging.StreamHandler"}},
            "loggers": {
                "uvicorn": {"handlers": ["stderr"], "level": "WARNING"},
                "uvicorn.access": {"level": logger.getEffectiveLevel()},  # by --verbose and --quiet
            },
        },
        timeout_graceful_shutdown=math.ceil(recipe.shutdown_seconds) + SLOW_CLIENT_SECONDS,
        server_header=False,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after its graceful shutdown
        signal.signal(number, lambda *_: None)
    bound.listen(config.backlog)
    port = bound.getsockname()[1]
    print(f"serving '{name}' at http://{recipe.host}:{port}/v1 (Ctrl-C stops)", flush=True)
    Server(config, engine, recipe.shutdown_seconds).run(sockets=[bound])


if __name__ == "__main__":
    sys.exit(run_command(main))
