"""A client's data are refused before the disk is full, so that the rest of the server goes on."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import DiskFull


class Disk:
    """Watches the disk that holds a folder, of which `least_bytes` are to stay free. Any thread may use it."""

    def __init__(self, folder: Path, least_bytes: int) -> None:
        self._folder, self._least_bytes = folder, least_bytes
        self._being_written = 0
        self._lock = threading.Lock()

    @contextmanager
    def writing(self, count: int) -> Iterator[None]:
        """Reserve so many bytes while they are written, so that other writers count them as used. Raises DiskFull."""
        with self._lock:
            self._check(self._being_written + count)
            self._being_written += count
        try:
            yield
        finally:
            with self._lock:
                self._being_written -= count

    def check(self, count: int = 0) -> None:
        """Raises DiskFull where there is no room for so many bytes more."""
        with self._lock:
            self._check(self._being_written + count)

    def _check(self, count: int) -> None:
        free = free_bytes(self._folder)
        if free is not None and free - count < self._least_bytes:
            raise DiskFull("the server's disk is nearly full: its operator keeps ISTHMUS_MIN_FREE_BYTES free")


def free_bytes(path: Path) -> int | None:
    """Return the bytes that an unprivileged process may still write there; None where the disk does not say."""
    try:
        disk = os.statvfs(path)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
