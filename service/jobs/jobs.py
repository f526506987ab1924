"""Bulk jobs store the items of a large input in the background, each once, whatever crashes.

POST /jobs spools the input to disk (input.py) and writes the job down (ledger.py); only then is it answered. A run
(run.py) counts what is in the input, cuts it into chunks, embeds each, and stores the items in order.
"""

import asyncio
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.errors import DiskFull, NotFound, NotReady
from service.jobs.input import Unusable, spool
from service.jobs.ledger import FILE, UNFINISHED, Form, Job, Ledger, LedgerThread, Refusal, State
from service.jobs.run import LONGEST_PAUSE_S, Cancelled, EmbeddingContext, Progress, Run, Workplace
from service.runtime.disk import Disk
from service.runtime.metrics import Metrics
from service.settings import Settings
from service.store import StoreError, StoreInUse
from service.store.files import hold, sync

log = logging.getLogger(__name__)

_ACTIVE_JOBS = 4
"""Number of jobs that are worked on at the same time, in turn; the others are queued."""
MAX_JOBS = 100
"""Most unfinished jobs. Beyond it a job gets 429."""
_TIDY_S = 3_600.0
_ERRORS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Opened:
    """Holds the folder of jobs, which this process has locked."""

    folder: Path
    ledger: Ledger
    lock: int


def open_jobs(folder: Path) -> Opened:
    """Open the jobs of a folder. Blocks. Raises StoreError."""
    try:
        lock = hold(folder)
    except StoreInUse:
        raise StoreInUse(f"the jobs in {folder} are another process's: each needs its own ISTHMUS_JOBS") from None
    try:
        ledger = Ledger(folder / FILE)
        unfinished = {job.id for job in ledger.unfinished()}
        for path in folder.iterdir():
            if path.is_dir() and path.name not in unfinished:  # an upload that a crash cut short
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        os.close(lock)
        raise StoreError(f"the jobs in {folder} cannot be read: {error}") from None
    return Opened(folder, ledger, lock)


