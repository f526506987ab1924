"""One modality of one model: a tower, its queue and its workers. It can be closed while idle, and replaced in use.

Whoever embeds holds the tower that was open when it began. A tower that is replaced, or closed for want of work, is
let go when the last of those is done; so no request is dropped.
"""

import asyncio
import ctypes
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle, Modality, Precision
from service.contract.vectors import l2_normalise
from service.engine.batcher import Batcher
from service.engine.handling import Handling, handling
from service.engine.towers import CPU, Arrays, Tower, TowerError
from service.errors import NotReady, Overloaded
from service.runtime.fair import FairSemaphore
from service.runtime.logs import caller
from service.runtime.metrics import TowerMetrics
from service.settings import Settings

log = logging.getLogger(__name__)

_CANARY_S = 5.0
_SHARES = 8
"""A caller may always use one of so many parts of a queue's room, and send a request, however much others use."""


class Runs(Protocol):
    """A tower, or what stands in for one."""

    provider: str
    precision: Precision

    def run(self, arrays: Arrays) -> NDArray[np.float32]: ...


Open = Callable[[Bundle, Modality], Runs]
"""Slow: for a thread. Raises TowerError or BundleError."""


def opener(settings: Settings) -> Open:
    return lambda bundle, modality: Tower(
        bundle,
        modality,
        settings.device,
        settings.call_threads,
        settings.precision,
        settings.towers_on_gpus,
        settings.batch_audio_seconds,
    )


