"""Files that a setting names are read whole, where they are files."""

import errno
import os
import stat
from pathlib import Path


def read_file(path: Path) -> bytes:
    """Return what a regular file holds. Raises OSError, also for a pipe or a device, which may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read()
