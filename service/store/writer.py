"""The one thread that writes to SQLite: waiting operations share a commit, and each is answered after it."""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.contract.vectors import Vectors
from service.errors import NotReady
from service.store.files import OpenFiles
from service.store.kinds import IndexRequest, Keys
from service.store.log_copier import LogCopier
from service.store.schema import meta, set_meta

_GROUP = 64
"""Largest number of operations in one commit: it bounds how long the first of them waits for the others."""

_NOT_WRITTEN = "the store cannot write: nothing of this request was stored"
_GONE = "the store's files were deleted or replaced: it takes no writes until the server is started again"
BEHIND = "the store's index is behind its rows: restart the server, then check what was stored"

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Put:
    collection: int
    modality: str
    slots: Keys
    vectors: Vectors
    metadata: Sequence[Mapping[str, Any]]
    records: Sequence[bytes]
    replaced: Keys


@dataclass(frozen=True)
class Remove:
    collection: int
    slots: Keys


@dataclass(frozen=True)
class Configure:
    """Makes a collection, or gives it another kind of index."""

    collection: int
    name: str
    index_request: IndexRequest


@dataclass(frozen=True)
class Drop:
    collection: int


Change = Put | Remove | Configure | Drop
"""A change that a committed operation makes to the indexes."""


@dataclass(frozen=True)
class Transaction:
    connection: sqlite3.Connection
    take: Callable[[int], int]
    """The first of so many new slots in a row. What is taken and not written is never used."""
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    operation: Callable[[Transaction], Any]
    answer: "Future[Any]"
    alone: bool


_Outcome = tuple[_Job, Any, Exception | None]


