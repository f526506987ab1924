"""Items as a client writes them → vectors → the store."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import cast

import numpy as np

from service.api.reading import embed_inputs, to_inputs
from service.contract.errors import InputError
from service.contract.vectors import Vectors, l2_normalise
from service.engine.embedder import Embedded, Embedder, Media
from service.engine.previews import Previewer
from service.engine.token_vectors import TokenEmbedder
from service.engine.videos import Video
from service.errors import InputFailed, input_problem
from service.retrieval.deadline import within
from service.retrieval.search import unit_vector
from service.runtime.timings import timed
from service.schemas.embed import InputProblem
from service.schemas.items import ItemInput, RefusedItem, StoredItem, StoredModality
from service.store import Entry, Moment, Store

_TOKENS_AT_ONCE = 32
_PREVIEWS_BEHIND = 2
"""At once, in the background: requests have the other threads that decode."""


async def index_items(
    embedder: Embedder,
    store: Store,
    items: Sequence[ItemInput],
    *,
    fail: bool,
    tokens: TokenEmbedder | None = None,
    previewer: Previewer | None = None,
    background: bool = False,
) -> list[StoredItem | RefusedItem]:
    """Embed and upsert items in one transaction; an answer for each, in order.

    With `fail`, one bad input fails them all: raises InputFailed with its index. Without, the others are stored. Raises
    DeadlineExceeded, with nothing stored.
    """
    keeping = await token_collections(store, {item.collection for item in items}) if tokens else frozenset()
    # Of embedding, tokens and previews together; what is being written is not broken off.
    async with within(None if background else embedder.deadline_s):
        made = await embed_items(
            embedder, items, keeping=keeping, tokens=tokens, previewer=previewer, background=background, fail=fail
        )
    answers: list[StoredItem | RefusedItem] = []
    for index, (item, result) in enumerate(zip(items, made, strict=True)):
        if isinstance(result, InputError):
            error = InputProblem.model_validate(input_problem(result))
            answers.append(RefusedItem(id=item.id, collection=item.collection, index=index, error=error))
        else:
            modality = cast(StoredModality, result.modality)
            answers.append(
                StoredItem.model_construct(
                    id=item.id, collection=item.collection, modality=modality, truncated=result.truncated
                )
            )
    if entries := [each for each in made if isinstance(each, Entry)]:
        with timed("write"):
            await store.upsert(entries)
    return answers


async def embed_items(
    embedder: Embedder,
    items: Sequence[ItemInput],
    *,
    keeping: Set[str] = frozenset(),
    tokens: TokenEmbedder | None = None,
    previewer: Previewer | None = None,
    background: bool = False,
    fail: bool = False,
) -> list[Entry | InputError]:
    """What is to be written for each item, or what is wrong with it, in order; those of the collections that are
    `keeping` token vectors with theirs.

    With `fail`, raises InputFailed for the first that something is wrong with.
    """
    inputs = [item.input for item in items]
    wanted = [each for each in inputs if each is not None]
    embedded = iter(await embed_inputs(embedder, wanted, role="passage", background=background, stored=True))
    given = iter(unit_vectors([item.vector for item in items if item.vector is not None], embedder.manifest.dimensions))
    made: list[Entry | InputError] = []
    for index, (item, value) in enumerate(zip(items, inputs, strict=True)):
        result = next(embedded) if value is not None else next(given)
        if isinstance(result, InputError):
            if fail:
                raise InputFailed(index, result, field="items")
            made.append(result)
        elif isinstance(result, Embedded):
            made.append(replace(_entry(item, result.kind, result.vector, result.moments), truncated=result.truncated))
        else:
            made.append(_entry(item, item.modality or "vector", result))
    if tokens is not None and tokens.available and keeping:
        made = await _with_tokens(tokens, items, made, keeping)
    if previewer is not None:
        made = await _with_previews(previewer, items, made, _PREVIEWS_BEHIND if background else max(1, len(made)))
    return made


async def token_collections(store: Store, names: Iterable[str]) -> Set[str]:
    """Those that keep token vectors."""
    return {name for name in names if await store.keeps_tokens(name)}


def _entry(item: ItemInput, modality: StoredModality, vector: Vectors, of: tuple[Moment, ...] = ()) -> Entry:
    return Entry(item.collection, item.id, modality, item.metadata, vector, text=item.text, moments=of)


async def _with_tokens(
    tokens: TokenEmbedder, items: Sequence[ItemInput], made: Sequence[Entry | InputError], keeping: Set[str]
) -> list[Entry | InputError]:
    """Entries with their token vectors; an input whose tower has none goes without."""
    done = list(made)
    wanted = [
        (place, value)
        for place, (item, each) in enumerate(zip(items, made, strict=True))
        if isinstance(each, Entry) and each.collection in keeping and (value := item.input) is not None
    ]
    # A few at a time: they have one deadline.
    for start in range(0, len(wanted), _TOKENS_AT_ONCE):
        places, values = zip(*wanted[start : start + _TOKENS_AT_ONCE], strict=True)
        given = zip(places, await to_inputs(values, role="passage"), strict=True)
        readable = [(place, each) for place, each in given if not isinstance(each, InputError | Video)]
        results = await tokens.embed([each for _, each in readable])
        for (place, _), result in zip(readable, results, strict=True):
            entry = done[place]
            if isinstance(entry, Entry) and not isinstance(result, InputError):
                done[place] = replace(entry, tokens=result)
    return done


async def _with_previews(
    previewer: Previewer, items: Sequence[ItemInput], made: Sequence[Entry | InputError], at_once: int
) -> list[Entry | InputError]:
    """Entries, those that were made from an image or a sound with a preview of it."""
    done = list(made)
    wanted = [
        (place, value)
        for place, (item, each) in enumerate(zip(items, made, strict=True))
        if isinstance(each, Entry) and item.text is None and (value := item.input) is not None
    ]
    for start in range(0, len(wanted), at_once):
        places, values = zip(*wanted[start : start + at_once], strict=True)
        found = zip(places, await to_inputs(values), strict=True)
        media = {place: each for place, each in found if isinstance(each, Media)}
        for place, preview in zip(media, await previewer.previews(list(media.values())), strict=True):
            entry = done[place]
            if isinstance(entry, Entry):
                done[place] = replace(entry, preview=preview)
    return done


def unit_vectors(given: Sequence[Vectors], dimensions: int) -> Sequence[Vectors | InputError]:
    """Clients' vectors at unit length, float32 (D,) each, or what is wrong with one."""
    if not given or any(len(vector) != dimensions for vector in given):
        return [unit_vector(vector, dimensions) for vector in given]
    try:
        return list(l2_normalise(np.stack(given)))
    except ValueError:  # one of them has no direction: which?
        return [unit_vector(vector, dimensions) for vector in given]
