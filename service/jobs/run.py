"""A run takes one job from its input to the store: it plans, cuts into chunks, and embeds and stores each chunk in
order.

Chunks are stored in order, so that of an id that comes twice the later stays, as though the items had been sent one
after the other, and so that a number says what is left after a crash.
"""

import asyncio
import logging
import sqlite3
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from service.contract.errors import InputError
from service.contract.videos import claims_of
from service.engine.caller import BACKGROUND
from service.engine.embedder import Embedder
from service.engine.fetch import Fetcher, Fetches
from service.engine.inputs import Input, Media, Single, Url, Video, costs_of, opened, parts_of
from service.engine.previews import Previewer
from service.errors import DeadlineExceeded, FetchFailed, NotReady, Overloaded, RateLimited, input_problem
from service.jobs.input import Bounds, Reader, Unusable, build
from service.jobs.ledger import Chunk, Job, Ledger, LedgerThread, Refusal
from service.retrieval.indexing import NewItem, embed_items
from service.runtime.disk import Disk
from service.runtime.metrics import Metrics
from service.runtime.quotas import Costs, Limiter, Meter, Unit
from service.runtime.workers import Workers
from service.settings import Limits, Settings
from service.store import Entry, Store

log = logging.getLogger(__name__)

_CHUNK_ITEMS, _CHUNK_BYTES = 256, 8 * 2**20
_EMBEDDED_CHUNKS = 2
"""Number of chunks, of all jobs, embedded at once: one is read while the other is in the model."""
_PENDING_CHUNKS = 8
"""Number of chunks of a job that are embedded or wait to be stored, because the first of them takes long."""
_STORED_ITEMS = 512
"""Approximate number of items stored in one write."""
ATTEMPTS = 3
"""Tries of a chunk, by processes that end before it is done or fail on it, before its items are tried one by one;
and tries of an item before it is refused."""
_POISON = ("poison", "the server ended or failed whenever it worked on this item, so that it was left out")
_MOST_ITEMS = 10_000_000
"""Items of one job."""
_THREADS = 4
"""Number of threads that read and write the files of jobs: as many as jobs are worked on at once."""
_RATE_S = 30.0
_SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
_FETCHED_URLS = 8
"""Number of URLs whose media are in memory together."""
FETCH_PAUSES_S = (1.0, 5.0, 20.0)
"""Seconds before each further try of URLs that failed temporarily."""

Outcome = Entry | Refusal


class Cancelled(Exception):
    """Raised where a client cancelled the job."""


class Poison(Exception):
    """Raised for items on which the process ended, or failed, whenever it worked on them."""


@dataclass(frozen=True)
class EmbeddingContext:
    """Holds the services that embed a job's items."""

    embedder: Embedder
    store: Store
    previewer: Previewer | None
    """Maker of previews; None: no previews are stored."""
    limiter: Limiter
    fetcher: Fetcher | None
    """Fetcher of URLs; None: URLs are not fetched."""


