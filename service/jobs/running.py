"""One job from its input to the store: planned, cut into chunks, each embedded and, in order, written.

A chunk is written down before it is embedded, and taken off once its items are in the store; whatever ends in between,
the next run goes on there.
"""

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar, get_args

from service.errors import NotReady
from service.jobs.embedding import Means, costs_of_work, embed, pay
from service.jobs.ledger import Chunk, Job, Ledger, Refusal, State
from service.jobs.pieces import Outcome, Work
from service.jobs.plan import Bounds, Reader, Unusable, build, folder_beneath
from service.jobs.turns import Turns
from service.retrieval.indexing import token_collections
from service.runtime.disk import Disk
from service.runtime.metrics import Metrics
from service.settings import Settings
from service.store import Entry, Store

log = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK_ITEMS, _CHUNK_BYTES = 256, 8 * 2**20
_HERE = 2
"""Chunks that this process embeds at once: one is read while the other is in the model."""
_AHEAD = 32
"""Chunks of a job that wait to be written, the first of them being the slowest."""
_WRITTEN_AT_ONCE = 512
"""Items that share a write, about."""
_RATE_S = 30.0
LONGEST_PAUSE_S = 10.0
_POISON = ("poison", "the server ended whenever it worked on this item, so that it was left out")


@dataclass(frozen=True)
class Progress:
    job: Job
    rate: float | None
    """Items per second of late; None where nothing was done lately."""
    eta_s: float | None


@dataclass(eq=False)
class Run:
    """A job that is worked on."""

    job: Job
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False
    """By a client."""
    ended: threading.Event = field(default_factory=threading.Event)
    """For what goes on in threads: nobody waits for it any more."""
    pending: "deque[tuple[Chunk, asyncio.Task[list[Outcome]]]]" = field(default_factory=deque)
    seen: "deque[tuple[float, int]]" = field(default_factory=deque)
    """(when, items done or failed) of late."""

    @property
    def left(self) -> int:
        """Items that are neither done nor refused yet; 0 until they are counted."""
        return 0 if self.job.total is None else self.job.total - self.job.done - self.job.failed

    def cancel(self) -> None:
        self.cancelled = True
        self.ended.set()
        for _, task in self.pending:
            task.cancel()

    def note(self) -> None:
        now = time.monotonic()
        self.seen.append((now, self.job.done + self.job.failed))
        while len(self.seen) > 2 and self.seen[1][0] < now - _RATE_S:
            self.seen.popleft()

    def progress(self) -> Progress:
        rate = eta = None
        if len(self.seen) > 1:
            (since, before), (_, after) = self.seen[0], self.seen[-1]
            if after > before:
                rate = (after - before) / (time.monotonic() - since)
        if rate and self.job.total is not None:
            eta = self.left / rate
        return Progress(self.job, rate, eta)


class Cancelled(Exception):
    """By a client."""


class Poison(Exception):
    """Whoever takes this chunk up does not live to answer."""


class Books:
    """The ledger, in a thread of its own."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")

    async def do(self, function: Callable[[], T]) -> T:
        """With the ledger. Raises NotReady."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        except RuntimeError:
            raise NotReady("the server is shutting down") from None
        except sqlite3.Error:
            log.exception("the ledger of jobs cannot be used")
            raise NotReady("the jobs cannot be read or written") from None

    def submit(self, function: Callable[[Chunk], None], chunk: Chunk) -> None:
        """Without waiting for it."""
        self._thread.submit(function, chunk)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        self.ledger.close()


