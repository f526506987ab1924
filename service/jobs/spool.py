"""An upload → one file on disk, block by block: hashed, unpacked where it is gzip, and never larger than allowed."""

import asyncio
import hashlib
import logging
import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from service.errors import BodyTooLarge, MalformedRequest, NotReady
from service.runtime.disk import Disk

log = logging.getLogger(__name__)

_BLOCK = 2**20
_GZIP = b"\x1f\x8b"
_MOST_TIMES = 100
"""What gzip may unpack to, as a multiple of what came: text shrinks to a tenth or so, a bomb to a thousandth."""
_MOST_PARTS, _PART_BYTES = 1_000, 1_024
"""Of gzip that is several, one after the other: so many, and one more for so many bytes. bgzip's are of 10 kB or so."""


async def spool(blocks: AsyncIterator[bytes], path: Path, most: int, disk: Disk) -> str:
    """Write what comes to `path`, on disk when this returns; the sha256 of what came, as it came.

    Gzip is known by its first bytes. Raises BodyTooLarge past `most` bytes (of what is written), MalformedRequest for
    gzip that is broken or cut off, DiskFull where the disk has no room for it, NotReady where it does not take it. What
    was begun is then to be removed.
    """
    waiting, size = [], 0
    try:
        with path.open("xb") as file:
            writer = _Writer(file, most, disk)
            async for block in blocks:
                waiting.append(block)
                size += len(block)
                if size >= _BLOCK:
                    await asyncio.to_thread(writer.write, b"".join(waiting))
                    waiting, size = [], 0
            await asyncio.to_thread(writer.end, b"".join(waiting))
    except OSError:
        log.exception("a job's input cannot be written")
        raise NotReady("the job's input cannot be written to disk") from None
    return writer.digest.hexdigest()


class _Writer:
    def __init__(self, file: BinaryIO, most: int, disk: Disk) -> None:
        self.digest = hashlib.sha256()
        self._file, self._most, self._disk = file, most, disk
        self._came = self._written = self._parts = 0
        self._gzip: zlib._Decompress | None = None
        self._begun = False
        self._start = b""

    def write(self, data: bytes) -> None:
        if not self._begun:
            data = self._start + data
            if len(data) < len(_GZIP):
                self._start = data
                return
            self._begun = True
            if data.startswith(_GZIP):
                self._gzip = _unpacker()
        self.digest.update(data)
        self._came += len(data)
        if self._gzip is None:
            self._put(data)
        else:
            self._unpack(data)

    def end(self, data: bytes) -> None:
        self.write(data)
        if not self._begun:  # of less than two bytes
            self.digest.update(self._start)
            self._put(self._start)
        if self._gzip is not None and not self._gzip.eof:
            raise MalformedRequest("the gzip data are cut off")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _unpack(self, data: bytes) -> None:
        try:
            while data:
                assert self._gzip is not None
                if self._gzip.eof:  # a gzip file may be several, one after the other, and padded with zeros
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    self._gzip = _unpacker()
                    self._parts += 1
                    if self._parts > _MOST_PARTS + self._came // _PART_BYTES:
                        raise MalformedRequest("the gzip data are of too many parts")
                self._put(self._gzip.decompress(data, _BLOCK))
                data = self._gzip.unused_data if self._gzip.eof else self._gzip.unconsumed_tail
                if self._written > _MOST_TIMES * max(self._came, _BLOCK // _MOST_TIMES):
                    raise BodyTooLarge(f"the body unpacks to more than {_MOST_TIMES} times its size")
        except zlib.error:
            raise MalformedRequest("the gzip data are damaged") from None

    def _put(self, data: bytes) -> None:
        self._written += len(data)
        if self._written > self._most:
            raise BodyTooLarge(f"a job's input may hold {self._most} bytes, unpacked")
        with self._disk.writing(len(data)):
            self._file.write(data)
            self._file.flush()


def _unpacker() -> "zlib._Decompress":
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def sync(*paths: Path) -> None:
    """What these files hold, and the names that these folders hold, is on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
