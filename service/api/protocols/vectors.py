"""The calls that protocols share: inputs → vectors, and documents in the order of their similarity to a query."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from service.api.state import Model
from service.contract.errors import InputError
from service.engine.caller import Caller
from service.engine.inputs import Embedded, Input, in_role, raise_first, unknown_warning
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


Warnings = Annotated[
    list[str] | None,
    Field(description="Texts that were cut, or of which hardly a word is known; absent where there are none."),
]


@dataclass(frozen=True)
class Ranking:
    best: Sequence[tuple[int, float]]
    """Index of each document and its cosine similarity to the query, in [-1, 1]; best first."""
    tokens: int
    """Tokens of all texts."""
    warnings: Sequence[str]


async def ranked(
    model: Model, query: Input, documents: Sequence[Input], caller: Caller, *, field: str, cut: bool = True
) -> Ranking:
    """Put documents in the order of their cosine similarity to a query.

    A bundle has no cross-encoder: this is the order of /search. Raises InputFailed.
    """
    results = await model.embedder.embed([query, *in_role(documents, "passage")], caller)
    if not cut:
        results = list(map(_whole, results))
    if isinstance(results[0], InputError):
        raise InputFailed(None, results[0], field="query")
    raise_first(results[1:], field=field)
    first, *embedded = (result for result in results if isinstance(result, Embedded))
    scores = np.clip(np.stack([document.vector for document in embedded]) @ first.vector, -1.0, 1.0)
    order = np.argsort(-scores, kind="stable")
    warnings = warnings_of("query", [first]) + warnings_of(field, embedded)
    return Ranking(
        [(int(place), float(scores[place])) for place in order],
        first.tokens + sum(document.tokens for document in embedded),
        warnings,
    )


def warnings_of(field: str, results: Sequence[Embedded]) -> list[str]:
    """Return what a vector alone would not tell: that only a part was read, or that hardly a word is known."""
    warnings = []
    for index, result in enumerate(results):
        where = field if field == "query" else f"{field}[{index}]"
        if result.truncated:
            warnings.append(f"{where}: only a part was read: the text is too long, or the file is damaged")
        warnings += unknown_warning(where, result)
    return warnings


def warning_field(warnings: Sequence[str]) -> dict[str, Any]:
    """Return the field `warnings` that an answer gets where there are any; the protocols' clients leave it aside."""
    return {"warnings": warnings} if warnings else {}


def _whole(result: Embedded | InputError) -> Embedded | InputError:
    if isinstance(result, Embedded) and result.truncated:
        return InputError("the text is longer than the model reads, and truncate says that it is not to be cut")
    return result
