"""The tables, and how a connection to them is opened."""

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from service.contract.bundle import Manifest
from service.store.errors import SpaceMismatch, StoreDamaged, StoreError, filled_elsewhere

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
CREATE TABLE keyword_fields (
    collection INTEGER NOT NULL REFERENCES collections (key) ON DELETE CASCADE,
    field TEXT NOT NULL,
    PRIMARY KEY (collection, field)
) STRICT, WITHOUT ROWID;
CREATE TABLE keywords (
    key INTEGER PRIMARY KEY,
    item INTEGER NOT NULL REFERENCES items (key) ON DELETE CASCADE,
    collection INTEGER NOT NULL,
    field TEXT NOT NULL,
    content TEXT NOT NULL
) STRICT;
CREATE INDEX keywords_of_item ON keywords (item);
CREATE INDEX keywords_of_field ON keywords (collection, field);
-- It holds no text of its own: triggers keep it level with the rows, also where a deleted item takes its rows along.
CREATE VIRTUAL TABLE keyword_index USING fts5 (
    content, content = 'keywords', content_rowid = 'key', tokenize = 'unicode61 remove_diacritics 2'
);
CREATE TRIGGER keywords_inserted AFTER INSERT ON keywords BEGIN
    INSERT INTO keyword_index (rowid, content) VALUES (new.key, new.content);
END;
CREATE TRIGGER keywords_deleted AFTER DELETE ON keywords BEGIN
    INSERT INTO keyword_index (keyword_index, rowid, content) VALUES ('delete', old.key, old.content);
END;
"""
_PREVIEWS = """
CREATE TABLE previews (
    item INTEGER PRIMARY KEY REFERENCES items (key) ON DELETE CASCADE,
    media_type TEXT NOT NULL CHECK (media_type IN ('image/jpeg', 'image/webp', 'audio/mpeg')),
    about TEXT NOT NULL,
    data BLOB NOT NULL
) STRICT;
"""
_MAPPED = """
CREATE TABLE IF NOT EXISTS mapped (
    slot INTEGER PRIMARY KEY REFERENCES vectors (slot) ON DELETE CASCADE ON UPDATE CASCADE,
    error REAL NOT NULL
) STRICT;
"""
"""Vectors that were mapped from those of another space. Stores that were made before have no such table until they are
opened."""
_TAKE_JPEG = f"""
BEGIN IMMEDIATE;
ALTER TABLE previews RENAME TO earlier;
{_PREVIEWS}
INSERT INTO previews SELECT * FROM earlier;
DROP TABLE earlier;
COMMIT;
"""
"""Statements for a store whose previews were all WebP, and whose table said so."""


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Return a connection in autocommit mode: transactions are opened and closed by name."""
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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Give SQLite's errors their meaning, where the file of a store is read that no server has open here."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreDamaged(f"{path} cannot be read: {error}") from None


def open_existing(path: Path, *, read_only: bool = True) -> sqlite3.Connection:
    """Open the file of a store, or a copy of it. Raises StoreError; StoreDamaged where it cannot be read."""
    if not path.is_file():
        raise StoreError(f"{path} is not there")
    with reading(path):
        connection = connect(path, read_only=read_only)
    try:
        with reading(path):
            if has_schema(connection):
                return connection
        raise StoreError(f"{path} is no store's")
    except StoreError:
        connection.close()
        raise


def prepare(connection: sqlite3.Connection, path: Path, manifest: Manifest) -> None:
    """Create the tables, or check that the store at `path` can be served with this bundle.

    Raises StoreDamaged (another schema), SpaceMismatch.
    """
    if not has_schema(connection):
        _create_schema(connection, manifest)
        return
    connection.execute(_MAPPED)
    space = meta(connection, "space") or ""
    if not manifest.accepts(space) and not is_empty(connection):
        filler = meta(connection, BUNDLE)
        raise SpaceMismatch(filled_elsewhere(f"the store {path}", space, filler, manifest))
    check_version(connection, path)
    (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'previews'").fetchone()
    if "image/jpeg" not in sql:
        connection.executescript(_TAKE_JPEG)
    if space != manifest.space:
        _adopt_space(connection, manifest.space, manifest.dimensions)
    if meta(connection, BUNDLE) != manifest.name:
        set_meta(connection, BUNDLE, manifest.name)


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Raises StoreDamaged where the store at `path` has tables of another version."""
    version = meta(connection, "schema")
    if version != str(SCHEMA_VERSION):
        raise StoreDamaged(f"the store {path} has schema version {version}; this service reads {SCHEMA_VERSION}")


def _create_schema(connection: sqlite3.Connection, manifest: Manifest) -> None:
    space = manifest.space
    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {_PREVIEWS} {_MAPPED}")
    store = uuid.uuid4().hex
    first = {"schema": SCHEMA_VERSION, "store": store, "space": space, BUNDLE: manifest.name, "sequence": 0, "slot": 0}
    for name, value in first.items():
        set_meta(connection, name, str(value))
    # A first search on a fresh server finds nothing, rather than no collection.
    create_collection(connection, DEFAULT_COLLECTION, space, manifest.dimensions)
    connection.execute("COMMIT")


def create_collection(connection: sqlite3.Connection, name: str, space: str, dimensions: int) -> int:
    """Return the key of the new collection."""
    query = "INSERT INTO collections (name, space, dimensions, created) VALUES (?, ?, ?, ?) RETURNING key"
    [key] = connection.execute(query, (name, space, dimensions, now())).fetchone()
    return int(key)


def has_schema(connection: sqlite3.Connection) -> bool:
    return (
        connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'meta'").fetchone() is not None
    )


def meta(connection: sqlite3.Connection, name: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def sequence(connection: sqlite3.Connection) -> int:
    """Return the number of the last commit."""
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
