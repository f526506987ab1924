"""`load` writes Parquet files of ready vectors to a store.

`python -m training embed` writes them; any file with columns `id` and `vector`, and perhaps `modality`, `metadata`
(JSON) and `text`, will do, if it says of which space its vectors are: in a column `space`, or as `isthmus.space` in its
schema's metadata. Loading again changes nothing. Which files were loaded whole is written down beside them, so that the
same command goes on where it was interrupted.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from service.commands import starters
from service.contract.bundle import Manifest
from service.contract.vectors import Vectors
from service.engine.inputs import StoredModality
from service.errors import IsthmusError, words_of
from service.retrieval.reembedding import naming_the_way_out
from service.schemas.inputs import parse_json
from service.schemas.items import ItemId, Metadata, Name
from service.settings import Settings, read_settings
from service.store import DEFAULT_COLLECTION, Entry, Store, StoreError
from service.store.opening import open_store

HELP = "take in the Parquet files that `python -m training embed` wrote"
_BATCH = 1_000
_UNIT = 1e-3
"""Largest deviation of a vector's length from 1."""

_IDS: TypeAdapter[list[str]] = TypeAdapter(list[ItemId])
_METADATA: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(list[Metadata])
_MODALITIES: TypeAdapter[list[StoredModality]] = TypeAdapter(list[StoredModality])
_NAME: TypeAdapter[str] = TypeAdapter(Name)


class LoadError(StoreError):
    """Raised where a file cannot be loaded: the message names it, and the row."""


@dataclass(frozen=True)
class Progress:
    files: int
    of: int
    items: int
    """Number of items written; those of files that were loaded before do not count."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FOLDER or FILE", help="Parquet files, or a folder of them")
    parser.add_argument("--collection", default=DEFAULT_COLLECTION, metavar="NAME", help="where the items are stored")
    for name in ("bundle", "store", "milvus-uri"):
        parser.add_argument(f"--{name}", metavar=name.upper(), help="as for serve")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object, in place of text")


def run(path: Path, collection: str, bundle: str | None, as_json: bool = False, **flags: str | None) -> int:
    load_files(path, collection, read_settings(bundle=starters.chosen(bundle), **flags), as_json)
    return 0


def load_files(path: Path, collection: str, settings: Settings, as_json: bool = False) -> None:
    """Write the items of Parquet files to the store that the settings name, which nobody else may have open."""
    manifest = settings.read_bundle().manifest
    with naming_the_way_out(settings):
        store, _ = open_store(settings, [manifest])
    # A store in a directory is identified by the absolute path, from wherever it is named.
    place = settings.milvus_uri if settings.store == Path("milvus") else str(settings.store.resolve())
    began = time.monotonic()

    def said(progress: Progress) -> None:
        rate = progress.items / max(time.monotonic() - began, 1e-3)
        end = "\r" if sys.stderr.isatty() else "\n"
        line = f"{progress.files} of {progress.of} files, {progress.items:,} items, {rate:,.0f} a second"
        print(f"{line:<79}", end=end, file=sys.stderr, flush=True)

    async def run() -> int:
        try:
            return await load(path, store, manifest, collection, place, said)
        finally:
            await store.close()

    count = asyncio.run(run())
    if as_json:
        print(json.dumps({"items": count, "space": manifest.space, "collection": collection}))
        return
    print(f"{count:,} items of space {manifest.space} written to the collection {collection}")


async def load(
    folder: Path, store: Store, manifest: Manifest, collection: str, place: str, said: Callable[[Progress], None]
) -> int:
    """Write every file's items, in batches, and return how many these were. `place` says which store it is.

    Raises LoadError before anything is written where a file is of another space, and then for the first bad row.
    """
    parquet = _parquet()
    try:
        _NAME.validate_python(collection)
    except ValidationError:
        raise LoadError(f"--collection {collection!r} is no name of a collection") from None
    files = _files(folder)
    for file in files:
        _check(parquet, file, manifest)
    digest = hashlib.sha256(f"{place} {collection}".encode()).hexdigest()
    record = _Done(files[0].parent / f".loaded-{digest[:12]}.json")
    items = 0
    for number, file in enumerate(files, start=1):
        last = record.last(file)
        if last is None or not await store.holds(collection, last):
            id = None
            for entries in _batches(parquet, file, manifest, collection):
                await store.upsert(entries)
                items += len(entries)
                id = entries[-1].id
                said(Progress(number - 1, len(files), items))
            if id is not None:
                record.write(file, id)
        said(Progress(number, len(files), items))
    return items


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    if not files or not all(file.is_file() for file in files):
        raise LoadError(f"{folder} holds no Parquet files")
    return files


class _Done:
    """Keeps the names of the files that were loaded whole, with the last id of each, which is checked in the store."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, list[Any]] = json.loads(path.read_text()) if path.exists() else {}

    def last(self, file: Path) -> str | None:
        entry = self._held.get(file.name)
        return str(entry[1]) if entry and entry[0] == _stamp(file) else None

    def write(self, file: Path, id: str) -> None:
        self._held[file.name] = [_stamp(file), id]
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._held))
        os.replace(part, self._path)


