"""A job's input (JSONL, or a tar) goes from an upload to a file on disk, to a plan of its items, to the items.

A plan is made once, by going through the whole input without reading what the items hold, and kept in a file of its own
(SQLite), so that neither the input nor the list of what is in it is ever in memory, and any item is found at once after
a crash. Nothing is written to disk under a name from an archive: names are only ids.

A tar holds images, sounds and videos (their content says what they are), texts (`.txt`, `.md`) and metadata: for
`a/b.jpg` the JSON object in `a/b.jpg.json`, else in `a/b.json`, on top of its line in `metadata.jsonl` at the root (an
object with a `file_name`; all else in it is metadata, as in Hugging Face's ImageFolder). Hidden files are left alone.
`isthmus index` reads a folder in the same way.
"""

import codecs
import hashlib
import io
import json
import logging
import os
import sqlite3
import tarfile
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from service.contract.containers import name_of_other
from service.errors import BodyTooLarge, DiskFull, MalformedRequest, NotReady
from service.jobs.ledger import Form, Refusal
from service.retrieval.indexing import NewItem
from service.runtime.disk import Disk
from service.runtime.workers import Workers
from service.schemas.inputs import File, parse_json
from service.schemas.items import MAX_METADATA_BYTES, InvalidItem, read_item
from service.settings import Limits
from service.store.files import sync

log = logging.getLogger(__name__)

Kind = Literal["line", "media", "text", "refused"]
"""Kind of an item: a line of JSONL, a file whose content shows its kind, a text file, or an invalid item."""

_WRITTEN_BYTES = 2**20
"""Bytes of an upload that are written at once."""
_GZIP = b"\x1f\x8b"
_MOST_RATIO = 100
"""Largest ratio of gzip's unpacked size to its packed size: text shrinks to a tenth or so, a bomb to a thousandth."""
_MOST_PARTS, _PART_BYTES = 1_000, 1_024
"""Largest number of members of a gzip file: a fixed number, and one more per so many bytes (bgzip's have some 10
kB)."""
_LONGEST_ID_CHARS = 256
"""Largest number of characters of an id that is shown with an error."""
_TEXTS = (".txt", ".md")
_DESCRIPTIONS = ".json"
_TABLE = "metadata.jsonl"
_LONGEST_NAME_BYTES = 4_096
_MOST_HEADER_BYTES = 2**20
"""Largest headers of one member of a tar, extended ones included, in bytes: tarfile reads them into memory."""
_BLOCK_BYTES = 512
_SCANNED_BYTES = 2**16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BATCH_ROWS = 1_000

_SCHEMA = """
CREATE TABLE items (
    number INTEGER PRIMARY KEY, line INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    place INTEGER NOT NULL, size INTEGER NOT NULL, detail TEXT
) STRICT;
CREATE TABLE descriptions (name TEXT PRIMARY KEY, place INTEGER NOT NULL, size INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE described (name TEXT PRIMARY KEY, metadata TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""


class Unusable(Exception):
    """Raised where the input as a whole cannot be read: the message says why, and names only what is the client's."""


class _Stopped(Exception): ...


@dataclass(frozen=True)
class Bounds:
    """Bounds a job's input."""

    limits: Limits
    items: int

    @property
    def file_bytes(self) -> int:
        return max(self.limits.image_bytes, self.limits.audio_bytes)

    @property
    def text_bytes(self) -> int:
        return 4 * self.limits.text_chars + 4  # of UTF-8, and a byte-order mark


# An upload → a file