def _trim() -> None:
    """Give freed memory back to the system: glibc by itself keeps much of what a tower took."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Engine:
    """An open tower, how its inputs are prepared, and the queue in front of it."""

    def __init__(
        self, bundle: Bundle, modality: Modality, tower: Runs, settings: Settings, how: Handling, metrics: TowerMetrics
    ) -> None:
        self.bundle, self.handling, self.tower = bundle, how, tower
        self.provider, self.precision = tower.provider, tower.precision
        on_cpu = tower.provider == CPU
        self.batcher: Batcher[Any] = Batcher(
            modality,
            how.collate,
            partial(_run, tower),
            dimensions=bundle.manifest.dimensions,
            budget=how.budget(on_cpu),
            lanes=settings.cpu_lanes if on_cpu else len(settings.gpus),
            observer=metrics,
        )
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def used(self) -> bool:
        return self._users > 0

    @contextmanager
    def use(self) -> Iterator[None]:
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def canary(self) -> None:
        """Embed a small input, ahead of what waits. Raises if anything on the way does not work."""
        if not self.batcher.alive:
            raise NotReady("a worker died and is not replaced yet")
        small = self.handling.canary
        async with asyncio.timeout(_CANARY_S):
            answer = await self.batcher.submit(small.value, small.size, first=True)
        l2_normalise(answer.vector)

    async def retire(self) -> None:
        """Close, once nobody uses it any more."""
        await self._unused.wait()
        await self.batcher.close()


class Channel:
    """Lives on one event loop."""

    def __init__(
        self, bundle: Bundle, modality: Modality, tower: Runs, open: Open, settings: Settings, metrics: TowerMetrics
    ) -> None:
        self._bundle, self._modality, self._open = bundle, modality, open
        self._settings, self._metrics = settings, metrics
        self.slots = FairSemaphore(settings.decode_workers)
        """Held from undecoded to enqueued."""
        self.background_slots = asyncio.Semaphore(max(1, settings.decode_workers // 2))
        """The same of jobs, which so leave threads to decode what requests bring."""
        self.provider, self.precision = tower.provider, tower.precision
        """What the tower obtained when it was last opened."""
        self._admitted = 0
        self._admitted_by: Counter[str | None] = Counter()
        self._decode_s = 0.0
        """For one input, with all the threads that decode at work, lately."""
        how = handling(bundle, modality, settings)
        self._engine: Engine | None = Engine(bundle, modality, tower, settings, how, metrics)
        metrics.opened()
        self._opening: asyncio.Task[None] | None = None
        self._broken = False
        self._closed = False
        self._retiring: dict[asyncio.Task[None], Engine] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wait_for_idleness()

    def decoded(self, seconds: float, inputs: int) -> None:
        """Note for how long one thread decoded so many inputs."""
        self._metrics.decoded(seconds)
        if inputs:
            self._decode_s += 0.2 * (seconds / inputs / self._settings.decode_workers - self._decode_s)

    @property
    def depth(self) -> int:
        """Inputs admitted and not yet answered."""
        return self._admitted

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    @property
    def alive(self) -> bool:
        """Whether the workers are; a tower that is closed for want of work has none."""
        return (
            not self._closed
            and not self._broken
            and not self.hangs
            and (self._engine is None or self._engine.batcher.alive)
        )

    @property
    def hangs(self) -> bool:
        """Whether a call of the tower takes so long that nothing can be expected of it."""
        return self._engine is not None and self._engine.batcher.longest_call_s > self._settings.hang_s

    @property
    def _pace(self) -> float:
        """Seconds for one input, lately: what takes longer sets it, decoding or the model."""
        return 0.0 if self._engine is None else max(self._engine.batcher.pace, self._decode_s)

    @contextmanager
    def admit(self, items: int) -> Iterator[None]:
        """Take room for `items` before any work is done for them. Raises Overloaded, or NotReady once closed.

        There is room for `queue_inputs`, and for what the tower, as fast as it lately is, does in `queue_s`. Where
        others use it all, a caller has room for a request, or for a part of that.
        """
        if self._closed:
            raise NotReady("the server is shutting down")
        if self.hangs:
            raise NotReady(f"the {self._modality} model does not answer")
        if not self.has_room(items):
            raise Overloaded(f"too many {self._modality} inputs are waiting", retry_after_s=self.until_there_is_room())
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
        """Whether there is, for the caller at hand."""
        own = self._admitted_by[caller.get()]
        share = own < self._admitted and (not own or self._fits(own, items, _SHARES))
        return share or self._fits(self._admitted, items, 1)

    def _fits(self, admitted: int, items: int, shares: int) -> bool:
        room, wait_s = self._settings.queue_inputs / shares, self._settings.queue_s / shares
        return admitted + items <= room and admitted * self._pace <= wait_s

    @asynccontextmanager
    async def using(self) -> AsyncIterator[Engine]:
        """The tower as it is now, opened if need be; it stays open inside. Raises NotReady if it cannot be opened."""
        engine = self._engine or await self._reopen()
        try:
            with engine.use():
                yield engine
        finally:
            self._wait_for_idleness()

    async def canary(self) -> None:
        """Raises if the tower does not work. One that is closed for want of work is not opened for this."""
        if self._closed:
            raise NotReady("the server is shutting down")
        if self.hangs:
            raise NotReady(f"the {self._modality} model does not answer")
        if self._engine is None and self._broken:
            await self._reopen()
        if self._engine is not None:
            await self._engine.canary()

    async def prepare(self, bundle: Bundle) -> Engine:
        """The same modality of another bundle, open and tried out, for `install`. Raises TowerError, BundleError."""
        tower, how = await asyncio.to_thread(
            lambda: (self._open(bundle, self._modality), handling(bundle, self._modality, self._settings))
        )
        engine = Engine(bundle, self._modality, tower, self._settings, how, self._metrics)
        try:
            await engine.canary()
        except Exception as error:
            await engine.retire()
            raise TowerError(f"the {self._modality} tower does not embed a small input: {error}") from error
        return engine

    def install(self, engine: Engine) -> None:
        """From now on this one is used; the one before it finishes what it has."""
        old, self._engine = self._engine, engine
        self._bundle, self._broken = engine.bundle, False
        self.provider, self.precision = engine.provider, engine.precision
        if old is not None:
            self._retire(old)
        self._metrics.opened()
        if self._closed:  # meanwhile
            self._engine = None
            self._retire(engine)
        self._wait_for_idleness()

    async def close(self) -> None:
        """Answer everything that waits with NotReady, and stop the workers."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._opening is not None:
            await self._opening
        if self._engine is not None:
            await self._engine.batcher.close()
        await asyncio.gather(*(engine.batcher.close() for engine in self._retiring.values()))
        await asyncio.gather(*self._retiring)

    async def _reopen(self) -> Engine:
        # Whoever waits for it may give up: the tower is opened all the same, for the next who comes.
        if self._opening is None:
            self._opening = asyncio.create_task(self._open_again())
            self._opening.add_done_callback(lambda _: setattr(self, "_opening", None))
        await asyncio.shield(self._opening)
        if self._engine is None or self._closed:
            raise NotReady(f"the {self._modality} tower is not open")
        return self._engine

    async def _open_again(self) -> None:
        try:
            there = await asyncio.to_thread(self._bundle.read_again)
            if there.manifest != self._bundle.manifest:
                raise TowerError(f"{there.path} holds another bundle now: reload it")
            engine = await self.prepare(self._bundle)
        except Exception:
            self._broken = True
            log.exception("the %s tower cannot be opened", self._modality)
            return
        if self._engine is None:
            self.install(engine)
        else:  # a reload came first
            self._retire(engine)

    def _wait_for_idleness(self) -> None:
        if self._settings.unload_idle_s is None or self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._settings.unload_idle_s, self._unload)

    def _unload(self) -> None:
        engine = self._engine
        if engine is not None and not engine.used:
            log.info("the %s tower is closed for want of work", self._modality)
            self._engine = None
            self._retire(engine)

    def _retire(self, engine: Engine) -> None:
        task = asyncio.create_task(engine.retire())
        self._retiring[task] = engine
        task.add_done_callback(self._let_go)

    def _let_go(self, task: "asyncio.Task[None]") -> None:
        del self._retiring[task]
        asyncio.get_running_loop().run_in_executor(None, _trim)

    def until_there_is_room(self) -> int:
        """Seconds, 1 to 60: how long the model takes for what has been admitted, at its pace of late."""
        return min(60, max(1, math.ceil(self._pace * self._admitted)))


def _run(tower: Runs, arrays: Arrays) -> NDArray[np.float32]:
    """Rows scaled to length 1, all at once and in the model's thread; those without a direction as they are."""
    vectors = tower.run(arrays)
    try:
        return l2_normalise(vectors)
    except ValueError:
        return np.stack([_unit_or_same(row) for row in vectors])


def _unit_or_same(row: NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        return l2_normalise(row)
    except ValueError:
        return row
