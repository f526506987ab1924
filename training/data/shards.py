"""Rows of webdataset tars, of Parquet and of Arrow files (Hugging Face `datasets`), and the media inside them.

A shard is read as a stream and never whole in memory: once for its texts, past its media, and once for its media, in
their order. Shards lie in folders or at addresses that fsspec opens, such as hf://datasets/USER/NAME/data/*.parquet.
"""

import glob
import hashlib
import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import fsspec

from training.errors import TrainingError

T = TypeVar("T")
KINDS = (".tar", ".parquet", ".arrow")
_ROWS = 4096  # rows of texts in memory
_MEDIA = 8  # rows of media in one batch
_RECENT_BYTES = 2**25  # of media that are kept: threads that decode come a little out of order
_AHEAD = 256  # rows of media that are read through; to one further on a reader jumps
_OPEN = 8  # shards
_BUFFER_BYTES = 2**20


class ShardError(TrainingError):
    """A shard cannot be read: the message names it and what is wrong."""


class Damage(str):
    """Stands in place of a row: a shard, or the rest of one, cannot be read."""


@dataclass(frozen=True, slots=True)
class Member:
    """A medium inside a shard: `size` bytes of a tar from `start` on, or row `start` of a `column`."""

    shard: str
    stamp: str
    """Hash of the shard's size and times, or of what its host says of it."""
    key: str
    start: int
    size: int
    column: str = ""

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}"

    @property
    def name(self) -> str:
        """The name without the shard's folder."""
        return f"{self.shard.rpartition('/')[2]}/{self.key}"

    @property
    def identity(self) -> str:
        """Return what changes where the medium may have changed."""
        return f"{self.shard}:{self.stamp}:{self.column}:{self.start}:{self.size}"

    @property
    def is_remote(self) -> bool:
        return "://" in self.shard

    def read_bytes(self) -> bytes:
        """The medium's file. Raises OSError."""
        try:
            if self.column:
                return _column(self.shard, self.stamp, self.column)(self.start)
            return _tar(self.shard, self.stamp)(self.start, self.size)
        except (ValueError, ShardError) as error:
            raise OSError(str(error)) from None


Medium = Path | Member


def identity(medium: Medium) -> str:
    """Return what changes where a medium's file may have changed. Raises OSError.

    Whoever puts another file in its place can keep size and time of modification, but not inode and time of change.
    """
    if isinstance(medium, Member):
        return medium.identity
    state = medium.stat()
    return f"{medium.absolute()}:{state.st_size}:{state.st_ino}:{state.st_mtime_ns}:{state.st_ctime_ns}"


def files(pattern: str, root: Path) -> list[str]:
    """The files that a path, a glob or an address names, sorted; of a folder that `datasets` saved, its shards."""
    remote = "://" in pattern
    system, path = fsspec.core.url_to_fs(pattern if remote else str(root / pattern))
    if not remote and Path(path).is_dir():
        path = f"{glob.escape(path)}/*.arrow"
    elif not glob.has_magic(pattern) or (not remote and Path(path).is_file()):
        return [pattern if remote else path]
    elif not remote and not Path(pattern).is_absolute():
        path = f"{glob.escape(str(root.absolute()))}/{pattern}"  # the root is a folder, not a pattern
    return [system.unstrip_protocol(one) if remote else one for one in sorted(system.glob(path))]


