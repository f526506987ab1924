"""Collections and items as rows, in SQLite: functions of a connection."""

import base64
import binascii
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.contract.vectors import Vectors
from service.errors import InvalidRequest
from service.store.index import Keys
from service.store.schema import now

Metadata = Mapping[str, Any]
Filter = Mapping[str, str | int | float | bool | Sequence[str | int | float | bool | None] | None]
"""Every key must hold the scalar, or one of the scalars; an empty filter lets everything through."""


@dataclass(frozen=True)
class Entry:
    """What a client writes: an item before it has a place in the store."""

    collection: str
    id: str
    modality: str
    metadata: Metadata
    vector: Vectors
    """(D,), unit length."""
    text: str | None = None
    """Of a text item: its words can be searched for."""
    tokens: Vectors | None = None
    """(N, D), unit length, for reranking; kept where the collection keeps them."""


@dataclass(frozen=True)
class Item:
    collection: str
    id: str
    modality: str
    metadata: Metadata
    created: str
    updated: str
    vector: Vectors | None


@dataclass(frozen=True)
class Collection:
    key: int
    name: str
    space: str
    dimensions: int
    created: str
    count: int


# Collections

_COLLECTION = """SELECT key, name, space, dimensions, created,
    (SELECT count(*) FROM items WHERE items.collection = collections.key) FROM collections"""


def collections(connection: sqlite3.Connection) -> list[Collection]:
    return [Collection(*row) for row in connection.execute(f"{_COLLECTION} ORDER BY name")]


def collection(connection: sqlite3.Connection, name: str) -> Collection | None:
    row = connection.execute(f"{_COLLECTION} WHERE name = ?", (name,)).fetchone()
    return None if row is None else Collection(*row)


