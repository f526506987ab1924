"""The ledger of all jobs is durable: an acknowledged job survives whatever happens to the process.

A job's items are numbered from 0 and are stored in order. So what a crash leaves to do are the items from `next` on.

Creating and ending a job waits for the disk; progress does not. A power cut takes back the last of it, and those items
are stored again, to the same effect.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

from service.errors import InvalidRequest, NotFound, NotReady, Overloaded
from service.store.schema import now

log = logging.getLogger(__name__)

FILE = "jobs.sqlite3"

Form = Literal["jsonl", "tar"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
UNFINISHED: tuple[State, ...] = ("queued", "running")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    form TEXT NOT NULL,
    collection TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    fingerprint TEXT NOT NULL,
    meter TEXT,
    created TEXT NOT NULL,
    started TEXT,
    ended TEXT,
    total INTEGER,
    next INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    code TEXT,
    detail TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE TABLE IF NOT EXISTS attempts (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    first INTEGER NOT NULL,
    count INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    PRIMARY KEY (job, first)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS errors (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    line INTEGER NOT NULL,
    id TEXT,
    code TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS errors_in_order ON errors (job, line);
"""


@dataclass(frozen=True)
class Job:
    number: int
    id: str
    state: State
    form: Form
    collection: str
    fingerprint: str
    created: str
    started: str | None
    ended: str | None
    total: int | None
    """Number of items; None until they are counted."""
    next: int
    """The first item that is neither stored nor refused."""
    done: int
    failed: int
    code: str | None
    detail: str | None
    """Why the job failed as a whole."""
    meter: str | None
    """The id and the limits of the API key that is charged, as the key had them; None: no key is charged."""


@dataclass(frozen=True)
class Chunk:
    """Names the items of a job that are embedded together."""

    first: int
    count: int
    attempts: int = 0
    """Number of times that a process began the chunk, or one that it was part of, and ended before it was done."""


@dataclass(frozen=True)
class Refusal:
    """Says why an item was not stored."""

    line: int
    """Position in the input, from 1: the line of JSONL, otherwise the item's number."""
    id: str | None
    code: str
    detail: str


_JOB = f"SELECT {', '.join(field.name for field in fields(Job))} FROM jobs"


