"""Indexing: items → vectors → the store."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.errors import InputError
from service.contract.vectors import Vectors, l2_normalise
from service.engine.caller import PROCESS, Caller
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Fused, Input, Media, StoredModality, Text, in_role, parts_of
from service.engine.previews import Previewer
from service.errors import InputFailed
from service.retrieval.search import unit_vector
from service.runtime.timings import timed
from service.store import DEFAULT_COLLECTION, Entry, Moment, Preview, Store

_PREVIEWS_BEHIND = 2
"""Previews made at once for background work: requests have the other threads that decode."""


@dataclass(frozen=True)
class NewItem:
    """An item that is to be stored."""

    id: str
    content: Input | NDArray[np.floating]
    """The input to embed, or its vector (D,) of any length."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    collection: str = DEFAULT_COLLECTION
    modality: StoredModality = "vector"
    """Modality of a given vector; inputs have their own."""


async def index_items(
    embedder: Embedder,
    store: Store,
    items: Sequence[NewItem],
    *,
    fail: bool,
    caller: Caller = PROCESS,
    previewer: Previewer | None = None,
) -> list[Entry | InputError]:
    """Embed and upsert items in one transaction; return what was written for each or its error, in order.

    With `fail`, one bad input fails them all: raises InputFailed with its index. Without, the others are stored. Raises
    DeadlineExceeded, with nothing stored.
    """
    # One deadline for embedding and previews together; a write is not interrupted.
    async with embedder.in_time(caller):
        outcomes = await embed_items(embedder, items, caller=caller, previewer=previewer, fail=fail)
    if entries := [entry for entry in outcomes if isinstance(entry, Entry)]:
        with timed("write"):
            await store.upsert(entries)
    return outcomes


async def embed_items(
    embedder: Embedder,
    items: Sequence[NewItem],
    *,
    caller: Caller = PROCESS,
    previewer: Previewer | None = None,
    fail: bool = False,
) -> list[Entry | InputError]:
    """Return each item's entry to write or its error, in order.

    With `fail`, raises InputFailed for the first that something is wrong with. Raises RateLimited.
    """
    vectors = {place: item.content for place, item in enumerate(items) if isinstance(item.content, np.ndarray)}
    contents = {place: item.content for place, item in enumerate(items) if not isinstance(item.content, np.ndarray)}
    if vectors and caller.meter is not None:  # who stores vectors takes room, too
        await caller.meter.take({"items": len(vectors)})
    read = await embedder.read(in_role(contents.values(), "passage"), caller)
    inputs = dict(zip(contents, read if previewer is None else previewer.watched(read), strict=True))
    results: dict[int, Embedded | Vectors | InputError] = {}
    known = embedder.manifest.stored_modalities
    results |= zip(vectors, unit_vectors(list(vectors.values()), embedder.manifest.dimensions), strict=True)
    if inputs:
        results |= zip(inputs, await embedder.embed(list(inputs.values()), caller, stored=True), strict=True)
    outcomes: list[Entry | InputError] = []
    for index, item in enumerate(items):
        result = results[index]
        if index in vectors and item.modality not in known:
            result = InputError(f"there is no modality {item.modality!r} here, only {', '.join(known)}")
        if isinstance(result, InputError):
            if fail:
                raise InputFailed(index, result, field="items")
            outcomes.append(result)
        else:
            outcomes.append(_entry(item, result))
    if previewer is not None:
        at_once = _PREVIEWS_BEHIND if caller.background else max(1, len(outcomes))
        await _add_previews(previewer, inputs, outcomes, at_once)
    return outcomes


def _entry(item: NewItem, result: Embedded | Vectors) -> Entry:
    if not isinstance(result, Embedded):
        return Entry(item.collection, item.id, item.modality, item.metadata, result)
    return Entry(
        item.collection,
        item.id,
        result.kind,
        item.metadata,
        result.vector,
        text=_text_of(item.content),
        moments=[Moment(part.modality, part.start, part.end, part.vector) for part in result.moments],
        truncated=result.truncated,
    )


def _text_of(content: Input | NDArray[np.floating]) -> str | None:
    """Return the text that words are searched for in. Of an input of several parts it is there, if empty, wherever one
    is no text: it tells that the vector is not that of the picture or the sound alone."""
    if isinstance(content, Fused):
        texts = [part.text for part in parts_of(content) if isinstance(part, Text)]
        return None if len(texts) == len(content.parts) else " ".join(texts)
    return content.text if isinstance(content, Text) else None


async def _add_previews(
    previewer: Previewer, inputs: Mapping[int, Input], outcomes: list[Entry | InputError], at_once: int
) -> None:
    """Add previews to the entries that were made from an image or a sound."""
    media = {place: part for place, content in inputs.items() for part in _shown(content)}
    entries = {place: entry for place in media if isinstance(entry := outcomes[place], Entry)}
    places = list(entries)
    for start in range(0, len(places), at_once):
        batch = places[start : start + at_once]
        for place, file in zip(batch, await previewer.previews([media[place] for place in batch]), strict=True):
            preview = None if file is None else Preview(file.media_type, file.data, file.about)
            outcomes[place] = replace(entries[place], preview=preview)


def _shown(content: Input) -> Sequence[Media]:
    """Return the first image or sound of an input, if it has one."""
    return [part for part in parts_of(content) if isinstance(part, Media) and part.kind != "array"][:1]


def unit_vectors(vectors: Sequence[Vectors], dimensions: int) -> list[Vectors | InputError]:
    """Return clients' vectors at unit length, float32 (D,) each, or the error of one."""
    if vectors and all(len(vector) == dimensions for vector in vectors):
        with suppress(ValueError):  # one of them has no direction: which?
            return list(l2_normalise(np.stack(vectors)))
    results: list[Vectors | InputError] = []
    for vector in vectors:
        try:
            results.append(unit_vector(vector, dimensions))
        except InputError as error:
            results.append(error)
    return results
