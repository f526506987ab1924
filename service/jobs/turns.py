"""Many at once, or one alone: what may end the process is not to take its neighbours along.

A chunk that was in hand when a process died may be what killed it, or may have stood beside it. Tried alone, each
answers for itself only.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """In the order in which they come. Lives on one event loop."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def take(self, *, alone: bool) -> AsyncIterator[None]:
        if alone:
            async with self._door:
                await self._empty.wait()
                yield
            return
        async with self._door:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()
