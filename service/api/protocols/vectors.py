"""What every protocol asks of a model: inputs → vectors, and documents in the order of their likeness to a query."""

from collections.abc import Sequence

import numpy as np

from service.api.model import Model
from service.contract.errors import InputError
from service.engine.caller import Caller
from service.engine.inputs import Embedded, Input, in_role, raise_first
from service.errors import InputFailed


async def vectors_of(
    model: Model, inputs: Sequence[Input], caller: Caller, *, field: str, cut: bool = True
) -> list[Embedded]:
    """Embed inputs, one result each, in order.

    Without `cut`, a text that is longer than the model reads is an error. Raises InputFailed for the first bad input,
    with its index in the request's `field`.
    """
    results = await model.embedder.embed(inputs, caller)
    raise_first(results if cut else map(_whole, results), field=field)
    return [result for result in results if isinstance(result, Embedded)]


async def ranked(
    model: Model, query: Input, documents: Sequence[Input], caller: Caller, *, field: str, cut: bool = True
) -> tuple[list[tuple[int, float]], int]:
    """Return (index, cosine similarity to the query in [-1, 1]) of each document, best first; and the texts' tokens.

    A bundle has no cross-encoder: this is the order of /search. Raises InputFailed.
    """
    results = await model.embedder.embed([query, *in_role(documents, "passage")], caller)
    if not cut:
        results = list(map(_whole, results))
    if isinstance(results[0], InputError):
        raise InputFailed(None, results[0], field="query")
    raise_first(results[1:], field=field)
    first, *others = (result for result in results if isinstance(result, Embedded))
    scores = np.clip(np.stack([other.vector for other in others]) @ first.vector, -1.0, 1.0)
    order = np.argsort(-scores, kind="stable")
    return [(int(place), float(scores[place])) for place in order], first.tokens + sum(one.tokens for one in others)


def cut_warnings(field: str, results: Sequence[Embedded]) -> list[str]:
    """Return a warning for each result whose text was cut, or whose file was read in part."""
    return [
        f"{field}[{index}]: only the beginning was read" for index, result in enumerate(results) if result.truncated
    ]


def _whole(result: Embedded | InputError) -> Embedded | InputError:
    if isinstance(result, Embedded) and result.truncated:
        return InputError("the text is longer than the model reads, and truncate says that it is not to be cut")
    return result
