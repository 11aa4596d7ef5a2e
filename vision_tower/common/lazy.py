"""Lazy package exports (PEP 562): a name's module is imported when the name is first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Args:
        modules: the module that defines each exported name. `__version__` is that of the installed distribution, or
            "0+unknown" for code that is not installed.
    """

    def load(name: str) -> Any:
        if name == "__version__":
            try:
                return version("clips-mllm")
            except PackageNotFoundError:
                return "0+unknown"
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return load
