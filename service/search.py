"""Queries → unit vectors → the nearest items. A query may be any input, a vector, a stored item, or a sum of these."""

from collections.abc import Sequence

import numpy as np

from service.contract.errors import InputError
from service.contract.vectors import Vectors, l2_normalise
from service.errors import InputFailed
from service.inputs import embed_inputs
from service.pipeline import Embedded, Embedder
from service.schemas.search import ComposeQuery, IdQuery, Query, VectorQuery, parts
from service.store import Filter, Hit, Store

_CANCELLED = 1e-6
"""Length of a sum of unit vectors (the largest weight scaled to 1) below which its direction is rounding noise."""


class Searcher:
    def __init__(self, embedder: Embedder, store: Store) -> None:
        self._embedder = embedder
        self._store = store

    async def search(
        self,
        queries: Sequence[Query],
        *,
        top_k: int,
        collection: str,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        with_vector: bool = False,
        field: str = "queries",
    ) -> list[list[Hit]]:
        """The `top_k` best items for each query, best first.

        Raises NotFound (collection, or an id in a query) and InputFailed; `field` is what the request calls the
        queries: "query" where there is only one.
        """
        vectors = await self._vectors(queries, collection, field)
        stored = [query.id if isinstance(query, IdQuery) else None for query in queries]
        return await self._store.search(
            collection,
            vectors,
            top_k,
            modalities=modalities,
            filter=filter,
            leave_out=stored if any(id is not None for id in stored) else None,
            with_vector=with_vector,
        )

    async def _vectors(self, queries: Sequence[Query], collection: str, field: str) -> Vectors:
        """One unit vector per query, (Q, D)."""
        flat = [(position, part) for position, query in enumerate(queries) for part in parts(query)]
        ids = [part.id for _, part in flat if isinstance(part, IdQuery)]
        stored = await self._store.vectors(collection, ids)
        inputs = [part for _, part in flat if not isinstance(part, VectorQuery | IdQuery | ComposeQuery)]
        embedded = iter(await embed_inputs(self._embedder, inputs))
        found: list[list[Vectors]] = [[] for _ in queries]
        for position, part in flat:
            result: Embedded | Vectors | InputError
            if isinstance(part, VectorQuery):
                result = unit_vector(part.vector, self._embedder.manifest.dimensions)
            elif isinstance(part, IdQuery):
                result = stored[part.id]
            else:
                result = next(embedded)
            if isinstance(result, InputError):
                raise InputFailed(None if field == "query" else position, result, field=field)
            found[position].append(result.vector if isinstance(result, Embedded) else result)
        rows = []
        for position, (query, vectors) in enumerate(zip(queries, found, strict=True)):
            row: Vectors | InputError = vectors[0]
            if isinstance(query, ComposeQuery):
                row = weighted_sum(vectors, [part.weight for part in query.compose])
            if isinstance(row, InputError):
                raise InputFailed(None if field == "query" else position, row, field=field)
            rows.append(row)
        return np.stack(rows)


def unit_vector(vector: Sequence[float], dimensions: int) -> Vectors | InputError:
    """A client's vector at unit length, float32 (D,)."""
    if len(vector) != dimensions:
        return InputError(f"the vector has {len(vector)} numbers; this space has {dimensions}")
    try:
        return l2_normalise(np.asarray(vector, np.float64))
    except ValueError:
        return InputError("the vector has no direction: it is zero or not finite")


def weighted_sum(vectors: Sequence[Vectors], weights: Sequence[float]) -> Vectors | InputError:
    """The sum of unit vectors (D,) with finite weights, at unit length, unless nothing but rounding noise is left."""
    largest = max(abs(weight) for weight in weights)
    if largest > 0:
        # Scaled first: weights may be as large or as small as a double can be.
        total = (np.array(weights) / largest) @ np.stack(vectors).astype(np.float64)
        if np.sqrt(total @ total) > _CANCELLED:
            return l2_normalise(total)
    return InputError("the weighted parts cancel each other out: nothing is left to search for")
