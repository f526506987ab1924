"""A channel serves one modality of one model: it has a tower, a queue in front of it, and workers."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from service.contract.bundle import Bundle, Modality
from service.engine.batcher import Batcher
from service.engine.handling import handling
from service.engine.providers import ON_CPU
from service.engine.towers import Tower
from service.errors import NotReady, Overloaded
from service.runtime.fair import FairSemaphore
from service.runtime.logs import caller
from service.runtime.metrics import TowerMetrics
from service.settings import Settings

_CANARY_S = 5.0
_HANG_S = 60.0
"""A model call that takes longer counts as hanging; or longer than a request may take, where that is more."""
_SHARES = 8
"""A caller may always use one of so many parts of a queue's room, and send a request, however much others use."""


class Channel:
    """Admits, prepares and queues the inputs of one modality, on one event loop."""

    def __init__(
        self, bundle: Bundle, modality: Modality, tower: Tower, settings: Settings, metrics: TowerMetrics
    ) -> None:
        self._modality, self._settings, self._metrics = modality, settings, metrics
        self.tower = tower
        self.handling = handling(bundle, modality, settings)
        on_cpu, choice = tower.provider in ON_CPU, tower.choice
        self.budget = self.handling.budget(on_cpu, choice.batch if choice else None)
        self.lanes = choice.lanes if choice else settings.cpu_lanes if on_cpu else len(settings.gpus)
        self.batcher = Batcher(
            modality,
            self.handling.collate,
            tower.run,
            dimensions=bundle.manifest.dimensions,
            budget=self.budget,
            lanes=self.lanes,
            observer=metrics,
            refusal=self.handling.refusal,
        )
        self.hang_s = max(_HANG_S, settings.request_deadline_s)
        self.slots = FairSemaphore(settings.decode_workers + 1, per_caller=settings.decode_workers)
        """Places for inputs from decoding to the queue; like the last thread, the last place is for a second caller."""
        self.background_slots = asyncio.Semaphore(max(1, settings.decode_workers // 2))
        """The same of jobs, which so leave threads to decode what requests bring."""
        self._admitted = 0
        self._admitted_by: Counter[str | None] = Counter()
        self._decode_s = 0.0
        """Recent average of the seconds per input, with all decoding threads at work."""
        self._closed = False

    def decoded(self, seconds: float, inputs: int) -> None:
        """Note the seconds in which one thread decoded so many inputs."""
        self._metrics.decoded(seconds)
        if inputs:
            self._decode_s += 0.2 * (seconds / inputs / self._settings.decode_workers - self._decode_s)

    def depth(self) -> int:
        """Return the number of inputs admitted and not yet answered."""
        return self._admitted

    @property
    def alive(self) -> bool:
        """Return whether the workers are alive."""
        return not self._closed and not self.hangs and self.batcher.alive

    @property
    def hangs(self) -> bool:
        """Return whether a call of the tower takes so long that it will probably never end."""
        return self.batcher.longest_call_s > self.hang_s

    @property
    def _pace(self) -> float:
        """Return the seconds for one input, lately: what takes longer sets it, decoding or the model."""
        return max(self.batcher.pace, self._decode_s)

    @contextmanager
    def admit(self, items: int) -> Iterator[None]:
        """Reserve room for `items` before any work is done for them. Raises Overloaded, or NotReady once closed.

        There is room for `queue_inputs`, and for what the tower, as fast as it lately is, does in `queue_s`. Where
        others use it all, a caller has room for a request, or for a part of that.
        """
        self._refuse_if_unable()
        if not self.has_room(items):
            raise Overloaded(
                f"too many {self._modality} inputs are waiting", retry_after_s=self.until_there_is_room(items)
            )
        name = caller.get()
        self._admitted += items
        self._admitted_by[name] += items
        try:
            yield
        finally:
            self._admitted -= items
            self._admitted_by[name] -= items
            if not self._admitted_by[name]:
                del self._admitted_by[name]

    def has_room(self, items: int) -> bool:
        """Return whether there is, for the caller at hand."""
        admitted = self._admitted_by[caller.get()]
        share = admitted < self._admitted and (not admitted or self._fits(admitted, items, _SHARES))
        return share or self._fits(self._admitted, items, 1)

    def _fits(self, admitted: int, items: int, shares: int) -> bool:
        room, wait_s = self._settings.queue_inputs / shares, self._settings.queue_s / shares
        return admitted + items <= room and admitted * self._pace <= wait_s

    async def canary(self) -> None:
        """Embed a small input, ahead of what waits. Raises if anything on the way does not work."""
        self._refuse_if_unable()
        if not self.batcher.alive:
            raise NotReady("a worker died and is not replaced yet")
        answer = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(_CANARY_S):
            await self.batcher.enqueue(replace(self.handling.canary), answer, first=True)
            if not (await answer).vector.any():
                raise ValueError("the canary's vector has no direction")

    async def close(self) -> None:
        """Answer all waiting inputs with NotReady, and stop the workers."""
        self._closed = True
        await self.batcher.close()

    def _refuse_if_unable(self) -> None:
        """Raises NotReady where the channel is closed, or its tower hangs."""
        if self._closed:
            raise NotReady("the server is shutting down")
        if self.hangs:
            raise NotReady(f"the {self._modality} model does not answer")

    def until_there_is_room(self, items: int = 1) -> int:
        """Return how many seconds (1 to 60) pass at the recent pace until what is admitted takes `queue_s` and leaves
        places for so many inputs.

        Whoever came back only when all of it is done would find an idle server.
        """
        places = self._settings.queue_inputs
        too_long_s = self._pace * self._admitted - self._settings.queue_s
        too_many_s = self._pace * (self._admitted + min(items, places) - places)
        return min(60, max(1, math.ceil(max(too_long_s, too_many_s))))
