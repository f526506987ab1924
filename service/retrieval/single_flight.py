"""Work that several callers ask for at the same time and that runs once."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Outcome = TypeVar("Outcome")


class SingleFlight(Generic[Outcome]):
    """Runs one call at a time: callers that arrive while it runs share its outcome, later ones start it again."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Outcome] | None = None

    async def __call__(self, work: Callable[[], Coroutine[Any, Any, Outcome]]) -> Outcome:
        """Return the result of `work` or raise its error. The work goes on when one of its callers is cancelled."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(work())
        return await asyncio.shield(self._task)


class Shared(Generic[Outcome]):
    """Work that begins at once, for several callers, and is cancelled when the last of them goes away."""

    def __init__(self, work: Coroutine[Any, Any, Outcome]) -> None:
        self.task = asyncio.create_task(work)
        self._waiting = 0
        # Mark the exception as retrieved, even where nobody waits to raise it.
        self.task.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def given_up(self) -> bool:
        """Return whether nobody may begin to wait for it any more."""
        return self.task.done() or self.task.cancelling() > 0

    async def outcome(self, wait_s: float | None = None) -> Outcome:
        """Return the work's result or raise its error. Raises TimeoutError after `wait_s`; the work goes on."""
        self._waiting += 1
        late = False
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.shield(self.task)
        except TimeoutError:
            late = True
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and not late:
                self.task.cancel()
