"""Who inputs are embedded for. It goes as one argument from where a request or a job comes in down to the towers."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from service.contract.errors import InputError

Unit = Literal["requests", "items", "pixels", "seconds", "characters"]
Costs = Mapping[Unit, float]
Fetch = Callable[[Sequence[tuple[Literal["image", "audio"], str]]], Awaitable[list[bytes | InputError]]]
"""Kinds and URLs → what is there, or what is wrong with it, in order. Raises RateLimited, DeadlineExceeded."""


@dataclass(frozen=True)
class Caller:
    key: str = ""
    """The id of the API key that is charged; empty where nobody is."""
    units: frozenset[Unit] = frozenset()
    """Those of which the key may use only so much: others need not be measured."""
    charge: Callable[[Costs], Awaitable[None]] | None = None
    """Takes costs from the key's limits. Raises RateLimited."""
    fetch: Fetch | None = None
    """None: URLs are not fetched."""
    background: bool = False
    """Whether the inputs wait behind those of others, take a quarter of the room at most, and have no deadline."""

    @property
    def uncharged(self) -> "Caller":
        """The same caller, for what has been paid for."""
        return replace(self, units=frozenset(), charge=None)


PROCESS = Caller()
"""The process itself: nobody is charged, and no URL is fetched."""
BACKGROUND = Caller(background=True)
"""The process itself, when nothing else waits."""
