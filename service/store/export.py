"""An export reads a whole collection from the file of a store, which may be served meanwhile."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import orjson

from service.store import keywords, previews, rows, schema
from service.store.errors import StoreDamaged, StoreError
from service.store.items import Item, Moment, Preview
from service.store.moments import by_owner, hidden, moments_table
from service.store.previews import TEXT_CHARS, Shown


@dataclass(frozen=True)
class Exported:
    """An item with all that the store has of it."""

    item: Item
    shown: Shown | None
    preview: Preview | None
    moments: Sequence[Moment]


class Export:
    """Reads a collection as it was when this was opened. Close it."""

    def __init__(self, path: Path, collection: str) -> None:
        """Raises StoreError where the store or the collection is not there, StoreDamaged where it cannot be read."""
        if not (path / schema.FILE).is_file():
            raise StoreError(f"{path} holds no store: name one by --store")
        self._path, self._name = path, collection
        self._connection = schema.open_existing(path / schema.FILE)
        try:
            schema.check_version(self._connection, path)
            self._connection.execute("BEGIN")
            self.space = schema.meta(self._connection, "space") or ""
            by_name = {row.name: row for row in rows.collections(self._connection)}
        except sqlite3.Error as error:
            self.close()
            raise StoreDamaged(f"{path} cannot be read: {error}") from None
        except StoreError:
            self.close()
            raise
        row_of_name = by_name.get(collection)
        if row_of_name is None or hidden(collection):
            self.close()
            names = ", ".join(sorted(name for name in by_name if not hidden(name)))
            raise StoreError(f"{path} has no collection {collection!r}, but: {names}")
        moments = by_name.get(moments_table(collection))
        self._key, self._moments_key = row_of_name.key, None if moments is None else moments.key
        self.vectors = row_of_name.count + (0 if moments is None else moments.count)
        """Number of vectors, those of moments too."""

    def close(self) -> None:
        self._connection.close()

    def items(self) -> Iterator[Exported]:
        """Yield the items in the order in which they were first written. Raises StoreDamaged."""
        error = "(SELECT error FROM mapped WHERE mapped.slot = items.slot)"
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'mapped'").fetchone():
            error = "NULL"  # a store of an earlier version, which no server has opened since
        query = f"""SELECT items.id, modality, metadata, created, updated, vector,
            (SELECT substr(content, 1, ?) FROM keywords WHERE keywords.item = items.key AND field = ?), {error}
            FROM items JOIN vectors USING (slot) WHERE collection = ? ORDER BY items.key"""
        try:
            with closing(self._connection.execute(query, (TEXT_CHARS, keywords.TEXT, self._moments_key))) as cursor:
                moments = by_owner({id: rows.unpack(vector) for id, _, _, _, _, vector, _, _ in cursor})
            for id, modality, metadata, created, updated, vector, text, off in self._connection.execute(
                query, (TEXT_CHARS, keywords.TEXT, self._key)
            ):
                preview = previews.of_item(self._connection, self._key, id)
                shown = None
                if text is not None or preview is not None or off is not None:
                    kind, about = (None, {}) if preview is None else (preview.media_type, dict(preview.about))
                    about |= {} if off is None else {"mapped": off}
                    shown = Shown(text, kind, about)
                values = orjson.loads(metadata), created, updated, rows.unpack(vector)
                yield Exported(Item(self._name, id, modality, *values), shown, preview, moments.get(id, ()))
        except sqlite3.Error as error:
            raise StoreDamaged(f"{self._path} cannot be read: {error}") from None
