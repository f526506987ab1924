"""Places for so many at once. Whoever waits for one stands in their own caller's line, and the lines are served in
turn: a caller that asks for a thousand things makes another, who asks for one, wait for one."""

import asyncio
from collections import deque
from types import TracebackType

from service.errors import Overloaded
from service.runtime.logs import caller

MOST_WAITING = 2_048
"""Of one caller; past it, 429. Twice what the queue of a tower holds by default."""


class FairSemaphore:
    """Lives on one event loop. A caller is who the key of the request at hand names (`logs.caller`)."""

    def __init__(self, places: int, most_waiting: int = MOST_WAITING) -> None:
        self._free, self._most = places, most_waiting
        self._lines: dict[str | None, deque[asyncio.Future[None]]] = {}
        """None of them empty; the next to be served first."""

    async def acquire(self) -> None:
        """Take a place, now or in turn. Raises Overloaded where too many of this caller's wait already."""
        if self._free:
            self._free -= 1
            return
        name = caller.get()
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = deque()
        elif len(line) >= self._most:
            raise Overloaded("too many requests of this key are waiting")
        turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came just now
                self.release()
            else:
                self._leave(name, turn)
            raise

    def release(self) -> None:
        """Give a place back: to whoever is next."""
        while self._lines:
            name = next(iter(self._lines))
            line = self._lines.pop(name)
            turn = line.popleft()
            if line:
                self._lines[name] = line  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _leave(self, name: str | None, turn: "asyncio.Future[None]") -> None:
        line = self._lines.get(name, deque())
        if turn in line:
            line.remove(turn)
            if not line:
                del self._lines[name]

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
