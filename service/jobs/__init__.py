"""Bulk jobs: an input of many items → the store, in the background, through crashes, once each.

POST /jobs spools the input to disk (spool.py) and writes the job down (ledger.py); only then is it answered. A run
(running.py) counts what is in the input (plan.py), cuts it into chunks, embeds each (embedding.py), and writes the
items to the store. Chunks are written in order, so that of an id that comes twice the later stays, as though the items
had been sent one after the other.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path

from service.errors import DiskFull, InvalidRequest, NotReady
from service.jobs.embedding import Means
from service.jobs.ledger import FILE, UNFINISHED, Form, Job, Ledger, Refusal, State
from service.jobs.plan import Unusable, folder_beneath
from service.jobs.running import LONGEST_PAUSE_S, Books, Cancelled, Progress, Run, Runner
from service.jobs.spool import spool, sync
from service.runtime.disk import Disk
from service.runtime.logs import caller
from service.runtime.metrics import Metrics
from service.settings import Settings
from service.store import Store, StoreError, StoreInUse
from service.store.sqlite import hold

__all__ = ["Job", "Jobs", "Means", "Opened", "Progress", "Refusal", "open_jobs"]

log = logging.getLogger(__name__)

_ACTIVE = 4
"""Jobs that are worked on at the same time, in turn; the others are queued."""
_TIDY_S = 3_600.0
_ERRORS_AT_ONCE = 1_000


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


class Jobs:
    """Lives on one event loop: `start` it, `close` it."""

    def __init__(
        self,
        opened: Opened,
        settings: Settings,
        means: Means,
        store: Store,
        metrics: Metrics,
    ) -> None:
        self._folder, self._ledger, self._lock = opened.folder, opened.ledger, opened.lock
        self._settings, self._metrics = settings, metrics
        self._disk = Disk(opened.folder, settings.min_free_bytes)
        self._books = Books(opened.ledger)
        self._runner = Runner(opened.folder, self._books, settings, store, means, metrics)
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._scheduler: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Go on with what is unfinished."""
        self._metrics.watch_jobs(
            lambda: len(self._runs),
            lambda: sum(len(run.pending) for run in self._runs.values()),
            lambda: sum(run.left for run in self._runs.values()),
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
        await self._books.close()
        os.close(self._lock)

    # What routes ask for

    async def submit(
        self,
        form: Form,
        collection: str,
        blocks: AsyncIterator[bytes],
        key: str | None,
        meter: str | None = None,
        size: int | None = None,
    ) -> tuple[Progress, bool]:
        """A job of what comes, and whether it is new, once it is on disk. `size`: its bytes, where they are stated.
        `meter` names the limits that its items are charged to.

        Raises Overloaded, and DiskFull for what is too large, before anything is read, InvalidRequest for an
        Idempotency-Key of another job, and what `spool` raises.
        """
        key = _of_caller(key)
        await self._books.do(lambda: self._ledger.admit(self._settings.max_jobs, key))
        await asyncio.to_thread(self._disk.check, size or 0)
        id = secrets.token_hex(12)
        folder = self._folder / id
        try:
            await asyncio.to_thread(folder.mkdir)
            came = await spool(blocks, folder / "input", self._settings.max_job_bytes, self._disk)
            await asyncio.to_thread(sync, folder, folder.parent)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))
            raise
        return await asyncio.shield(self._create(id, form, collection, came, None, key, meter))

    async def submit_folder(
        self, name: str, collection: str, key: str | None, meter: str | None = None
    ) -> tuple[Progress, bool]:
        """A job of a folder under the root that the operator allowed. Raises InvalidRequest, Overloaded."""
        root = self._settings.jobs_root
        if root is None:
            raise InvalidRequest("jobs of folders are off on this server: send the files", code="folder_jobs_disabled")
        if await asyncio.to_thread(folder_beneath, root, name) is None:
            raise InvalidRequest("folder: there is no such folder under the root of jobs", code="no_such_folder")
        await asyncio.to_thread(self._disk.check)
        id = secrets.token_hex(12)
        await asyncio.to_thread((self._folder / id).mkdir)
        return await asyncio.shield(self._create(id, "folder", collection, name, name, _of_caller(key), meter))

    async def job(self, id: str) -> Progress:
        return self._progress(await self._books.do(lambda: self._ledger.job(id)))

    async def jobs(self, limit: int, before: str | None, states: Sequence[State] | None) -> list[Progress]:
        """The newest first; those that are older than the job `before`."""

        def read() -> list[Job]:
            number = None if before is None else self._ledger.job(before).number
            return self._ledger.jobs(limit, number, states)

        return [self._progress(job) for job in await self._books.do(read)]

    async def cancel(self, id: str) -> Progress:
        """Stop it, and wait until nothing more of it is written; one that has ended stays as it is."""
        job = await self._books.do(lambda: self._ledger.job(id))
        run = self._runs.get(id)
        if run is not None:
            run.cancel()
            await run.finished.wait()
        elif job.state in UNFINISHED:
            await self._end(job, "cancelled")
        return await self.job(id)

    async def errors(self, id: str) -> AsyncIterator[list[Refusal]]:
        """What was refused so far, in the order of the input, page by page. Raises NotFound at once."""
        job = await self._books.do(lambda: self._ledger.job(id))

        async def pages() -> AsyncIterator[list[Refusal]]:
            page = await self._books.do(lambda: self._ledger.errors(job, 0, _ERRORS_AT_ONCE))
            while page:
                yield page
                after = page[-1].line
                page = await self._books.do(lambda after=after: self._ledger.errors(job, after, _ERRORS_AT_ONCE))  # type: ignore[misc]

        return pages()

    def _progress(self, job: Job) -> Progress:
        run = self._runs.get(job.id)
        return Progress(job, None, None) if run is None or job.state not in UNFINISHED else run.progress()

    async def _create(
        self,
        id: str,
        form: Form,
        collection: str,
        content: str,
        folder: str | None,
        key: str | None,
        meter: str | None,
    ) -> tuple[Progress, bool]:
        """Write the job down. Not to be cancelled: its files go where it is not written, and only there."""
        fingerprint = hashlib.sha256("\0".join((form, collection, content)).encode()).hexdigest()
        most = self._settings.max_jobs
        new = False
        try:
            job, new = await self._books.do(
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

    async def _scheduling(self) -> None:
        """Start what waits; now and then forget what ended long ago."""
        tidied = -_TIDY_S
        while True:
            self._wake.clear()
            try:
                if time.monotonic() - tidied > _TIDY_S:
                    tidied = time.monotonic()
                    await self._books.do(lambda: self._ledger.forget(self._settings.jobs_keep_s))
                await self._runner.count()
                for job in await self._books.do(self._ledger.unfinished):
                    if len(self._runs) < _ACTIVE and job.id not in self._runs:
                        run = self._runs[job.id] = Run(job)
                        self._begin(self._running(run))
            except NotReady:
                await asyncio.sleep(LONGEST_PAUSE_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TIDY_S):
                    await self._wake.wait()

    async def _running(self, run: Run) -> None:
        job = run.job
        ended: tuple[State, str | None, str | None] | None
        ended = "failed", "internal_error", "the server failed on this job"
        try:
            await self._runner.run(run)
            ended = "done", None, None
        except Unusable as error:
            ended = "failed", "unusable_input", str(error)
        except Cancelled:
            ended = "cancelled", None, None
        except DiskFull as error:
            ended = "failed", "disk_full", str(error)
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
                log.warning("the job %s is tried again in %.0f s", job.id, LONGEST_PAUSE_S)
                await asyncio.sleep(LONGEST_PAUSE_S)
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

    async def _end(self, job: Job, state: State, code: str | None = None, detail: str | None = None) -> None:
        await self._books.do(lambda: self._ledger.end(job, state, code, detail))
        await self._runner.count()
        await asyncio.to_thread(shutil.rmtree, self._folder / job.id, ignore_errors=True)


def _of_caller(key: str | None) -> str | None:
    """An Idempotency-Key together with the API key of the request at hand: two clients may hit on the same."""
    return None if key is None else f"{caller.get() or ''} {key}"
