"""A caller is who inputs are embedded for: one argument from a request or a job down to the towers."""

from dataclasses import dataclass, replace

from service.engine.fetch import Fetches
from service.runtime.quotas import Meter


@dataclass(frozen=True)
class Caller:
    meter: Meter | None = None
    """Meter of the key that is charged; None: no key is charged."""
    fetches: Fetches | None = None
    """Fetcher of the caller's URLs; None: they are not fetched."""
    background: bool = False
    """Whether the inputs wait behind those of others, take a quarter of the room at most, and have no deadline."""

    @property
    def uncharged(self) -> "Caller":
        """Return the same caller, for what has been paid for."""
        return replace(self, meter=None)


PROCESS = Caller()
"""The process itself."""
BACKGROUND = Caller(background=True)
"""The process itself, when nothing else waits."""
