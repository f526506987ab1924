"""Collections and items as rows, in SQLite: functions of a connection."""

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from service.contract.vectors import Vectors
from service.errors import InvalidRequest, NotFound
from service.runtime.workers import stop_if_abandoned
from service.store import cursors
from service.store.items import Collection, Entry, Item, Metadata
from service.store.kinds import REPLACED, IndexRequest, Keys
from service.store.schema import now

_BATCH = 10_000
"""Rows read at a time."""
_BATCH_BYTES = 2**22
"""Bytes of JSON metadata that are read at a time: as Python objects they are some twenty times as large."""
_FETCHED = 256
_FEW = 32
"""Largest number of values that are named in the statement itself, which SQLite reads faster than JSON."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectionRow(Collection):
    key: int


# Collections

_COLLECTION = """SELECT key, name, space, dimensions, created, kind, precision,
    (SELECT count(*) FROM items WHERE items.collection = collections.key),
    (SELECT json_group_array(field) FROM keyword_fields WHERE collection = collections.key)
    FROM collections"""


def collections(connection: sqlite3.Connection) -> list[CollectionRow]:
    return [_collection(*row) for row in connection.execute(f"{_COLLECTION} ORDER BY name")]


def collection(connection: sqlite3.Connection, name: str) -> CollectionRow | None:
    row = connection.execute(f"{_COLLECTION} WHERE name = ?", (name,)).fetchone()
    return None if row is None else _collection(*row)


def _collection(
    key: int, name: str, space: str, dimensions: int, created: str, kind: Any, precision: Any, count: int, keywords: str
) -> CollectionRow:
    request = IndexRequest.stored(kind, precision)
    return CollectionRow(name, space, dimensions, created, request, count, sorted(orjson.loads(keywords)), key)


def collection_key(connection: sqlite3.Connection, name: str) -> int | None:
    row = connection.execute("SELECT key FROM collections WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def existing_collection_key(connection: sqlite3.Connection, name: str) -> int:
    """Return the key of a collection. Raises NotFound."""
    key = collection_key(connection, name)
    if key is None:
        raise NotFound(f"no collection {name!r}")
    return key


def configure_collection(connection: sqlite3.Connection, key: int, request: IndexRequest) -> None:
    connection.execute(
        "UPDATE collections SET kind = ?, precision = ? WHERE key = ?", (request.kind, request.precision, key)
    )


def replace_kinds(connection: sqlite3.Connection) -> None:
    """Give each collection whose kind of index there is no more the nearest kind, and say so in the log."""
    for kind, instead in REPLACED.items():
        affected = connection.execute("SELECT key, precision FROM collections WHERE kind = ?", (kind,)).fetchall()
        for key, precision in affected:
            configure_collection(connection, key, IndexRequest.stored(kind, precision))
        if affected:
            _log.warning(
                "%s collections have an index of kind %s, which there is no more: %s replaces it. The old index is "
                "searched until the new one is built.",
                *(len(affected), kind, instead),
            )


def drop_collection(connection: sqlite3.Connection, key: int) -> None:
    connection.execute("DELETE FROM vectors WHERE slot IN (SELECT slot FROM items WHERE collection = ?)", (key,))
    connection.execute("DELETE FROM items WHERE collection = ?", (key,))
    connection.execute("DELETE FROM collections WHERE key = ?", (key,))


# Items


def upsert(
    connection: sqlite3.Connection, collection: int, entries: Sequence[Entry], first: int
) -> tuple[Keys, dict[str, int], list[bytes]]:
    """Write entries of one collection under the slots from `first` on.

    Their row keys, by id the slots of the rows that they replace, and their records.
    """
    ids = json.dumps([entry.id for entry in entries])
    older = connection.execute(
        f"SELECT id, slot, created FROM items WHERE collection = ? AND id IN {_GIVEN}", (collection, ids)
    ).fetchall()
    replaced: dict[str, int] = {id: slot for id, slot, _ in older}
    created: dict[str, str] = {id: at for id, _, at in older}
    at = now()
    dates = [entry.dates or (created.get(entry.id, at), at) for entry in entries]
    packed = [_packed(entry.metadata) for entry in entries]
    connection.executemany(
        """INSERT INTO items (collection, id, modality, slot, created, updated, metadata)
        VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (collection, id) DO UPDATE SET modality = excluded.modality, slot = excluded.slot,
            created = excluded.created, updated = excluded.updated, metadata = excluded.metadata""",
        [
            (collection, entry.id, entry.modality, slot, *when, metadata)
            for slot, (entry, when, metadata) in enumerate(zip(entries, dates, packed, strict=True), first)
        ],
    )
    connection.executemany(
        "INSERT INTO vectors VALUES (?, ?)", [(slot, blob(entry.vector)) for slot, entry in enumerate(entries, first)]
    )
    connection.executemany(
        "INSERT INTO mapped VALUES (?, ?)",
        [(slot, entry.mapped) for slot, entry in enumerate(entries, first) if entry.mapped is not None],
    )
    _delete_vectors(connection, replaced.values())
    keys = connection.execute(
        "SELECT key FROM items WHERE collection = ? AND slot BETWEEN ? AND ? ORDER BY slot",
        (collection, first, first + len(entries) - 1),
    )
    records = [record(entry.id, *when, metadata) for entry, when, metadata in zip(entries, dates, packed, strict=True)]
    return np.fromiter((row[0] for row in keys), np.int64, len(entries)), replaced, records


def _packed(metadata: Metadata) -> str:
    # Raises ValueError for NaN and infinity; orjson would write null.
    return json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":")) if metadata else "{}"


_ITEM = "collections.name, items.id, modality, metadata, items.created, updated"
_FROM = "FROM items JOIN collections ON collections.key = items.collection"
_VECTOR = f"{_FROM} JOIN vectors ON vectors.slot = items.slot"
_GIVEN = "(SELECT value FROM json_each(?))"


def forget_details(connection: sqlite3.Connection, keys: Keys) -> None:
    """Delete the words and previews of the items with these row keys."""
    for table in ("keywords", "previews") if keys.size else ():
        connection.execute(f"DELETE FROM {table} WHERE item IN {_GIVEN}", (_json(keys.tolist()),))


def item(connection: sqlite3.Connection, collection: int, id: str, with_vector: bool) -> Item | None:
    columns = f"{_ITEM}, vector {_VECTOR}" if with_vector else f"{_ITEM} {_FROM}"
    row = connection.execute(f"SELECT {columns} WHERE collection = ? AND id = ?", (collection, id)).fetchone()
    return None if row is None else _item(*row)


def items_by_slot(
    connection: sqlite3.Connection, collection: int, name: str, slots: Set[int], with_vector: bool
) -> dict[int, Item]:
    """Return the items of the collection with this key and name, by slot."""
    vector, join = (", vector", "JOIN vectors USING (slot)") if with_vector else ("", "")
    are_few = len(slots) <= _FEW
    values = ",".join("?" * len(slots)) if are_few else _GIVEN[1:-1]
    rows = connection.execute(
        f"""SELECT slot, ?, id, modality, metadata, created, updated{vector} FROM items {join}
        WHERE collection = ? AND slot IN ({values})""",
        (name, collection, *(slots if are_few else (_json(slots),))),
    )
    return {row[0]: _item(*row[1:]) for row in rows}


def items_by_key(connection: sqlite3.Connection, keys: Iterable[int], with_vector: bool) -> dict[int, Item]:
    columns = f"{_ITEM}, vector {_VECTOR}" if with_vector else f"{_ITEM} {_FROM}"
    rows = connection.execute(f"SELECT items.key, {columns} WHERE items.key IN {_GIVEN}", (_json(keys),))
    return {row[0]: _item(*row[1:]) for row in rows}


def keys_of_slots(connection: sqlite3.Connection, collection: int, slots: Keys) -> Keys:
    # Sorted here: for an ORDER BY, SQLite walks an index in that order, and so looks at every row of the collection.
    query = f"SELECT key FROM items WHERE collection = ? AND slot IN {_GIVEN}"
    return np.sort(_numbers(connection, query, collection, _json(slots.tolist())))


def vectors(connection: sqlite3.Connection, collection: int, ids: Sequence[str]) -> dict[str, Vectors]:
    """Return the vectors (D,) of those ids that are there."""
    rows = connection.execute(
        f"SELECT id, vector FROM items JOIN vectors USING (slot) WHERE collection = ? AND id IN {_GIVEN}",
        (collection, json.dumps(list(ids))),
    )
    return {id: unpack(data) for id, data in rows}


def page(
    connection: sqlite3.Connection, collection: int | None, modality: str | None, cursor: str | None, limit: int
) -> tuple[list[Item], str | None]:
    """Return items in the order in which they were first written, and the cursor of the next page, None at the end."""
    where = ["items.key > ?"]
    bound: list[int | str] = [0 if cursor is None else _key_of_cursor(cursor)]
    if collection is not None:
        where.append("items.collection = ?")
        bound.append(collection)
    else:
        where.append("collections.name NOT LIKE '.%'")  # moments of videos and sounds
    if modality is not None:
        where.append("modality = ?")
        bound.append(modality)
    rows = connection.execute(
        f"SELECT items.key, {_ITEM} {_FROM} WHERE {' AND '.join(where)} ORDER BY items.key LIMIT ?", (*bound, limit + 1)
    ).fetchall()
    more = cursors.encoded(b"k%d" % rows[limit - 1][0]) if len(rows) > limit else None
    return [_item(*row[1:]) for row in rows[:limit]], more


def _key_of_cursor(cursor: str) -> int:
    """Return the key in a cursor. Raises InvalidRequest for one that no page came with."""
    place = cursors.decoded(cursor)
    if not place.startswith(b"k") or not place[1:].isdigit() or len(place) > 19:
        raise InvalidRequest("the cursor is not one that a page came with")
    return int(place[1:])


def slots_of_ids(connection: sqlite3.Connection, collection: int, ids: Sequence[str]) -> Keys:
    query = f"SELECT slot FROM items WHERE collection = ? AND id IN {_GIVEN}"  # sorted here: see keys_of_slots()
    return np.sort(_numbers(connection, query, collection, json.dumps(list(ids))))


_BEGINNING = """json_each(?) AS given CROSS JOIN items
    ON items.collection = ? AND items.id > given.value AND items.id < given.value || char(1114111)"""
"""Ranges of ids use the index over them. CROSS JOIN: SQLite keeps to this order."""


def vectors_of_prefixes(connection: sqlite3.Connection, collection: int, prefixes: Sequence[str]) -> dict[str, Vectors]:
    """Return the vectors (D,), by id, of the items whose ids begin with one of these texts, as in slots_of_prefixes."""
    rows = connection.execute(
        f"SELECT items.id, vector FROM {_BEGINNING} JOIN vectors USING (slot)", (json.dumps(list(prefixes)), collection)
    )
    return {id: unpack(data) for id, data in rows}


def slots_of_prefixes(connection: sqlite3.Connection, collection: int, prefixes: Sequence[str]) -> Keys:
    """Return the slots of items whose ids begin with one of these texts, which end in a control character."""
    return np.sort(_numbers(connection, f"SELECT slot FROM {_BEGINNING}", json.dumps(list(prefixes)), collection))


def ids_of_slots(connection: sqlite3.Connection, collection: int, slots: Keys) -> list[str]:
    rows = connection.execute(
        f"SELECT id FROM items WHERE collection = ? AND slot IN {_GIVEN}", (collection, _json(slots.tolist()))
    )
    return [row[0] for row in rows]


def delete(connection: sqlite3.Connection, collection: int, slots: Keys) -> None:
    connection.execute(
        f"DELETE FROM items WHERE collection = ? AND slot IN {_GIVEN}", (collection, _json(slots.tolist()))
    )
    _delete_vectors(connection, slots.tolist())


def rename(connection: sqlite3.Connection, collection: int, items: Mapping[int, Item], first: int) -> list[bytes]:
    """Give the rows in these slots the ids and metadata of these items, and the slots from `first` on; their records.

    Words and previews belong to the row, and stay with it.
    """
    at = now()
    packed = [_packed(item.metadata) for item in items.values()]
    connection.executemany(
        "UPDATE items SET id = ?, slot = ?, updated = ?, metadata = ? WHERE collection = ? AND slot = ?",
        [
            (item.id, first + place, at, metadata, collection, slot)
            for place, ((slot, item), metadata) in enumerate(zip(items.items(), packed, strict=True))
        ],
    )
    connection.executemany(
        "UPDATE vectors SET slot = ? WHERE slot = ?", [(first + place, slot) for place, slot in enumerate(items)]
    )
    return [record(item.id, item.created, at, metadata) for item, metadata in zip(items.values(), packed, strict=True)]


def _delete_vectors(connection: sqlite3.Connection, slots: Iterable[int]) -> None:
    connection.execute(f"DELETE FROM vectors WHERE slot IN {_GIVEN}", (_json(slots),))


def slots(connection: sqlite3.Connection, collection: int) -> Keys:
    """Return every slot of a collection, ascending."""
    return _numbers(connection, "SELECT slot FROM items WHERE collection = ? ORDER BY slot", collection)


def _numbers(connection: sqlite3.Connection, query: str, *bound: int | str) -> Keys:
    """Return the first column of a query's rows."""
    return np.fromiter((number for (number,) in connection.execute(query, bound)), np.int64)