class Ledger:
    """Keeps the jobs in a database, used by one thread at a time. Raises NotFound for an unknown job."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        if durable:
            self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        finally:
            if durable:
                self._connection.execute("PRAGMA synchronous = NORMAL")

    # Jobs

    def create(
        self,
        id: str,
        form: Form,
        collection: str,
        fingerprint: str,
        *,
        key: str | None = None,
        meter: str | None = None,
        most: int,
    ) -> tuple[Job, bool]:
        """Create a job and return it, and whether it is new: the same key with the same fingerprint is the same job.

        Raises InvalidRequest for the same key with another fingerprint, Overloaded where `most` are unfinished.
        """
        with self._transaction(durable=True) as connection:
            if key is not None:
                row = connection.execute(f"{_JOB} WHERE idempotency_key = ?", (key,)).fetchone()
                if row is not None:
                    job = Job(*row)
                    if job.fingerprint != fingerprint:
                        raise InvalidRequest(
                            "this Idempotency-Key came with another job before", code="idempotency_key_reused"
                        )
                    return job, False
            self._check_room(most)
            connection.execute(
                "INSERT INTO jobs (id, state, form, collection, idempotency_key, fingerprint, meter, created) "
                "VALUES (?, 'queued', ?, ?, ?, ?, ?, ?)",
                (id, form, collection, key, fingerprint, meter, now()),
            )
        return self.job(id), True

    def admit(self, most: int, key: str | None) -> None:
        """Raises Overloaded where a job would be refused, whatever is in it."""
        query = "SELECT 1 FROM jobs WHERE idempotency_key = ?"
        if key is None or self._connection.execute(query, (key,)).fetchone() is None:
            self._check_room(most)

    def _check_room(self, most: int) -> None:
        count = self._connection.execute("SELECT count(*) FROM jobs WHERE state IN (?, ?)", UNFINISHED).fetchone()[0]
        if count >= most:
            raise Overloaded(f"{count} jobs are unfinished: no more are taken", retry_after_s=30)

    def job(self, id: str) -> Job:
        row = self._connection.execute(f"{_JOB} WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound(f"no job {id!r}")
        return Job(*row)

    def jobs(self, limit: int, before: int | None = None, states: Sequence[State] | None = None) -> list[Job]:
        """Return the newest jobs first; `before`: only those with a smaller number."""
        selected = states or get_args(State)
        rows = self._connection.execute(
            f"{_JOB} WHERE number < ? AND state IN ({', '.join('?' * len(selected))}) ORDER BY number DESC LIMIT ?",
            (before if before is not None else 2**62, *selected, limit),
        )
        return [Job(*row) for row in rows]

    def unfinished(self) -> list[Job]:
        """Return the oldest jobs first."""
        rows = self._connection.execute(f"{_JOB} WHERE state IN (?, ?) ORDER BY number", UNFINISHED)
        return [Job(*row) for row in rows]

    def begin(self, job: Job, total: int) -> Job:
        """Record that the job's items are counted and that embedding begins."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE jobs SET state = 'running', total = ?, started = ? WHERE number = ? AND state = 'queued'",
                (total, now(), job.number),
            )
        return self.job(job.id)

    def end(self, job: Job, state: State, code: str | None = None, detail: str | None = None) -> None:
        with self._transaction(durable=True) as connection:
            connection.execute(
                "UPDATE jobs SET state = ?, ended = ?, code = ?, detail = ? WHERE number = ? AND state IN (?, ?)",
                (state, now(), code, detail, job.number, *UNFINISHED),
            )
            connection.execute("DELETE FROM attempts WHERE job = ?", (job.number,))

    def forget(self, older_than_s: float) -> None:
        """Forget jobs that ended longer ago than this."""
        limit = (datetime.now(UTC) - timedelta(seconds=older_than_s)).isoformat(timespec="milliseconds")
        with self._transaction() as connection:
            connection.execute("DELETE FROM jobs WHERE ended < ?", (limit,))

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        counts = dict(self._connection.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
        return dict.fromkeys(get_args(State), 0) | counts

    # Progress

    def advance(self, job: Job, next: int, done: int, refusals: Sequence[Refusal]) -> Job:
        """Record that the items before `next` are stored, `done` of them since the last call, or refused."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE jobs SET next = ?, done = done + ?, failed = failed + ? WHERE number = ?",
                (next, done, len(refusals), job.number),
            )
            connection.execute("DELETE FROM attempts WHERE job = ? AND first < ?", (job.number, next))
            connection.executemany(
                "INSERT INTO errors VALUES (?, ?, ?, ?, ?)",
                [(job.number, refusal.line, refusal.id, refusal.code, refusal.detail) for refusal in refusals],
            )
        return self.job(job.id)

    def attempted(self, job: Job) -> dict[int, Chunk]:
        """Return chunks that were under way when a process ended, or their parts, by first item."""
        rows = self._connection.execute(
            "SELECT first, count, attempts FROM attempts WHERE job = ? AND attempts > 0", (job.number,)
        )
        return {first: Chunk(first, count, attempts) for first, count, attempts in rows}

    def begin_attempt(self, job: Job, chunk: Chunk) -> None:
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, 1) "
                "ON CONFLICT DO UPDATE SET count = excluded.count, attempts = attempts + 1",
                (job.number, chunk.first, chunk.count),
            )

    def undo_attempt(self, job: Job, chunk: Chunk) -> None:
        """Record that the process outlived the attempt."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE attempts SET attempts = attempts - 1 WHERE job = ? AND first = ?", (job.number, chunk.first)
            )

    def split(self, job: Job, chunk: Chunk) -> list[Chunk]:
        """Replace a chunk by one for each of its items."""
        chunks = [Chunk(chunk.first + place, 1, attempts=1) for place in range(chunk.count)]
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?)",
                [(job.number, part.first, part.count, part.attempts) for part in chunks],
            )
        return chunks

    def errors(self, job: Job, after: int, limit: int) -> list[Refusal]:
        """Return the refusals of lines past `after`, in order."""
        rows: list[Any] = self._connection.execute(
            "SELECT line, id, code, detail FROM errors WHERE job = ? AND line > ? ORDER BY line LIMIT ?",
            (job.number, after, limit),
        ).fetchall()
        return [Refusal(*row) for row in rows]


P = ParamSpec("P")
T = TypeVar("T")


class LedgerThread:
    """Calls the ledger in a thread of its own."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")

    async def do(self, method: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the ledger. Raises its exceptions, and NotReady."""
        call = partial(method, self._ledger, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except RuntimeError:
            raise NotReady("the server is shutting down") from None
        except sqlite3.Error:
            log.exception("the ledger of jobs cannot be used")
            raise NotReady("the jobs cannot be read or written") from None

    def begin(self, method: Callable[Concatenate[Ledger, P], object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call a method of the ledger after earlier calls, without waiting for it."""
        self._thread.submit(partial(method, self._ledger, *args, **kwargs))

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        self._ledger.close()
