"""What is known of every job, on disk: a job that was answered for survives whatever happens to the process.

A job's items are numbered from 0. Chunks are cut from them in order; a chunk is written down when it is cut and taken
off when all of its items are in the store or refused, in the same transaction as the counts. So after a crash what is
left to do are the chunks that stand here, and the items from `next` on.

Creating and ending a job waits for the disk; progress does not (a power cut takes back the last of it, and those chunks
are done again, to the same effect).
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from service.errors import InvalidRequest, NotFound, Overloaded

FILE = "jobs.sqlite3"

Form = Literal["jsonl", "tar", "folder"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
UNFINISHED: tuple[State, ...] = ("queued", "running")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    form TEXT NOT NULL,
    collection TEXT NOT NULL,
    folder TEXT,
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
CREATE TABLE IF NOT EXISTS chunks (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    first INTEGER NOT NULL,
    count INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    suspect INTEGER NOT NULL DEFAULT 0,
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
    folder: str | None
    """Under the root that the operator allowed; of form `folder`."""
    fingerprint: str
    created: str
    started: str | None
    ended: str | None
    total: int | None
    """Items; None until they were counted."""
    next: int
    """The first item that no chunk was cut from yet."""
    done: int
    failed: int
    code: str | None
    detail: str | None
    """Why it failed as a whole."""
    meter: str | None
    """The id and the limits of the API key that it counts for, as the key had them; None: nobody counts."""


@dataclass(frozen=True)
class Chunk:
    job: int
    first: int
    count: int
    attempts: int = 0
    """Times that a process took it up and ended before it was done."""
    suspect: bool = False
    """It is one item of a chunk that processes ended on."""


@dataclass(frozen=True)
class Refusal:
    """An item that was not stored."""

    line: int
    """Its place in the input, from 1: of JSONL the line, else the item's number."""
    id: str | None
    code: str
    detail: str


_JOB = """SELECT number, id, state, form, collection, folder, fingerprint, created, started, ended, total, next, done,
    failed, code, detail, meter FROM jobs"""


