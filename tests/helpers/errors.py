"""Assertions on the fields of UserError, instead of on its wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vision_tower.common.errors import UserError

ANY: Any = object()


@contextmanager
def raises_user_error(
    *, file: str | Path | None = ANY, key: str | None = ANY, value: Any = ANY
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with these fields; fields left out are not compared."""
    with pytest.raises(UserError) as caught:
        yield caught
    error = caught.value
    if file is not ANY:
        assert error.file == (None if file is None else str(file)), error
    if key is not ANY:
        assert error.key == key, error
    if value is not ANY:
        assert error.value == value, error
