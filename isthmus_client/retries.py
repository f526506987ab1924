"""Pure functions decide whether and when to retry a request; the clients do the waiting."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

RETRIED_STATUSES = frozenset({429, 503})
RETRIED_FAILURES = (httpx2.ConnectError, httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)
"""No answer came, and asking again is safe: every request of this client can be repeated without harm, because writes
name their ids. A timeout is not among them: a server that is too slow does not get quicker by being asked twice."""


@dataclass(frozen=True)
class Retries:
    """Exponential backoff with full jitter: before try n + 1, between 0 and first_s × 2ⁿ seconds, at most `most_s`.

    What a server says by Retry-After is waited for at least, with jitter on top, so that those who were refused
    together do not come back together. One that asks for longer than `patience_s` is not waited for.
    """

    attempts: int = 5
    first_s: float = 0.25
    most_s: float = 20.0
    patience_s: float = 120.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}: at least 1, the first try")

    def pause(self, failures: int, retry_after_s: float | None) -> float | None:
        """Return the seconds to wait after so many failed tries (from 1); None where it is time to give up."""
        if failures >= self.attempts or (retry_after_s or 0.0) > self.patience_s:
            return None
        backoff = min(self.most_s, self.first_s * 2 ** (failures - 1))
        return (retry_after_s or 0.0) + random.uniform(0.0, backoff)


def retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds that the server asks to wait: Retry-After, a number or a date (RFC 9110, 10.2.3)."""
    header = response.headers.get("retry-after", "").strip()
    if header.isascii() and header.isdecimal():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
