"""The tables, and how a connection to them is opened."""

import sqlite3
import uuid
from datetime import UTC, datetime
from pathlib import Path

from service.contract.bundle import Manifest
from service.store.errors import SpaceMismatch, StoreDamaged

SCHEMA_VERSION = 1
DEFAULT_COLLECTION = "default"

# The vector is the last column: reading what stands before it leaves a long vector's overflow pages alone.
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE collections (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    space TEXT NOT NULL,
    dimensions INTEGER NOT NULL,
    created TEXT NOT NULL
) STRICT;
CREATE TABLE items (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    collection INTEGER NOT NULL REFERENCES collections (key),
    id TEXT NOT NULL,
    modality TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    created TEXT NOT NULL,
    updated TEXT NOT NULL,
    metadata TEXT NOT NULL,
    vector BLOB NOT NULL,
    UNIQUE (collection, id)
) STRICT;
CREATE INDEX items_in_order ON items (collection, key, modality, sequence);
CREATE TABLE label_sets (
    name TEXT PRIMARY KEY,
    space TEXT NOT NULL,
    definition TEXT NOT NULL,
    created TEXT NOT NULL,
    updated TEXT NOT NULL
) STRICT;
CREATE TABLE label_vectors (
    label_set TEXT NOT NULL REFERENCES label_sets (name) ON DELETE CASCADE,
    digest TEXT NOT NULL,
    vectors BLOB NOT NULL,
    PRIMARY KEY (label_set, digest)
) STRICT;
"""


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions are opened and closed by name."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def prepare(connection: sqlite3.Connection, path: Path, manifest: Manifest) -> None:
    """Create the tables, or check that what the store at `path` holds can be served with this bundle.

    Raises StoreDamaged (another schema), SpaceMismatch.
    """
    if not _has_schema(connection):
        _create_schema(connection, manifest.space, manifest.dimensions)
        return
    version = meta(connection, "schema")
    if version != str(SCHEMA_VERSION):
        raise StoreDamaged(f"the store {path} has schema version {version}; this service reads {SCHEMA_VERSION}")
    space = meta(connection, "space") or ""
    if not manifest.accepts(space) and not _is_empty(connection):
        raise SpaceMismatch(
            f"the store {path} holds vectors of space {space}, and the bundle {manifest.name} accepts only "
            f"{', '.join((manifest.space, *manifest.admits))}: serve the bundle that filled it, or give this one "
            "another store directory and index the items again"
        )
    if space != manifest.space:
        _adopt_space(connection, manifest.space, manifest.dimensions)


def _create_schema(connection: sqlite3.Connection, space: str, dimensions: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    for name, value in (("schema", SCHEMA_VERSION), ("store", uuid.uuid4().hex), ("space", space), ("sequence", 0)):
        set_meta(connection, name, str(value))
    # A first search on a fresh server finds nothing, rather than no collection.
    connection.execute(
        "INSERT INTO collections (name, space, dimensions, created) VALUES (?, ?, ?, ?)",
        (DEFAULT_COLLECTION, space, dimensions, now()),
    )
    connection.execute("COMMIT")


def _has_schema(connection: sqlite3.Connection) -> bool:
    return (
        connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'meta'").fetchone() is not None
    )


def meta(connection: sqlite3.Connection, name: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def set_meta(connection: sqlite3.Connection, name: str, value: str) -> None:
    connection.execute("INSERT INTO meta VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = ?2", (name, value))


def _is_empty(connection: sqlite3.Connection) -> bool:
    held = connection.execute("SELECT EXISTS (SELECT 1 FROM items) OR EXISTS (SELECT 1 FROM label_sets)").fetchone()
    return not held[0]


def _adopt_space(connection: sqlite3.Connection, space: str, dimensions: int) -> None:
    """Record that everything stored is valid in `space`."""
    connection.execute("BEGIN IMMEDIATE")
    set_meta(connection, "space", space)
    connection.execute("UPDATE collections SET space = ?, dimensions = ?", (space, dimensions))
    connection.execute("UPDATE label_sets SET space = ?", (space,))
    connection.execute("COMMIT")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
