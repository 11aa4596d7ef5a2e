"""Start an engine from a recipe, after the checks that need no model: checkpoint, address and token."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.provenance.folder_kinds import known_kind
from clips_mllm.talk.recipe import ModelRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.files import check_model_exists
from vision_tower.common.recipe import check_ranges

if TYPE_CHECKING:
    from clips_mllm.talk.engine import Engine

TOKEN_VARIABLE = "CLIPS_MLLM_TOKEN"


def check_model(name: str, recipe: ModelRecipe, key: str = "model") -> None:
    """Raise UserError if the checkpoint is missing or is not a multimodal LLM, or if the context is below 1."""
    check_model_exists(name, key)
    check_ranges(recipe, context="[1, inf)")
    if Path(name).is_dir():
        found = known_kind(Path(name))
        if found is None or found.kind not in ("mllm", "adapter"):
            line = found.line if found else "an unknown folder"
            raise UserError(f"not a LLaVA model but: {line}", file=name, remedy=f"point {key} to a `train` run")


def bound_socket(host: str, port: int) -> socket.socket:
    """Bind a socket without listening yet, so that a taken address is reported before the model is loaded.

    Raises:
        UserError: the address is invalid or taken.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = error.strerror if isinstance(error, OSError) else "ports range from 0 to 65535"
        raise UserError(f"cannot listen on {host}:{port} ({reason})", remedy="change --host or --port") from error
    return bound


def start_engine(model: str, recipe: ModelRecipe, *, max_batch_size: int = 1, max_waiting: int = 64) -> Engine:
    """Load a full, adapter or merged checkpoint from a folder or the hub, and start its worker."""
    from clips_mllm.model.checkpoint import load_mllm
    from clips_mllm.talk.engine import Engine

    mllm = load_mllm(model, device=recipe.device, dtype=recipe.dtype, quantize=recipe.quantize)
    return Engine(mllm, context=recipe.context, max_batch_size=max_batch_size, max_waiting=max_waiting)


def read_token(file: str | None) -> str | None:
    """Read the access token from a file or the environment.

    It is not an option of the command line, because every user of a machine can read those.

    Raises:
        UserError: unreadable file or empty token.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        try:
            token = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("cannot be read as text", file=file, remedy="check token_file") from error
    if token is None:
        return None
    if not token.strip():
        source = {"key": TOKEN_VARIABLE} if file is None else {"file": file}
        raise UserError("the token is empty", **source, remedy="write a token, or remove the file or variable")
    return token.strip()
