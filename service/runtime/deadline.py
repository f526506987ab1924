"""One stage of a request may take only so long."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import DeadlineExceeded

ADVICE = "send fewer inputs at a time, or ask for less"


@asynccontextmanager
async def within(seconds: float | None, advice: str = ADVICE) -> AsyncIterator[asyncio.Timeout]:
    """Raises DeadlineExceeded where what is inside takes longer; None: as long as it likes."""
    try:
        async with asyncio.timeout(seconds) as clock:
            yield clock
    except TimeoutError:
        if not clock.expired():
            raise
        raise DeadlineExceeded(f"the request was not done within its deadline: {advice}") from None
