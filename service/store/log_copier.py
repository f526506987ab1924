"""The thread that copies SQLite's write-ahead log into the database, so that no write and no search waits for it."""

import logging
import math
import sqlite3
import threading
import time

from service.store.files import OpenFiles

_LONGEST_LOG = 2**28
"""Bytes of the log from which on it begins anew, for which writes wait a moment."""
_WAIT_MS = 50
"""Milliseconds that they wait at most until no search reads the log. SQLite begins it anew by itself at a moment
without readers, of which there may be none while searches overlap."""
_LAST_WAIT_MS = 2_000
"""The same where the log is twice as long, since reads that overlap never leave so short a moment, and at the end."""
_AGAIN_S = 10.0
"""Seconds until that is tried again where something, such as a backup, reads the log for longer."""
_PAUSE_S = 1.0
"""Seconds between two copies: a page that is written again meanwhile is copied once."""
_ROUNDS, _FEW_PAGES = 4, 256
"""Copies before the log begins anew, until so few pages are left that writers hardly wait for them."""

_log = logging.getLogger(__name__)


class LogCopier:
    """Copies after writes, at most once a second. The writer holds `writing` during a transaction."""

    def __init__(self, connection: sqlite3.Connection, files: OpenFiles) -> None:
        """Start the thread, which uses this connection alone. `files` are those that the connection opened."""
        self._connection, self._files = connection, files
        self.writing = threading.Lock()
        self._copying = threading.Lock()
        self._written, self._closing = threading.Event(), threading.Event()
        self._again = -math.inf
        self._thread = threading.Thread(target=self._run, name="store-log-copier", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Note that something was committed."""
        self._written.set()

    def copy_all(self) -> None:
        """Copy the whole log now, as far as the readers allow."""
        with self._copying:
            self._copy("FULL", _LAST_WAIT_MS)

    def close(self) -> None:
        self._closing.set()
        self._written.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._written.wait()
            self._written.clear()  # before the look at `_closing`, which is set before `_written`
            if self._closing.is_set():
                return
            with self._copying:
                pages = self._copy("PASSIVE")
                if self._files.log_bytes() > _LONGEST_LOG and time.monotonic() > self._again:
                    self._begin_anew(pages)
            self._closing.wait(_PAUSE_S)

    def _begin_anew(self, pages: int) -> None:
        """Empty the log, which had so many pages when it was copied last."""
        for _ in range(_ROUNDS):
            before, pages = pages, self._copy("PASSIVE")
            if pages - before <= _FEW_PAGES:
                break
        with self.writing:
            patient = self._files.log_bytes() > 2 * _LONGEST_LOG
            self._copy("TRUNCATE", _LAST_WAIT_MS if patient else _WAIT_MS)
        if self._files.log_bytes() > _LONGEST_LOG:
            self._again = time.monotonic() + _AGAIN_S

    def _copy(self, how: str, wait_ms: int = 0) -> int:
        """Copy the pages that no reader keeps from it, and return how many the log has."""
        try:
            self._connection.execute(f"PRAGMA busy_timeout = {wait_ms}")
            _, pages, _ = self._connection.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
        except sqlite3.Error:
            _log.exception("the write-ahead log cannot be copied into the database")
            return 0
        return int(pages)
