"""Items, collections and label sets: durable rows in SQLite, and the indexes in memory that are derived from them."""

import asyncio
import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from service.contract.bundle import Manifest
from service.contract.vectors import Vectors
from service.errors import InvalidRequest, NotFound, NotReady
from service.store import keywords, labels, rows, schema, snapshot, tokens
from service.store.errors import SpaceMismatch, StoreDamaged, StoreError, StoreInUse
from service.store.index import Index, Keys
from service.store.labels import LabelSet
from service.store.rows import Collection, Entry, Filter, Item
from service.store.schema import DEFAULT_COLLECTION
from service.store.writer import Change, Create, Drop, Put, Remove, Transaction, Writer

__all__ = [
    "DEFAULT_COLLECTION",
    "Collection",
    "Entry",
    "Filter",
    "Hit",
    "Index",
    "Item",
    "LabelSet",
    "SpaceMismatch",
    "Store",
    "StoreDamaged",
    "StoreError",
    "StoreInUse",
]

_READERS = 4

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Hit:
    item: Item
    score: float
    """Cosine similarity, -1 to 1."""


class Store:
    """An open store. An awaited write is on disk and can be searched; no method blocks the event loop.

    Every method that names a collection, an item or a label set that is not there raises NotFound.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: int) -> None:
        """Not called directly: see open()."""
        self._path = path
        self._lock = lock
        self._space = manifest.space
        self._dimensions = manifest.dimensions
        self._connections: list[sqlite3.Connection] = []
        writing = self._connect()
        schema.prepare(writing, path, manifest)
        keywords.prepare(writing)
        tokens.prepare(writing)
        sequence = int(schema.meta(writing, "sequence") or 0)
        self._id = schema.meta(writing, "store") or ""
        self._indexes = self._load_indexes(writing, sequence)
        self._writer = Writer(writing, sequence, self._apply)
        self._thread = threading.local()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._closed = False

    @classmethod
    def open(cls, path: Path, manifest: Manifest) -> "Store":
        """Open or create the store in a directory. Blocks while vectors are read: call it before serving.

        Raises StoreInUse, StoreDamaged, or SpaceMismatch where the vectors that are there are of a space that the
        bundle does not accept.
        """
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
        try:
            return cls(path, manifest, lock)
        except (sqlite3.Error, ValueError) as error:
            os.close(lock)
            raise StoreDamaged(f"the store {path} cannot be read: {error}") from error
        except BaseException:
            os.close(lock)
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = schema.connect(self._path / "store.sqlite3")
        self._connections.append(connection)
        return connection

    def _load_indexes(self, connection: sqlite3.Connection, sequence: int) -> dict[int, Index]:
        """Start from the snapshot and bring it up to the rows; without a usable one this reads every vector."""
        at, saved = snapshot.load(self._path / "snapshot", self._id, sequence, self._dimensions)
        indexes = {}
        for collection in rows.collections(connection):
            index = saved.get(collection.key) or Index(self._dimensions)
            held = index.keys()
            keys, sequences = rows.sequences(connection, collection.key)
            index.remove(np.setdiff1d(held, keys[sequences <= at]))
            fresh = np.setdiff1d(keys, index.keys())
            for modality, batch, vectors in rows.batches(connection, fresh, self._dimensions):
                index.put(modality, batch, vectors, replaced=batch[:0])
            indexes[collection.key] = index
        return indexes

    def _apply(self, changes: list[Change]) -> None:
        for change in changes:
            match change:
                case Create(collection):
                    self._indexes[collection] = Index(self._dimensions)
                case Drop(collection):
                    del self._indexes[collection]
                case Put(collection, modality, keys, vectors, replaced):
                    self._indexes[collection].put(modality, keys, vectors, replaced)
                case Remove(collection, keys):
                    self._indexes[collection].remove(keys)

    def ready(self) -> bool:
        return not self._closed and self._writer.alive()

    async def close(self) -> None:
        """Finish every write and search that was begun, save a snapshot, and let go of the directory."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        whole = self._writer.alive()
        self._writer.close()
        self._readers.shutdown(wait=True)
        try:
            if whole:
                snapshot.save(self._path / "snapshot", self._id, self._writer.sequence, self._indexes)
        except (OSError, RuntimeError):
            _log.exception("no snapshot was saved: the next start reads every vector again")
        for connection in self._connections:
            connection.close()
        os.close(self._lock)

    # Items

    async def upsert(self, entries: Sequence[Entry]) -> None:
        """Write all the entries or none, each replacing the item of its collection and id; no id twice."""

        def write(transaction: Transaction) -> None:
            for name in dict.fromkeys(entry.collection for entry in entries):
                mine = [entry for entry in entries if entry.collection == name]
                collection = self._ensure(transaction, name)
                keys, replaced = rows.upsert(transaction.connection, collection, mine, transaction.sequence)
                keywords.put(transaction.connection, collection, keys, replaced, mine)
                tokens.put(transaction.connection, collection, keys, replaced, mine)
                for modality in dict.fromkeys(entry.modality for entry in mine):
                    chosen = np.array([entry.modality == modality for entry in mine])
                    vectors = np.stack([entry.vector for entry in mine if entry.modality == modality])
                    older = keys[chosen & np.array(replaced)]
                    transaction.changes.append(Put(collection, modality, keys[chosen], vectors, older))

        await self._write(write)

    async def get(self, collection: str, id: str, with_vector: bool = False) -> Item:
        def read(connection: sqlite3.Connection) -> Item:
            found = rows.item(connection, _collection_key(connection, collection), id, with_vector)
            if found is None:
                raise NotFound(f"no item {id!r} in the collection {collection!r}")
            return found

        return await self._read(read)

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
        """Items in the order in which they were first written, and the cursor to go on from, None at the end.

        Raises InvalidRequest for a cursor that no page came with.
        """

        def read(connection: sqlite3.Connection) -> tuple[list[Item], str | None]:
            key = None if collection is None else _collection_key(connection, collection)
            items, last = rows.page(
                connection, key, modality, 0 if cursor is None else rows.key_of_cursor(cursor), limit
            )
            return items, None if last is None else rows.cursor(last)

        return await self._read(read)

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """How many were there, and are gone."""
        return await self._delete(collection, lambda connection, key: rows.keys_of_ids(connection, key, ids))

    async def delete_matching(self, collection: str, filter: Filter) -> int:
        return await self._delete(collection, lambda connection, key: rows.matching(connection, key, filter))

    async def _delete(self, collection: str, choose: Callable[[sqlite3.Connection, int], Keys]) -> int:
        def write(transaction: Transaction) -> int:
            key = _collection_key(transaction.connection, collection)
            keys = choose(transaction.connection, key)
            rows.delete(transaction.connection, keys)
            transaction.changes.append(Remove(key, keys))
            return int(keys.size)

        return await self._write(write)

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
    ) -> list[list[Hit]]:
        """The `count` nearest items to each of the unit vectors (Q, D), best first, exactly.

        `leave_out` names for each query one item that is not to be among its own results. An item that is deleted
        while the search runs is left out.
        """

        def read(connection: sqlite3.Connection) -> list[list[Hit]]:
            key = _collection_key(connection, collection)
            index = self._indexes.get(key)
            if index is None:
                raise NotFound(f"no collection {collection!r}")
            with _one_view(connection):
                among = rows.matching(connection, key, filter) if filter else None
                # One more than asked for, where one of them may be the item that is left out.
                found = index.search(queries, count + bool(leave_out), modalities, among)
                items = rows.items_by_key(connection, {key for hits in found for key, _ in hits}, with_vector)
            results = []
            for hits, own in zip(found, leave_out or [None] * len(found), strict=True):
                kept = [Hit(items[key], score) for key, score in hits if key in items and items[key].id != own]
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
        """The `count` best items for the words of a query by BM25 (the hits' score), with their vectors, best first.

        `field` is `text` or one of the collection's keyword fields (raises InvalidRequest for another), None all of
        them; see keywords.search. The item `leave_out` is not among them.
        """

        def read(connection: sqlite3.Connection) -> list[Hit]:
            key = _collection_key(connection, collection)
            known = [keywords.TEXT, *keywords.fields(connection, key)]
            if field is not None and field not in known:
                raise InvalidRequest(
                    f"keywords.field: {field!r} is no keyword field of the collection {collection!r}: "
                    f"it has {', '.join(known)}"
                )
            with _one_view(connection):
                among = rows.matching(connection, key, filter) if filter else None
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
        """The token vectors (N, D) of those items that have any."""
        return await self._read(
            lambda connection: tokens.of_items(connection, _collection_key(connection, collection), ids)
        )

    # Collections

    async def collections(self) -> list[Collection]:
        return await self._read(rows.collections)

    async def collection(self, name: str) -> Collection:
        def read(connection: sqlite3.Connection) -> Collection:
            found = rows.collection(connection, name)
            if found is None:
                raise NotFound(f"no collection {name!r}")
            return found

        return await self._read(read)

    async def create_collection(self, name: str) -> bool:
        """Whether it was created by this call: it is no error that it is there already."""

        def write(transaction: Transaction) -> bool:
            before = len(transaction.changes)
            self._ensure(transaction, name)
            return len(transaction.changes) > before

        return await self._write(write)

    async def keyword_fields(self, collection: str) -> list[str]:
        """The metadata keys whose words can be searched for, besides the text of text items."""
        return await self._read(lambda connection: keywords.fields(connection, _collection_key(connection, collection)))

    async def set_keyword_fields(self, collection: str, fields: Sequence[str]) -> None:
        """Make these the keyword fields; the items that are there are indexed in the same transaction."""
        await self._write(
            lambda transaction: keywords.set_fields(
                transaction.connection, _collection_key(transaction.connection, collection), fields
            )
        )

    async def keeps_tokens(self, collection: str) -> bool:
        """Whether items are stored with their token vectors; False for a collection that is not there yet."""

        def read(connection: sqlite3.Connection) -> bool:
            key = rows.collection_key(connection, collection)
            return key is not None and tokens.kept(connection, key)

        return await self._read(read)

    async def keep_tokens(self, collection: str, wanted: bool) -> None:
        """Keep token vectors of what is written from now on, or throw away those that are kept."""
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
            transaction.changes.append(Create(key))
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

    async def delete_label_set(self, name: str) -> None:
        def write(transaction: Transaction) -> None:
            if not labels.delete_label_set(transaction.connection, name):
                raise NotFound(f"no label set {name!r}")

        await self._write(write)

    async def _write(self, operation: Callable[[Transaction], T]) -> T:
        return await asyncio.wrap_future(self._writer.submit(operation))

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            if not hasattr(self._thread, "connection"):
                self._thread.connection = self._connect()
            return function(self._thread.connection)

        if self._closed:
            raise NotReady("the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, run)


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
