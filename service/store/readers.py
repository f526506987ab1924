"""Threads read a store's rows here, and SQLite's errors get their meaning."""

import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from service.errors import NotReady
from service.runtime.workers import Workers, abandoned
from service.store import schema
from service.store.errors import StoreDamaged, StoreError

_READERS, _SPARE_READERS = 4, 1
"""Threads that read: for one caller, and for another while that one has them all."""
_STEPS = 20_000
"""Steps of SQLite's virtual machine (under a millisecond) between two checks whether anybody still waits for a read."""
_UNWRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Readers(Workers):
    """Threads that read rows, each with a connection of its own."""

    def __init__(self, file: Path) -> None:
        self._file, self._thread = file, threading.local()
        # Before anything can happen to the files: a later connection might find another log.
        self._connections = [schema.connect(file) for _ in range(_READERS + _SPARE_READERS)]
        self._unused = list(self._connections)
        """Connections that no thread uses now."""
        self.refusing: Callable[[], bool] = lambda: False
        """Whether the files may be others by now, so that nothing more is opened."""
        self.closed = self.damaged = False
        super().__init__("store-reader", _READERS, spare=_SPARE_READERS)

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function of a connection in one of the threads. Raises NotReady where the rows cannot be read."""
        if self.closed:
            raise NotReady("the store is closed")
        return await self.run(lambda: self._read(function))

    def close(self, *, wait: bool = True) -> None:
        super().close(wait=wait)
        for connection in self._connections:
            connection.close()

    def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        if not hasattr(self._thread, "connection"):
            self._thread.connection = self._connection()
            # A read whose client went away, or whose deadline is over, ends in the middle.
            self._thread.connection.set_progress_handler(abandoned, _STEPS)
        try:
            return function(self._thread.connection)
        except sqlite3.DatabaseError as error:
            code = _primary_code(error)
            if code not in (*_UNWRITABLE, *_CORRUPT):
                if code == sqlite3.SQLITE_INTERRUPT or not isinstance(error, sqlite3.OperationalError):
                    raise
                _log.exception("an operation failed in SQLite")
                raise NotReady("the store cannot be read now") from None
            self.damaged = self.damaged or code in _CORRUPT
            _log.exception("the store cannot be read: stop the server, and run `python -m service check` on it")
            raise NotReady("the store cannot be read") from None

    def _connection(self) -> sqlite3.Connection:
        with suppress(IndexError):
            return self._unused.pop()
        if self.refusing():  # another thread died with its connection
            raise NotReady("the store cannot be read")
        connection = schema.connect(self._file)
        self._connections.append(connection)
        return connection


def reason(path: Path, error: Exception) -> StoreError:
    """Return the error for a store at `path` that cannot be opened."""
    if isinstance(error, sqlite3.Error) and _primary_code(error) in _UNWRITABLE:
        return StoreError(f"the store {path} cannot be written: {error}")
    return StoreDamaged(
        f"the store {path} cannot be read: {error}; `python -m service check {path}` says more, and "
        "`python -m service restore` brings a backup back"
    )


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
