"""Previews of items: functions of a connection. A row goes with its item, and into every backup."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from service.store import keywords
from service.store.kinds import Keys
from service.store.rows import Entry, Preview

TEXT_CHARS = 1_000
"""Number of characters of a stored text that are shown."""

_EARLIER_KINDS, _KINDS = "IN ('image/webp', 'audio/mpeg')", "IN ('image/jpeg', 'image/webp', 'audio/mpeg')"
_SCHEMA = f"""CREATE TABLE IF NOT EXISTS previews (
    item INTEGER PRIMARY KEY REFERENCES items (key) ON DELETE CASCADE,
    media_type TEXT NOT NULL CHECK (media_type {_KINDS}),
    about TEXT NOT NULL,
    data BLOB NOT NULL
) STRICT"""


@dataclass(frozen=True)
class Shown:
    """What can be shown of an item without the file itself."""

    text: str | None
    """The beginning of a text item's text."""
    media_type: str | None
    about: dict[str, Any]


def prepare(connection: sqlite3.Connection) -> None:
    """Create the table where it is not there yet. That of an earlier version, whose pictures were all WebP, is made to
    take JPEG as well."""
    connection.execute(_SCHEMA)
    (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'previews'").fetchone()
    if _EARLIER_KINDS not in sql:
        return
    # SQLite's own procedure for another CHECK (lang_altertable.html, 7): no row is written again.
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA schema_version").fetchone()
        connection.execute("PRAGMA writable_schema = ON")
        sql = sql.replace(_EARLIER_KINDS, _KINDS)
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'previews'", (sql,))
        connection.execute(f"PRAGMA schema_version = {version + 1}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA writable_schema = OFF")


def present(connection: sqlite3.Connection) -> bool:
    """Return whether the store has the table: one that this version has not served yet does not."""
    return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'previews'").fetchone())


def put(connection: sqlite3.Connection, keys: Keys, replaced: Sequence[bool], entries: Sequence[Entry]) -> None:
    """Store the previews of the entries just written under these row keys, in place of those of the replaced rows."""
    older = [int(key) for key, known in zip(keys, replaced, strict=True) if known]
    if older:
        connection.execute("DELETE FROM previews WHERE item IN (SELECT value FROM json_each(?))", (json.dumps(older),))
    connection.executemany(
        "INSERT INTO previews (item, media_type, about, data) VALUES (?, ?, ?, ?)",
        [
            (int(key), kept.media_type, orjson.dumps(kept.about).decode(), kept.data)
            for key, entry in zip(keys, entries, strict=True)
            if (kept := entry.preview) is not None
        ],
    )


def of_item(connection: sqlite3.Connection, collection: int, id: str) -> Preview | None:
    row = connection.execute(
        """SELECT media_type, data, about FROM previews JOIN items ON items.key = previews.item
        WHERE items.collection = ? AND items.id = ?""",
        (collection, id),
    ).fetchone()
    return None if row is None else Preview(row[0], row[1], orjson.loads(row[2]))


def shown(connection: sqlite3.Connection, collection: int, ids: Iterable[str]) -> dict[str, Shown]:
    """Return the previews of those of the ids that have one."""
    rows = connection.execute(
        """SELECT items.id, substr(content, 1, ?), media_type, about FROM items
        LEFT JOIN keywords ON keywords.item = items.key AND keywords.field = ?
        LEFT JOIN previews ON previews.item = items.key
        WHERE items.collection = ? AND items.id IN (SELECT value FROM json_each(?))
        AND (content IS NOT NULL OR media_type IS NOT NULL)""",
        (TEXT_CHARS, keywords.TEXT, collection, json.dumps(list(ids))),
    )
    return {id: Shown(text, kind, {} if about is None else orjson.loads(about)) for id, text, kind, about in rows}
