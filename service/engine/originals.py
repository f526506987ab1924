"""The file of an item is opened below a folder, and typed, where the operator lets it be read (`media`).

Every part of the name is opened in the folder that was opened before it and no link is followed, so that nothing that
changes meanwhile leads out of the folder. What is opened is a plain file or is not read.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.contract.containers import container_of, sound_demuxer_of
from service.contract.structure import is_sound, picture_format

OTHER = "application/octet-stream"
_HEADER_BYTES = 512
_SOUNDS = {
    "aac": "audio/aac",
    "aiff": "audio/aiff",
    "amr": "audio/amr",
    "au": "audio/basic",
    "caf": "audio/x-caf",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "w64": "audio/x-w64",
    "wav": "audio/wav",
}
_CONTAINERS = {
    "avi": "video/x-msvideo",
    "flv": "video/x-flv",
    "matroska": "video/x-matroska",
    "mp4": "video/mp4",
    "mpegts": "video/mp2t",
    "ogg": "video/ogg",
}
_BRANDS = {b"M4A ": "audio/mp4", b"M4B ": "audio/mp4", b"qt  ": "video/quicktime"}


class Original:
    """Holds an open file, which is closed when nobody holds it any more."""

    def __init__(self, descriptor: int) -> None:
        """Take over an open descriptor. Blocks; raises OSError."""
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.plain = stat.S_ISREG(status.st_mode)
        self.size = status.st_size
        self.tag = f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"
        """A text that changes with the file."""
        self.media_type = media_type(self.read(0, _HEADER_BYTES)) if self.plain else OTHER
        """By the first bytes: a type of pictures, sounds or videos, or OTHER."""

    def read(self, start: int, count: int) -> bytes:
        """Read at most so many bytes. Blocks."""
        return os.pread(self._descriptor, count, start)

    def __del__(self) -> None:
        os.close(self._descriptor)


def open_original(roots: Sequence[Path], id: str, metadata: Mapping[str, Any]) -> Original | None:
    """Open the file of an item below one of the folders, or return None where there is none. Blocks.

    `isthmus index` makes an item's id of the file's path in the indexed folder, and notes under `file` the folder's
    name and the file's size. A file of another size is not the one that was indexed.
    """
    stamp = metadata.get("file")
    stamp = stamp if isinstance(stamp, Mapping) else {}
    folder, size = stamp.get("folder"), stamp.get("bytes")
    for root in roots:
        for name in [id, f"{folder}/{id}"] if isinstance(folder, str) else [id]:
            original = _open_below(root, name)
            if original is not None and (not isinstance(size, int) or size == original.size):
                return original
    return None


def _open_below(root: Path, name: str) -> Original | None:
    """Open a plain file below a folder without following a link; None where that cannot be. Hidden files are left
    alone, as `isthmus index` does."""
    *folders, last = name.split("/")
    if any(not part or part.startswith(".") or "\0" in part for part in (*folders, last)):
        return None
    descriptor = -1
    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        # Opening some devices does something, and opening a pipe waits: what is plainly neither is opened.
        if not stat.S_ISREG(os.stat(last, dir_fd=descriptor, follow_symlinks=False).st_mode):
            return None
        # In between it may have become one: then this does not wait, and what was opened is looked at.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        original = Original(os.open(last, flags, dir_fd=descriptor))
        return original if original.plain else None
    except (OSError, UnicodeEncodeError):
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def media_type(head: bytes) -> str:
    """Return the media type of a file that begins so; OTHER for what is no picture, sound or video."""
    if picture := picture_format(head):
        return f"image/{picture.lower()}"
    if is_sound(head) and (sound := sound_demuxer_of(head)) in _SOUNDS:
        return _SOUNDS[sound]
    container = container_of(head)
    if container == "matroska" and b"webm" in head[:64]:
        return "video/webm"
    if container == "mp4" and head[8:12] in _BRANDS:
        return _BRANDS[head[8:12]]
    return _CONTAINERS.get(container or "", OTHER)
