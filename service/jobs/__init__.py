"""Bulk jobs: an input of many items → the store, in the background, through crashes, once each.

POST /jobs spools the input to disk (spool.py) and writes the job down (ledger.py); only then is it answered. A run
counts what is in the input (plan.py), cuts it into chunks, has each embedded (pieces.py), here or by workers
(stream.py), and writes the items to the store itself: a store has one owner. Chunks are written in order, so that of an
id that comes twice the later stays, as though the items had been sent one after the other.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar, get_args

from service import moments
from service.errors import InvalidRequest, NotReady
from service.fetch import Fetcher
from service.indexing import token_collections
from service.jobs.embedding import Means, costs_of_work, embed, pay
from service.jobs.ledger import FILE, UNFINISHED, Chunk, Form, Job, Ledger, Refusal, State
from service.jobs.pieces import Outcome, Work
from service.jobs.plan import Bounds, Reader, Unusable, build, folder_beneath
from service.jobs.spool import spool
from service.jobs.stream import Dispatcher, NoWorkers, Poison
from service.jobs.turns import Turns
from service.logs import caller
from service.metrics import Metrics
from service.pipeline import Embedder
from service.previews import Previewer
from service.quotas import Limiter, metering
from service.settings import Settings
from service.store import Entry, Store, StoreError, StoreInUse
from service.store.sqlite import hold
from service.token_vectors import TokenEmbedder

__all__ = ["Job", "Jobs", "Opened", "Progress", "Refusal", "open_jobs"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_ACTIVE = 4
"""Jobs that are worked on at the same time, in turn; the others are queued."""
_CHUNK_ITEMS, _CHUNK_BYTES = 256, 8 * 2**20
_HERE = 2
"""Chunks that this process embeds at once: one is read while the other is in the model."""
_HANDED_OUT = 16
"""Chunks that workers have, or find, at once."""
_AHEAD = 32
"""Chunks of a job that wait to be written, the first of them being the slowest."""
_WRITTEN_AT_ONCE = 512
"""Items that share a write, about."""
_RATE_S = 30.0
_LONGEST_PAUSE_S = 10.0
_TIDY_S = 3_600.0
_ERRORS_AT_ONCE = 1_000
_POISON = ("poison", "the server or a worker ended whenever it worked on this item, so that it was left out")


@dataclass(frozen=True)
class Opened:
    """The folder of jobs, held by this process."""

    folder: Path
    ledger: Ledger
    lock: int


def open_jobs(folder: Path) -> Opened:
    """Blocks. Raises StoreError."""
    try:
        lock = hold(folder)
    except StoreInUse:
        raise StoreInUse(f"the jobs in {folder} are another process's: each needs its own ISTHMUS_JOBS") from None
    try:
        ledger = Ledger(folder / FILE)
        # Of uploads that were cut short by a crash.
        known = {job.id for job in ledger.unfinished()}
        for path in folder.iterdir():
            if path.is_dir() and path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        os.close(lock)
        raise StoreError(f"the jobs in {folder} cannot be read: {error}") from None
    return Opened(folder, ledger, lock)


@dataclass(frozen=True)
class Progress:
    job: Job
    rate: float | None
    """Items per second of late; None where nothing was done lately."""
    eta_s: float | None


@dataclass(eq=False)
class _Run:
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


class _Cancelled(Exception): ...


class Jobs:
    """Lives on one event loop: `start` it, `close` it."""

    def __init__(
        self,
        opened: Opened,
        settings: Settings,
        embedder: Embedder,
        tokens: TokenEmbedder,
        previewer: Previewer,
        store: Store,
        limiter: Limiter,
        fetcher: Fetcher | None,
        metrics: Metrics,
    ) -> None:
        self._folder, self._ledger, self._lock = opened.folder, opened.ledger, opened.lock
        self._settings, self._embedder, self._tokens, self._store = settings, embedder, tokens, store
        self._limiter, self._metrics = limiter, metrics
        self._means = Means(embedder, tokens, previewer, settings.limits, limiter, fetcher, background=True)
        self._bounds = Bounds(settings.limits, settings.max_job_items)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._runs: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._turns = Turns()
        self._here, self._out = asyncio.Semaphore(_HERE), asyncio.Semaphore(_HANDED_OUT)
        self._scheduler: asyncio.Task[None] | None = None
        self._dispatcher: Dispatcher | None = None

    async def start(self) -> None:
        """Go on with what is unfinished."""
        manifest, settings = self._embedder.manifest, self._settings
        if settings.redis_url is not None:
            owner = await self._do(lambda: self._ledger.owner)
            self._dispatcher = Dispatcher(
                settings.redis_url,
                manifest.space,
                owner,
                manifest.dimensions,
                deliveries=settings.job_deliveries,
                silence_s=settings.worker_silence_s,
            )
        self._metrics.watch_jobs(
            lambda: len(self._runs),
            lambda: sum(len(run.pending) for run in self._runs.values()),
            lambda: sum(run.left for run in self._runs.values()),
            lambda: self._dispatcher.workers if self._dispatcher else 0,
        )
        self._scheduler = self._begin(self._scheduling())

    @property
    def alive(self) -> bool:
        return self._scheduler is not None and not self._scheduler.done()

    async def close(self) -> None:
        """Stop where things stand; the next start goes on."""
        for run in self._runs.values():
            run.ended.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._dispatcher is not None:
            await self._dispatcher.close()
        await asyncio.to_thread(self._thread.shutdown)
        self._ledger.close()
        os.close(self._lock)

    # What routes ask for

    async def submit(
        self, form: Form, collection: str, blocks: AsyncIterator[bytes], key: str | None
    ) -> tuple[Progress, bool]:
        """A job of what comes, and whether it is new, once it is on disk.

        Raises Overloaded before anything is read, InvalidRequest for an Idempotency-Key of another job, and what
        `spool` raises.
        """
        key = _of_caller(key)
        await self._do(lambda: self._ledger.admit(self._settings.max_jobs, key))
        id = secrets.token_hex(12)
        folder = self._folder / id
        try:
            await asyncio.to_thread(folder.mkdir)
            came = await spool(blocks, folder / "input", self._settings.max_job_bytes)
            await asyncio.to_thread(_sync_names, folder)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))
            raise
        return await asyncio.shield(self._create(id, form, collection, came, None, key))

    async def submit_folder(self, name: str, collection: str, key: str | None) -> tuple[Progress, bool]:
        """A job of a folder under the root that the operator allowed. Raises InvalidRequest, Overloaded."""
        root = self._settings.jobs_root
        if root is None:
            raise InvalidRequest("jobs of folders are off on this server: send the files", code="folder_jobs_disabled")
        if await asyncio.to_thread(folder_beneath, root, name) is None:
            raise InvalidRequest("folder: there is no such folder under the root of jobs", code="no_such_folder")
        id = secrets.token_hex(12)
        await asyncio.to_thread((self._folder / id).mkdir)
        return await asyncio.shield(self._create(id, "folder", collection, name, name, _of_caller(key)))

    async def job(self, id: str) -> Progress:
        return self._progress(await self._do(lambda: self._ledger.job(id)))

    async def jobs(self, limit: int, before: str | None, states: Sequence[State] | None) -> list[Progress]:
        """The newest first; those that are older than the job `before`."""

        def read() -> list[Job]:
            number = None if before is None else self._ledger.job(before).number
            return self._ledger.jobs(limit, number, states)

        return [self._progress(job) for job in await self._do(read)]

    async def cancel(self, id: str) -> Progress:
        """Stop it, and wait until nothing more of it is written; one that has ended stays as it is."""
        job = await self._do(lambda: self._ledger.job(id))
        run = self._runs.get(id)
        if run is not None:
            run.cancel()
            await run.finished.wait()
        elif job.state in UNFINISHED:
            await self._end(job, "cancelled")
        return await self.job(id)

    async def errors(self, id: str) -> AsyncIterator[list[Refusal]]:
        """What was refused so far, in the order of the input, page by page. Raises NotFound at once."""
        job = await self._do(lambda: self._ledger.job(id))

        async def pages() -> AsyncIterator[list[Refusal]]:
            page = await self._do(lambda: self._ledger.errors(job, 0, _ERRORS_AT_ONCE))
            while page:
                yield page
                after = page[-1].line
                page = await self._do(lambda after=after: self._ledger.errors(job, after, _ERRORS_AT_ONCE))  # type: ignore[misc]

        return pages()

    def _progress(self, job: Job) -> Progress:
        run = self._runs.get(job.id)
        return Progress(job, None, None) if run is None or job.state not in UNFINISHED else run.progress()

    async def _create(
        self, id: str, form: Form, collection: str, content: str, folder: str | None, key: str | None
    ) -> tuple[Progress, bool]:
        """Write the job down. Not to be cancelled: its files go where it is not written, and only there."""
        fingerprint = hashlib.sha256("\0".join((form, collection, content)).encode()).hexdigest()
        most, meter = self._settings.max_jobs, _meter_text()
        new = False
        try:
            job, new = await self._do(
                lambda: self._ledger.create(
                    id, form, collection, fingerprint, folder=folder, key=key, meter=meter, most=most
                )
            )
        finally:
            if not new:
                await asyncio.to_thread(shutil.rmtree, self._folder / id, ignore_errors=True)
        self._wake.set()
        return self._progress(job), new

    # Runs

    def _begin(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        # In a context of its own: it is not the request's that happened to start it.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _do(self, function: Callable[[], T]) -> T:
        """With the ledger, in its thread."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        except RuntimeError:
            raise NotReady("the server is shutting down") from None
        except sqlite3.Error:
            log.exception("the ledger of jobs cannot be used")
            raise NotReady("the jobs cannot be read or written") from None

    async def _scheduling(self) -> None:
        """Start what waits; now and then forget what ended long ago."""
        tidied = -_TIDY_S
        while True:
            self._wake.clear()
            try:
                if time.monotonic() - tidied > _TIDY_S:
                    tidied = time.monotonic()
                    await self._do(lambda: self._ledger.forget(self._settings.jobs_keep_s))
                await self._count()
                for job in await self._do(self._ledger.unfinished):
                    if len(self._runs) < _ACTIVE and job.id not in self._runs:
                        run = self._runs[job.id] = _Run(job)
                        self._begin(self._running(run))
            except NotReady:
                await asyncio.sleep(_LONGEST_PAUSE_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TIDY_S):
                    await self._wake.wait()

    async def _running(self, run: _Run) -> None:
        job = run.job
        ended: tuple[State, str | None, str | None] | None
        ended = "failed", "internal_error", "the server failed on this job"
        try:
            await self._run(run)
            ended = "done", None, None
        except Unusable as error:
            ended = "failed", "unusable_input", str(error)
        except _Cancelled:
            ended = "cancelled", None, None
        except NotReady:
            ended = None
        except Exception:
            log.exception("the job %s failed", job.id)
        finally:
            for _, task in run.pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in run.pending), return_exceptions=True)
        # Where the task itself was cancelled, the server ends: the job is not at its end.
        try:
            if run.cancelled and (ended is None or ended[0] == "failed"):
                ended = "cancelled", None, None
            if ended is None or not await self._ended(run.job, *ended):
                log.warning("the job %s is tried again in %.0f s", job.id, _LONGEST_PAUSE_S)
                await asyncio.sleep(_LONGEST_PAUSE_S)
        finally:
            del self._runs[job.id]
            run.finished.set()
            self._wake.set()

    async def _ended(self, job: Job, state: State, code: str | None, detail: str | None) -> bool:
        """Whether it could be written down that it ended."""
        try:
            await self._end(job, state, code, detail)
        except NotReady:
            return False
        log.info("the job %s is %s", job.id, state)
        return True

    async def _count(self) -> None:
        with contextlib.suppress(NotReady):
            self._metrics.count_jobs({**dict.fromkeys(get_args(State), 0), **await self._do(self._ledger.counts)})

    async def _end(self, job: Job, state: State, code: str | None = None, detail: str | None = None) -> None:
        await self._do(lambda: self._ledger.end(job, state, code, detail))
        await self._count()
        await asyncio.to_thread(shutil.rmtree, self._folder / job.id, ignore_errors=True)

    async def _run(self, run: _Run) -> None:
        reader = await self._planned(run)
        try:
            run.note()
            waiting = deque(await self._do(lambda: self._ledger.chunks(run.job)))
            while True:
                while len(run.pending) < _AHEAD and not run.cancelled:
                    chunk = waiting.popleft() if waiting else await self._cut(run, reader)
                    if chunk is None:
                        break
                    run.pending.append((chunk, asyncio.create_task(self._embed(run, reader, chunk))))
                if run.cancelled:
                    raise _Cancelled
                if not run.pending:
                    return
                await self._write_next(run, reader)
        finally:
            reader.close()

    async def _planned(self, run: _Run) -> Reader:
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
                total = await asyncio.to_thread(build, job.form, source, plan, self._bounds, run.ended)
            except FileNotFoundError:
                raise Unusable("the files of the job are gone") from None
            if run.cancelled:
                raise _Cancelled
            run.job = await self._do(lambda: self._ledger.begin(job, total))
            await self._count()
            if run.job.state != "running":  # it was cancelled before it was begun
                raise _Cancelled
        try:
            return await asyncio.to_thread(Reader, job.form, source, plan, self._bounds)
        except (OSError, sqlite3.Error):
            raise Unusable("the files of the job are gone") from None

    async def _cut(self, run: _Run, reader: Reader) -> Chunk | None:
        count = await asyncio.to_thread(reader.length, run.job.next, _CHUNK_ITEMS, _CHUNK_BYTES)
        if not count:
            return None
        chunk = await self._do(lambda: self._ledger.cut(run.job, count))
        run.job = await self._do(lambda: self._ledger.job(run.job.id))
        return chunk

    async def _write_next(self, run: _Run, reader: Reader) -> None:
        """Wait for the first chunk; write its items, and those of what comes after it and is ready too."""
        chunk, task = run.pending[0]
        try:
            outcomes = list(await task)
        except asyncio.CancelledError:
            if run.cancelled and not _being_cancelled():
                raise _Cancelled from None
            raise
        except Poison:
            if chunk.count > 1:
                log.warning("the items of a chunk of job %s are tried one by one", run.job.id)
                ones = await self._do(lambda: self._ledger.split(chunk))
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

    async def _write(self, run: _Run, chunks: Sequence[Chunk], outcomes: Sequence[Outcome]) -> None:
        """To the store, then to the ledger: a crash between the two repeats the first, to the same effect."""
        entries = [each for each in outcomes if isinstance(each, Entry)]
        refusals = [each for each in outcomes if isinstance(each, Refusal)]
        latest = {(entry.collection, entry.id): entry for entry in entries}
        pause = 0.5
        while latest:
            try:
                await moments.upsert(self._store, list(latest.values()))
                break
            except NotReady:
                log.warning("the job %s waits for the store", run.job.id)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            if run.cancelled:
                raise _Cancelled
        run.job = await self._do(lambda: self._ledger.close_chunks(run.job, chunks, len(entries), refusals))
        run.note()
        self._metrics.job_items.labels("done").inc(len(entries))
        self._metrics.job_items.labels("failed").inc(len(refusals))

    async def _embed(self, run: _Run, reader: Reader, chunk: Chunk) -> list[Outcome]:
        """By a worker where there is one, else here. Raises Poison."""
        await self._charge(run, reader, chunk)
        delivered = 0
        if self._dispatcher is not None and self._dispatcher.workers:
            async with self._out:
                work = await self._work(run, reader, chunk)
                try:
                    return await self._dispatcher.embed(chunk, work)
                except NoWorkers as left:
                    log.warning("no worker is left: the server embeds itself")
                    delivered = left.deliveries
        alone = chunk.suspect or chunk.attempts + delivered > 0
        async with self._here, self._turns.take(alone=alone):
            return await self._embed_here(run, reader, chunk, delivered)

    async def _charge(self, run: _Run, reader: Reader, chunk: Chunk) -> None:
        """Take what it costs from the limits of the key that sent the job, as soon as they allow it."""
        if run.job.meter is None:
            return
        work = await self._work(run, reader, chunk)
        costs = await asyncio.to_thread(costs_of_work, self._settings.limits, self._embedder.video_limits, work)
        await pay(self._limiter, run.job.meter, costs)

    async def _embed_here(self, run: _Run, reader: Reader, chunk: Chunk, delivered: int) -> list[Outcome]:
        try:
            while await self._do(lambda: self._ledger.attempt(chunk, delivered)) < self._settings.job_deliveries:
                work = await self._work(run, reader, chunk)
                try:
                    outcomes = await embed(self._means, work)
                except Exception:
                    log.exception("a chunk of job %s failed", run.job.id)
                    continue
                await self._do(lambda: self._ledger.untry(chunk))
                return outcomes
        except asyncio.CancelledError:
            # It was stopped, not killed by this chunk.
            self._thread.submit(self._ledger.untry, chunk)
            raise
        raise Poison

    async def _work(self, run: _Run, reader: Reader, chunk: Chunk) -> Work:
        pieces = await asyncio.to_thread(reader.pieces, chunk.first, chunk.count)
        keeping: frozenset[str] = frozenset()
        if self._tokens.available:
            names = [collection.name for collection in await self._store.collections()]
            keeping = frozenset(await token_collections(self._store, names))
        urls = self._settings.fetch != "off"
        return Work(run.job.collection, keeping, pieces, self._settings.previews, urls, run.job.meter)


def _of_caller(key: str | None) -> str | None:
    """An Idempotency-Key together with the API key of the request at hand: two clients may hit on the same."""
    return None if key is None else f"{caller.get() or ''} {key}"


def _meter_text() -> str | None:
    """Of the request at hand, where what its key may embed is limited."""
    meter = metering.get()
    if meter is None or meter.units <= {"requests"}:
        return None
    return " ".join((meter.key, *map(str, meter.limits)))


def _being_cancelled() -> bool:
    """Whether it is this task, and not what it waits for, that was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _sync_names(folder: Path) -> None:
    """That the folder is there, and what is in it, is on disk."""
    for path in (folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