class Runner:
    """Works on runs. Lives on one event loop."""

    def __init__(
        self, folder: Path, books: Books, settings: Settings, store: Store, means: Means, metrics: Metrics
    ) -> None:
        self._folder, self._books, self._ledger = folder, books, books.ledger
        self._settings, self._store, self._means, self._metrics = settings, store, means, metrics
        self._bounds = Bounds(settings.limits, settings.max_job_items)
        self._disk = Disk(folder, settings.least_free_bytes)
        self._turns = Turns()
        self._here = asyncio.Semaphore(_HERE)

    async def run(self, run: Run) -> None:
        """To the end of the input. Raises Unusable, Cancelled, DiskFull, NotReady."""
        reader = await self._planned(run)
        try:
            run.note()
            waiting = deque(await self._books.do(lambda: self._ledger.chunks(run.job)))
            while True:
                while len(run.pending) < _AHEAD and not run.cancelled:
                    chunk = waiting.popleft() if waiting else await self._cut(run, reader)
                    if chunk is None:
                        break
                    run.pending.append((chunk, asyncio.create_task(self._embed(run, reader, chunk))))
                if run.cancelled:
                    raise Cancelled
                if not run.pending:
                    return
                await self._write_next(run, reader)
        finally:
            reader.close()

    async def count(self) -> None:
        """Jobs by state, for the metrics."""
        with contextlib.suppress(NotReady):
            self._metrics.count_jobs({**dict.fromkeys(get_args(State), 0), **await self._books.do(self._ledger.counts)})

    async def _planned(self, run: Run) -> Reader:
        job, folder = run.job, self._folder / run.job.id
        source, plan = folder / "input", folder / "plan.sqlite3"
        if job.form == "folder":
            root, name = self._settings.jobs_root, job.folder or "."
            found = None if root is None else await asyncio.to_thread(folder_beneath, root, name)
            if found is None:
                raise Unusable("the folder is not there any more, or not allowed any more")
            source = found
        if job.total is None:
            try:
                total = await asyncio.to_thread(build, job.form, source, plan, self._bounds, run.ended, self._disk)
            except FileNotFoundError:
                raise Unusable("the files of the job are gone") from None
            if run.cancelled:
                raise Cancelled
            run.job = await self._books.do(lambda: self._ledger.begin(job, total))
            await self.count()
            if run.job.state != "running":  # it was cancelled before it was begun
                raise Cancelled
        try:
            return await asyncio.to_thread(Reader, job.form, source, plan, self._bounds)
        except (OSError, sqlite3.Error):
            raise Unusable("the files of the job are gone") from None

    async def _cut(self, run: Run, reader: Reader) -> Chunk | None:
        count = await asyncio.to_thread(reader.length, run.job.next, _CHUNK_ITEMS, _CHUNK_BYTES)
        if not count:
            return None
        chunk = await self._books.do(lambda: self._ledger.cut(run.job, count))
        run.job = await self._books.do(lambda: self._ledger.job(run.job.id))
        return chunk

    async def _write_next(self, run: Run, reader: Reader) -> None:
        """Wait for the first chunk; write its items, and those of what comes after it and is ready too."""
        chunk, task = run.pending[0]
        try:
            outcomes = list(await task)
        except asyncio.CancelledError:
            if run.cancelled and not _being_cancelled():
                raise Cancelled from None
            raise
        except Poison:
            if chunk.count > 1:
                log.warning("the items of a chunk of job %s are tried one by one", run.job.id)
                ones = await self._books.do(lambda: self._ledger.split(chunk))
                run.pending.popleft()
                tasks = [(one, asyncio.create_task(self._embed(run, reader, one))) for one in ones]
                run.pending.extendleft(reversed(tasks))
                return
            [piece] = (await self._work(run, reader, chunk)).pieces
            outcomes = [Refusal(piece.line, piece.name or None, *_POISON)]
        chunks = [chunk]
        for after, task in islice(run.pending, 1, None):
            if len(outcomes) >= _WRITTEN_AT_ONCE or not task.done() or task.cancelled() or task.exception():
                break
            chunks.append(after)
            outcomes += task.result()
        await self._write(run, chunks, outcomes)
        for _ in chunks:
            run.pending.popleft()

    async def _write(self, run: Run, chunks: Sequence[Chunk], outcomes: Sequence[Outcome]) -> None:
        """To the store, then to the ledger: a crash between the two repeats the first, to the same effect."""
        entries = [each for each in outcomes if isinstance(each, Entry)]
        refusals = [each for each in outcomes if isinstance(each, Refusal)]
        latest = {(entry.collection, entry.id): entry for entry in entries}
        pause = 0.5
        while outcomes:
            try:
                await asyncio.to_thread(self._disk.check)  # a refusal is written too
                if latest:
                    await self._store.upsert(list(latest.values()))
                break
            except NotReady:
                log.warning("the job %s waits for the store", run.job.id)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            if run.cancelled:
                raise Cancelled
        run.job = await self._books.do(lambda: self._ledger.close_chunks(run.job, chunks, len(entries), refusals))
        run.note()
        self._metrics.job_items.labels("done").inc(len(entries))
        self._metrics.job_items.labels("failed").inc(len(refusals))

    async def _embed(self, run: Run, reader: Reader, chunk: Chunk) -> list[Outcome]:
        """Raises Poison."""
        await self._charge(run, reader, chunk)
        async with self._here, self._turns.take(alone=chunk.suspect or chunk.attempts > 0):
            return await self._embed_here(run, reader, chunk)

    async def _charge(self, run: Run, reader: Reader, chunk: Chunk) -> None:
        """Take what it costs from the limits of the key that sent the job, as soon as they allow it."""
        if run.job.meter is None:
            return
        work = await self._work(run, reader, chunk)
        await pay(self._means, run.job.meter, await asyncio.to_thread(costs_of_work, self._settings.limits, work))

    async def _embed_here(self, run: Run, reader: Reader, chunk: Chunk) -> list[Outcome]:
        try:
            while await self._books.do(lambda: self._ledger.attempt(chunk)) < self._settings.job_deliveries:
                work = await self._work(run, reader, chunk)
                try:
                    outcomes = await embed(self._means, work)
                except Exception:
                    log.exception("a chunk of job %s failed", run.job.id)
                    continue
                await self._books.do(lambda: self._ledger.untry(chunk))
                return outcomes
        except asyncio.CancelledError:
            # It was stopped, not killed by this chunk.
            self._books.submit(self._ledger.untry, chunk)
            raise
        raise Poison

    async def _work(self, run: Run, reader: Reader, chunk: Chunk) -> Work:
        pieces = await asyncio.to_thread(reader.pieces, chunk.first, chunk.count)
        keeping: frozenset[str] = frozenset()
        if self._means.tokens.available:
            names = [collection.name for collection in await self._store.collections()]
            keeping = frozenset(await token_collections(self._store, names))
        urls = self._settings.fetch != "off"
        return Work(run.job.collection, keeping, pieces, self._settings.previews, urls, run.job.meter)


def _being_cancelled() -> bool:
    """Whether it is this task, and not what it waits for, that was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
