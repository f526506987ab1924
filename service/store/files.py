"""Files of a database: who holds their folder, whether they are those that were opened, and when they are on disk."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from service.store.errors import StoreError, StoreInUse


def hold(path: Path) -> int:
    """Lock a directory, made if need be, for this process until the descriptor is closed. Raises StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"the store {path} cannot be written: {error.strerror}") from None
    try:
        # The process holds the lock until it ends: a second server over the same rows would serve a stale index.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StoreInUse(f"the store {path} is open in another process: each server needs its own") from None
    return lock


class OpenFiles:
    """The database, its write-ahead log and the log's index, as they were when they were opened.

    A file that is deleted or replaced stays open, without a name: what is written to it works, and is gone with the
    process. SQLite does not notice.
    """

    def __init__(self, database: Path) -> None:
        self._log = database.with_name(database.name + "-wal")
        paths = (database, self._log, database.with_name(database.name + "-shm"))
        self._opened = {path: _identity(path) for path in paths}

    def gone(self) -> Sequence[str]:
        """Return the names of the files that are not there any more, or are others by now."""
        return [path.name for path, opened in self._opened.items() if _identity(path) != opened]

    def log_bytes(self) -> int:
        """Return the size of the write-ahead log; 0 where there is none."""
        try:
            return self._log.stat().st_size
        except OSError:
            return 0


def sync(*paths: Path) -> None:
    """Wait until the content of these files, and the names in these folders, are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
