"""The inputs of many requests share one model call.

No timer fills a batch: the model takes what waits, up to a budget, as soon as it is free, so a lone request never
waits and at saturation batches fill by themselves. While the model runs, one further batch is collated, once there
is enough for a full one. A model that takes several calls at once has a lane for each; what waits is shared out among
the lanes that are free.

What jobs want embedded waits in a line of its own, which is served when nothing else waits. While requests come, it
leaves a lane free for them and its calls are small, so that a request waits for little; once in a while it has a call
all the same, so that a busy server's jobs go on.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.errors import InputError
from service.errors import InferenceFailed, NotReady, ServiceError
from service.runtime import tracing
from service.runtime.metrics import TowerMetrics
from service.runtime.workers import WorkerDied, Workers

log = logging.getLogger(__name__)

Vectors = NDArray[np.float32]

_RESTART_S = (0.0, 0.01, 0.05, 0.25, 1.0)
"""Seconds before the 1st, 2nd … restart of a dead worker when no batch was answered in between."""
_ATTENDED_S = 5.0
"""Seconds after a request in which another is expected: meanwhile calls of jobs are small and leave it a lane."""
_SMALLER = 4
"""Divisor of such a call's budget: a request waits at most for that part of a full call."""
_PATIENCE_S = 1.0
"""Seconds without a call after which the queue of jobs gets one, whoever waits."""


@dataclass(frozen=True)
class Budget:
    """Bounds one call: the sum of sizes, or, where rows are padded, rows × the largest size."""

    limit: int
    padded: bool = False
    near: int | None = None
    """Size from which items are bucketed: no larger item is more than twice as large as another of its call. None:
    no buckets."""
    slack: int | None = None
    """Largest padding in one call; inputs beyond it wait for the next call. None: any."""
    waiting: int = 0
    """Size that may wait besides the running call; 0: two full calls."""

    @property
    def by_length(self) -> bool:
        return self.near is not None or self.slack is not None

    def cost(self, rows: int, total: int, largest: int) -> int:
        return rows * largest if self.padded else total

    def together(self, rows: int, total: int, smallest: int, largest: int) -> bool:
        near = self.near is None or largest <= max(2 * smallest, self.near)
        return near and (self.slack is None or rows * largest - total <= self.slack)


@dataclass(frozen=True)
class Answer:
    vector: NDArray[np.float32]
    """The vector (dimensions,) as the model returned it: a row of the batch's array."""
    queue_s: float
    model_s: float


@dataclass(eq=False)
class Prepared:
    """Holds an input as its tower takes it. In a queue it also has a future, which the queue resolves."""

    value: Any
    """The prepared input: pixels (3, H, W), Sound, or Tokens."""
    size: int
    """Cost in the unit of the modality's budget: 1 image, milliseconds of sound, tokens, or numbers of an array."""
    tokens: int = 0
    truncated: bool = False
    unknown: float = 0.0
    """Share of unknown tokens, as in contract.tokens.Tokens."""
    result: "asyncio.Future[Any]" = field(init=False)
    enqueued: float = field(init=False)
    origin: tracing.Origin | None = field(init=False)
    background: bool = field(init=False)
    returned: bool = False
    """Whether a worker died with it in hand."""