def live(
    connection: sqlite3.Connection, collection: int, first: int = 0
) -> Iterator[tuple[Keys, list[str], list[Metadata], list[bytes]]]:
    """Yield batches of slots, modalities, metadata and records of a collection, in the order of the slots, from the
    first on."""
    rows = connection.execute(
        """SELECT slot, modality, metadata, id, created, updated FROM items WHERE collection = ? AND slot >= ?
        ORDER BY slot""",
        (collection, first),
    )
    more = True
    while more:
        batch: list[tuple[Any, ...]] = []
        size = 0
        while len(batch) < _BATCH and size < _BATCH_BYTES and (more := bool(fetched := rows.fetchmany(_FETCHED))):
            batch += fetched
            size += sum(len(row[2]) for row in fetched)
        if not batch:
            break
        slots, modalities, metadata, *fields = zip(*batch, strict=True)
        records = list(map(record, *fields, metadata))
        yield np.array(slots, np.int64), list(modalities), [orjson.loads(text) for text in metadata], records


class SlotReader:
    """Reads vectors and metadata of a collection by slot."""

    def __init__(self, connection: sqlite3.Connection, collection: int, dimensions: int) -> None:
        self._connection, self._collection, self._dimensions = connection, collection, dimensions
        self.missed = False
        """Whether a vector that was asked for was not there."""

    def vectors(self, slots: Keys) -> tuple[Keys, Vectors]:
        """Raises ValueError for a row whose vector has another length."""
        fetched = []
        for start in range(0, len(slots), _BATCH):
            stop_if_abandoned()
            part = slots[start : start + _BATCH]
            if part[-1] - part[0] < 2 * len(part):
                between = (int(part[0]), int(part[-1]))
                rows = self._connection.execute(
                    "SELECT slot, vector FROM vectors WHERE slot BETWEEN ? AND ? ORDER BY slot", between
                ).fetchall()
                slot_set = set(part.tolist())
                fetched += [row for row in rows if row[0] in slot_set]
            else:
                fetched += self._connection.execute(
                    f"SELECT slot, vector FROM vectors WHERE slot IN {_GIVEN} ORDER BY slot", (_json(part.tolist()),)
                ).fetchall()
        if any(len(vector) != 4 * self._dimensions for _, vector in fetched):
            raise ValueError(f"a stored vector does not have {self._dimensions} dimensions")
        self.missed = self.missed or len(fetched) < len(slots)
        stacked = np.frombuffer(b"".join(vector for _, vector in fetched), "<f4").reshape(-1, self._dimensions)
        return np.array([slot for slot, _ in fetched], np.int64), stacked.astype(np.float32, copy=False)

    def metadata(self, slots: Keys, holding: str) -> Iterator[tuple[int, Metadata]]:
        # The form of the JSON that _packed() wrote.
        text = json.dumps(holding, ensure_ascii=False)[1:-1]
        for start in range(0, len(slots), _BATCH):
            stop_if_abandoned()
            part = slots[start : start + _BATCH]
            rows = self._connection.execute(
                f"""SELECT slot, metadata FROM items WHERE collection = ? AND slot IN {_GIVEN}
                AND instr(metadata, ?)""",
                (self._collection, _json(part.tolist()), text),
            ).fetchall()
            for slot, metadata in rows:
                yield slot, orjson.loads(metadata)


def record(id: str, created: str, updated: str, metadata: str) -> bytes:
    """Return an item without its vector, as the index holds it (records.Records)."""
    when = "0" if updated == created else f'"{updated}"'
    return orjson.dumps(id).join((b"[", f',"{created}",{when},{metadata}]'.encode()))


def item_of_record(collection: str, modality: str, record: bytes) -> Item:
    id, created, updated, metadata = orjson.loads(record)
    return Item(collection, id, modality, metadata, created, updated or created, None, len(record))


def _item(
    collection: str, id: str, modality: str, metadata: str, created: str, updated: str, vector: bytes | None = None
) -> Item:
    unpacked = None if vector is None else unpack(vector)
    return Item(collection, id, modality, orjson.loads(metadata), created, updated, unpacked, len(metadata))


def _json(numbers: Iterable[int]) -> str:
    return orjson.dumps(list(numbers)).decode()


def blob(vectors: Vectors) -> bytes:
    return np.ascontiguousarray(vectors, dtype="<f4").tobytes()


def unpack(blob: bytes) -> Vectors:
    return np.frombuffer(blob, "<f4").astype(np.float32)