async def spool(blocks: AsyncIterator[bytes], path: Path, most: int, disk: Disk, threads: Workers) -> str:
    """Write what comes to `path` in `threads`, on disk when this returns, and return the sha256 of what came.

    Gzip is known by its first bytes, and unpacked. Raises BodyTooLarge past `most` bytes (of what is written),
    MalformedRequest for gzip that is broken or cut off, DiskFull where the disk has no room for it, NotReady where it
    does not take it. The caller then removes what was begun.
    """
    blocks_waiting, size = [], 0
    try:
        with path.open("xb") as file:
            upload = _Upload(file, most, disk)
            async for block in blocks:
                blocks_waiting.append(block)
                size += len(block)
                if size >= _WRITTEN_BYTES:
                    await threads.run(partial(upload.write, b"".join(blocks_waiting)))
                    blocks_waiting, size = [], 0
            await threads.run(partial(upload.end, b"".join(blocks_waiting)))
    except OSError:
        log.exception("a job's input cannot be written")
        raise NotReady("the job's input cannot be written to disk") from None
    return upload.digest.hexdigest()


class _Upload:
    """Writes a file that is hashed as it comes, unpacked where it is gzip, and never larger than allowed."""

    def __init__(self, file: BinaryIO, most: int, disk: Disk) -> None:
        self.digest = hashlib.sha256()
        self._file, self._most, self._disk = file, most, disk
        self._received = self._written = self._parts = 0
        self._gzip: zlib._Decompress | None = None

    def write(self, data: bytes) -> None:
        """Write what came. The first call has at least two bytes, where there are as many."""
        if not self._received and data.startswith(_GZIP):
            self._gzip = _unpacker()
        self.digest.update(data)
        self._received += len(data)
        if self._gzip is None:
            self._put(data)
        else:
            self._gzip = self._unpack(self._gzip, data)

    def end(self, data: bytes) -> None:
        self.write(data)
        if self._gzip is not None and not self._gzip.eof:
            raise MalformedRequest("the gzip data are cut off")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _unpack(self, part: "zlib._Decompress", data: bytes) -> "zlib._Decompress":
        """Unpack a part of a gzip file of one or several members, and return the current decompressor."""
        try:
            while data:
                if part.eof:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    part = _unpacker()
                    self._parts += 1
                    if self._parts > _MOST_PARTS + self._received // _PART_BYTES:
                        raise MalformedRequest("the gzip data are of too many parts")
                self._put(part.decompress(data, _WRITTEN_BYTES))
                data = part.unused_data if part.eof else part.unconsumed_tail
                if self._written > _MOST_RATIO * max(self._received, _WRITTEN_BYTES // _MOST_RATIO):
                    raise BodyTooLarge(f"the body unpacks to more than {_MOST_RATIO} times its size")
        except zlib.error:
            raise MalformedRequest("the gzip data are damaged") from None
        return part

    def _put(self, data: bytes) -> None:
        self._written += len(data)
        if self._written > self._most:
            raise BodyTooLarge(f"a job's input may hold {self._most} bytes, unpacked")
        with self._disk.writing(len(data)):
            self._file.write(data)
            self._file.flush()


def _unpacker() -> "zlib._Decompress":
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


# A file → its plan


def build(form: Form, source: Path, plan: Path, bounds: Bounds, stopped: threading.Event, disk: Disk) -> int:
    """Read the input and write its plan to disk; return the number of items. Raises Unusable, DiskFull.

    Ends early, with a plan that is good for nothing, once it is `stopped`.
    """
    plan.unlink(missing_ok=True)
    with closing(sqlite3.connect(plan, isolation_level=None)) as connection:
        # The plan is made again after a crash.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.executescript(_SCHEMA)
        connection.execute("BEGIN")
        writer = _Writer(connection, bounds, stopped, disk)
        with suppress(_Stopped), source.open("rb") as file:
            (_plan_lines if form == "jsonl" else _plan_tar)(file, writer)
            writer.flush()
        connection.execute("COMMIT")
    sync(plan)
    return writer.count


class _Writer:
    """Writes rows of a plan in batches."""

    def __init__(self, connection: sqlite3.Connection, bounds: Bounds, stopped: threading.Event, disk: Disk) -> None:
        self.bounds, self.count = bounds, 0
        self._stopped, self._disk = stopped, disk
        self._connection = connection
        self._rows: list[tuple[Any, ...]] = []

    def item(self, kind: Kind, name: str, place: int, size: int, *, line: int | None = None) -> None:
        self._add(line, kind, name, place, size, None)

    def refuse(self, name: str, detail: str, *, line: int | None = None) -> None:
        self._add(line, "refused", name, 0, 0, detail)

    def _add(self, line: int | None, kind: Kind, name: str, place: int, size: int, detail: str | None) -> None:
        if self.count >= self.bounds.items:
            raise Unusable(f"the input holds more than {self.bounds.items} items")
        self._rows.append((self.count, self.count + 1 if line is None else line, kind, name, place, size, detail))
        self.count += 1
        if len(self._rows) >= _BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        self._disk.check()
        self._connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", self._rows)
        self._rows.clear()
        if self._stopped.is_set():
            raise _Stopped

    def file(self, name: str, place: int, size: int) -> None:
        """Add a file of a tar, by its name."""
        lower = name.lower()
        if lower.endswith(_DESCRIPTIONS):
            if size > MAX_METADATA_BYTES:
                self.refuse(name, f"the metadata are larger than {MAX_METADATA_BYTES} bytes of JSON")
            else:
                self._disk.check()
                self._connection.execute("INSERT OR REPLACE INTO descriptions VALUES (?, ?, ?)", (name, place, size))
            return
        text = lower.endswith(_TEXTS)
        most = self.bounds.text_bytes if text else self.bounds.file_bytes
        if size > most:
            self.refuse(name, f"the file is larger than {most} bytes")
        else:
            self.item("text" if text else "media", name, place, size)

    def table(self, file: BinaryIO, size: int) -> None:
        """Add the lines of `metadata.jsonl`, from where the file stands."""
        end = file.tell() + size
        for number, start, length in _lines(file, end):
            self._disk.check()
            description = None
            if length <= MAX_METADATA_BYTES:
                file.seek(start)
                with suppress(MalformedRequest):
                    description = parse_json(file.read(length))
            name = description.pop("file_name", None) if isinstance(description, dict) else None
            if isinstance(name, str) and _storable(name):
                row = (_plain(name), json.dumps(description, ensure_ascii=False))
                self._connection.execute("INSERT OR REPLACE INTO described VALUES (?, ?)", row)
            else:
                detail = f"line {number} is no JSON object with a file_name, of at most {MAX_METADATA_BYTES} bytes"
                self.refuse(_TABLE, detail)


# JSONL


def _plan_lines(file: BinaryIO, writer: _Writer) -> None:
    end = os.fstat(file.fileno()).st_size
    most = writer.bounds.limits.body_bytes
    for number, start, length in _lines(file, end):
        if length > most:
            writer.refuse("", f"the line is longer than {most} bytes", line=number)
        else:
            writer.item("line", "", start, length, line=number)


def _lines(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number from 1, start and length of each line up to `end` that is not blank. Moves the file's position."""
    position, number = file.tell(), 0
    while position < end:
        file.seek(position)
        number += 1
        length = mark = 0
        blank = True
        part = b""
        while not part.endswith(b"\n") and position + length < end:
            part = file.readline(min(_SCANNED_BYTES, end - position - length))
            if not part:  # it is shorter than it was
                return
            if number == 1 and not length and part.startswith(_BYTE_ORDER_MARK):
                mark = len(_BYTE_ORDER_MARK)
            blank = blank and not part[0 if length else mark :].strip()
            length += len(part)
        if not blank:
            yield number, position + mark, length - mark
        position += length


# Tar


class _Metered(io.RawIOBase):
    """Lets tarfile read headers from a file, and no more than so many bytes of one member's."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left = file, _MOST_HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        self.left -= size if size >= 0 else _MOST_HEADER_BYTES + 1
        if self.left < 0:
            raise tarfile.ReadError("headers too large")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _plan_tar(file: BinaryIO, writer: _Writer) -> None:
    metered = _Metered(file)
    count, before = 0, -1
    try:
        with tarfile.TarFile(fileobj=metered, mode="r") as archive:
            while True:
                metered.left = _MOST_HEADER_BYTES
                member = archive.next()
                if member is None:
                    break
                count += 1
                if member.size < 0 or archive.offset <= before:  # it would be gone through for ever
                    raise tarfile.ReadError("a size below zero")
                before = archive.offset
                if count > 2 * writer.bounds.items + _BATCH_ROWS:
                    raise Unusable(f"the archive holds more than {writer.bounds.items} items")
                # Metadata that tarfile would keep of each member, and of global headers.
                archive.members, archive.pax_headers = [], {}  # type: ignore[attr-defined]
                _member(member, file, writer)
            is_whole = _ends(file, archive.offset)
    except (Unusable, DiskFull, _Stopped):
        raise
    except Exception as error:  # tarfile raises many kinds for what is no tar, RecursionError among them
        raise Unusable("the archive is damaged or cut off" if count else _no_tar(file)) from error
    if not is_whole:
        raise Unusable("the archive is damaged or cut off: it does not end as a tar does")


def _no_tar(file: BinaryIO) -> str:
    file.seek(0)
    name = name_of_other(file.read(_BLOCK_BYTES))
    return "the body is no tar" if name is None else f"the body is no tar, plain or gzipped. This is {name}"


def _ends(file: BinaryIO, offset: int) -> bool:
    """Return whether the mark of a tar's end stands there: tarfile takes whatever it cannot read for the end."""
    file.seek(offset)
    return file.read(_BLOCK_BYTES) == bytes(_BLOCK_BYTES)


def _member(member: tarfile.TarInfo, file: BinaryIO, writer: _Writer) -> None:
    name = _plain(member.name)
    printable = _printable(name)
    parts = PurePosixPath(name).parts
    if member.isdir() or not parts or any(part.startswith(".") and part != ".." for part in parts):
        return
    if not _storable(name):
        writer.refuse(printable, "the name is not valid UTF-8, or too long")
    elif name.startswith("/") or ".." in parts:
        writer.refuse(printable, "the name leads out of the archive")
    elif not member.isreg() or member.sparse is not None:
        writer.refuse(printable, "not a plain file: links, devices and sparse files are not read")
    elif name == _TABLE:
        file.seek(member.offset_data)
        if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
            raise Unusable("the archive is cut off")
        writer.table(file, member.size)
    else:
        writer.file(name, member.offset_data, member.size)


def _plain(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _storable(name: str) -> bool:
    try:
        return 0 < len(name.encode()) <= _LONGEST_NAME_BYTES and "\0" not in name
    except UnicodeEncodeError:
        return False


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode().replace("\0", "?")[:_LONGEST_NAME_BYTES]


# A plan → items


@dataclass(frozen=True)
class Piece:
    """Holds one item as it stands in the input."""

    line: int
    kind: Kind
    name: str
    """Path of a file in the tar, which is its id."""
    data: bytes
    metadata: tuple[bytes, ...] = ()
    """JSON texts that describe it; a later one overrides an earlier one."""
    detail: str = ""
    """Why the item is refused."""


class Reader:
    """Reads items by a finished plan, for any thread. Raises ValueError once it is closed."""

    def __init__(self, source: Path, plan: Path) -> None:
        self._connection = sqlite3.connect(f"{plan.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        self._file = source.open("rb")
        self._lock, self._closed = threading.Lock(), False

    def close(self) -> None:
        """Close the input after the present reads."""
        with self._lock:
            self._closed = True
            self._connection.close()
            self._file.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._closed:
                raise ValueError("the plan is closed")
            yield self._connection

    def length(self, first: int, most_items: int, most_bytes: int) -> int:
        """Return how many items from `first` on make a chunk: at least one while there are items, 0 at the end."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT size FROM items WHERE number >= ? ORDER BY number LIMIT ?", (first, most_items)
            ).fetchall()
        count = total = 0
        for (size,) in rows:
            total += size
            if count and total > most_bytes:
                break
            count += 1
        return count

    def items(self, first: int, count: int, collection: str, limits: Limits) -> dict[int, NewItem | Refusal]:
        """Return items by line, as though a client had sent each to `collection`, or their errors."""
        return {piece.line: read_piece(piece, collection, limits) for piece in self.pieces(first, count)}

    def pieces(self, first: int, count: int) -> list[Piece]:
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT line, kind, name, place, size, detail FROM items "
                "WHERE number >= ? AND number < ? ORDER BY number",
                (first, first + count),
            ).fetchall()
            return [self._piece(*row) for row in rows]

    def _piece(self, line: int, kind: Kind, name: str, place: int, size: int, detail: str | None) -> Piece:
        if kind == "refused":
            return Piece(line, kind, name, b"", detail=detail or "")
        try:
            data = self._data(place, size)
            if kind == "line":
                return Piece(line, kind, name, data)
            return Piece(line, kind, name, data, tuple(self._descriptions(name)))
        except OSError:
            return Piece(line, "refused", name, b"", detail="the file cannot be read any more")

    def _data(self, place: int, size: int) -> bytes:
        self._file.seek(place)
        return self._file.read(size)

    def _descriptions(self, name: str) -> Iterator[bytes]:
        for (metadata,) in self._connection.execute("SELECT metadata FROM described WHERE name = ?", (name,)):
            yield metadata.encode()
        for described in (f"{name}{_DESCRIPTIONS}", os.path.splitext(name)[0] + _DESCRIPTIONS):
            rows = self._connection.execute("SELECT place, size FROM descriptions WHERE name = ?", (described,))
            if row := rows.fetchone():
                yield self._data(*row)
                break


def read_piece(piece: Piece, collection: str, limits: Limits) -> NewItem | Refusal:
    """Return the item, read as though a client had sent it to `collection`, or what is wrong with it."""
    id: str | None = piece.name or None
    if piece.kind == "refused":
        return Refusal(piece.line, id, "invalid_item", piece.detail)
    try:
        body = _body(piece)
        if isinstance(raw_id := body.get("id"), str):
            id = raw_id.encode("utf-8", "replace").decode()[:_LONGEST_ID_CHARS]
        item = read_item({"collection": collection} | body, limits)
        return NewItem(item.id, item.content, item.metadata, item.collection, item.modality or "vector")
    except _Unreadable as error:
        return Refusal(piece.line, id, "malformed_item", str(error))
    except InvalidItem as error:
        return Refusal(piece.line, id, "invalid_item", str(error))


class _Unreadable(Exception): ...


def _body(piece: Piece) -> dict[str, Any]:
    if piece.kind == "line":
        return _object(piece.data, "the line")
    body: dict[str, Any] = {"id": piece.name, "metadata": {}}
    for described in piece.metadata:
        body["metadata"] |= _object(described, "the file's metadata")
    if piece.kind == "text":
        body["text"] = _text(piece.data)
    else:
        body["file"] = File(piece.name, piece.data)
    return body


def _text(data: bytes) -> str:
    # Editors of Windows write UTF-16, with a byte-order mark.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise _Unreadable("the text is not UTF-8, nor UTF-16 with a byte-order mark: save it as UTF-8") from None
    if "\0" in text:
        raise _Unreadable("the text is no UTF-8: it holds NUL characters, as UTF-16 without a byte-order mark does")
    return text


def _object(data: bytes, label: str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except MalformedRequest as error:
        raise _Unreadable(str(error).replace("the body", label, 1)) from None
    except BodyTooLarge:
        raise _Unreadable(f"{label} holds too many values") from None
    if not isinstance(value, dict):
        raise _Unreadable(f"{label} is not a JSON object")
    return value
