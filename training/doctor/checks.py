"""One line of the doctor's table."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    what: str
    state: Literal["ok", "missing", "absent"]
    """`absent`: not there, and not needed by this recipe."""
    detail: str
