"""Room on the disk: what is written on a client's behalf stops before the last byte, so that others can go on."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import DiskFull


class Disk:
    """The disk that holds a folder, of which `least_bytes` are to stay free. For any thread."""

    def __init__(self, folder: Path, least_bytes: int) -> None:
        self._folder, self._least_bytes = folder, least_bytes
        self._being_written = 0
        self._lock = threading.Lock()

    @contextmanager
    def writing(self, count: int) -> Iterator[None]:
        """Around the writing of so many bytes, which others count with until the disk does. Raises DiskFull."""
        with self._lock:
            self._check(self._being_written + count)
            self._being_written += count
        try:
            yield
        finally:
            with self._lock:
                self._being_written -= count

    def check(self, count: int = 0) -> None:
        """Whether there is room for so many bytes more. Raises DiskFull."""
        with self._lock:
            self._check(self._being_written + count)

    def _check(self, count: int) -> None:
        free = free_bytes(self._folder)
        if free is not None and free - count < self._least_bytes:
            raise DiskFull("the server's disk is nearly full: its operator keeps ISTHMUS_MIN_FREE_BYTES free")


def free_bytes(path: Path) -> int | None:
    """That an unprivileged process may still write there; None where the disk does not say."""
    try:
        disk = os.statvfs(path)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
