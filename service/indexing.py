"""Items as a client writes them → vectors → the store."""

from collections.abc import Sequence

from service.contract.errors import InputError
from service.errors import InputFailed, input_problem
from service.inputs import embed_inputs
from service.pipeline import Embedded, Embedder
from service.schemas.embed import InputProblem
from service.schemas.items import ItemInput, RefusedItem, StoredItem, StoredModality
from service.search import unit_vector
from service.store import Entry, Store


async def index_items(
    embedder: Embedder, store: Store, items: Sequence[ItemInput], *, fail: bool
) -> list[StoredItem | RefusedItem]:
    """Embed and upsert items in one transaction; an answer for each, in order.

    With `fail`, one bad input fails them all: raises InputFailed with its index. Without, the others are stored.
    """
    inputs = [item.input for item in items]
    embedded = iter(await embed_inputs(embedder, [each for each in inputs if each is not None]))
    entries: list[Entry] = []
    answers: list[StoredItem | RefusedItem] = []
    for index, (item, value) in enumerate(zip(items, inputs, strict=True)):
        result = next(embedded) if value is not None else unit_vector(item.vector or (), embedder.manifest.dimensions)
        if isinstance(result, InputError):
            if fail:
                raise InputFailed(index, result, field="items")
            error = InputProblem.model_validate(input_problem(result))
            answers.append(RefusedItem(id=item.id, collection=item.collection, index=index, error=error))
            continue
        modality: StoredModality
        if isinstance(result, Embedded):
            modality, vector = result.modality, result.vector
        else:
            modality, vector = item.modality or "vector", result
        entries.append(Entry(item.collection, item.id, modality, item.metadata, vector))
        answers.append(StoredItem(id=item.id, collection=item.collection, modality=modality))
    if entries:
        await store.upsert(entries)
    return answers
