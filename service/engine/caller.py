"""Who inputs are embedded for. It goes as one argument from where a request or a job comes in down to the towers."""

from dataclasses import dataclass, replace

from service.engine.fetch import Fetches
from service.runtime.quotas import Meter


@dataclass(frozen=True)
class Caller:
    meter: Meter | None = None
    """Of the key that is charged; None: nobody is."""
    fetches: Fetches | None = None
    """What fetches its URLs; None: they are not fetched."""
    background: bool = False
    """Whether the inputs wait behind those of others, take a quarter of the room at most, and have no deadline."""

    @property
    def uncharged(self) -> "Caller":
        """The same caller, for what has been paid for."""
        return replace(self, meter=None)


PROCESS = Caller()
"""The process itself."""
BACKGROUND = Caller(background=True)
"""The process itself, when nothing else waits."""
