"""Token vectors of items, for reranking by late interaction: functions of a connection.

Kept only where the collection asks for it, because they are many: as float16, (N, D) an item.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence

import numpy as np

from service.contract.vectors import Vectors
from service.store.items import Entry
from service.store.kinds import Keys


def kept(connection: sqlite3.Connection, collection: int) -> bool:
    """Return whether the collection keeps the token vectors of its items."""
    row = connection.execute("SELECT 1 FROM token_collections WHERE collection = ?", (collection,)).fetchone()
    return row is not None


def keep(connection: sqlite3.Connection, collection: int, kept: bool) -> None:
    """Keep token vectors from now on, or delete them."""
    if kept:
        connection.execute("INSERT OR IGNORE INTO token_collections VALUES (?)", (collection,))
        return
    connection.execute("DELETE FROM token_collections WHERE collection = ?", (collection,))
    connection.execute(
        "DELETE FROM token_vectors WHERE item IN (SELECT key FROM items WHERE collection = ?)", (collection,)
    )


def put(connection: sqlite3.Connection, collection: int, keys: Keys, entries: Sequence[Entry]) -> None:
    """Store the token vectors of the entries just written under these row keys."""
    if not kept(connection, collection):
        return
    connection.executemany(
        "INSERT INTO token_vectors VALUES (?, ?, ?)",
        [
            (int(key), len(entry.tokens), np.ascontiguousarray(entry.tokens, "<f2").tobytes())
            for key, entry in zip(keys, entries, strict=True)
            if entry.tokens is not None
        ],
    )


def of_items(connection: sqlite3.Connection, collection: int, ids: Iterable[str]) -> dict[str, Vectors]:
    """Return the token vectors (N, D) of those ids that have any, float32."""
    rows = connection.execute(
        """SELECT items.id, count, vectors FROM token_vectors JOIN items ON items.key = token_vectors.item
        WHERE items.collection = ? AND items.id IN (SELECT value FROM json_each(?))""",
        (collection, json.dumps(list(ids))),
    )
    return {id: np.frombuffer(stored, "<f2").astype(np.float32).reshape(count, -1) for id, count, stored in rows}
