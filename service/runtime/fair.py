"""A limited number of places is given in turn. Each caller has a waiting line, and the lines are served in turn: a
caller that asks for a thousand things makes another, who asks for one, wait for one; or for none, where a caller may
not have all the places."""

import asyncio
from collections import Counter, deque

from service.errors import Overloaded
from service.runtime.logs import caller

MOST_WAITING = 2_048
"""Largest number of waiting inputs of one caller; past it, 429. Twice what the queue of a tower holds by default."""


class FairSemaphore:
    """Gives places on one event loop. The caller is the key of the current request (`logs.caller`)."""

    def __init__(self, places: int, *, per_caller: int | None = None, most_waiting: int = MOST_WAITING) -> None:
        self._free, self._per_caller, self._most = places, per_caller or places, most_waiting
        self._taken: Counter[str | None] = Counter()
        """Places, by caller."""
        self._lines: dict[str | None, deque[asyncio.Future[None]]] = {}
        """Waiting lines by caller, none of them empty; the first is served next. While a place is free, all lines are
        those of callers who have as many places as they may."""

    async def acquire(self) -> str | None:
        """Take a place, now or in turn, and return the caller who has it. Raises Overloaded where too many of this
        caller's wait already."""
        name = caller.get()
        if self._free and self._taken[name] < self._per_caller:
            self._take(name)
            return name
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
                self.release(name)
            else:
                self._leave(name, turn)
            raise
        return name

    def release(self, name: str | None) -> None:
        """Give back a place of this caller, and wake the next waiters who may have one."""
        self._free += 1
        self._taken[name] -= 1
        if not self._taken[name]:
            del self._taken[name]
        while self._free:
            admissible = [name for name in self._lines if self._taken[name] < self._per_caller]
            if not admissible:
                return
            following = admissible[0]
            line = self._lines.pop(following)
            turn = line.popleft()
            if line:
                self._lines[following] = line  # behind the others
            if not turn.done():
                self._take(following)
                turn.set_result(None)

    def _take(self, name: str | None) -> None:
        self._free -= 1
        self._taken[name] += 1

    def _leave(self, name: str | None, turn: "asyncio.Future[None]") -> None:
        line = self._lines.get(name, deque())
        if turn in line:
            line.remove(turn)
            if not line:
                del self._lines[name]

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *error: object) -> None:
        self.release(caller.get())
