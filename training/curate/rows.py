"""The rows of a pool, one at a time: JSONL, CSV, TSV and webdataset shards, none of them ever whole in memory."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from training.curate.recipe import CurateError, PoolSource
from training.data.shards import samples
from training.files import QUOTING, dialect, wrong_header


@dataclass(frozen=True, slots=True)
class Row:
    """A text, and perhaps a medium, with whatever else its source says about them."""

    text: str
    media: str | None = None
    """The file name as the table has it; `shard.tar/member` in a shard."""
    fields: dict[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    """The bytes of a medium in a shard; those of tables are read when they are needed."""


def read_rows(stream: BinaryIO, path: Path, name: str, source: PoolSource) -> Generator[Row, None, None]:
    """The rows of one file, which `stream` has open. Raises CurateError naming the file and row of what is wrong."""
    zipped = path.suffix == ".gz"
    kind = Path(path.stem).suffix if zipped else path.suffix
    where = f"pool.{name}: {path.name}"
    try:
        if kind == ".tar":
            with tarfile.open(fileobj=stream, mode="r|gz" if zipped else "r|") as shard:
                yield from _samples(shard, path.name, source)
            return
        binary: Any = gzip.GzipFile(fileobj=stream) if zipped else stream
        lines = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        try:
            if kind == ".jsonl":
                rows = _json_lines(lines, where)
            elif kind in (".csv", ".tsv"):
                rows = _table(lines, kind, where, source)
            else:
                raise CurateError(f"{where} is none of .jsonl, .csv, .tsv (each also .gz), .tar and .tar.gz")
            yield from _picked(rows, where, source)
        finally:
            lines.detach()  # the stream is its opener's to close
    except csv.Error as error:
        raise CurateError(f"{where} is damaged: {error} ({QUOTING})") from None
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, UnicodeDecodeError) as error:
        raise CurateError(f"{where} is damaged: {error}") from None


def blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows, `size` at a time."""
    block: list[Row] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _json_lines(lines: Iterable[str], where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise CurateError(f"{where}: line {number} is not a JSON object")
        yield row


def _table(lines: Iterable[str], kind: str, where: str, source: PoolSource) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(lines, fieldnames=source.columns or None, dialect=dialect(kind))
    if problem := wrong_header(reader.fieldnames, kind):
        raise CurateError(f"{where}: {problem}")
    for number, row in enumerate(reader, start=1):
        if None in row or None in row.values():
            raise CurateError(f"{where}: row {number} has not {len(reader.fieldnames or [])} columns")
        yield row


def _picked(rows: Iterable[dict[str, Any]], where: str, source: PoolSource) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        named = [column for column in (source.text, source.media) if column is not None]
        for column in named:
            if column not in row:
                raise CurateError(f"{where}: row {number} has no column {column!r}; it has {', '.join(row)}")
            if row[column] is not None and not isinstance(row[column], str):
                raise CurateError(f"{where}: row {number}: {column} is no text: {row[column]!r}")
        fields = {key: value for key, value in row.items() if key not in named}
        media = row[source.media] if source.media else None
        yield Row((row[source.text] or "").strip(), media or None, fields)


def _samples(shard: tarfile.TarFile, name: str, source: PoolSource) -> Iterator[Row]:

    def take(_: str, member: tarfile.TarInfo) -> bytes:
        file = shard.extractfile(member)
        assert file is not None  # `samples` takes files
        return file.read()

    return (_sample(key, parts, name, source) for key, parts in samples(shard, take))


def _sample(key: str, parts: dict[str, bytes], shard: str, source: PoolSource) -> Row:
    where = f"{shard}: {key}"
    try:
        fields = json.loads(parts.get("json", b"{}"))
        if not isinstance(fields, dict):
            raise ValueError("its .json is no object")
        text = parts[source.text].decode("utf-8-sig") if source.text in parts else fields.pop(source.text, "")
    except ValueError as error:
        raise CurateError(f"{where}: {error}") from None
    extension = next((one for one in (source.media or "").lower().split(";") if one in parts), None)
    if extension is None:
        return Row(str(text or "").strip(), None, fields)
    return Row(str(text or "").strip(), f"{shard}/{key}.{extension}", fields, parts[extension])
