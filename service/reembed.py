"""A store of one space → a new store of another: what `python -m service reembed` runs.

Vectors of one space mean nothing in another, and no map between two spaces is as good as embedding again. So this needs
the originals. The store has the texts of text items; images and sounds are looked for in a folder, under the path that
a metadata key holds or else the item's id; what was given as a vector has no original. The old store is only read.
"""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service import videos
from service.cache import MemoryCache
from service.classify import Classifier, stored_labels
from service.contract.errors import InputError
from service.errors import InputFailed
from service.inputs import known
from service.metrics import Metrics
from service.pipeline import Embedded, Embedder, Input, Text
from service.schemas.inputs import of_file, sniff
from service.settings import Settings
from service.store import (
    Entry,
    Preview,
    SqliteStore,
    Store,
    StoreError,
    Wanted,
    keywords,
    moments,
    previews,
    rows,
    schema,
    tokens,
)
from service.towers import open_towers
from service.videos import Video

_BATCH = 64


@dataclass
class Outcome:
    embedded: int = 0
    already: int = 0
    """In the new store from a run that was interrupted."""
    label_sets: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """By reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """An id for each reason."""

    def leave_out(self, reason: str, id: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, id)


@dataclass(frozen=True)
class _Item:
    collection: str
    id: str
    modality: str
    metadata: dict[str, Any]
    text: str | None
    preview: Preview | None


@dataclass(frozen=True)
class Originals:
    """Where images and sounds are."""

    folder: Path | None = None
    key: str | None = None
    """The metadata key that holds a path inside the folder."""

    def of(self, item: _Item) -> Text | Path | str:
        """A text, the path of a file, or why there is neither."""
        if item.modality == "text":
            return "its text was not stored" if item.text is None else Text(item.text, role="passage")
        if item.modality == "vector":
            return "it was given as a vector"
        if self.folder is None:
            return f"{item.modality}: no folder of media was named (--media)"
        name = item.id if self.key is None else item.metadata.get(self.key)
        if not isinstance(name, str):
            return f"{item.modality}: its metadata have no path under {self.key!r}"
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            return f"{item.modality}: its file is not in {self.folder}"
        return path


def survey(old: Path, originals: Originals) -> Outcome:
    """What could be embedded again, and what not, without doing anything. Raises StoreError."""
    outcome = Outcome()
    with closing(_opened(old)) as connection:
        for item in _items(connection):
            found = originals.of(item)
            if isinstance(found, str):
                outcome.leave_out(found, item.id)
            else:
                outcome.embedded += 1
    return outcome


async def reembed(old: Path, new: Path, settings: Settings, originals: Originals) -> Outcome:
    """Fill a store at `new`, or go on filling it, for the bundle that the settings name.

    Raises StoreError, BundleError, TowerError.
    """
    bundle = settings.read_bundle()
    towers = open_towers(
        bundle,
        settings.device,
        settings.threads,
        settings.modalities,
        call_seconds=settings.batch_audio_seconds,
    )
    embedder = Embedder(bundle, towers, MemoryCache(0), settings, Metrics())
    outcome = Outcome()
    try:
        with closing(_opened(old)) as connection:
            store = SqliteStore.open(new, bundle.manifest)
            try:
                await _collections(connection, store)
                batch: list[_Item] = []
                for item in _items(connection):
                    batch.append(item)
                    if len(batch) == _BATCH:
                        await _move(batch, store, embedder, originals, outcome)
                        batch = []
                if batch:
                    await _move(batch, store, embedder, originals, outcome)
                await _label_sets(connection, Classifier(embedder, store), outcome)
            finally:
                await store.close()
    finally:
        await embedder.close()
    return outcome


async def _move(batch: list[_Item], store: Store, embedder: Embedder, originals: Originals, outcome: Outcome) -> None:
    wanted: list[tuple[_Item, Input | Video]] = []
    for item in batch:
        if await store.holds(item.collection, item.id):
            outcome.already += 1
            continue
        found = originals.of(item)
        try:
            if isinstance(found, Path):
                data = await asyncio.to_thread(found.read_bytes)
                found = "it is of another kind than its item" if sniff(data) != item.modality else found
                if isinstance(found, Path):
                    wanted.append((item, of_file(data)))
                    continue
        except (OSError, InputError):
            found = f"{item.modality}: its file cannot be read"
        if isinstance(found, Text):
            wanted.append((item, found))
        else:
            outcome.leave_out(str(found), item.id)
    entries = []
    results = await videos.embed(embedder, [each for _, each in wanted], stored=True) if wanted else []
    for (item, _), result in zip(wanted, map(known, results), strict=True):
        if isinstance(result, Embedded):
            entries.append(
                Entry(
                    item.collection,
                    item.id,
                    item.modality,
                    item.metadata,
                    result.vector,
                    item.text,
                    preview=item.preview,
                    moments=result.moments,
                )
            )
        else:
            outcome.leave_out(f"{item.modality}: {result}", item.id)
    if entries:
        await store.upsert(entries)
        outcome.embedded += len(entries)


async def _collections(connection: sqlite3.Connection, store: Store) -> None:
    for collection in rows.collections(connection):
        if moments.hidden(collection.name):
            continue
        await store.create_collection(collection.name, Wanted(collection.wanted.kind, collection.wanted.precision))
        await store.set_keyword_fields(collection.name, keywords.fields(connection, collection.key))
        if tokens.kept(connection, collection.key):
            await store.keep_tokens(collection.name, True)


async def _label_sets(connection: sqlite3.Connection, classifier: Classifier, outcome: Outcome) -> None:
    for name, definition in connection.execute("SELECT name, definition FROM label_sets ORDER BY name").fetchall():
        held = json.loads(definition)
        try:
            await classifier.save_label_set(name, stored_labels(held), held.get("templates"))
        except InputFailed as error:
            outcome.leave_out(f"label set: {error}", name)
            continue
        if any(not isinstance(each, str) and each.get("examples") for each in held["labels"]):
            outcome.leave_out("examples of a label set: teach it again", name)
        outcome.label_sets += 1


def _items(connection: sqlite3.Connection) -> Iterator[_Item]:
    kept = previews.present(connection)
    found = connection.execute(
        """SELECT collections.key, collections.name, items.id, modality, metadata,
        (SELECT content FROM keywords WHERE keywords.item = items.key AND field = ?)
        FROM items JOIN collections ON collections.key = items.collection
        WHERE collections.name NOT LIKE '.%' ORDER BY items.key""",
        (keywords.TEXT,),
    )
    for key, collection, id, modality, metadata, text in found:
        preview = previews.of_item(connection, key, id) if kept else None
        yield _Item(collection, id, modality, json.loads(metadata), text, preview)


def _opened(old: Path) -> sqlite3.Connection:
    file = old / schema.FILE
    if not file.is_file():
        raise StoreError(f"{old} holds no store")
    connection = schema.connect(file, read_only=True)
    version = schema.meta(connection, "schema")
    if version != str(schema.SCHEMA_VERSION):
        connection.close()
        raise StoreError(f"the store {old} has schema version {version}: serve it once with the bundle that filled it")
    return connection
