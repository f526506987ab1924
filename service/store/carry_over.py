"""A store is carried over from one embedding space to another: the old one is read, and the new one put in its place.

A store is one file. What else is in its folder follows from that file (the indexes' snapshot) or is of no space (bulk
jobs). So the new file is made in a folder inside the store's, `new.SPACE`, and one rename puts it in its place. The old
file has a second name by then, in the folder `old.SPACE`, which is a store that can be served.
"""

import itertools
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from service.contract.vectors import Vectors
from service.store import keywords, moments, previews, rows, schema
from service.store.errors import StoreError
from service.store.files import sync
from service.store.items import Moment, Preview
from service.store.rows import CollectionRow

EMBEDDED = "embedded"
"""Key in a preview's details: true where the item's vector was made from the preview."""
_MADE_FROM = "made-from"
"""A file beside a store that is being filled: the version of the old one."""
_ITEMS = "FROM items JOIN collections ON collections.key = items.collection WHERE collections.name NOT LIKE '.%'"
_BUSY_S = 10.0
"""Seconds to wait for other processes that use a store's file."""
_PAUSE_S = 0.05


@dataclass(frozen=True)
class OldItem:
    collection: str
    id: str
    modality: str
    metadata: Mapping[str, Any]
    created: str
    updated: str
    text: str | None
    preview: Preview | None
    slot: int
    """Number of its vector, which no other vector of the store has or had."""
    vector: Vectors
    moments: Sequence[Moment]
    mapped: float | None = None
    """Where the vector was mapped from another space: how far it may be off, as 1 less the cosine similarity."""


@dataclass(frozen=True)
class OldLabelSet:
    name: str
    definition: Mapping[str, Any]
    created: str
    updated: str


ERRORS = (OSError, sqlite3.Error)
"""Exceptions that reading and writing the files of a store raise."""


def file_of(path: Path) -> Path:
    """Raises StoreError where the folder holds no store."""
    file = path / schema.FILE
    if not file.is_file():
        raise StoreError(f"{path} holds no store")
    return file


class OldStore:
    """Reads a store, whatever its space. Close it."""

    def __init__(self, path: Path, *, alone: bool) -> None:
        """Open the old store. `alone`: nobody else has it open. Raises StoreError."""
        self._connection = schema.open_existing(file_of(path), read_only=not alone)
        try:
            schema.check_version(self._connection, path)
        except (StoreError, sqlite3.Error):
            self.close()
            raise
        self.space = schema.meta(self._connection, "space") or ""
        self.id, sequence = schema.meta(self._connection, "store"), schema.meta(self._connection, "sequence")
        self.version = f"{self.id} {sequence}"
        """A value that changes with every write."""

    def close(self) -> None:
        self._connection.close()

    @property
    def empty(self) -> bool:
        """Return whether there is nothing that was made in its space."""
        return schema.is_empty(self._connection)

    @property
    def count(self) -> int:
        """Return the number of items, without the hidden items that hold moments."""
        [count] = self._connection.execute(f"SELECT count(*) {_ITEMS}").fetchone()
        return int(count)

    def items(self, slots: Iterable[int] | None = None, *, of: str | None = None) -> Iterator[OldItem]:
        """Yield all items, or those of a collection, in the order in which they were first written; or those with these
        slots in their order."""
        mapped = "(SELECT error FROM mapped WHERE mapped.slot = items.slot)"
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'mapped'").fetchone():
            mapped = "NULL"  # a store of an earlier version, which no server has opened since
        query = f"""SELECT collections.key, collections.name, items.id, modality, metadata, items.created, updated,
            (SELECT content FROM keywords WHERE keywords.item = items.key AND field = ?), items.slot, vector, {mapped}
            {_ITEMS.replace("WHERE", "JOIN vectors USING (slot) WHERE")}"""
        if slots is None:
            query, names = (query, ()) if of is None else (f"{query} AND collections.name = ?", (of,))
            records: Iterator[Any] = self._connection.execute(f"{query} ORDER BY items.key", (keywords.TEXT, *names))
        else:
            of_slot = f"{query} AND items.slot = ?"
            records = (
                row for slot in slots for row in self._connection.execute(of_slot, (keywords.TEXT, slot)).fetchall()
            )
        for key, collection, id, modality, metadata, created, updated, text, slot, vector, error in records:
            preview = previews.of_item(self._connection, key, id)
            parts = self._moments(collection, id) if modality in moments.HAVING else ()
            details = (orjson.loads(metadata), created, updated, text, preview, slot, rows.unpack(vector), parts, error)
            yield OldItem(collection, id, modality, *details)

    def _moments(self, collection: str, id: str) -> Sequence[Moment]:
        key = rows.collection_key(self._connection, moments.moments_table(collection))
        prefix = f"{id}{moments.SEPARATOR}"
        vectors = {} if key is None else rows.vectors_of_prefixes(self._connection, key, [prefix])
        return moments.by_owner(vectors).get(id, ())

    def slots(self) -> dict[str, list[int]]:
        """Return the slots of the items of each modality."""
        slots: dict[str, list[int]] = {}
        for modality, slot in self._connection.execute(f"SELECT modality, slot {_ITEMS}"):
            slots.setdefault(modality, []).append(slot)
        return slots

    def vectors(self, slots: Sequence[int]) -> tuple[list[int], Vectors]:
        """Return those of the slots that still hold a vector, in their order, and the vectors (N, D)."""
        query = "SELECT vector FROM vectors WHERE slot = ?"
        pairs = [(slot, row[0]) for slot in slots if (row := self._connection.execute(query, (slot,)).fetchone())]
        vectors = rows.unpack(b"".join(blob for _, blob in pairs))
        return [slot for slot, _ in pairs], vectors.reshape(len(pairs), -1 if pairs else 0)

    def collections(self) -> Iterator[tuple[CollectionRow, Sequence[str]]]:
        """Yield each collection with its keyword fields."""
        for collection in rows.collections(self._connection):
            if not collection.name.startswith("."):  # moments of videos
                yield collection, keywords.fields(self._connection, collection.key)

    def label_sets(self) -> Iterator[OldLabelSet]:
        query = "SELECT name, definition, created, updated FROM label_sets WHERE name NOT LIKE '.%' ORDER BY name"
        for name, definition, created, updated in self._connection.execute(query).fetchall():
            yield OldLabelSet(name, orjson.loads(definition), created, updated)