class Writer:
    """Runs operations in order. An operation that raises is undone alone; the others of its commit stand."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        copying: sqlite3.Connection,
        apply: Callable[[list[Change]], None],
        files: OpenFiles,
    ) -> None:
        """Start the writer. `files` are those of its connection, and of the one that copies the log into the database.

        `apply` brings the indexes up to date with what has just been committed, before anyone is answered.
        """
        self._connection = connection
        self._sequence = self._applied = int(meta(connection, "sequence") or 0)
        self._slot = int(meta(connection, "slot") or 0)
        self._apply = apply
        self._files = files
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._held_back: _Job | None = None
        self.committing = threading.Lock()
        """Held from before a commit until the indexes show it: its holder sees both in the same state."""
        self._gate = threading.Lock()
        self._open = True
        self._failed = self._gone = False
        self._refusing = False
        self._written = time.monotonic()
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        self._copier = LogCopier(copying, files)
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def sequence(self) -> int:
        """Return the sequence number of the last commit."""
        return self._sequence

    @property
    def applied(self) -> int:
        """Return the sequence number of the last commit that the indexes show."""
        return self._applied

    def alive(self) -> bool:
        return self._open and not self._failed and self._thread.is_alive()

    @property
    def refusing(self) -> bool:
        """Return whether the last commit failed, or the files on disk are not those that are written to."""
        return self._refusing or self._gone or bool(self._files.gone())

    @property
    def idle_s(self) -> float:
        """Return seconds since the last commit."""
        return time.monotonic() - self._written

    def submit(self, operation: Callable[[Transaction], T], *, alone: bool = False) -> "Future[T]":
        """Queue an operation; the future is answered once it is on disk and can be searched. Raises NotReady.

        One that is to be `alone` shares its commit with none: it finds in the indexes all that was written before it.
        """
        answer: Future[T] = Future()
        with self._gate:
            if self._gone:
                raise NotReady(_GONE)
            if not self.alive():
                raise NotReady("the store takes no more writes")
            self._jobs.put(_Job(operation, answer, alone))
        return answer

    def close(self) -> None:
        """Finish the submitted operations, then stop."""
        with self._gate:
            if self._open:
                self._open = False
                self._jobs.put(None)
        self._thread.join()
        self._copier.close()

    def _take(self, count: int) -> int:
        self._slot += count
        return self._slot - count + 1

    def _run(self) -> None:
        try:
            while self._open or self._held_back or not self._jobs.empty():
                if jobs := self._waiting():
                    self._commit(jobs)
        finally:
            with self._gate:
                self._failed = self._failed or self._open
            while self._held_back or not self._jobs.empty():
                if (job := self._taken()) and job.answer.set_running_or_notify_cancel():
                    job.answer.set_exception(NotReady(_NOT_WRITTEN))

    def _waiting(self) -> list[_Job]:
        """Wait for an operation, then return all that wait, up to _GROUP; no operation waits for a group to fill."""
        jobs = [self._taken()]
        while len(jobs) < _GROUP and not self._jobs.empty() and not (jobs[0] and jobs[0].alone):
            job = self._taken()
            if job is not None and job.alone:
                self._held_back = job
                break
            jobs.append(job)
        return [job for job in jobs if job is not None and job.answer.set_running_or_notify_cancel()]

    def _taken(self) -> _Job | None:
        job, self._held_back = self._held_back, None
        return job or self._jobs.get()

    def _commit(self, jobs: list[_Job]) -> None:
        if self._failed:
            _refuse(jobs, BEHIND)
            return
        if self._lost_files():
            _refuse(jobs, _GONE)
            return
        with self._copier.writing:
            outcomes = self._committed(jobs)
        if outcomes is None:
            return
        self._refusing, self._written = False, time.monotonic()
        if self._lost_files():
            _refuse(jobs, _GONE)
            return
        for job, result, failure in outcomes:
            if failure is None:
                job.answer.set_result(result)
            elif isinstance(failure, sqlite3.Error):
                _log.error("an operation failed in SQLite", exc_info=failure)
                job.answer.set_exception(NotReady(_NOT_WRITTEN))
            else:
                job.answer.set_exception(failure)
        self._copier.notify()

    def _committed(self, jobs: list[_Job]) -> list[_Outcome] | None:
        """Run jobs in one transaction; return what each is answered, or None where all are answered by now."""
        outcomes: list[_Outcome] = []
        changes: list[Change] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            sequence = self._sequence + 1
            for job in jobs:
                transaction = Transaction(self._connection, self._take)
                self._connection.execute("SAVEPOINT job")
                try:
                    outcomes.append((job, job.operation(transaction), None))
                    changes += transaction.changes
                except Exception as error:
                    self._connection.execute("ROLLBACK TO job")
                    outcomes.append((job, None, error))
                self._connection.execute("RELEASE job")
            set_meta(self._connection, "sequence", str(sequence))
            set_meta(self._connection, "slot", str(self._slot))
        except Exception:
            self._give_up(jobs)
            return None
        with self.committing:
            try:
                self._connection.execute("COMMIT")
            except Exception:
                self._give_up(jobs)
                return None
            self._sequence = sequence
            try:
                self._apply(changes)
            except Exception:
                # The rows are safe and the index is behind them; only a start, which reads the rows, puts that right.
                _log.exception("the index does not hold what was written: restart to rebuild it")
                self._failed = True
                _refuse(jobs, BEHIND)
                return None
            self._applied = sequence
        return outcomes

    def _lost_files(self) -> bool:
        """Return whether the files on disk are not those that are open, once for all."""
        if not self._gone and (names := self._files.gone()):
            self._gone = True
            _log.critical("%s: deleted or replaced while the server uses it; nothing more is written", ", ".join(names))
            # Acknowledged writes that only the log holds go into the database before the log is deleted for good.
            self._copier.copy_all()
        return self._gone

    def _give_up(self, jobs: list[_Job]) -> None:
        _log.exception("nothing was written: the commit failed")
        self._refusing = True
        _refuse(jobs, _NOT_WRITTEN)
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _refuse(jobs: list[_Job], message: str) -> None:
    for job in jobs:
        job.answer.set_exception(NotReady(message))
