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