class Dates:
    """Reads what a store that is filled has by now, and restores the dates of its collections and label sets, which the
    store itself takes from the clock.

    A second connection to the file of an open store; nothing else is written by it. Close it.
    """

    def __init__(self, store: Path) -> None:
        self._connection = schema.connect(store / schema.FILE)

    def close(self) -> None:
        self._connection.close()

    def of_item(self, item: OldItem) -> tuple[str | None, bool, bool]:
        """Return when the stored item was updated (None where it is absent), whether its preview was embedded, and
        whether its vector was mapped."""
        row = self._connection.execute(
            """SELECT updated, about, error IS NOT NULL
            FROM items JOIN collections ON collections.key = items.collection LEFT JOIN mapped USING (slot)
            LEFT JOIN previews ON previews.item = items.key WHERE collections.name = ? AND items.id = ?""",
            (item.collection, item.id),
        ).fetchone()
        if row is None:
            return None, False, False
        return row[0], row[1] is not None and orjson.loads(row[1]).get(EMBEDDED, False), bool(row[2])

    def of_collection(self, name: str) -> str | None:
        """Return when the collection was created."""
        return self._one("SELECT created FROM collections WHERE name = ?", name)

    def of_label_set(self, name: str) -> str | None:
        """Return when the label set was updated."""
        return self._one("SELECT updated FROM label_sets WHERE name = ?", name)

    def _one(self, query: str, name: str) -> str | None:
        row = self._connection.execute(query, (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_collection(self, name: str, created: str) -> None:
        self._connection.execute("UPDATE collections SET created = ? WHERE name = ?", (created, name))

    def set_label_set(self, label_set: OldLabelSet) -> None:
        self._connection.execute(
            "UPDATE label_sets SET created = ?, updated = ? WHERE name = ?",
            (label_set.created, label_set.updated, label_set.name),
        )


def stage(path: Path, space: str, old: OldStore) -> Path:
    """Return the folder in which a store's successor is made, with what an interrupted run left if it still fits."""
    staged = path / f"new.{space}"
    note = staged / _MADE_FROM
    with suppress(OSError):
        if note.read_text(encoding="utf-8") == old.version:
            return staged
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    note.write_text(old.version, encoding="utf-8")
    return staged


def put_in_place(path: Path, staged: Path, space: str, beside: Sequence[Path]) -> Path:
    """Make the staged store the store at `path` in one step, and return the folder of the old one, whose space is
    `space`.

    Neither is open, and `path` is held. The files `beside` go with the old one. Raises StoreError, and leaves the store
    as it was.
    """
    current, new = path / schema.FILE, staged / schema.FILE
    try:
        for file in (new, current):
            _make_whole(file)
        aside = _aside(path, space, current)
        aside.mkdir(exist_ok=True)
        if not (aside / schema.FILE).exists():
            _link(current, aside / schema.FILE)
        for file in beside:
            os.replace(file, aside / file.name)
        sync(aside, path)
        os.replace(new, current)
        sync(path)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"the new store cannot be put in the place of {path}, which is as it was: {error}. Is a backup or a check "
            "of it at work? Run the same command again; what is embedded is kept"
        ) from None
    with suppress(OSError):  # without them the indexes are built anew
        os.rename(path / "snapshot", aside / "snapshot")
        os.rename(staged / "snapshot", path / "snapshot")
    clear(path)
    return aside


def clear(path: Path) -> None:
    """Remove the staged files: none of them belongs to the store that is there now."""
    for folder in path.glob("new.*"):
        shutil.rmtree(folder, ignore_errors=True)


def _make_whole(file: Path) -> None:
    """Move the content of the write-ahead log into the file, so that the file is the whole database."""
    until = time.monotonic() + _BUSY_S
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode = DELETE")
                break
            except sqlite3.OperationalError:  # somebody else has it open; SQLite does not wait here
                if time.monotonic() > until:
                    raise
                time.sleep(_PAUSE_S)
    # A remaining log would be taken for that of the other file.
    if file.with_name(f"{file.name}-wal").exists():
        raise OSError(f"{file}-wal is still there")
    sync(file)


def _aside(path: Path, space: str, current: Path) -> Path:
    """Return a folder that holds no store, or by a run that was killed this one."""
    for number in itertools.count(1):
        folder = path / (f"old.{space}" if number == 1 else f"old.{space}.{number}")
        file = folder / schema.FILE
        if not file.exists() or file.samefile(current):
            return folder
    raise AssertionError


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system that has no second names
        part = target.with_name(f"{target.name}.part")
        shutil.copyfile(source, part)
        sync(part)
        os.replace(part, target)
