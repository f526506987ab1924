"""The store of one process: durable rows in SQLite, and the indexes in memory that are derived from them."""

import asyncio
import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from service.contract.bundle import Manifest
from service.contract.vectors import Vectors
from service.errors import InvalidRequest, NotFound, NotReady
from service.store import keywords, labels, previews, rows, schema, snapshot, tokens
from service.store.builder import Builder
from service.store.errors import StoreDamaged, StoreError, StoreInUse
from service.store.filters import Filter
from service.store.index import Index
from service.store.interface import MOST_FOUND_BYTES, TOO_MUCH_FOUND, Hit, Part
from service.store.kinds import Built, Effort, Keys, Rules, Wanted
from service.store.labels import LabelSet
from service.store.previews import Shown
from service.store.rows import Collection, Entry, Item, Preview, SlotReader
from service.store.writer import Change, Configure, Drop, Put, Remove, Transaction, Writer
from service.workers import Workers, abandoned

_READERS = 4
_STEPS = 20_000
"""Of SQLite's machine, after which a read looks whether anybody still waits for it: less than a millisecond."""
_LOOKS = 4
"""Times that a search is made again because what it found was replaced before it was read."""
_UNWRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_log = logging.getLogger(__name__)
T = TypeVar("T")


class SqliteStore:
    """See interface.Store, whose methods are described there."""

    def __init__(self, path: Path, manifest: Manifest, lock: int, rules: Rules) -> None:
        """Not called directly: see open()."""
        self._path = path
        self._lock = lock
        self._space = manifest.space
        self._dimensions = manifest.dimensions
        self._connections: list[sqlite3.Connection] = []
        self._closed = self._damaged = False
        try:
            writing = self._connect()
            schema.prepare(writing, path, manifest)
            keywords.prepare(writing)
            tokens.prepare(writing)
            previews.prepare(writing)
            self._id = schema.meta(writing, "store") or ""
            self._keys = {each.name: each.key for each in rows.collections(writing)}
            """Of collections, by name."""
            self._indexes = self._load_indexes(writing)
            reading = self._connect()
        except BaseException:
            self._disconnect()
            raise
        self._thread = threading.local()
        self._readers = Workers("store-reader", _READERS)
        self._writer = Writer(writing, self._apply)
        self._builder = Builder(_Library(self, reading), rules)

    @classmethod
    def open(cls, path: Path, manifest: Manifest, rules: Rules | None = None) -> "SqliteStore":
        """Open or create the store in a directory. Blocks while it is read: call it before serving.

        An index whose snapshot is absent or damaged is built in the background, while searches are exact. Raises
        StoreInUse, StoreDamaged, or SpaceMismatch where the vectors that are there are of a space that the bundle does
        not accept; StoreError where the directory cannot be written.
        """
        lock = hold(path)
        try:
            return cls(path, manifest, lock, rules or Rules())
        except (sqlite3.Error, ValueError) as error:
            os.close(lock)
            raise _reason(path, error) from error
        except BaseException:
            os.close(lock)
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = schema.connect(self._path / schema.FILE)
        self._connections.append(connection)
        return connection

    def _disconnect(self) -> None:
        for connection in self._connections:
            connection.close()

    @property
    def _snapshot(self) -> Path:
        return self._path / "snapshot"

    def _load_indexes(self, connection: sqlite3.Connection) -> dict[int, Index]:
        """Start from the snapshot and bring it up to the rows; vectors that are in no index are read."""
        latest = int(schema.meta(connection, "sequence") or 0)
        saved = snapshot.load(self._snapshot, self._id, latest, self._dimensions)
        indexes = {}
        for collection in rows.collections(connection):
            index = Index(self._dimensions, collection.wanted)
            for each in saved:
                if each.collection == collection.key:
                    index.load(each.modality, each.built, each.slots)
            reader = SlotReader(connection, collection.key, self._dimensions)
            for slots, modalities, metadata, records in rows.live(connection, collection.key):
                for modality in dict.fromkeys(modalities):
                    chosen = np.array([each == modality for each in modalities])
                    places = np.flatnonzero(chosen).tolist()
                    own, mine = [metadata[place] for place in places], [records[place] for place in places]
                    fresh = ~index.revive(modality, slots[chosen], own, mine)
                    if fresh.any():
                        wanted = slots[chosen][fresh]
                        found, vectors = reader.vectors(wanted)
                        if len(found) != len(wanted):
                            raise ValueError("an item has no vector")
                        places = np.flatnonzero(fresh).tolist()
                        index.put(
                            modality,
                            wanted,
                            vectors,
                            [own[place] for place in places],
                            [mine[place] for place in places],
                        )
            indexes[collection.key] = index
        for each in saved:
            if each.collection not in indexes:
                snapshot.forget(self._snapshot, each.collection)
        return indexes

    def _apply(self, changes: list[Change]) -> None:
        for change in changes:
            match change:
                case Configure(collection, name, wanted):
                    # Replaced as a whole, as the names are: the builder and searches may be going through them.
                    self._indexes = {collection: Index(self._dimensions, wanted), **self._indexes}
                    self._indexes[collection].wanted = wanted
                    self._keys = {**self._keys, name: collection}
                case Drop(collection):
                    self._keys = {name: key for name, key in self._keys.items() if key != collection}
                    self._indexes = {key: index for key, index in self._indexes.items() if key != collection}
                    snapshot.forget(self._snapshot, collection)
                case Put(collection, modality, slots, vectors, metadata, records, replaced):
                    self._indexes[collection].put(modality, slots, vectors, metadata, records, replaced)
                case Remove(collection, slots):
                    self._indexes[collection].remove(slots)
        self._builder.notify()

    async def ready(self) -> bool:
        return not self._closed and not self._damaged and self._writer.alive()

    async def indexed(self, timeout_s: float) -> bool:
        """Whether every part has the index that it is to have, now or within the time."""
        return await asyncio.to_thread(self._builder.wait, timeout_s)

    async def close(self) -> None:
        """Finish every write and search that was begun, and let go of the directory."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.close()
        self._readers.close()
        self._builder.close()
        self._disconnect()
        os.close(self._lock)

    # Items

    async def upsert(self, entries: Sequence[Entry]) -> None:
        by_part: dict[str, dict[str, list[Entry]]] = {}
        for entry in entries:
            by_part.setdefault(entry.collection, {}).setdefault(entry.modality, []).append(entry)

        def write(transaction: Transaction) -> None:
            for name, parts in by_part.items():
                collection = self._ensure(transaction, name)
                for modality, mine in parts.items():
                    first = transaction.take(len(mine))
                    keys, replaced, records = rows.upsert(transaction.connection, collection, mine, first)
                    known = [id in replaced for id in (entry.id for entry in mine)]
                    keywords.put(transaction.connection, collection, keys, known, mine)
                    tokens.put(transaction.connection, collection, keys, known, mine)
                    previews.put(transaction.connection, keys, known, mine)
                    slots = np.arange(first, first + len(mine))
                    vectors = np.stack([entry.vector for entry in mine])
                    metadata = [entry.metadata for entry in mine]
                    older = np.sort(np.array(list(replaced.values()), np.int64))
                    put = Put(collection, modality, slots, vectors, metadata, records, older)
                    transaction.changes.append(put)

        await self._write(write)

    async def get(self, collection: str, id: str, with_vector: bool = False) -> Item:
        def read(connection: sqlite3.Connection) -> Item:
            found = rows.item(connection, _collection_key(connection, collection), id, with_vector)
            if found is None:
                raise NotFound(f"no item {id!r} in the collection {collection!r}")
            return found

        return await self._read(read)

    async def holds(self, collection: str, id: str) -> bool:
        def read(connection: sqlite3.Connection) -> bool:
            key = rows.collection_key(connection, collection)
            return key is not None and rows.item(connection, key, id, with_vector=False) is not None

        return await self._read(read)

    async def preview(self, collection: str, id: str) -> Preview:
        def read(connection: sqlite3.Connection) -> Preview:
            found = previews.of_item(connection, _collection_key(connection, collection), id)
            if found is None:
                raise NotFound(f"no preview of an item {id!r} in the collection {collection!r}")
            return found

        return await self._read(read)

    async def shown(self, collection: str, ids: Sequence[str]) -> dict[str, Shown]:
        return await self._read(
            lambda connection: previews.shown(connection, _collection_key(connection, collection), ids)
        )

    async def sample(self, collection: str, count: int) -> tuple[list[Item], int]:
        def read(connection: sqlite3.Connection) -> tuple[list[Item], int]:
            key = _collection_key(connection, collection)
            slots = self._indexes[key].slots() if key in self._indexes else np.empty(0, np.int64)
            total = len(slots)
            if total > count:
                slots = np.sort(np.random.default_rng(0).choice(slots, count, replace=False))
            items = rows.items_by_slot(connection, key, collection, set(slots.tolist()), with_vector=True)
            return [items[slot] for slot in sorted(items)], total

        return await self._read(read)

    async def version(self, collection: str) -> str:
        return str(self._writer.sequence)  # of the whole store: what is written elsewhere only costs a little work

    async def vectors(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        def read(connection: sqlite3.Connection) -> dict[str, Vectors]:
            found = rows.vectors(connection, _collection_key(connection, collection), ids)
            for id in ids:
                if id not in found:
                    raise NotFound(f"no item {id!r} in the collection {collection!r}")
            return found

        return await self._read(read)

    async def page(
        self, collection: str | None, modality: str | None, cursor: str | None, limit: int
    ) -> tuple[list[Item], str | None]:
        def read(connection: sqlite3.Connection) -> tuple[list[Item], str | None]:
            key = None if collection is None else _collection_key(connection, collection)
            items, last = rows.page(
                connection, key, modality, 0 if cursor is None else rows.key_of_cursor(cursor), limit
            )
            return items, None if last is None else rows.cursor(last)

        return await self._read(read)

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        return await self._delete(collection, lambda connection, key: rows.slots_of_ids(connection, key, ids))

    async def delete_matching(self, collection: str, filter: Filter) -> int:
        def choose(connection: sqlite3.Connection, key: int) -> Keys:
            return self._indexes[key].matching(filter, SlotReader(connection, key, self._dimensions))

        return await self._delete(collection, choose, alone=True)

    async def _delete(
        self, collection: str, choose: Callable[[sqlite3.Connection, int], Keys], *, alone: bool = False
    ) -> int:
        def write(transaction: Transaction) -> int:
            key = _collection_key(transaction.connection, collection)
            slots = choose(transaction.connection, key)
            rows.delete(transaction.connection, key, slots)
            transaction.changes.append(Remove(key, slots))
            return int(slots.size)

        return await self._write(write, alone=alone)

    async def search(
        self,
        collection: str,
        queries: Vectors,
        count: int,
        *,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        leave_out: Sequence[str | None] | None = None,
        with_vector: bool = False,
        effort: Effort | None = None,
    ) -> list[list[Hit]]:
        def read(connection: sqlite3.Connection) -> list[list[Hit]]:
            key = self._keys.get(collection)
            index = None if key is None else self._indexes.get(key)
            if key is None or index is None:
                raise NotFound(f"no collection {collection!r}")
            reader = SlotReader(connection, key, self._dimensions)
            for _ in range(_LOOKS):
                # One more than asked for, where one of them may be the item that is left out.
                found = index.search(
                    queries, count + bool(leave_out), reader, modalities=modalities, filter=filter, effort=effort
                )
                # Most are in memory: vectors are read, and the items whose records are long.
                wanted = {each.slot for hits in found for each in hits if with_vector or not each.record}
                items = rows.items_by_slot(connection, key, collection, wanted, with_vector) if wanted else {}
                if len(items) == len(wanted):
                    break
            if sum(len(each.record) for hits in found for each in hits) > MOST_FOUND_BYTES:
                raise InvalidRequest(TOO_MUCH_FOUND)
            results = []
            for hits, own in zip(found, leave_out or [None] * len(found), strict=True):
                kept = []
                for slot, score, modality, record in hits:
                    item = items.get(slot)
                    if item is None and slot not in wanted:
                        item = rows.item_of_record(collection, modality, record)
                    if item is not None and item.id != own:
                        kept.append(Hit(item, score))
                results.append(kept[:count])
            return results

        return await self._read(read)

    async def keyword_search(
        self,
        collection: str,
        query: str,
        count: int,
        *,
        field: str | None = None,
        every: bool = False,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        leave_out: str | None = None,
    ) -> list[Hit]:
        def read(connection: sqlite3.Connection) -> list[Hit]:
            key = _collection_key(connection, collection)
            known = [keywords.TEXT, *keywords.fields(connection, key)]
            if field is not None and field not in known:
                raise InvalidRequest(
                    f"keywords.field: {field!r} is no keyword field of the collection {collection!r}: "
                    f"it has {', '.join(known)}"
                )
            among = None
            if filter is not None:
                index = self._indexes[key]
                slots = index.matching(filter, SlotReader(connection, key, self._dimensions))
                among = rows.keys_of_slots(connection, key, slots)
            with _one_view(connection):
                found = keywords.search(
                    connection,
                    key,
                    query,
                    count + bool(leave_out),
                    field=field,
                    modalities=modalities,
                    among=among,
                    every=every,
                )
                items = rows.items_by_key(connection, [each for each, _ in found], with_vector=True)
            hits = [Hit(items[each], score) for each, score in found if items[each].id != leave_out]
            return hits[:count]

        return await self._read(read)

    async def tokens(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        return await self._read(
            lambda connection: tokens.of_items(connection, _collection_key(connection, collection), ids)
        )

    # Collections

    async def collections(self) -> list[Collection]:
        return list(await self._read(rows.collections))

    async def collection(self, name: str) -> Collection:
        def read(connection: sqlite3.Connection) -> Collection:
            found = rows.collection(connection, name)
            if found is None:
                raise NotFound(f"no collection {name!r}")
            return found

        return await self._read(read)

    async def parts(self, name: str) -> list[Part]:
        def read(connection: sqlite3.Connection) -> list[Part]:
            key = _collection_key(connection, name)
            index = self._indexes.get(key)
            described = []
            for modality, view in sorted(index.views().items() if index else ()):
                kind, precision = (
                    (view.built.chosen.kind, view.built.chosen.precision) if view.built else ("flat", "float32")
                )
                living = view.count - view.dead
                indexed = int(np.count_nonzero(view.alive[: view.indexed]))
                building = self._builder.building == (key, modality)
                if living:
                    described.append(Part(modality, kind, precision, living, indexed, building))
            return described

        return await self._read(read)

    async def create_collection(self, name: str, wanted: Wanted | None = None) -> bool:
        def write(transaction: Transaction) -> bool:
            before = len(transaction.changes)
            key = self._ensure(transaction, name)
            created = len(transaction.changes) > before
            if wanted is not None:
                rows.configure_collection(transaction.connection, key, wanted)
                transaction.changes.append(Configure(key, name, wanted))
            return created

        return await self._write(write)

    async def keyword_fields(self, collection: str) -> list[str]:
        return await self._read(lambda connection: keywords.fields(connection, _collection_key(connection, collection)))

    async def set_keyword_fields(self, collection: str, fields: Sequence[str]) -> None:
        """Make these the keyword fields; the items that are there are indexed in the same transaction."""
        await self._write(
            lambda transaction: keywords.set_fields(
                transaction.connection, _collection_key(transaction.connection, collection), fields
            )
        )

    async def keeps_tokens(self, collection: str) -> bool:
        def read(connection: sqlite3.Connection) -> bool:
            key = rows.collection_key(connection, collection)
            return key is not None and tokens.kept(connection, key)

        return await self._read(read)

    async def keep_tokens(self, collection: str, wanted: bool) -> None:
        await self._write(
            lambda transaction: tokens.keep(
                transaction.connection, _collection_key(transaction.connection, collection), wanted
            )
        )

    async def drop_collection(self, name: str) -> None:
        def write(transaction: Transaction) -> None:
            key = _collection_key(transaction.connection, name)
            rows.drop_collection(transaction.connection, key)
            transaction.changes.append(Drop(key))

        await self._write(write)

    def _ensure(self, transaction: Transaction, name: str) -> int:
        key, created = rows.ensure_collection(transaction.connection, name, self._space, self._dimensions)
        if created:
            transaction.changes.append(Configure(key, name, Wanted()))
        return key

    # Label sets

    async def put_label_set(self, name: str, definition: Mapping[str, Any], vectors: Mapping[str, Vectors]) -> None:
        await self._write(
            lambda transaction: labels.put_label_set(transaction.connection, name, self._space, definition, vectors)
        )

    async def label_set(self, name: str) -> LabelSet:
        def read(connection: sqlite3.Connection) -> LabelSet:
            with _one_view(connection):
                found = labels.label_set(connection, name, self._dimensions)
            if found is None:
                raise NotFound(f"no label set {name!r}")
            return found

        return await self._read(read)

    async def label_set_version(self, name: str) -> str:
        def read(connection: sqlite3.Connection) -> str:
            found = labels.version(connection, name)
            if found is None:
                raise NotFound(f"no label set {name!r}")
            return found

        return await self._read(read)

    async def delete_label_set(self, name: str) -> None:
        def write(transaction: Transaction) -> None:
            if not labels.delete_label_set(transaction.connection, name):
                raise NotFound(f"no label set {name!r}")

        await self._write(write)

    async def _write(self, operation: Callable[[Transaction], T], *, alone: bool = False) -> T:
        return await asyncio.wrap_future(self._writer.submit(operation, alone=alone))

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            if not hasattr(self._thread, "connection"):
                self._thread.connection = self._connect()
                # A read whose client went away, or whose deadline is over, ends in the middle.
                self._thread.connection.set_progress_handler(abandoned, _STEPS)
            try:
                return function(self._thread.connection)
            except sqlite3.DatabaseError as error:
                code = _primary_code(error)
                if code not in (*_UNWRITABLE, *_CORRUPT):
                    raise
                self._damaged = self._damaged or code in _CORRUPT
                _log.exception("the store cannot be read: stop the server, and run `python -m service check` on it")
                raise NotReady("the store cannot be read") from None

        if self._closed:
            raise NotReady("the store is closed")
        return await self._readers.run(run)


@contextmanager
def _one_view(connection: sqlite3.Connection) -> Iterator[None]:
    """What is read inside is of one moment, whatever is written meanwhile; the moment is that of the first read."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")