class Jobs:
    """Runs the bulk jobs of a server, on one event loop: `start` it, `close` it."""

    def __init__(self, opened: Opened, settings: Settings, context: EmbeddingContext, metrics: Metrics) -> None:
        self.replica = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname() or "localhost")[:63]
        """The name of this process's machine, container or pod: a job's id ends in the name of whoever took it."""
        self._folder, self._lock = opened.folder, opened.lock
        self._settings, self._metrics = settings, metrics
        self._disk = Disk(opened.folder, settings.min_free_bytes)
        self._ledger = LedgerThread(opened.ledger)
        self._workplace = Workplace(opened.folder, self._ledger, settings, context, metrics)
        self._threads = self._workplace.threads
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._scheduler: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Continue the unfinished jobs."""
        self._metrics.watch_jobs(
            lambda: len(self._runs),
            lambda: sum(len(run.pending) for run in self._runs.values()),
            lambda: sum(run.left for run in self._runs.values()),
        )
        await self._workplace.count_jobs()
        self._scheduler = self._begin(self._schedule())

    @property
    def alive(self) -> bool:
        return self._scheduler is not None and not self._scheduler.done()

    async def close(self) -> None:
        """Stop in the middle; the next start continues."""
        for run in self._runs.values():
            run.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.close)
        await self._ledger.close()
        os.close(self._lock)

    # Calls of routes

    async def submit(
        self,
        form: Form,
        collection: str,
        blocks: AsyncIterator[bytes],
        key: str | None,
        meter: str | None,
        size: int | None = None,
    ) -> tuple[Progress, bool]:
        """Return a job of what comes, and whether it is new, once it is on disk.

        `key` is what tells a repeated request, `meter` names the limits that the items are charged to, and `size` is
        the number of bytes, where it is stated. Raises Overloaded, and DiskFull for what is too large, before anything
        is read, InvalidRequest for a key of another job, and what `spool` raises.
        """
        await self._ledger.do(Ledger.admit, MAX_JOBS, key)
        await self._threads.run(partial(self._disk.check, size or 0))
        id = f"{secrets.token_hex(12)}-{self.replica}"
        folder = self._folder / id
        try:
            await self._threads.run(folder.mkdir)
            digest = await spool(blocks, folder / "input", self._settings.max_job_bytes, self._disk, self._threads)
            await self._threads.run(partial(sync, folder, folder.parent))
        except BaseException:
            await asyncio.shield(self._remove(id))
            raise
        return await asyncio.shield(self._create(id, form, collection, digest, key, meter))

    async def _remove(self, id: str) -> None:
        """Delete the files of a job."""
        await self._threads.run(partial(shutil.rmtree, self._folder / id, ignore_errors=True))

    async def job(self, id: str) -> Progress:
        """Return a job. Raises NotFound, which names the replica that took the job, where that is another."""
        return self._progress(await self._job(id))

    async def jobs(self, limit: int, before: str | None, states: Sequence[State] | None) -> list[Progress]:
        """Return the newest jobs first; those that are older than the job `before`."""
        number = None if before is None else (await self._job(before)).number
        return [self._progress(job) for job in await self._ledger.do(Ledger.jobs, limit, number, states)]

    async def cancel(self, id: str) -> Progress:
        """Stop a job, and wait until nothing more of it is written; an ended job stays as it is."""
        job = await self._job(id)
        run = self._runs.get(id)
        if run is not None:
            run.cancel()
            await run.finished.wait()
        elif job.state in UNFINISHED:
            await self._end(job, "cancelled")
        return await self.job(id)

    async def errors(self, id: str) -> AsyncIterator[list[Refusal]]:
        """Yield the items refused so far, page by page, in the order of the input. Raises NotFound at once."""
        job = await self._job(id)

        async def pages() -> AsyncIterator[list[Refusal]]:
            line = 0
            while page := await self._ledger.do(Ledger.errors, job, line, _ERRORS_AT_ONCE):
                yield page
                line = page[-1].line

        return pages()

    async def _job(self, id: str) -> Job:
        try:
            return await self._ledger.do(Ledger.job, id)
        except NotFound:
            match = re.fullmatch(r"[0-9a-f]{24}-([A-Za-z0-9.-]{1,63})", id)
            if match is None or match[1] == self.replica:
                raise
            raise NotFound(
                f"no job {id!r} on the replica {self.replica}: ask the replica {match[1]}, which took it"
            ) from None

    def _progress(self, job: Job) -> Progress:
        run = self._runs.get(job.id)
        return Progress(job) if run is None or job.state not in UNFINISHED else run.progress()

    async def _create(
        self, id: str, form: Form, collection: str, digest: str, key: str | None, meter: str | None
    ) -> tuple[Progress, bool]:
        """Write the job down. Not to be cancelled: its files go where it is not written, and only there."""
        fingerprint = hashlib.sha256("\0".join((form, collection, digest)).encode()).hexdigest()
        new = False
        try:
            job, new = await self._ledger.do(
                Ledger.create, id, form, collection, fingerprint, key=key, meter=meter, most=MAX_JOBS
            )
        finally:
            if not new:
                await self._remove(id)
        self._wake.set()
        return self._progress(job), new

    # Runs

    def _begin(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        # In a context of its own: not that of the request that happened to start it.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _schedule(self) -> None:
        """Start queued jobs, and now and then forget those that ended long ago."""
        tidied = -_TIDY_S
        while True:
            self._wake.clear()
            try:
                if time.monotonic() - tidied > _TIDY_S:
                    tidied = time.monotonic()
                    await self._ledger.do(Ledger.forget, self._settings.jobs_keep_s)
                await self._workplace.count_jobs()
                for job in await self._ledger.do(Ledger.unfinished):
                    if len(self._runs) < _ACTIVE_JOBS and job.id not in self._runs:
                        run = self._runs[job.id] = Run(job, self._workplace)
                        self._begin(self._work(run))
            except NotReady:
                await asyncio.sleep(LONGEST_PAUSE_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_TIDY_S):
                    await self._wake.wait()

    async def _work(self, run: Run) -> None:
        """Work on a job and record how it ended. A cancelled task means the end of the server, not of the job."""
        try:
            try:
                state, *why = await _outcome(run)
                await self._end(run.job, state, *why)
                log.info("the job %s is %s", run.job.id, state)
            except NotReady:
                log.warning("the job %s is tried again in %.0f s", run.job.id, LONGEST_PAUSE_S)
                await asyncio.sleep(LONGEST_PAUSE_S)
        finally:
            del self._runs[run.job.id]
            run.finished.set()
            self._wake.set()

    async def _end(self, job: Job, state: State, code: str | None = None, detail: str | None = None) -> None:
        """Record the end of a job. Raises NotReady."""
        await self._ledger.do(Ledger.end, job, state, code, detail)
        await self._workplace.count_jobs()
        await self._remove(job.id)


async def _outcome(run: Run) -> tuple[State] | tuple[State, str, str]:
    """Run a job and return its final state, with code and reason where it failed. Raises NotReady."""
    try:
        await run.work()
    except Exception as error:
        if run.cancelled:
            return ("cancelled",)
        match error:
            case Cancelled():
                return ("cancelled",)
            case Unusable():
                return "failed", "unusable_input", str(error)
            case DiskFull():
                return "failed", "disk_full", str(error)
            case NotReady():
                raise
        log.exception("the job %s failed", run.job.id)
        return "failed", "internal_error", "the server failed on this job"
    return ("done",)