def collection_key(connection: sqlite3.Connection, name: str) -> int | None:
    row = connection.execute("SELECT key FROM collections WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def ensure_collection(connection: sqlite3.Connection, name: str, space: str, dimensions: int) -> tuple[int, bool]:
    """The collection's key, and whether it was created by this call."""
    key = collection_key(connection, name)
    if key is not None:
        return key, False
    values = (name, space, dimensions, now())
    cursor = connection.execute(
        "INSERT INTO collections (name, space, dimensions, created) VALUES (?, ?, ?, ?)", values
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid, True


def drop_collection(connection: sqlite3.Connection, key: int) -> None:
    connection.execute("DELETE FROM items WHERE collection = ?", (key,))
    connection.execute("DELETE FROM collections WHERE key = ?", (key,))


# Items


def upsert(
    connection: sqlite3.Connection, collection: int, entries: Sequence[Entry], sequence: int
) -> tuple[Keys, list[bool]]:
    """Write entries of one collection; their row keys, and which of them replaced an older row."""
    ids = json.dumps([entry.id for entry in entries])
    known = {
        row[0]
        for row in connection.execute(
            "SELECT id FROM items WHERE collection = ? AND id IN (SELECT value FROM json_each(?))", (collection, ids)
        )
    }
    at = now()
    keys = []
    for entry in entries:
        row = connection.execute(
            """INSERT INTO items (collection, id, modality, sequence, created, updated, metadata, vector)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (collection, id) DO UPDATE SET modality = excluded.modality, sequence = excluded.sequence,
                updated = excluded.updated, metadata = excluded.metadata, vector = excluded.vector
            RETURNING key""",
            (
                collection,
                entry.id,
                entry.modality,
                sequence,
                at,
                at,
                json.dumps(entry.metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":")),
                blob(entry.vector),
            ),
        ).fetchone()
        keys.append(row[0])
    return np.array(keys, np.int64), [entry.id in known for entry in entries]


_ITEM = "collections.name, items.id, modality, metadata, items.created, updated"
_FROM = "FROM items JOIN collections ON collections.key = items.collection"


def item(connection: sqlite3.Connection, collection: int, id: str, with_vector: bool) -> Item | None:
    columns = f"{_ITEM}, vector" if with_vector else _ITEM
    row = connection.execute(f"SELECT {columns} {_FROM} WHERE collection = ? AND id = ?", (collection, id)).fetchone()
    return None if row is None else _item(*row)


def items_by_key(connection: sqlite3.Connection, keys: Iterable[int], with_vector: bool) -> dict[int, Item]:
    columns = f"{_ITEM}, vector" if with_vector else _ITEM
    rows = connection.execute(
        f"SELECT items.key, {columns} {_FROM} WHERE items.key IN (SELECT value FROM json_each(?))",
        (json.dumps(list(keys)),),
    )
    return {row[0]: _item(*row[1:]) for row in rows}


def vectors(connection: sqlite3.Connection, collection: int, ids: Sequence[str]) -> dict[str, Vectors]:
    """The vectors (D,) of those ids that are there."""
    rows = connection.execute(
        "SELECT id, vector FROM items WHERE collection = ? AND id IN (SELECT value FROM json_each(?))",
        (collection, json.dumps(list(ids))),
    )
    return {id: unpack(stored) for id, stored in rows}


def page(
    connection: sqlite3.Connection, collection: int | None, modality: str | None, after: int, limit: int
) -> tuple[list[Item], int | None]:
    """Items in the order in which they were first written, and the key to go on from, None at the end."""
    where = ["items.key > ?"]
    bound: list[int | str] = [after]
    if collection is not None:
        where.append("items.collection = ?")
        bound.append(collection)
    if modality is not None:
        where.append("modality = ?")
        bound.append(modality)
    rows = connection.execute(
        f"SELECT items.key, {_ITEM} {_FROM} WHERE {' AND '.join(where)} ORDER BY items.key LIMIT ?", (*bound, limit + 1)
    ).fetchall()
    more = rows[limit - 1][0] if len(rows) > limit else None
    return [_item(*row[1:]) for row in rows[:limit]], more


def cursor(key: int) -> str:
    """The key of a page's last row, as an opaque text."""
    return base64.urlsafe_b64encode(b"k%d" % key).decode().rstrip("=")


def key_of_cursor(text: str) -> int:
    """Raises InvalidRequest for what cursor() did not make."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("the cursor is not one that a page came with") from None
    if not raw.startswith(b"k") or not raw[1:].isdigit() or len(raw) > 19:
        raise InvalidRequest("the cursor is not one that a page came with")
    return int(raw[1:])


# JSON's own notion of equality: 1 is 1.0, and is neither true nor "1". Both sides are read by SQLite's JSON parser, so
# that a number is the same double on both; a container matches nothing, because its type is never among the wanted.
_MATCHES = """EXISTS (SELECT 1 FROM json_each(items.metadata) AS held WHERE held.key = ?
    AND (ifnull(held.atom, 0), CASE held.type WHEN 'integer' THEN 'real' ELSE held.type END) IN
        (SELECT ifnull(atom, 0), CASE type WHEN 'integer' THEN 'real' ELSE type END FROM json_each(?)))"""


def matching(connection: sqlite3.Connection, collection: int, filter: Filter) -> Keys:
    """Row keys of the items of a collection whose metadata pass the filter, sorted."""
    where = ["collection = ?"]
    bound: list[int | str] = [collection]
    for name, wanted in filter.items():
        allowed = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
        where.append(_MATCHES)
        bound += [name, json.dumps(allowed, ensure_ascii=False, allow_nan=False)]
    rows = connection.execute(f"SELECT key FROM items WHERE {' AND '.join(where)} ORDER BY key", bound)
    return np.fromiter((row[0] for row in rows), np.int64)


def keys_of_ids(connection: sqlite3.Connection, collection: int, ids: Sequence[str]) -> Keys:
    rows = connection.execute(
        "SELECT key FROM items WHERE collection = ? AND id IN (SELECT value FROM json_each(?)) ORDER BY key",
        (collection, json.dumps(list(ids))),
    )
    return np.fromiter((row[0] for row in rows), np.int64)


def delete(connection: sqlite3.Connection, keys: Keys) -> None:
    connection.execute("DELETE FROM items WHERE key IN (SELECT value FROM json_each(?))", (json.dumps(keys.tolist()),))


def sequences(connection: sqlite3.Connection, collection: int) -> tuple[Keys, Keys]:
    """Every row key of a collection, sorted, and the sequence number of its last write."""
    rows = connection.execute("SELECT key, sequence FROM items WHERE collection = ? ORDER BY key", (collection,))
    pairs = np.fromiter((number for row in rows for number in row), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def batches(connection: sqlite3.Connection, keys: Keys, dimensions: int) -> Iterator[tuple[str, Keys, Vectors]]:
    """The vectors of these rows, as (modality, keys, (N, D)) in batches.

    Raises ValueError for a row whose vector has another length.
    """
    for start in range(0, keys.size, 10_000):
        rows = connection.execute(
            "SELECT modality, key, vector FROM items WHERE key IN (SELECT value FROM json_each(?))",
            (json.dumps(keys[start : start + 10_000].tolist()),),
        ).fetchall()
        for modality in {row[0] for row in rows}:
            chosen = [row for row in rows if row[0] == modality]
            if any(len(row[2]) != 4 * dimensions for row in chosen):
                raise ValueError(f"a stored vector does not have {dimensions} dimensions")
            stacked = np.frombuffer(b"".join(row[2] for row in chosen), "<f4").reshape(-1, dimensions)
            yield modality, np.array([row[1] for row in chosen], np.int64), stacked.astype(np.float32)


def _item(
    collection: str, id: str, modality: str, metadata: str, created: str, updated: str, vector: bytes | None = None
) -> Item:
    unpacked = None if vector is None else unpack(vector)
    return Item(collection, id, modality, json.loads(metadata), created, updated, unpacked)


def blob(vectors: Vectors) -> bytes:
    return np.ascontiguousarray(vectors, dtype="<f4").tobytes()


def unpack(blob: bytes) -> Vectors:
    return np.frombuffer(blob, "<f4").astype(np.float32)