def rows(shard: str, media: str, columns: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """The rows of a shard: `media` is a Member, or a name in a table of names; other columns are as they are.

    In a tar `media` is extensions such as `jpg;png`, and a column another extension or a key of the sample's .json.
    What cannot be read is a text that says so in place of a row, a Damage where it ends the shard. Raises ShardError
    where nothing can.
    """
    if shard.endswith(".tar"):
        yield from _samples(shard, media, columns)
    else:
        yield from _records(shard, media, columns)


def samples(tar: tarfile.TarFile, take: Callable[[str, tarfile.TarInfo], T]) -> Iterator[tuple[str, dict[str, T]]]:
    """Name and parts of each sample, by extension: members in a row that agree up to the last part's first dot."""
    key, parts = "", dict[str, T]()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if not member.isfile():
            continue
        folder, slash, last = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = last.partition(".")
        if f"{folder}{slash}{stem}" != key and parts:
            yield key, parts
            parts = {}
        key = f"{folder}{slash}{stem}"
        parts[extension.lower()] = take(extension.lower(), member)
    if parts:
        yield key, parts


def _samples(shard: str, media: str, columns: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    system, path = _opened(shard)
    extensions, key = media.lower().split(";"), ""
    try:
        stamp = _stamp(system, path)
        with system.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:

            def take(extension: str, member: tarfile.TarInfo) -> bytes | tuple[int, int]:
                if extension in extensions or (extension not in columns and extension != "json"):
                    return member.offset_data, member.size
                file = tar.extractfile(member)
                assert file is not None  # `samples` takes files
                return file.read()

            for key, parts in samples(tar, take):
                yield _row(shard, stamp, key, media, columns, parts)
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Damage(f"{shard} is damaged{f' after {key}' if key else ''}: {error}")


def _row(
    shard: str, stamp: str, key: str, media: str, columns: Sequence[str], parts: Mapping[str, Any]
) -> dict[str, Any] | str:
    try:
        values = json.loads(parts.get("json", b"{}"))
        if not isinstance(values, dict):
            raise ValueError("its .json is no object")
        values |= {name: parts[name].decode("utf-8-sig") for name in columns if isinstance(parts.get(name), bytes)}
    except ValueError as error:
        return f"{shard}/{key}: {error}"
    chosen = next((name for name in media.lower().split(";") if name in parts), None)
    absent = [name for name in columns if name not in values]
    if chosen is None or absent:
        lacking, there = absent[0] if absent else media, ", ".join(sorted({*parts, *values}))
        return f"{shard}/{key} has no {lacking}; it has {there}"
    return {name: values[name] for name in columns} | {media: Member(shard, stamp, f"{key}.{chosen}", *parts[chosen])}


def _records(shard: str, media: str, columns: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    system, path = _opened(shard)
    try:
        stamp = _stamp(system, path)
        table = _Table(shard)
        if absent := [name for name in (media, *columns) if name not in table.schema.names]:
            raise ShardError(f"{shard} has no column {absent[0]}; it has {', '.join(table.schema.names)}")
        kind = table.schema.field(media).type
        named = str(getattr(kind, "value_type", kind)) in ("string", "large_string", "string_view")
        labels = table.labels()
        for start, batch in table.batches([*([media] if named else []), *columns], 0, _ROWS):
            for number, values in enumerate(batch.to_pylist(), start):
                values |= {  # `datasets` writes -1 where there is no label
                    name: names[values[name]] if 0 <= values[name] < len(names) else None
                    for name, names in labels.items()
                    if isinstance(values.get(name), int)
                }
                if not named:
                    values |= {media: Member(shard, stamp, str(number), number, 0, media)}
                yield values if values[media] else f"{shard}/{number} has no {media}"
    except ShardError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own are both
        yield Damage(f"{shard} is damaged: {error}")


def _opened(shard: str) -> tuple[Any, str]:
    """The file system of a shard, and its path there. Raises ShardError where nothing is there."""
    try:
        system, path = fsspec.core.url_to_fs(shard)
        there = system.isfile(path)
    except (ImportError, ValueError, OSError) as error:
        raise ShardError(f"{shard} cannot be opened: {error}") from None
    if not there:
        raise ShardError(f"{shard} is not there")
    return system, path


def _stamp(system: Any, path: str) -> str:
    """A hash of what the host says of a shard: size, and times or a hash of its own.

    fsspec's own of a web server knows the address alone.
    """
    info = system.info(path)
    stated = [info.get(name) for name in ("size", "ETag", "Last-Modified", "Content-MD5", "Digest")]
    return hashlib.sha256(f"{system.ukey(path)}:{stated}".encode()).hexdigest()


class _Table:
    """A Parquet file, or an Arrow file as `datasets` saves it."""

    def __init__(self, shard: str) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as parquet
        except ImportError:
            raise ShardError(f"{shard}: Parquet and Arrow need pyarrow: pip install 'isthmus[parquet]'") from None
        system, path = _opened(shard)
        if shard.endswith(".parquet"):
            # Without a buffer of its own a reader takes a whole row group into memory.
            self._file = parquet.ParquetFile(system.open(path, "rb"), buffer_size=_BUFFER_BYTES, pre_buffer=False)
            self.schema = self._file.schema_arrow
        else:
            # Mapped: no copy is made of it.
            source = pa.memory_map(path) if "://" not in shard else system.open(path, "rb")
            try:
                self._whole = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                self._whole = pa.ipc.open_file(source).read_all()
            self._file, self.schema = None, self._whole.schema

    def labels(self) -> dict[str, list[str]]:
        """The names that numbers of a ClassLabel column of `datasets` stand for."""
        stated = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stated.get("info", {}).get("features") or {}
        return {name: one["names"] for name, one in features.items() if isinstance(one, dict) and "names" in one}

    def batches(self, columns: Sequence[str], row: int, size: int) -> Iterator[tuple[int, Any]]:
        """Batches of rows with the number of their first, from the one that holds `row` on."""
        if self._file is None:
            for batch in self._whole.select(columns).slice(row).to_batches(size):
                yield row, batch
                row += len(batch)
            return
        first, start, count = 0, 0, self._file.num_row_groups
        while first < count and start + (rows := self._file.metadata.row_group(first).num_rows) <= row:
            first, start = first + 1, start + rows
        for batch in self._file.iter_batches(size, row_groups=list(range(first, count)), columns=columns):
            if start + len(batch) > row:
                yield start, batch
            start += len(batch)


@lru_cache(_OPEN)
def _column(shard: str, stamp: str, column: str) -> Callable[[int], bytes]:
    """A function from a row to the file in it, for rows that come about in their order."""
    table, lock = _Table(shard), Lock()
    recent: deque[tuple[int, Any]] = deque()
    coming: Iterator[tuple[int, Any]] = iter(())

    def batch_with(row: int) -> tuple[int, Any] | None:
        return next(((start, batch) for start, batch in recent if start <= row < start + len(batch)), None)

    def read(row: int) -> bytes:
        nonlocal coming
        with lock:
            if (batch := batch_with(row)) is None:
                if not recent or not recent[-1][0] < row < recent[-1][0] + _AHEAD:
                    recent.clear()
                    coming = table.batches([column], row, _MEDIA)
                while (batch := batch_with(row)) is None:
                    try:
                        batch = next(coming)
                    except StopIteration:
                        raise ValueError("it has fewer rows now") from None
                    except Exception:
                        recent.clear()  # so that the next row is looked for anew: this iterator has ended
                        raise
                    recent.append(batch)
                    while len(recent) > 2 and sum(one.nbytes for _, one in recent) > _RECENT_BYTES:
                        recent.popleft()
            value = batch[1].column(0)[row - batch[0]].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError(f"the column {column} holds no file there")
        return value

    return read


@lru_cache(_OPEN)
def _tar(shard: str, stamp: str) -> Callable[[int, int], bytes]:
    """A function from the place of a member to its bytes."""
    system, path = _opened(shard)
    stream, lock = system.open(path, "rb"), Lock()

    def read(start: int, size: int) -> bytes:
        with lock:
            stream.seek(start)
            content: bytes = stream.read(size)
        if len(content) < size:
            raise ValueError(f"only {len(content):,} of its {size:,} bytes are there")
        return content

    return read
