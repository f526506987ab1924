"""Long rows of parameters, of which `make test` runs few and `make test-all` all."""

from collections.abc import Iterable
from typing import Any

import pytest


def matrix(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values as parameters; those that are not quick are marked `full`."""
    rows = list(values)
    assert all(value in rows for value in quick), "what runs in `make test` is one of the values"
    return [pytest.param(value, marks=() if value in quick else pytest.mark.full) for value in rows]