def _stamp(file: Path) -> list[float]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime]


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise LoadError("Parquet needs pyarrow: pip install 'isthmus[parquet]'") from None
    return pyarrow.parquet


def _check(parquet: Any, file: Path, manifest: Manifest) -> None:
    """Check by its schema that a file's vectors are of the bundle's space. Reads no rows."""
    try:
        schema = parquet.read_schema(file)
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read as Parquet: {error}") from None
    if missing := {"id", "vector"} - set(schema.names):
        raise LoadError(f"{file} has no column {sorted(missing)[0]}: it has {', '.join(schema.names)}")
    space = (schema.metadata or {}).get(b"isthmus.space")
    if space is not None:
        _accepted(file, space.decode(), manifest)
    elif "space" not in schema.names:
        raise LoadError(f"{file} does not say of which space its vectors are: `space` is a column, or isthmus.space")


def _accepted(where: object, space: str | None, manifest: Manifest) -> None:
    if space is None or not manifest.accepts(space):
        raise LoadError(
            f"{where} holds vectors of space {space}, and the bundle {manifest.name} accepts only "
            f"{', '.join((manifest.space, *manifest.admits))}: embed them again with `python -m training embed`"
        )


def _batches(parquet: Any, file: Path, manifest: Manifest, collection: str) -> Iterator[list[Entry]]:
    source = parquet.ParquetFile(file)
    names = [
        name for name in ("id", "modality", "vector", "metadata", "text", "space") if name in source.schema_arrow.names
    ]
    first = 0
    try:
        for batch in source.iter_batches(_BATCH, columns=names):
            columns = {name: batch.column(name) for name in names}
            if batch.num_rows:
                yield _entries(f"{file}, rows {first + 1} to {first + batch.num_rows}", columns, manifest, collection)
            first += batch.num_rows
    except (OSError, ValueError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{file} cannot be read after row {first}: {error}") from None


def _entries(where: str, columns: Mapping[str, Any], manifest: Manifest, collection: str) -> list[Entry]:
    lists = {name: column.to_pylist() for name, column in columns.items() if name != "vector"}
    count = len(lists["id"])
    for space in set(lists.get("space", ())):
        _accepted(where, space, manifest)
    try:
        ids = _IDS.validate_python(lists["id"])
        modalities = _MODALITIES.validate_python(lists.get("modality", ["vector"] * count))
        metadata = _METADATA.validate_python(
            [parse_json((text or "{}").encode()) for text in lists.get("metadata", [""] * count)]
        )
    except (ValidationError, IsthmusError) as error:
        message = words_of(error.errors()[0]) if isinstance(error, ValidationError) else "the metadata are not JSON"
        raise LoadError(f"{where}: {message}") from None
    if unknown := sorted({*modalities} - {*manifest.stored_modalities}):
        raise LoadError(f"{where}: {unknown[0]} is no modality of the bundle {manifest.name}")
    vectors = _vectors(where, columns["vector"], manifest.dimensions)
    texts = lists.get("text", [None] * count)
    # The last row of a repeated id counts, as it would if the rows were in two batches.
    entries = {
        id: Entry(collection, id, modality, item_metadata, vector, text=text if modality == "text" else None)
        for id, modality, item_metadata, vector, text in zip(ids, modalities, metadata, vectors, texts, strict=True)
    }
    return list(entries.values())


def _vectors(where: str, column: Any, dimensions: int) -> Vectors:
    flat = np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32)
    if column.null_count or flat.size != len(column) * dimensions:
        raise LoadError(f"{where}: a vector has not the {dimensions} dimensions of the space")
    vectors = flat.reshape(-1, dimensions)
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) <= _UNIT).all():  # false for NaN too
        raise LoadError(f"{where}: a vector is not of unit length")
    return vectors
