"""From a recipe to a running engine. What can be seen to be wrong beforehand is said before anything is loaded."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.provenance.folder_kinds import known_kind
from clips_mllm.talk.recipes import ModelRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.files import check_model_exists

if TYPE_CHECKING:
    from clips_mllm.talk.engine import Engine

SPEECHLESS = ("encoder", "tower", "llm", "open_clip", "sample_world", "feature_cache", "unfinished_run")


def check_model(name: str, recipe: ModelRecipe, key: str = "model") -> None:
    """Raise UserError for a folder that is missing or of another kind, and for a context of no token."""
    check_model_exists(name, key)
    if recipe.context is not None and recipe.context < 1:
        raise UserError(f"context={recipe.context}: at least 1 token")
    kind = known_kind(Path(name)) if Path(name).is_dir() else None
    if kind is not None and kind.kind in SPEECHLESS:
        raise UserError(f"{kind.line}", file=name, remedy=f"not a LLaVA model, point {key} to a `train` run")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that holds the address, and does not listen yet. Raises UserError where it cannot be had."""
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except (OSError, OverflowError) as error:
        held.close()
        reason = error.strerror if isinstance(error, OSError) else "ports go from 0 to 65535"
        raise UserError(f"{host}:{port}: cannot listen there ({reason})", remedy="give another host or port") from error
    return held


def start_engine(model: str, recipe: ModelRecipe, *, max_batch_size: int = 1, max_waiting: int = 64) -> Engine:
    """Load a full, adapter or merged checkpoint, from a folder or a hub, and start a worker on it."""
    from clips_mllm.model.checkpoint import load_mllm
    from clips_mllm.talk.engine import Engine

    mllm = load_mllm(model, device=recipe.device, dtype=recipe.dtype, quantize=recipe.quantize)
    return Engine(mllm, context=recipe.context, max_batch_size=max_batch_size, max_waiting=max_waiting)


TOKEN = "CLIPS_MLLM_TOKEN"


def read_token(file: str | None) -> str | None:
    """The token of a file or the environment; not of the command line, which all users of a machine can read."""
    token = os.environ.get(TOKEN)
    if file is not None:
        try:
            token = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("cannot be read as text", file=file, remedy="check token_file") from error
    if token is None:
        return None
    if not token.strip():
        raise UserError("the token is empty", file=file or TOKEN, remedy="write one, or leave it out")
    return token.strip()
