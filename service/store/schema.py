"""The tables, and how a connection to them is opened."""

import sqlite3
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from service.contract.bundle import Manifest
from service.store.errors import SpaceMismatch, StoreDamaged, filled_elsewhere

SCHEMA_VERSION = 2
DEFAULT_COLLECTION = "default"
FILE = "store.sqlite3"

BUNDLE = "bundle"
"""Key in the table `meta`: the name of the bundle that was served last."""
_PAGE_BYTES = 8_192
"""Bytes of a page: it holds five vectors of 384 dimensions, and one of 4,096 bytes would hold two."""
_CACHE_KIB = 16_384
_CHECKPOINT_PAGES = 4_000

# A slot names one vector for ever: writing an item again gives it another, so that what an index holds under a slot can
# be out of date but never wrong. Vectors have a table of their own: reading metadata then reads no vectors.
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE collections (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    space TEXT NOT NULL,
    dimensions INTEGER NOT NULL,
    created TEXT NOT NULL,
    kind TEXT NOT NULL DEFAULT 'auto',
    precision TEXT
) STRICT;
CREATE TABLE items (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    collection INTEGER NOT NULL REFERENCES collections (key),
    id TEXT NOT NULL,
    modality TEXT NOT NULL,
    slot INTEGER NOT NULL,
    created TEXT NOT NULL,
    updated TEXT NOT NULL,
    metadata TEXT NOT NULL,
    UNIQUE (collection, id)
) STRICT;
CREATE INDEX items_in_order ON items (collection, key, modality);
CREATE UNIQUE INDEX items_by_slot ON items (collection, slot);
CREATE TABLE vectors (slot INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT;
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


def _to_2(connection: sqlite3.Connection) -> None:
    """Migrate version 1, which kept the vector in the item's row and had no slots: an item's key becomes its first
    slot."""
    for statement in (
        "ALTER TABLE collections ADD COLUMN kind TEXT NOT NULL DEFAULT 'auto'",
        "ALTER TABLE collections ADD COLUMN precision TEXT",
        "CREATE TABLE vectors (slot INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT",
        "INSERT INTO vectors SELECT key, vector FROM items ORDER BY key",
        "DROP INDEX items_in_order",
        "ALTER TABLE items DROP COLUMN vector",
        "ALTER TABLE items RENAME COLUMN sequence TO slot",
        "UPDATE items SET slot = key",
        "CREATE INDEX items_in_order ON items (collection, key, modality)",
        "CREATE UNIQUE INDEX items_by_slot ON items (collection, slot)",
        "INSERT INTO meta SELECT 'slot', CAST(ifnull(max(key), 0) AS TEXT) FROM items",
    ):
        connection.execute(statement)


_MIGRATIONS: Mapping[str, Callable[[sqlite3.Connection], None]] = {"1": _to_2}
"""Functions that migrate from the version named by the key to the next."""


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions are opened and closed by name."""
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
    try:
        _set_up(connection, read_only=read_only)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _set_up(connection: sqlite3.Connection, *, read_only: bool) -> None:
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    connection.execute("PRAGMA foreign_keys = ON")
    if not read_only:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # of a file that is made now
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")


def prepare(connection: sqlite3.Connection, path: Path, manifest: Manifest) -> None:
    """Create the tables, or check that the store at `path` can be served with this bundle.

    Raises StoreDamaged (another schema), SpaceMismatch.
    """
    if not has_schema(connection):
        _create_schema(connection, manifest)
        return
    space = meta(connection, "space") or ""
    if not manifest.accepts(space) and not is_empty(connection):
        filler = meta(connection, BUNDLE)
        raise SpaceMismatch(filled_elsewhere(f"the store {path}", space, filler, manifest))
    migrate(connection, path)
    if space != manifest.space:
        _adopt_space(connection, manifest.space, manifest.dimensions)
    if meta(connection, BUNDLE) != manifest.name:
        set_meta(connection, BUNDLE, manifest.name)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Migrate tables of an older version to this one, in one transaction. Raises StoreDamaged for another version."""
    version = meta(connection, "schema") or "0"
    if version == str(SCHEMA_VERSION):
        return
    if version not in _MIGRATIONS:
        raise StoreDamaged(f"the store {path} has schema version {version}; this service reads {SCHEMA_VERSION}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        while version in _MIGRATIONS:
            _MIGRATIONS[version](connection)
            version = str(int(version) + 1)
        set_meta(connection, "schema", version)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _create_schema(connection: sqlite3.Connection, manifest: Manifest) -> None:
    space = manifest.space
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    store = uuid.uuid4().hex
    first = {"schema": SCHEMA_VERSION, "store": store, "space": space, BUNDLE: manifest.name, "sequence": 0, "slot": 0}
    for name, value in first.items():
        set_meta(connection, name, str(value))
    # A first search on a fresh server finds nothing, rather than no collection.
    connection.execute(
        "INSERT INTO collections (name, space, dimensions, created) VALUES (?, ?, ?, ?)",
        (DEFAULT_COLLECTION, space, manifest.dimensions, now()),
    )
    connection.execute("COMMIT")


def has_schema(connection: sqlite3.Connection) -> bool:
    return (
        connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'meta'").fetchone() is not None
    )


def meta(connection: sqlite3.Connection, name: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def sequence(connection: sqlite3.Connection) -> int:
    """The number of the last commit."""
    return int(meta(connection, "sequence") or 0)


def set_meta(connection: sqlite3.Connection, name: str, value: str) -> None:
    connection.execute("INSERT INTO meta VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = ?2", (name, value))


def is_empty(connection: sqlite3.Connection) -> bool:
    """Return whether nothing is stored that was made in a space."""
    row = connection.execute("SELECT EXISTS (SELECT 1 FROM items) OR EXISTS (SELECT 1 FROM label_sets)").fetchone()
    return not row[0]


def _adopt_space(connection: sqlite3.Connection, space: str, dimensions: int) -> None:
    """Record that everything stored is valid in `space`."""
    connection.execute("BEGIN IMMEDIATE")
    set_meta(connection, "space", space)
    connection.execute("UPDATE collections SET space = ?, dimensions = ?", (space, dimensions))
    connection.execute("UPDATE label_sets SET space = ?", (space,))
    connection.execute("COMMIT")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
