"""SQLite's FTS5 indexes the words of items; these are functions of a connection.

The text of a text item is always indexed, under the field `text`; strings in the metadata, and lists of them, where the
collection names their key as one of its keyword fields. Rows go with their items: deleting an item deletes them.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import category

from service.store.filters import Filter
from service.store.items import Entry
from service.store.kinds import Keys

TEXT = "text"

_MAX_WORDS = 64

_FROM_METADATA = """
INSERT INTO keywords (item, collection, field, content)
SELECT items.key, items.collection, held.key, CASE held.type WHEN 'text' THEN held.atom ELSE
    (SELECT group_concat(atom, char(10)) FROM json_each(held.value) WHERE type = 'text') END AS words
FROM items JOIN json_each(items.metadata) AS held
WHERE items.collection = ?1 AND held.key IN (SELECT value FROM json_each(?2)) AND held.type IN ('text', 'array')
    AND words IS NOT NULL"""


def fields(connection: sqlite3.Connection, collection: int) -> list[str]:
    """Return the metadata keys whose strings are indexed, sorted."""
    rows = connection.execute("SELECT field FROM keyword_fields WHERE collection = ? ORDER BY field", (collection,))
    return [row[0] for row in rows]


def set_fields(connection: sqlite3.Connection, collection: int, names: Sequence[str]) -> None:
    """Set the keyword fields of a collection, and index its present items by them."""
    current = set(fields(connection, collection))
    removed, added = sorted(current - set(names)), sorted(set(names) - current)
    for field in removed:
        connection.execute("DELETE FROM keyword_fields WHERE collection = ? AND field = ?", (collection, field))
        connection.execute("DELETE FROM keywords WHERE collection = ? AND field = ?", (collection, field))
    if added:
        connection.executemany("INSERT INTO keyword_fields VALUES (?, ?)", [(collection, field) for field in added])
        connection.execute(_FROM_METADATA, (collection, json.dumps(added, ensure_ascii=False)))


def put(connection: sqlite3.Connection, collection: int, keys: Keys, entries: Sequence[Entry]) -> None:
    """Index the words of the rows just written under these keys."""
    texts = [
        (int(key), collection, TEXT, entry.text)
        for key, entry in zip(keys, entries, strict=True)
        if entry.text is not None
    ]
    if texts:
        connection.executemany("INSERT INTO keywords (item, collection, field, content) VALUES (?, ?, ?, ?)", texts)
    if names := fields(connection, collection):
        connection.execute(
            f"{_FROM_METADATA} AND items.key IN (SELECT value FROM json_each(?3))",
            (collection, json.dumps(names, ensure_ascii=False), json.dumps(keys.tolist())),
        )


@dataclass(frozen=True)
class KeywordSearch:
    """Asks for the `count` best items of a collection for the words of a query."""

    collection: str
    query: str
    count: int
    field: str | None = None
    """`text`, or one of the collection's keyword fields; None: all of them."""
    every: bool = False
    """Whether all the words must be in one field."""
    modalities: Sequence[str] | None = None
    filter: Filter | None = None
    leave_out: str | None = None
    """An item that is not to be among the results."""


def search(
    connection: sqlite3.Connection, collection: int, request: KeywordSearch, among: Keys | None = None
) -> list[tuple[int, float]]:
    """Return the best (row key, BM25, higher is better) for the words of a query, best first: one more than asked for
    where one of them may be the item that is left out.

    An item counts by the best of its fields. Where `among` is given, it is one of these row keys.
    """
    expression = match_expression(request.query, every=request.every)
    if expression is None:
        return []
    where, bound = ["keyword_index MATCH ?", "keywords.collection = ?"], [expression, collection]
    if request.field is not None:
        where.append("field = ?")
        bound.append(request.field)
    if request.modalities is not None:
        where.append("(SELECT modality FROM items WHERE items.key = item) IN (SELECT value FROM json_each(?))")
        bound.append(json.dumps(list(request.modalities)))
    if among is not None:
        where.append("item IN (SELECT value FROM json_each(?))")
        bound.append(json.dumps(among.tolist()))
    # Materialised: merged into the grouping, bm25 would be out of its query. CROSS JOIN: SQLite keeps to this order,
    # where it might otherwise go through the collection's rows and ask the word index about each.
    rows = connection.execute(
        f"""WITH scored AS MATERIALIZED (
            SELECT item, bm25(keyword_index) AS score
            FROM keyword_index CROSS JOIN keywords ON keywords.key = keyword_index.rowid WHERE {" AND ".join(where)}
        ) SELECT item, -min(score) FROM scored GROUP BY item ORDER BY min(score), item LIMIT ?""",
        (*bound, request.count + bool(request.leave_out)),
    )
    return [(row[0], row[1]) for row in rows]


def match_expression(query: str, *, every: bool = False) -> str | None:
    """Return a client's words as an FTS5 expression that is always valid: every word or "quoted phrase" is a string in
    it, so that nothing in it is an operator. None where no word is left."""
    terms = []
    for place, part in enumerate(query.split('"')):
        words = "".join(letter if category(letter)[0] in "LMN" else " " for letter in part).split()
        # Between a pair of quotes; what follows a quote that is never closed is words again.
        quoted = place % 2 == 1 and place < query.count('"')
        terms += [" ".join(words)] if quoted and words else words
    strings = [f'"{term}"' for term in dict.fromkeys(terms)][:_MAX_WORDS]
    return (" AND " if every else " OR ").join(strings) or None