def _collection_key(connection: sqlite3.Connection, name: str) -> int:
    key = rows.collection_key(connection, name)
    if key is None:
        raise NotFound(f"no collection {name!r}")
    return key


class _Library:
    """What the builder sees of the store."""

    def __init__(self, store: SqliteStore, connection: sqlite3.Connection) -> None:
        self._store, self._connection = store, connection

    def indexes(self) -> Mapping[int, Index]:
        return self._store._indexes

    def reader(self, collection: int) -> SlotReader:
        return SlotReader(self._connection, collection, self._store._dimensions)

    def save(self, collection: int, modality: str, built: Built | None, slots: Keys) -> None:
        store = self._store
        if built is None:
            snapshot.forget(store._snapshot, collection, modality)
        elif collection in store._indexes:
            saved = snapshot.Saved(collection, modality, built, slots)
            snapshot.save(store._snapshot, store._id, store._writer.sequence, saved)


def hold(path: Path) -> int:
    """Take a directory, made if need be, for this process until the descriptor is closed. Raises StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"the store {path} cannot be written: {error.strerror}") from None
    try:
        # Held by the process, however it ends: a second server over the same rows would serve an index of its own.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StoreInUse(f"the store {path} is open in another process: each server needs its own") from None
    return lock


def _reason(path: Path, error: Exception) -> StoreError:
    if isinstance(error, sqlite3.Error) and _primary_code(error) in _UNWRITABLE:
        return StoreError(f"the store {path} cannot be written: {error}")
    return StoreDamaged(
        f"the store {path} cannot be read: {error}; `python -m service check {path}` says more, and "
        "`python -m service restore` brings a backup back"
    )


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
