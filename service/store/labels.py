"""Label sets as rows, in SQLite: functions of a connection."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.contract.vectors import Vectors
from service.store.rows import blob, unpack
from service.store.schema import now


@dataclass(frozen=True)
class LabelSet:
    name: str
    space: str
    definition: dict[str, Any]
    created: str
    updated: str
    vectors: Mapping[str, Vectors]
    """Vectors (L, D) by digest of the labels and templates that they were made with, and whatever else was learned."""


@dataclass(frozen=True)
class ListedLabelSet:
    name: str
    created: str
    updated: str


def put_label_set(
    connection: sqlite3.Connection, name: str, space: str, definition: Mapping[str, Any], vectors: Mapping[str, Vectors]
) -> None:
    at = now()
    connection.execute(
        """INSERT INTO label_sets VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
        space = excluded.space, definition = excluded.definition, updated = excluded.updated""",
        (name, space, json.dumps(definition, ensure_ascii=False), at, at),
    )
    connection.execute("DELETE FROM label_vectors WHERE label_set = ?", (name,))
    connection.executemany(
        "INSERT INTO label_vectors VALUES (?, ?, ?)", [(name, digest, blob(array)) for digest, array in vectors.items()]
    )


def label_set(connection: sqlite3.Connection, name: str, dimensions: int) -> LabelSet | None:
    connection.execute("BEGIN")  # so that both reads see one state
    try:
        row = connection.execute("SELECT * FROM label_sets WHERE name = ?", (name,)).fetchone()
        blobs = connection.execute("SELECT digest, vectors FROM label_vectors WHERE label_set = ?", (name,)).fetchall()
    finally:
        connection.execute("COMMIT")
    if row is None:
        return None
    vectors = {digest: unpack(blob).reshape(-1, dimensions) for digest, blob in blobs}
    _, space, definition, created, updated = row
    return LabelSet(name, space, json.loads(definition), created, updated, vectors)


def listed(connection: sqlite3.Connection, after: str, limit: int) -> list[ListedLabelSet]:
    rows = connection.execute(
        "SELECT name, created, updated FROM label_sets WHERE name > ? ORDER BY name LIMIT ?", (after, limit)
    )
    return [ListedLabelSet(*row) for row in rows]


def version(connection: sqlite3.Connection, name: str) -> str | None:
    """Return a value that changes whenever the set does."""
    row = connection.execute("SELECT updated FROM label_sets WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def delete_label_set(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("DELETE FROM label_sets WHERE name = ?", (name,)).rowcount > 0
