"""Many requests, one model call.

No timer fills a batch: the model takes what waits, up to a budget, as soon as it is free, so a lone request never
waits and at saturation batches fill by themselves. While the model runs, one further batch is collated, once there
is enough for a full one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceFailed, NotReady, Overloaded

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Budget:
    """How much goes into one call: the sum of sizes, or, where rows are padded, rows × the largest size."""

    limit: int
    padded: bool = False

    def cost(self, rows: int, total: int, largest: int) -> int:
        return rows * largest if self.padded else total


class Observer(Protocol):
    def batch(self, items: int, seconds: float) -> None: ...
    def failed(self, items: int) -> None: ...


@dataclass(frozen=True)
class Answer:
    vector: Vector
    """(dimensions,), as the model gave it."""
    queue_s: float
    model_s: float


@dataclass(eq=False)
class _Waiter(Generic[Item]):
    item: Item
    size: int
    result: asyncio.Future[Answer]
    enqueued: float = field(default_factory=time.perf_counter)


@dataclass
class _Batch(Generic[Item]):
    waiters: list[_Waiter[Item]]
    arrays: Any = None
    failure: Exception | None = None
    """Of the collation."""


class Batcher(Generic[Item]):
    """One queue and one model. Lives on one event loop; the model has a thread of its own, collation another.

    `collate` makes a call's arrays from items; `run` makes (B, dimensions) from those. Either may raise: the items are
    then run one by one, and only those that fail again are answered with InferenceFailed.
    """

    def __init__(
        self,
        name: str,
        collate: Callable[[Sequence[Item]], Any],
        run: Callable[[Any], Vector],
        *,
        dimensions: int,
        budget: Budget,
        capacity: int,
        observer: Observer | None = None,
    ) -> None:
        self.name = name
        self._collate, self._run_model = collate, run
        self._dimensions, self._budget, self._capacity = dimensions, budget, capacity
        self._observer = observer
        self._admitted = 0
        self._waiting: list[_Waiter[Item]] = []
        self._ahead: _Batch[Item] | None = None
        self._busy = False
        self._closed = False
        self._changed = asyncio.Event()
        self._model_thread = ThreadPoolExecutor(1, f"{name}-model")
        self._collate_thread = ThreadPoolExecutor(1, f"{name}-collate")
        self._workers = [
            asyncio.create_task(self._collating(), name=f"{name}-collating"),
            asyncio.create_task(self._running(), name=f"{name}-running"),
        ]

    @property
    def alive(self) -> bool:
        return not self._closed and not any(worker.done() for worker in self._workers)

    @property
    def depth(self) -> int:
        """Inputs admitted and not yet answered."""
        return self._admitted

    @contextmanager
    def admit(self, items: int) -> Iterator[None]:
        """Take room for `items` before any work is done for them. Raises Overloaded, or NotReady once closed."""
        if self._closed:
            raise NotReady("the server is shutting down")
        if self._admitted + items > self._capacity:
            raise Overloaded(f"too many {self.name} inputs are waiting")
        self._admitted += items
        try:
            yield
        finally:
            self._admitted -= items

    async def enqueue(self, item: Item, size: int) -> asyncio.Future[Answer]:
        """Put an item in the queue and return its answer to come.

        Waits while two full batches are waiting already: whoever prepares items then stops preparing more, so that
        prepared items do not fill the memory. Cancel the result to withdraw the item.
        """
        while not self._closed and self._waiting and self._cost(self._waiting) + size > 2 * self._budget.limit:
            await self._changed.wait()
        if self._closed:
            raise NotReady("the server is shutting down")
        waiter = _Waiter(item, size, asyncio.get_running_loop().create_future())
        waiter.result.add_done_callback(lambda _: self._withdraw(waiter))
        self._waiting.append(waiter)
        self._notify()
        return waiter.result

    async def submit(self, item: Item, size: int) -> Answer:
        """Enqueue and wait. Raises InferenceFailed for an item the model fails on, NotReady at shutdown."""
        return await (await self.enqueue(item, size))

    async def close(self) -> None:
        """Finish the call that runs, answer everything else with NotReady, stop the threads."""
        if self._closed:
            return
        self._closed = True
        self._notify()
        await asyncio.gather(*self._workers, return_exceptions=True)
        left = [*self._waiting, *(self._ahead.waiters if self._ahead else ())]
        self._waiting, self._ahead = [], None
        for waiter in left:
            _fail(waiter, NotReady("the server is shutting down"))
        self._model_thread.shutdown()
        self._collate_thread.shutdown()

    # Between a test of the state and a wait there is no await, so that no change is missed.
    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _withdraw(self, waiter: _Waiter[Item]) -> None:
        if waiter.result.cancelled() and waiter in self._waiting:
            self._waiting.remove(waiter)
            self._notify()

    def _cost(self, waiters: Sequence[_Waiter[Item]]) -> int:
        sizes = [waiter.size for waiter in waiters]
        return self._budget.cost(len(sizes), sum(sizes), max(sizes, default=0))

    async def _collating(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closed:
            # With the model at work, a batch that is not full would only be smaller for being closed early.
            full = self._cost(self._waiting) >= self._budget.limit
            if self._ahead is not None or not self._waiting or (self._busy and not full):
                await self._changed.wait()
                continue
            batch = _Batch(self._take())
            try:
                items = [waiter.item for waiter in batch.waiters]
                batch.arrays = await loop.run_in_executor(self._collate_thread, self._collate, items)
            except Exception as error:
                batch.failure = error
            self._ahead = batch
            self._notify()

    async def _running(self) -> None:
        while True:
            if self._closed:
                return
            if self._ahead is None:
                await self._changed.wait()
                continue
            batch, self._ahead, self._busy = self._ahead, None, True
            self._notify()
            try:
                await self._answer(batch)
            except Exception:
                log.exception("the %s batcher failed on a batch", self.name)
                for waiter in batch.waiters:
                    _fail(waiter, InferenceFailed("the model failed on this input"))
            self._busy = False
            self._notify()

    def _take(self) -> list[_Waiter[Item]]:
        """The next batch: the oldest that waits, then what goes with it, oldest first, or by likeness of length."""
        first, rest = self._waiting[0], self._waiting[1:]
        if self._budget.padded:
            rest.sort(key=lambda waiter: abs(waiter.size - first.size))
        taken, total, shortest, largest = [first], first.size, first.size, first.size
        for waiter in rest:
            shortest, largest = min(shortest, waiter.size), max(largest, waiter.size)
            total += waiter.size
            if self._budget.cost(len(taken) + 1, total, largest) > self._budget.limit:
                break
            if self._budget.padded and largest > max(2 * shortest, 16):
                break  # more than half of a row would be padding: another call is cheaper
            taken.append(waiter)
        chosen = set(map(id, taken))
        self._waiting = [waiter for waiter in self._waiting if id(waiter) not in chosen]
        return taken

    async def _answer(self, batch: _Batch[Item]) -> None:
        waiters = [waiter for waiter in batch.waiters if not waiter.result.done()]
        if not waiters:
            return
        failure = batch.failure
        if failure is None and len(waiters) == len(batch.waiters):
            failure = await self._attempt(waiters, batch.arrays)
        elif failure is None:  # some went away while the batch waited for the model
            failure = await self._attempt(waiters, None)
        if failure is None:
            return
        log.warning("a batch of %d failed in the %s tower", len(waiters), self.name, exc_info=failure)
        for waiter in waiters:
            if waiter.result.done():
                continue
            alone = failure if len(waiters) == 1 else await self._attempt([waiter], None)
            if alone is not None:
                if self._observer:
                    self._observer.failed(1)
                _fail(waiter, InferenceFailed("the model failed on this input"))

    async def _attempt(self, waiters: Sequence[_Waiter[Item]], arrays: Any) -> Exception | None:
        """One model call. Answers the waiters and returns None, or answers none and returns what went wrong."""
        started = time.perf_counter()

        def call() -> Vector:
            given = self._collate([waiter.item for waiter in waiters]) if arrays is None else arrays
            vectors = self._run_model(given)
            if vectors.shape != (len(waiters), self._dimensions):
                raise ValueError(f"the model gave {vectors.shape} for {len(waiters)} items")
            if not np.isfinite(vectors).all():
                raise ValueError("the model gave numbers that are not finite")
            return vectors

        try:
            vectors = await asyncio.get_running_loop().run_in_executor(self._model_thread, call)
        except Exception as error:
            return error
        seconds = time.perf_counter() - started
        if self._observer:
            self._observer.batch(len(waiters), seconds)
        for waiter, vector in zip(waiters, vectors, strict=True):
            if not waiter.result.done():
                waiter.result.set_result(Answer(vector, started - waiter.enqueued, seconds))
        return None


def _fail(waiter: _Waiter[Any], error: Exception) -> None:
    if not waiter.result.done():
        waiter.result.set_exception(error)
