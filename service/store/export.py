"""An export reads a whole collection from the file of a store, which may be served meanwhile."""

from collections.abc import Iterator
from pathlib import Path

from service.store import rows, schema
from service.store.carry_over import OldItem, OldStore
from service.store.errors import StoreError
from service.store.moments import hidden, moments_table
from service.store.previews import TEXT_CHARS, Shown


class Export(OldStore):
    """Reads a collection as it was when this was opened. Close it."""

    def __init__(self, path: Path, collection: str) -> None:
        """Raises StoreError where the store or the collection is not there, StoreDamaged where it cannot be read."""
        if not (path / schema.FILE).is_file():
            raise StoreError(f"{path} holds no store: name one by --store")
        self._path, self._name = path, collection
        with schema.reading(path):
            super().__init__(path, alone=False)
        try:
            with schema.reading(path):
                self._connection.execute("BEGIN")
                counts = {row.name: row.count for row in rows.collections(self._connection)}
            if collection not in counts or hidden(collection):
                names = ", ".join(sorted(name for name in counts if not hidden(name)))
                raise StoreError(f"{path} has no collection {collection!r}, but: {names}")
        except StoreError:
            self.close()
            raise
        self.vector_count = counts[collection] + counts.get(moments_table(collection), 0)
        """Number of vectors, those of moments too."""

    def exported(self) -> Iterator[tuple[OldItem, Shown | None]]:
        """Yield the items, and what can be shown of them, in the order in which they were first written. Raises
        StoreDamaged."""
        with schema.reading(self._path):
            for item in self.items(of=self._name):
                yield item, _shown(item)


def _shown(item: OldItem) -> Shown | None:
    if item.text is None and item.preview is None and item.mapped is None:
        return None
    kind, about = (None, {}) if item.preview is None else (item.preview.media_type, dict(item.preview.about))
    about |= {} if item.mapped is None else {"mapped": item.mapped}
    return Shown(None if item.text is None else item.text[:TEXT_CHARS], kind, about)
