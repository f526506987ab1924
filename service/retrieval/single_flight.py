"""Work that many may ask for at the same time, and that is then done once."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Outcome = TypeVar("Outcome")


class OneAtATime(Generic[Outcome]):
    """Whoever asks while the work is being done gets its outcome; who asks later has it done again."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Outcome] | None = None

    async def __call__(self, work: Callable[[], Coroutine[Any, Any, Outcome]]) -> Outcome:
        """What `work` gives or raises; it goes on when one who asked is cancelled."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(work())
        return await asyncio.shield(self._task)


class Shared(Generic[Outcome]):
    """Work that is begun at once, that many may wait for, and that is given up when the last of them goes away."""

    def __init__(self, work: Coroutine[Any, Any, Outcome]) -> None:
        self.task = asyncio.create_task(work)
        self._waiting = 0
        # Seen, whoever is there to raise it.
        self.task.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def given_up(self) -> bool:
        """Whether nobody may begin to wait for it any more."""
        return self.task.done() or self.task.cancelling() > 0

    async def outcome(self, wait_s: float | None = None) -> Outcome:
        """What the work gives or raises. Raises TimeoutError after `wait_s`, and the work then goes on all the same."""
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