class Batcher:
    """Joins a queue and a model, on one event loop; each of the model's lanes has a thread, and collation has another.

    `collate` makes a call's arrays from inputs' values; `run` makes (B, dimensions) from those. Either may raise: the
    inputs are then run one by one, and only those that fail again are answered with InferenceFailed, or with an
    InputError that says `refusal`, where that is given and a vector is not finite or zero. A task or a thread
    of its own that dies is started again; what it had in hand is tried once more.
    """

    def __init__(
        self,
        name: str,
        collate: Callable[[Sequence[Any]], Any],
        run: Callable[[Any], Vectors],
        *,
        dimensions: int,
        budget: Budget,
        observer: TowerMetrics,
        lanes: int = 1,
        refusal: str | None = None,
    ) -> None:
        self.name, self._refusal = name, refusal
        self._collate, self._run_model = collate, run
        self._dimensions, self._budget = dimensions, budget
        self._observer = observer
        self._line, self._background = _Line(budget), _Line(budget)
        self._attended = self._background_served = -math.inf
        self._ahead: tuple[list[Prepared], Any] | None = None
        """Inputs of the next call, and their arrays; None for these where the collation failed."""
        self._preparing = False
        self._without_room = 0
        self._lanes, self._busy, self._busy_background = lanes, 0, 0
        self._closed = False
        self._deaths = 0
        self._item_s = 0.0
        self._begun: dict[object, float] = {}
        """When each running call began."""
        self._changed = asyncio.Event()
        self._model = Workers(f"{name}-model", lanes, died=observer.restarted)
        self._collator = Workers(f"{name}-collate", died=observer.restarted)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._start("collating")
        for lane in range(lanes):
            self._start(f"running-{lane}" if lane else "running")

    @property
    def alive(self) -> bool:
        """Return whether every task and thread of it is."""
        tasks = not any(task.done() for task in self._tasks.values())
        return not self._closed and tasks and self._model.alive and self._collator.alive

    @property
    def pace(self) -> float:
        """Return the seconds per item at which its lanes work together, lately."""
        return self._item_s / self._lanes

    @property
    def longest_call_s(self) -> float:
        """Return for how many seconds the oldest running call has run."""
        return time.perf_counter() - min(self._begun.values()) if self._begun else 0.0

    async def enqueue(
        self, prepared: Prepared, result: "asyncio.Future[Any]", *, background: bool = False, first: bool = False
    ) -> None:
        """Put an input in the queue. Its result becomes an Answer, InferenceFailed, or NotReady at shutdown.

        Waits while the budget's `waiting` is used up: whoever prepares inputs then stops preparing more, so that
        prepared inputs do not fill the memory. With `first` it goes to the head of the queue, full or not. Cancel the
        result to withdraw the input. Raises NotReady after close.
        """
        room = self._budget.waiting or 2 * self._budget.limit
        line = self._background if background else self._line
        while not (self._closed or first) and line.waiters and line.cost_with(prepared.size) > room:
            self._without_room += 1
            try:
                await self._changed.wait()
            finally:
                self._without_room -= 1
        if not (background or first):
            self._attended = time.perf_counter()
        if self._closed:
            raise NotReady("the server is shutting down")
        prepared.result, prepared.background = result, background
        prepared.enqueued, prepared.origin = time.perf_counter(), tracing.origin()
        result.add_done_callback(lambda result: self._withdraw(prepared) if result.cancelled() else None)
        line.put([prepared], first=first)
        self._notify()

    async def close(self) -> None:
        """Finish the call that runs, answer everything else with NotReady, stop the threads."""
        if self._closed:
            return
        self._closed = True
        self._notify()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        ahead, self._ahead = self._ahead[0] if self._ahead else (), None
        for waiter in (*self._line.take_all(), *self._background.take_all(), *ahead):
            _fail(waiter, NotReady("the server is shutting down"))
        await asyncio.to_thread(self._model.close)
        await asyncio.to_thread(self._collator.close)
        del self._run_model, self._collate  # a tower's memory is not to wait for the garbage collector

    # Between a test of the state and a wait there is no await, so that no change is missed.
    def _notify(self) -> None:
        idle = self._ahead is None and not (self._line.waiters or self._background.waiters)
        if idle and not (self._without_room or self._closed):
            return  # whoever waits would find nothing to do: to wake them costs more than the rest of a lone call
        self._changed.set()
        self._changed = asyncio.Event()

    def _line_of(self, waiter: Prepared) -> "_Line":
        return self._background if waiter.background else self._line

    def _withdraw(self, waiter: Prepared) -> None:
        if self._line_of(waiter).remove(waiter):
            self._notify()

    # Workers and their restarts

    def _start(self, name: str) -> None:
        work = self._collating if name == "collating" else self._running
        self._tasks[name] = task = asyncio.create_task(work(), name=f"{self.name}-{name}")
        task.add_done_callback(lambda task: self._restart(name, task))

    def _restart(self, name: str, task: "asyncio.Task[None]") -> None:
        if self._closed:
            return
        failure = None if task.cancelled() else task.exception()
        log.critical("the %s task of the %s batcher died", name, self.name, exc_info=failure)
        self._observer.restarted()
        delay = _RESTART_S[min(self._deaths, len(_RESTART_S) - 1)]
        self._deaths += 1
        if delay:
            asyncio.get_running_loop().call_later(delay, lambda: None if self._closed else self._start(name))
        else:
            self._start(name)

    def _give_back(self, waiters: Sequence[Prepared]) -> None:
        """Put a dying worker's inputs back at the head of the queue, and fail those that a dead worker had before."""
        retried = [waiter for waiter in waiters if not waiter.result.done() and not waiter.returned]
        for waiter in waiters:
            if waiter.returned:
                _fail(waiter, InferenceFailed("the model failed on this input"))
            waiter.returned = True
        for line in (self._line, self._background):
            line.put([waiter for waiter in retried if self._line_of(waiter) is line], first=True)

    async def _collating(self) -> None:
        while not self._closed:
            # Closing a batch that is not full before the model is free would only make it smaller.
            line = self._due()
            if self._ahead is not None or self._busy < self._lanes or line is None or not line.full(self._limit(line)):
                await self._changed.wait()
                continue
            waiters, arrays = line.take(self._limit(line)), None
            self._preparing = True
            try:
                arrays = await self._collator.run(partial(self._collate, [waiter.value for waiter in waiters]))
            except Exception:  # the model's thread tries again, and finds out which input it is
                log.debug("a batch of %d could not be collated ahead", len(waiters), exc_info=True)
            except BaseException:
                self._give_back(waiters)
                raise
            finally:
                self._preparing = False
            self._ahead = waiters, arrays
            self._notify()

    async def _running(self) -> None:
        while not self._closed:
            batch = self._next()
            if batch is None:
                await self._changed.wait()
                continue
            waiters, arrays = batch
            background = waiters[0].background
            self._busy += 1
            self._busy_background += background
            self._notify()
            try:
                if failure := await self._attempt(waiters, arrays):
                    await self._attempt_each(waiters, failure)
            except BaseException:
                self._give_back(waiters)
                raise
            finally:
                self._busy -= 1
                self._busy_background -= background
                if background:
                    self._background_served = time.perf_counter()
                self._notify()
            self._deaths = 0

    def _next(self) -> tuple[list[Prepared], Any] | None:
        """Return the batch that was collated ahead, or what waits; not before what is being collated, though.

        A batch of a job's that was collated ahead waits while a request does.
        """
        ahead = self._ahead
        if ahead is not None and (not ahead[0][0].background or self._background_turn()):
            self._ahead = None
            return ahead
        line = self._due()
        if self._preparing or line is None or (ahead is not None and line is self._background):
            return None
        return line.take(self._limit(line), sharers=self._lanes - self._busy), None

    def _due(self) -> "_Line | None":
        """Return the line to be served next; None where nothing waits that may be served now."""
        if self._background.waiters and self._background_turn():
            return self._background
        return self._line if self._line.waiters else None

    def _background_turn(self) -> bool:
        """Return whether a call may be a job's now."""
        if self._expecting() and self._busy_background >= max(1, self._lanes - 1):
            return False
        if not self._line.waiters:
            return True
        waiters = self._background.waiters if self._ahead is None else self._ahead[0]
        since = max(self._background_served, waiters[0].enqueued) if waiters else math.inf
        return time.perf_counter() - since > _PATIENCE_S

    def _expecting(self) -> bool:
        """Return whether requests come now and then."""
        return time.perf_counter() - self._attended < _ATTENDED_S

    def _limit(self, line: "_Line") -> int:
        small = line is self._background and self._expecting()
        return max(1, self._budget.limit // _SMALLER) if small else self._budget.limit

    async def _attempt_each(self, waiters: Sequence[Prepared], failure: Exception) -> None:
        """Run the inputs of a failed call one by one."""
        tried = len(waiters) == 1 and not isinstance(failure, WorkerDied)
        waiters = [waiter for waiter in waiters if not waiter.result.done()]
        if not isinstance(failure, InputError):
            log.warning("a batch of %d failed in the %s tower", len(waiters), self.name, exc_info=failure)
        if isinstance(failure, ServiceError):  # no single input is at fault: what the tower asks does not answer
            self._observer.failed(len(waiters))
            for waiter in waiters:
                _fail(waiter, failure)
            return
        for place, waiter in enumerate(waiters):
            error = failure if tried else await self._attempt([waiter], None)
            if isinstance(error, ServiceError):  # what the tower asks went away meanwhile: nobody's input is at fault
                unanswered = [waiter for waiter in waiters[place:] if not waiter.result.done()]
                self._observer.failed(len(unanswered))
                for waiter in unanswered:
                    _fail(waiter, error)
                return
            if isinstance(error, InputError):
                _fail(waiter, error.without_frames())
            elif error is not None:
                self._observer.failed(1)
                _fail(waiter, InferenceFailed("the model failed on this input"))

    async def _attempt(self, batch: Sequence[Prepared], arrays: Any) -> Exception | None:
        """Run one model call for those who still wait. Answers them and returns None, or answers nobody and returns
        the exception."""
        waiters = [waiter for waiter in batch if not waiter.result.done()]
        if not waiters:
            return None
        start_s, call_id = time.perf_counter(), object()
        # Where clients went away while the batch waited for the model, its arrays have rows too many.
        collated = arrays is not None and len(waiters) == len(batch)

        def call() -> Vectors:
            inputs = arrays if collated else self._collate([waiter.value for waiter in waiters])
            vectors = self._run_model(inputs)
            if vectors.shape != (len(waiters), self._dimensions):
                raise ValueError(f"the model gave {vectors.shape} for {len(waiters)} items")
            finite = np.isfinite(vectors).all()
            if self._refusal and not (finite and vectors.any(1).all()):
                raise InputError(self._refusal)
            if not finite:
                raise ValueError("the model gave numbers that are not finite")
            return vectors

        origins = [waiter.origin for waiter in waiters]
        self._begun[call_id] = start_s
        try:
            with tracing.batch(origins, {"isthmus.modality": self.name, "isthmus.items": len(waiters)}):
                vectors = await self._model.run(call)
        except Exception as error:
            return error
        finally:
            del self._begun[call_id]
        seconds = time.perf_counter() - start_s
        self._item_s += 0.2 * (seconds / len(waiters) - self._item_s)
        self._observer.batch([start_s - waiter.enqueued for waiter in waiters], seconds)
        for waiter, vector in zip(waiters, vectors, strict=True):
            if not waiter.result.done():
                waiter.result.set_result(Answer(vector, start_s - waiter.enqueued, seconds))
        return None


class _Line:
    """Keeps waiters in a queue, the oldest first, and the sum of their costs."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.waiters: list[Prepared] = []
        self._total = self._largest = 0

    def full(self, limit: int) -> bool:
        return self._budget.cost(len(self.waiters), self._total, self._largest) >= limit

    def cost_with(self, size: int) -> int:
        return self._budget.cost(len(self.waiters) + 1, self._total + size, max(self._largest, size))

    def put(self, waiters: Sequence[Prepared], *, first: bool) -> None:
        place = 0 if first else len(self.waiters)
        self.waiters[place:place] = waiters
        for waiter in waiters:
            self._total += waiter.size
            self._largest = max(self._largest, waiter.size)

    def remove(self, waiter: Prepared) -> bool:
        if waiter not in self.waiters:
            return False
        self._become([other for other in self.waiters if other is not waiter])
        return True

    def take_all(self) -> list[Prepared]:
        waiters = self.waiters
        self._become([])
        return waiters

    def take(self, limit: int, sharers: int = 1) -> list[Prepared]:
        """Remove and return the next batch: the oldest, then what goes with it, oldest first, or by likeness of length.

        Where several lanes are free it is no more than this one's share of what waits.
        """
        first, others = self.waiters[0], self.waiters[1:]
        limit = min(limit, -(-self._total // sharers)) if sharers > 1 else limit
        if self._budget.by_length:
            others.sort(key=lambda waiter: abs(waiter.size - first.size))
        batch, total, smallest, largest = [first], first.size, first.size, first.size
        for waiter in others:
            low, high, size = min(smallest, waiter.size), max(largest, waiter.size), total + waiter.size
            if self._budget.cost(len(batch) + 1, size, high) > limit:
                break
            if not self._budget.together(len(batch) + 1, size, low, high):
                continue
            batch.append(waiter)
            total, smallest, largest = size, low, high
        ids = set(map(id, batch))
        self._become([waiter for waiter in self.waiters if id(waiter) not in ids])
        return batch

    def _become(self, waiters: list[Prepared]) -> None:
        self.waiters = waiters
        self._total = sum(waiter.size for waiter in waiters)
        self._largest = max((waiter.size for waiter in waiters), default=0)


def _fail(waiter: Prepared, error: Exception) -> None:
    if not waiter.result.done():
        waiter.result.set_exception(error)
