"""Previews of items: functions of a connection. A row goes with its item, and into every backup."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from service.store import keywords
from service.store.items import Entry, Preview
from service.store.kinds import Keys

TEXT_CHARS = 1_000
"""Number of characters of a stored text that are shown."""


@dataclass(frozen=True)
class Shown:
    """Holds what can be shown of an item without the file itself."""

    text: str | None
    """The beginning of a text item's text."""
    media_type: str | None
    about: dict[str, Any]


def put(connection: sqlite3.Connection, keys: Keys, entries: Sequence[Entry]) -> None:
    """Store the previews of the entries just written under these row keys."""
    connection.executemany(
        "INSERT INTO previews (item, media_type, about, data) VALUES (?, ?, ?, ?)",
        [
            (int(key), preview.media_type, orjson.dumps(preview.about).decode(), preview.data)
            for key, entry in zip(keys, entries, strict=True)
            if (preview := entry.preview) is not None
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
    """Return the previews of those of the ids that have one; of an item whose vector was mapped, also its error."""
    rows = connection.execute(
        """SELECT items.id, substr(content, 1, ?), media_type, coalesce(about, '{}'), error FROM items
        LEFT JOIN keywords ON keywords.item = items.key AND keywords.field = ?
        LEFT JOIN previews ON previews.item = items.key
        LEFT JOIN mapped USING (slot)
        WHERE items.collection = ? AND items.id IN (SELECT value FROM json_each(?))
        AND (content IS NOT NULL OR media_type IS NOT NULL OR error IS NOT NULL)""",
        (TEXT_CHARS, keywords.TEXT, collection, json.dumps(list(ids))),
    )
    return {
        id: Shown(text, kind, orjson.loads(about) | ({} if error is None else {"mapped": error}))
        for id, text, kind, about, error in rows
    }