class Places:
    """Gives places to some chunks at once, or to one alone. Lives on one event loop.

    A chunk that was in hand when a process ended may have been what ended it, or may have stood beside that. Tried
    alone, it answers for itself only.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_EMBEDDED_CHUNKS)
        self._door = asyncio.Lock()

    @asynccontextmanager
    async def take(self, *, alone: bool) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            async with self._door:
                for _ in range(_EMBEDDED_CHUNKS if alone else 1):
                    await stack.enter_async_context(self._free)
            yield


class Workplace:
    """Holds the services and limits that the runs of all jobs share."""

    def __init__(
        self, folder: Path, ledger: LedgerThread, settings: Settings, context: EmbeddingContext, metrics: Metrics
    ) -> None:
        self.folder, self.ledger, self.settings = folder, ledger, settings
        self.context, self.metrics = context, metrics
        self.bounds = Bounds(settings.limits, _MOST_ITEMS)
        self.disk = Disk(folder, settings.least_free_bytes)
        self.places = Places()
        self.threads = Workers("jobs", _THREADS, spare=1)

    async def count_jobs(self) -> None:
        """Count jobs by state, for the metrics."""
        with suppress(NotReady):
            self.metrics.count_jobs(await self.ledger.do(Ledger.counts))


@dataclass(frozen=True)
class Progress:
    job: Job
    rate: float | None = None
    """Recent items per second; None where nothing was done lately."""
    eta_s: float | None = None


class Run:
    """Works on one job. Lives on one event loop."""

    def __init__(self, job: Job, workplace: Workplace) -> None:
        self.job = job
        self.finished = asyncio.Event()
        self.cancelled = False
        self.pending: deque[tuple[Chunk, asyncio.Task[list[Outcome]]]] = deque()
        self._workplace, self._ledger = workplace, workplace.ledger
        self._meter = None if job.meter is None else Meter.parse(workplace.context.limiter, job.meter)
        self._stopped = threading.Event()
        self._reading = asyncio.Lock()
        self._seen: deque[tuple[float, int]] = deque()
        """Recent times and numbers of items stored or refused."""

    @property
    def left(self) -> int:
        """Return the number of items that are neither stored nor refused yet; 0 until they are counted."""
        return 0 if self.job.total is None else self.job.total - self.job.done - self.job.failed

    def stop(self) -> None:
        """Let the work in threads end."""
        self._stopped.set()

    def cancel(self) -> None:
        self.cancelled = True
        self.stop()
        for _, task in self.pending:
            task.cancel()

    def progress(self) -> Progress:
        rate = eta_s = None
        if len(self._seen) > 1:
            (since, before), (_, after) = self._seen[0], self._seen[-1]
            if after > before:
                rate = (after - before) / (time.monotonic() - since)
        if rate and self.job.total is not None:
            eta_s = self.left / rate
        return Progress(self.job, rate, eta_s)

    async def work(self) -> None:
        """Work to the end of the input. Raises Unusable, Cancelled, DiskFull, NotReady."""
        reader = await self._open_plan()
        try:
            self._note()
            attempted = await self._ledger.do(Ledger.attempted, self.job)
            first = self.job.next
            while not self.cancelled:
                while len(self.pending) < _PENDING_CHUNKS:
                    length = await self._workplace.threads.run(
                        partial(reader.length, first, _CHUNK_ITEMS, _CHUNK_BYTES)
                    )
                    if not length:
                        break
                    chunk = attempted.get(first) or Chunk(first, length)
                    self.pending.append(self._begin(reader, chunk))
                    first += chunk.count
                if not self.pending:
                    return
                await self._store_next(reader)
            raise Cancelled
        finally:
            for _, task in self.pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in self.pending), return_exceptions=True)
            reader.close()

    def _note(self) -> None:
        now = time.monotonic()
        self._seen.append((now, self.job.done + self.job.failed))
        while len(self._seen) > 2 and self._seen[1][0] < now - _RATE_S:
            self._seen.popleft()

    async def _open_plan(self) -> Reader:
        job, workplace = self.job, self._workplace
        source, plan = workplace.folder / job.id / "input", workplace.folder / job.id / "plan.sqlite3"
        if job.total is None:
            try:
                total = await self._workplace.threads.run(
                    partial(build, job.form, source, plan, workplace.bounds, self._stopped, workplace.disk)
                )
            except FileNotFoundError:
                raise Unusable("the files of the job are gone") from None
            if self.cancelled:
                raise Cancelled
            self.job = await self._ledger.do(Ledger.begin, job, total)
            await workplace.count_jobs()
            if self.job.state != "running":  # it was cancelled before it was begun
                raise Cancelled
        try:
            return await self._workplace.threads.run(partial(Reader, source, plan))
        except (OSError, sqlite3.Error):
            raise Unusable("the files of the job are gone") from None

    def _begin(self, reader: Reader, chunk: Chunk) -> "tuple[Chunk, asyncio.Task[list[Outcome]]]":
        return chunk, asyncio.create_task(self._embed(reader, chunk))

    async def _embed(self, reader: Reader, chunk: Chunk) -> list[Outcome]:
        """Return what to store for each item, in order. Raises Poison for several items."""
        async with AsyncExitStack() as place:
            async with self._reading:  # one chunk of a job at a time waits with its items in memory
                limits = self._workplace.bounds.limits
                reading = partial(reader.items, chunk.first, chunk.count, self.job.collection, limits)
                items = await self._workplace.threads.run(reading)
                await self._charge(items)
                await place.enter_async_context(self._workplace.places.take(alone=chunk.attempts > 0))
            return await self._attempt(chunk, items)

    async def _charge(self, items: Mapping[int, NewItem | Refusal]) -> None:
        """Charge the items to the limits of the key that sent the job, as soon as they allow it."""
        if self._meter is not None:
            context = self._workplace.context
            fetched = context.fetcher is not None
            counting = partial(costs_of_items, items.values(), context.embedder.limits, fetched=fetched)
            await _pay(self._meter, await self._workplace.threads.run(counting))

    async def _attempt(self, chunk: Chunk, items: Mapping[int, NewItem | Refusal]) -> list[Outcome]:
        if chunk.attempts < ATTEMPTS:
            await self._ledger.do(Ledger.begin_attempt, self.job, chunk)
            try:
                for _ in range(ATTEMPTS):
                    try:
                        return await embed(self._workplace.context, items, self._meter)
                    except Exception:
                        log.exception("a chunk of job %s failed", self.job.id)
            finally:  # also where it is stopped: only what ends the process stays written down
                self._ledger.begin(Ledger.undo_attempt, self.job, chunk)
        if chunk.count > 1:
            raise Poison
        [(line, item)] = items.items()
        return [Refusal(line, item.id, *_POISON)]

    async def _store_next(self, reader: Reader) -> None:
        """Wait for the first chunk; store its items, and those of the following chunks that are ready too."""
        chunk, task = self.pending[0]
        await asyncio.wait({task})
        if self.cancelled:
            raise Cancelled
        if isinstance(task.exception(), Poison):
            log.warning("the items of a chunk of job %s are tried one by one", self.job.id)
            chunks = await self._ledger.do(Ledger.split, self.job, chunk)
            self.pending.popleft()
            self.pending.extendleft([self._begin(reader, part) for part in chunks][::-1])
            return
        outcomes = list(task.result())
        ready = 1
        for _, task in islice(self.pending, 1, None):
            if len(outcomes) >= _STORED_ITEMS or not task.done() or task.cancelled() or task.exception():
                break
            outcomes += task.result()
            ready += 1
        last, _ = self.pending[ready - 1]
        await self._store(outcomes, last.first + last.count)
        for _ in range(ready):
            self.pending.popleft()

    async def _store(self, outcomes: Sequence[Outcome], end: int) -> None:
        """Write outcomes to the store, then to the ledger: a crash in between repeats the first, harmlessly."""
        entries = [outcome for outcome in outcomes if isinstance(outcome, Entry)]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
        latest = {(entry.collection, entry.id): entry for entry in entries}
        pause_s = _SHORTEST_PAUSE_S
        while True:
            try:
                await self._workplace.threads.run(self._workplace.disk.check)  # a refusal is written too
                if latest:
                    await self._workplace.context.store.upsert(list(latest.values()))
                break
            except NotReady:
                log.warning("the job %s waits for the store", self.job.id)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if self.cancelled:
                raise Cancelled
        self.job = await self._ledger.do(Ledger.advance, self.job, end, len(entries), refusals)
        self._note()
        self._workplace.metrics.job_items.labels("done").inc(len(entries))
        self._workplace.metrics.job_items.labels("failed").inc(len(refusals))


# Items → vectors


async def embed(
    context: EmbeddingContext, items: Mapping[int, NewItem | Refusal], meter: Meter | None
) -> list[Outcome]:
    """Embed items by line; return what to store for each, in order. Waits while there is no room or no tower.

    Where URLs are fetched, those of a chunk are fetched a few at a time, each few embedded before the next are fetched,
    so that a chunk of lines that are short takes no more memory than one of lines that hold their media. What may come
    of a URL later is tried again a few times, at the end of the chunk; what does not come then fails alone.
    """
    good = {line: item for line, item in items.items() if isinstance(item, NewItem)}
    at_urls = {line: item for line, item in good.items() if context.fetcher and _at_urls(item)}
    results = await _embed_patiently(context, {line: item for line, item in good.items() if line not in at_urls})
    paid: set[tuple[int, int]] = set()
    for pause_s in (*FETCH_PAUSES_S, None):
        for batch in _by_urls(at_urls):
            results |= await _embed_patiently(context, await _fetch(context, batch, meter, paid))
        at_urls = {line: item for line, item in at_urls.items() if _may_come(results[line])}
        if not at_urls or pause_s is None:
            break
        await asyncio.sleep(pause_s)
    return [item if isinstance(item, Refusal) else _outcome(line, item, results[line]) for line, item in items.items()]


def _at_urls(item: NewItem) -> int:
    """Return the number of URLs in an item."""
    content = item.content
    return 0 if isinstance(content, np.ndarray) else sum(isinstance(part, Url) for part in parts_of(content))


def _by_urls(items: Mapping[int, NewItem]) -> Iterator[dict[int, NewItem]]:
    """Yield the items in groups of _FETCHED_URLS URLs; an item with more is a group of its own."""
    group: dict[int, NewItem] = {}
    for line, item in items.items():
        if group and sum(map(_at_urls, group.values())) + _at_urls(item) > _FETCHED_URLS:
            yield group
            group = {}
        group[line] = item
    if group:
        yield group


def _may_come(result: Entry | InputError) -> bool:
    return isinstance(result, FetchFailed) and result.temporary


def _outcome(line: int, item: NewItem, result: Entry | InputError) -> Outcome:
    if isinstance(result, Entry):
        return result
    problem = input_problem(result)
    return Refusal(line, item.id, problem["code"], problem["detail"])


async def _fetch(
    context: EmbeddingContext, items: Mapping[int, NewItem], meter: Meter | None, paid: set[tuple[int, int]]
) -> dict[int, NewItem]:
    """Return the items with what is at their URLs. `paid`: lines and parts that are paid for, and now those too."""
    fetcher = context.fetcher
    assert fetcher is not None

    async def read(content: Input) -> Input:
        # All that is at the URLs of one item is limited like a request's body.
        [filled] = await context.embedder.read([content], replace(BACKGROUND, fetches=Fetches(fetcher, of_a_job=True)))
        return filled

    contents = {line: item.content for line, item in items.items() if not isinstance(item.content, np.ndarray)}
    filled = dict(zip(contents, await asyncio.gather(*map(read, contents.values())), strict=True))
    fetched = {
        (line, place): part
        for line, content in contents.items()
        for place, (url, part) in enumerate(zip(parts_of(content), parts_of(filled[line]), strict=True))
        if isinstance(url, Url) and isinstance(part, Media)
    }
    unpaid = [part for place, part in fetched.items() if place not in paid]
    if meter is not None and unpaid:
        # The items themselves were paid for before anything was fetched.
        costs = await context.embedder.in_worker(partial(costs_of, unpaid, context.embedder.limits))
        await _pay(meter, {unit: cost for unit, cost in costs.items() if unit != "items"})
        paid.update(fetched)
    return {line: replace(item, content=filled[line]) for line, item in items.items()}


async def _embed_patiently(context: EmbeddingContext, items: Mapping[int, NewItem]) -> dict[int, Entry | InputError]:
    """Embed items, trying again while there is no room or no tower."""
    pause_s = _SHORTEST_PAUSE_S
    while True:
        try:
            results = await embed_items(
                context.embedder,
                list(items.values()),
                caller=BACKGROUND,
                previewer=context.previewer,
            )
            return dict(zip(items, results, strict=True))
        except Overloaded as full:
            await asyncio.sleep(full.retry_after_s)
        except (NotReady, DeadlineExceeded):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


# Costs of items


def costs_of_items(items: Iterable[NewItem | Refusal], limits: Limits, *, fetched: bool) -> Costs:
    """Return what items cost of a key's limits; slow. An unreadable item costs nothing. An item at a URL counts as
    one item where URLs are fetched: its other costs are not known before."""
    single: list[Single] = []
    costs: dict[Unit, float] = defaultdict(float)
    contents = [item.content for item in items if isinstance(item, NewItem)]
    costs["items"] += sum(isinstance(content, np.ndarray) for content in contents)
    for part in (part for content in contents if not isinstance(content, np.ndarray) for part in parts_of(content)):
        content = opened(part) if isinstance(part, Video) else part
        if isinstance(content, Single):
            single.append(content)
        elif isinstance(content, Url):
            costs["items"] += fetched
        elif isinstance(content, Video):
            with suppress(InputError):
                claims = claims_of(content.data, limits.of_videos)
                costs["items"] += claims.frames + claims.sounds
                costs["pixels"] += claims.frames * claims.pixels
                costs["seconds"] += claims.seconds
    return {unit: cost + costs[unit] for unit, cost in costs_of(single, limits).items()}


async def _pay(meter: Meter, costs: Costs) -> None:
    """Charge costs to the limits of the key that sent the job, as soon as they allow it."""
    while True:
        try:
            await meter.take(costs)
            return
        except RateLimited as used_up:
            await asyncio.sleep(used_up.retry_after_s)