class Ledger:
    """Used by one thread at a time. Raises NotFound for a job that is not there."""

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
        folder: str | None = None,
        key: str | None = None,
        meter: str | None = None,
        most: int,
    ) -> tuple[Job, bool]:
        """The job, and whether it is new: the same key with the same fingerprint is the same job.

        Raises InvalidRequest for the same key with another fingerprint, Overloaded where `most` are unfinished.
        """
        with self._transaction(durable=True) as connection:
            if key is not None:
                row = connection.execute(f"{_JOB} WHERE idempotency_key = ?", (key,)).fetchone()
                if row is not None:
                    if (held := Job(*row)).fingerprint != fingerprint:
                        raise InvalidRequest(
                            "this Idempotency-Key came with another job before", code="idempotency_key_reused"
                        )
                    return held, False
            self._room(most)
            connection.execute(
                "INSERT INTO jobs (id, state, form, collection, folder, idempotency_key, fingerprint, meter, created) "
                "VALUES (?, 'queued', ?, ?, ?, ?, ?, ?, ?)",
                (id, form, collection, folder, key, fingerprint, meter, _now()),
            )
        return self.job(id), True

    def admit(self, most: int, key: str | None) -> None:
        """Raises Overloaded where a job would be refused, whatever is in it."""
        known = "SELECT 1 FROM jobs WHERE idempotency_key = ?"
        if key is None or self._connection.execute(known, (key,)).fetchone() is None:
            self._room(most)

    def _room(self, most: int) -> None:
        waiting = self._connection.execute("SELECT count(*) FROM jobs WHERE state IN (?, ?)", UNFINISHED).fetchone()[0]
        if waiting >= most:
            raise Overloaded(f"{waiting} jobs are unfinished: no more are taken", retry_after_s=30)

    def job(self, id: str) -> Job:
        row = self._connection.execute(f"{_JOB} WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound(f"no job {id!r}")
        return Job(*row)

    def jobs(self, limit: int, before: int | None = None, states: Sequence[State] | None = None) -> list[Job]:
        """The newest first; `before`: only those with a smaller number."""
        chosen = states or ("queued", "running", "done", "failed", "cancelled")
        rows = self._connection.execute(
            f"{_JOB} WHERE number < ? AND state IN ({', '.join('?' * len(chosen))}) ORDER BY number DESC LIMIT ?",
            (before if before is not None else 2**62, *chosen, limit),
        )
        return [Job(*row) for row in rows]

    def unfinished(self) -> list[Job]:
        """The oldest first."""
        rows = self._connection.execute(f"{_JOB} WHERE state IN (?, ?) ORDER BY number", UNFINISHED)
        return [Job(*row) for row in rows]

    def begin(self, job: Job, total: int) -> Job:
        """Its items are counted, and are embedded from now on."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE jobs SET state = 'running', total = ?, started = ? WHERE number = ? AND state = 'queued'",
                (total, _now(), job.number),
            )
        return self.job(job.id)

    def end(self, job: Job, state: State, code: str | None = None, detail: str | None = None) -> Job:
        with self._transaction(durable=True) as connection:
            connection.execute(
                "UPDATE jobs SET state = ?, ended = ?, code = ?, detail = ? WHERE number = ? AND state IN (?, ?)",
                (state, _now(), code, detail, job.number, *UNFINISHED),
            )
            connection.execute("DELETE FROM chunks WHERE job = ?", (job.number,))
        return self.job(job.id)

    def forget(self, older_than_s: float) -> list[str]:
        """Forget jobs that ended so long ago; their ids."""
        limit = (datetime.now(UTC) - timedelta(seconds=older_than_s)).isoformat(timespec="milliseconds")
        with self._transaction() as connection:
            rows = connection.execute("DELETE FROM jobs WHERE ended < ? RETURNING id", (limit,)).fetchall()
        return [row[0] for row in rows]

    def counts(self) -> Mapping[str, int]:
        """Jobs by state."""
        return dict(self._connection.execute("SELECT state, count(*) FROM jobs GROUP BY state"))

    # Chunks

    def cut(self, job: Job, count: int) -> Chunk:
        """The next `count` items, written down as under way."""
        with self._transaction() as connection:
            [after] = connection.execute(
                "UPDATE jobs SET next = next + ? WHERE number = ? RETURNING next", (count, job.number)
            ).fetchone()
            connection.execute(
                "INSERT INTO chunks (job, first, count) VALUES (?, ?, ?)", (job.number, after - count, count)
            )
        return Chunk(job.number, after - count, count)

    def chunks(self, job: Job) -> list[Chunk]:
        """Those under way, in order."""
        found = self._connection.execute(
            "SELECT job, first, count, attempts, suspect FROM chunks WHERE job = ? ORDER BY first", (job.number,)
        )
        return [Chunk(job, first, count, tried, bool(suspect)) for job, first, count, tried, suspect in found]

    def attempt(self, chunk: Chunk) -> int:
        """Write down that it is taken up once more; how often that was done before."""
        with self._transaction() as connection:
            row = connection.execute(
                "UPDATE chunks SET attempts = attempts + 1 WHERE job = ? AND first = ? RETURNING attempts",
                (chunk.job, chunk.first),
            ).fetchone()
        return int(row[0]) - 1 if row else 0

    def untry(self, chunk: Chunk) -> None:
        """Take an attempt back that was lived through."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE chunks SET attempts = max(attempts - 1, 0) WHERE job = ? AND first = ? AND count = ?",
                (chunk.job, chunk.first, chunk.count),
            )

    def split(self, chunk: Chunk) -> list[Chunk]:
        """Put a chunk for each of its items in its place, none of them tried yet."""
        ones = [Chunk(chunk.job, chunk.first + each, 1, suspect=True) for each in range(chunk.count)]
        with self._transaction() as connection:
            connection.execute("DELETE FROM chunks WHERE job = ? AND first = ?", (chunk.job, chunk.first))
            connection.executemany(
                "INSERT INTO chunks (job, first, count, suspect) VALUES (?, ?, 1, TRUE)",
                [(one.job, one.first) for one in ones],
            )
        return ones

    def close_chunks(self, job: Job, chunks: Sequence[Chunk], done: int, refusals: Sequence[Refusal]) -> Job:
        """Their items are in the store or refused; the job as it is then."""
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM chunks WHERE job = ? AND first = ?", [(chunk.job, chunk.first) for chunk in chunks]
            )
            connection.execute(
                "UPDATE jobs SET done = done + ?, failed = failed + ? WHERE number = ?",
                (done, len(refusals), job.number),
            )
            connection.executemany(
                "INSERT INTO errors VALUES (?, ?, ?, ?, ?)",
                [(job.number, each.line, each.id, each.code, each.detail) for each in refusals],
            )
        return self.job(job.id)

    def errors(self, job: Job, after: int, limit: int) -> list[Refusal]:
        """Refusals of lines past `after`, in order."""
        found: list[Any] = self._connection.execute(
            "SELECT line, id, code, detail FROM errors WHERE job = ? AND line > ? ORDER BY line LIMIT ?",
            (job.number, after, limit),
        ).fetchall()
        return [Refusal(*row) for row in found]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
