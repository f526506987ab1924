"""The one thread that writes to SQLite: waiting operations share a commit, and each is answered after it."""

import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.contract.vectors import Vectors
from service.errors import NotReady
from service.store.index import Keys
from service.store.schema import set_meta

_GROUP = 64
"""Operations that share a commit at most: it bounds how long the first of them waits for the others."""

_NOT_WRITTEN = "the store cannot write: nothing of this request was stored"
_BEHIND = "the store's index is behind its rows: restart the server, then check what was stored"

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Put:
    collection: int
    modality: str
    keys: Keys
    vectors: Vectors
    replaced: Keys


@dataclass(frozen=True)
class Remove:
    collection: int
    keys: Keys


@dataclass(frozen=True)
class Create:
    collection: int


@dataclass(frozen=True)
class Drop:
    collection: int


Change = Put | Remove | Create | Drop
"""What a committed operation does to the indexes."""


@dataclass(frozen=True)
class Transaction:
    connection: sqlite3.Connection
    sequence: int
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    operation: Callable[[Transaction], Any]
    answer: "Future[Any]"


class Writer:
    """Runs operations in order. An operation that raises is undone alone; the others of its commit stand."""

    def __init__(self, connection: sqlite3.Connection, sequence: int, apply: Callable[[list[Change]], None]) -> None:
        """`apply` brings the indexes up to date with what has just been committed, before anyone is answered."""
        self._connection = connection
        self._sequence = sequence
        self._apply = apply
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._open = True
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def sequence(self) -> int:
        return self._sequence

    def alive(self) -> bool:
        return self._open and not self._failed and self._thread.is_alive()

    def submit(self, operation: Callable[[Transaction], T]) -> "Future[T]":
        """The future is answered once the operation is on disk and can be searched. Raises NotReady."""
        answer: Future[T] = Future()
        with self._gate:
            if not self.alive():
                raise NotReady("the store takes no more writes")
            self._jobs.put(_Job(operation, answer))
        return answer

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        with self._gate:
            if self._open:
                self._open = False
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._open or not self._jobs.empty():
                if jobs := self._waiting():
                    self._commit(jobs)
        finally:
            with self._gate:
                self._failed = self._failed or self._open
            while not self._jobs.empty():
                if (job := self._jobs.get()) and job.answer.set_running_or_notify_cancel():
                    job.answer.set_exception(NotReady(_NOT_WRITTEN))

    def _waiting(self) -> list[_Job]:
        """Wait for something to do, then take all that waits, up to _GROUP; nobody waits for a group to fill."""
        taken = [self._jobs.get()]
        while len(taken) < _GROUP and not self._jobs.empty():
            taken.append(self._jobs.get())
        return [job for job in taken if job is not None and job.answer.set_running_or_notify_cancel()]

    def _commit(self, jobs: list[_Job]) -> None:
        if self._failed:
            _refuse(jobs, _BEHIND)
            return
        outcomes: list[tuple[_Job, Any, Exception | None]] = []
        changes: list[Change] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            sequence = self._sequence + 1
            for job in jobs:
                transaction = Transaction(self._connection, sequence)
                self._connection.execute("SAVEPOINT job")
                try:
                    outcomes.append((job, job.operation(transaction), None))
                    changes += transaction.changes
                except Exception as error:
                    self._connection.execute("ROLLBACK TO job")
                    outcomes.append((job, None, error))
                self._connection.execute("RELEASE job")
            set_meta(self._connection, "sequence", str(sequence))
            self._connection.execute("COMMIT")
        except Exception:
            _log.exception("nothing was written: the commit failed")
            _refuse(jobs, _NOT_WRITTEN)
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            return
        self._sequence = sequence
        try:
            self._apply(changes)
        except Exception:
            # The rows are safe and the index is behind them; only a start, which reads the rows, puts that right.
            _log.exception("the index does not hold what was written: restart to rebuild it")
            self._failed = True
            _refuse(jobs, _BEHIND)
            return
        for job, result, failure in outcomes:
            if failure is None:
                job.answer.set_result(result)
            elif isinstance(failure, sqlite3.Error):
                _log.error("an operation failed in SQLite", exc_info=failure)
                job.answer.set_exception(NotReady(_NOT_WRITTEN))
            else:
                job.answer.set_exception(failure)


def _refuse(jobs: list[_Job], message: str) -> None:
    for job in jobs:
        job.answer.set_exception(NotReady(message))
