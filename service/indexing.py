"""Items as a client writes them → vectors → the store."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service import moments
from service.contract.errors import InputError
from service.contract.vectors import Vectors, l2_normalise
from service.errors import InputFailed, input_problem
from service.inputs import embed_inputs, to_inputs
from service.pipeline import Embedded, Embedder, Media
from service.previews import Previewer
from service.schemas.embed import InputProblem
from service.schemas.items import ItemInput, RefusedItem, StoredItem, StoredModality
from service.search import unit_vector
from service.store import Entry, Store
from service.timings import timed
from service.token_vectors import TokenEmbedder
from service.videos import Video


async def index_items(
    embedder: Embedder,
    store: Store,
    items: Sequence[ItemInput],
    *,
    fail: bool,
    tokens: TokenEmbedder | None = None,
    previewer: Previewer | None = None,
) -> list[StoredItem | RefusedItem]:
    """Embed and upsert items in one transaction; an answer for each, in order.

    With `fail`, one bad input fails them all: raises InputFailed with its index. Without, the others are stored.
    """
    inputs = [item.input for item in items]
    embedded = iter(await embed_inputs(embedder, [each for each in inputs if each is not None], role="passage"))
    given = iter(unit_vectors([item.vector for item in items if item.vector is not None], embedder.manifest.dimensions))
    entries: list[Entry] = []
    answers: list[StoredItem | RefusedItem] = []
    for index, (item, value) in enumerate(zip(items, inputs, strict=True)):
        result = next(embedded) if value is not None else next(given)
        if isinstance(result, InputError):
            if fail:
                raise InputFailed(index, result, field="items")
            error = InputProblem.model_validate(input_problem(result))
            answers.append(RefusedItem(id=item.id, collection=item.collection, index=index, error=error))
            continue
        modality: StoredModality
        if isinstance(result, Embedded):
            modality, vector, of = result.kind, result.vector, result.moments
        else:
            modality, vector, of = item.modality or "vector", result, ()
        entries.append(Entry(item.collection, item.id, modality, item.metadata, vector, text=item.text, moments=of))
        answers.append(StoredItem.model_construct(id=item.id, collection=item.collection, modality=modality))
    if tokens is not None and tokens.available:
        entries = await _with_tokens(tokens, store, items, entries)
    if previewer is not None:
        entries = await _with_previews(previewer, items, entries)
    if entries:
        with timed("write"):
            await moments.upsert(store, entries)
    return answers


async def _with_tokens(
    tokens: TokenEmbedder, store: Store, items: Sequence[ItemInput], entries: list[Entry]
) -> list[Entry]:
    """Entries of the collections that keep token vectors, with theirs; an input whose tower has none goes without."""
    keeping = {name for name in {each.collection for each in entries} if await store.keeps_tokens(name)}
    inputs = {(item.collection, item.id): item.input for item in items if item.collection in keeping}
    wanted = [
        entry for entry in entries if inputs.get((entry.collection, entry.id)) is not None and entry.modality != "video"
    ]
    values = [each for entry in wanted if (each := inputs[entry.collection, entry.id]) is not None]
    given = await to_inputs(values, role="passage")
    made = await tokens.embed([each for each in given if not isinstance(each, InputError | Video)])
    by_item = {
        (entry.collection, entry.id): each
        for entry, each in zip(wanted, made, strict=True)
        if not isinstance(each, InputError)
    }
    return [replace(entry, tokens=by_item.get((entry.collection, entry.id))) for entry in entries]


async def _with_previews(previewer: Previewer, items: Sequence[ItemInput], entries: list[Entry]) -> list[Entry]:
    """Entries, those that were made from an image or a sound with a preview of it."""
    inputs = {(item.collection, item.id): item.input for item in items if item.text is None}
    wanted = [entry for entry in entries if inputs.get((entry.collection, entry.id)) is not None]
    values = [each for entry in wanted if (each := inputs[entry.collection, entry.id]) is not None]
    found = zip(wanted, await to_inputs(values), strict=True)
    media = {(entry.collection, entry.id): each for entry, each in found if isinstance(each, Media)}
    by_item = dict(zip(media, await previewer.previews(list(media.values())), strict=True))
    return [replace(entry, preview=by_item.get((entry.collection, entry.id))) for entry in entries]


def unit_vectors(given: Sequence[Vectors], dimensions: int) -> Sequence[Vectors | InputError]:
    """Clients' vectors at unit length, float32 (D,) each, or what is wrong with one."""
    if not given or any(len(vector) != dimensions for vector in given):
        return [unit_vector(vector, dimensions) for vector in given]
    try:
        return list(l2_normalise(np.stack(given)))
    except ValueError:  # one of them has no direction: which?
        return [unit_vector(vector, dimensions) for vector in given]
