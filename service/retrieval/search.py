"""Search: queries → unit vectors → the nearest items, in the requested order.

A query may be any input, a vector, a stored item, or a weighted sum of these. A request that names no other order gets
that of the store; for one that does, candidates come from the store and are put in order here.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, compress
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Manifest
from service.contract.errors import InputError
from service.contract.vectors import Vectors, l2_normalise
from service.engine.caller import PROCESS, Caller
from service.engine.embedder import Embedder
from service.engine.inputs import Input, Text, unknown_warning, weighted_sum
from service.errors import InputFailed, InvalidRequest
from service.retrieval import chance
from service.retrieval.chance import BackgroundQueries
from service.retrieval.feedback import Feedback
from service.retrieval.ranking import distinct, diverse, fuse
from service.retrieval.script import Followed, follow
from service.retrieval.why import Explainer
from service.runtime.fair import FairSemaphore
from service.runtime.timings import timed
from service.schemas.search import Content, Diversity, Query, ScriptRequest, SearchOptions
from service.store import Background, Effort, Filter, Item, KeywordSearch, Moment, Shown, Store, VectorSearch
from service.store.interface import MOST_FOUND_BYTES, TOO_MUCH_FOUND
from service.store.moments import HAVING

_DEEPEST = 4_000
"""Largest number of candidates of one query that are read to find enough without duplicates."""
_SURELY = 0.95
"""Confidence from which on a result is surely none by chance."""
_INLINE = 256
"""Number of results up to which they are judged in the event loop: that takes less than a millisecond."""
_AT_ONCE = 8
"""Number of queries whose candidates are sorted at once: twice as many as the store reads at once. More would only
take memory, and turns of the event loop."""
_MANY, _MANY_AT_ONCE = 1_024, 4
"""Number of candidates, with their vectors, from which on a search waits its turn to hold them; and of such turns."""
_COMPARED = 256
"""Number of items of a modality, over all steps, whose moments are compared with a script."""
_TOGETHER = 32
"""Number of queries that the store gets at once: between two such groups other requests have their turn."""


@dataclass(slots=True)
class Result:
    item: Item
    score: float
    """What the order goes by."""
    similarity: float
    """Cosine similarity, whatever the score is."""
    moment: Moment | None = None
    """Best moment of a video or a long sound."""
    shown: Shown | None = None
    """The item's preview, where it was asked for and exists."""
    correction: float = 0.0
    vector_rank: int | None = None
    keyword_rank: int | None = None
    keyword_score: float | None = None
    """BM25."""
    fused: float | None = None
    explanation: Mapping[str, Any] | None = None
    confidence: float | None = None
    """The chance that no item would fit as well by chance; None where that was not asked for, or cannot be judged."""
    why: Mapping[str, Any] | None = None

    @property
    def vector(self) -> Vectors:
        assert self.item.vector is not None
        return self.item.vector

    @property
    def corrected(self) -> float:
        return self.similarity - self.correction


@dataclass(frozen=True)
class _Scope:
    """The part of the store that is searched, and the caller."""

    collection: str
    modalities: Sequence[str] | None
    filter: Filter | None
    effort: Effort | None
    caller: Caller
    field: str

    def fail(self, position: int, error: InputError) -> InputFailed:
        """Return the error for the query at a position."""
        return InputFailed(None if self.field == "query" else position, error, field=self.field)


@dataclass(frozen=True)
class _EmbeddedQuery:
    """A query as vectors."""

    vector: Vectors
    """Unit vector (D,): Σ share · part."""
    parts: Vectors
    """Unit vectors (P, D)."""
    weights: Sequence[float]
    own: str | None
    """The stored item that the query is."""
    source: Query
    untaught: Vectors | None = None
    """The unit vector (D,) before feedback moved it."""


class Searcher:
    def __init__(self, embedder: Embedder, store: Store) -> None:
        self._embedder = embedder
        self._store = store
        self._background = BackgroundQueries(embedder)
        self._explainer = Explainer(embedder, store)
        self.feedback = Feedback(embedder, store)
        self._places = FairSemaphore(_AT_ONCE + 1, per_caller=_AT_ONCE)
        self._large = FairSemaphore(_MANY_AT_ONCE + 1, per_caller=_MANY_AT_ONCE)
        # The moments of one script may take some 240 MB.
        self._scripts = FairSemaphore(2, per_caller=1)

    async def search(
        self,
        request: SearchOptions,
        caller: Caller = PROCESS,
        *,
        original: Callable[[Item], Awaitable[bytes | None]] | None = None,
        warn: Callable[[str], None] = lambda _: None,
        taught: Callable[[int], None] = lambda _: None,
    ) -> list[list[Result]]:
        """Return the `top_k` best items for each query, best first. `original` reads the file of an item that has no
        preview. `warn` is told of queries that the model hardly knows, and `taught` which version of the collection's
        feedback moved the queries.

        Raises NotFound (collection, or an id in a query), InvalidRequest (an option that this bundle or collection does
        not allow) and InputFailed.
        """
        effort = None if request.effort is None else Effort(**request.effort.model_dump())
        check_modalities(self._embedder.manifest, request.modalities)
        if request.balance:
            try:
                request.check_results(len(set(request.modalities or self._embedder.manifest.stored_modalities)))
            except ValueError as error:
                raise InvalidRequest(str(error)) from None
        scope = _Scope(request.collection, request.modalities, request.filter, effort, caller, request.field)
        embedded = await self._embedded(request.asked, scope, warn)
        if request.feedback and (lesson := await self.feedback.head(request.collection)) is not None:
            number, head = lesson
            taught(number)
            moved = head.moved(np.stack([query.vector for query in embedded]))
            embedded = [
                replace(query, vector=vector, untaught=query.vector)
                for query, vector in zip(embedded, moved, strict=True)
            ]
        top_k, include, balance = request.top_k, request.include, request.balance
        judged = "confidence" in include or balance or request.fdr is not None
        if request.reordered or "explain" in include:
            results = await self._ordered(embedded, scope, request)
            if judged:
                results = await self._judged(embedded, results, scope, request.fdr)
            if "preview" in include:
                ids = list({result.item.id for result in chain(*results)})
                previews = await self._store.shown(request.collection, ids)
                for result in chain(*results):
                    result.shown = previews.get(result.item.id)
        else:
            async with self._large if judged and len(embedded) * top_k > _MANY else nullcontext():
                results = await self._nearest(
                    embedded,
                    top_k,
                    scope,
                    with_vector=judged or "vector" in include or "why" in include,
                    with_shown="preview" in include,
                    by_modality=balance,
                )
                if judged:
                    results = await self._judged(embedded, results, scope, request.fdr, top_k if balance else None)
        if "why" in include:
            with timed("why"):
                await self._add_why(embedded, results, request.why_of, original, caller)
        return results

    async def vectors(
        self, queries: Sequence[Query], collection: str, caller: Caller, field: str, warn: Callable[[str], None]
    ) -> Vectors:
        """Return queries as unit vectors (Q, D), before any feedback. Raises as `search` does."""
        scope = _Scope(collection, None, None, None, caller, field)
        return np.stack([query.vector for query in await self._embedded(queries, scope, warn)])

    async def _add_why(
        self,
        queries: Sequence[_EmbeddedQuery],
        results: list[list[Result]],
        ids: Sequence[str] | None,
        original: Callable[[Item], Awaitable[bytes | None]] | None,
        caller: Caller,
    ) -> None:
        """Add to the results, those of `ids` or all, what in them and in the query made them alike."""
        for query, best in zip(queries, results, strict=True):
            explained = [result for result in best if ids is None or result.item.id in ids]
            words = await self._explainer.words(parts(query.source), query.parts, caller) if explained else None
            for result in explained:
                result.why = await self._explainer.why(
                    result.item, query.vector, _nearer(query, result), words, original, caller
                )

    async def follow(
        self, request: ScriptRequest, caller: Caller = PROCESS, warn: Callable[[str], None] = lambda _: None
    ) -> list[Followed]:
        """Find `top_k` videos and long sounds whose moments follow the steps best, best first, of those that are among
        the nearest to any step. Raises as `search` does."""
        collection = request.collection
        scope = _Scope(collection, request.modalities or HAVING, request.filter, None, caller, "script")
        embedded = await self._embedded(request.script, scope, warn)
        async with self._scripts:
            hits_by_step = await self._nearest(
                embedded, _COMPARED // len(embedded), scope, with_vector=False, by_modality=True
            )
            query_ids = {step.own for step in embedded}
            items = {hit.item.id: hit.item for hits in hits_by_step for hit in hits if hit.item.id not in query_ids}
            moments = await self._store.moments_of(collection, list(items))
            vectors = np.stack([step.vector for step in embedded])
            matches = await self._embedder.in_worker(partial(follow, vectors, moments, request.top_k))
        previews = {}
        if "preview" in request.include:
            previews = await self._store.shown(collection, [match.id for match in matches])
        return [Followed(items[match.id], match, previews.get(match.id)) for match in matches]

    async def _judged(
        self,
        embedded: Sequence[_EmbeddedQuery],
        results: list[list[Result]],
        scope: _Scope,
        fdr: float | None,
        balanced: int | None = None,
    ) -> list[list[Result]]:
        """Add confidences to the results of queries that are texts. `fdr`: keep what survives at this rate. `balanced`:
        keep so many of each modality, what is least likely by chance first, and then what cannot be judged."""
        textual = [all(isinstance(content, Text) for content, _ in parts(query.source)) for query in embedded]
        if fdr is not None and not all(textual):
            raise InvalidRequest("fdr: only queries that are texts can be judged")
        bank, backgrounds = None, dict[str, Background]()
        if any(textual):
            bank = await self._background.bank()
            backgrounds = await self._store.background(scope.collection, bank.words)
        backgrounds = {name: one for name, one in backgrounds.items() if name in (scope.modalities or backgrounds)}
        answers = []
        for query, text, best in zip(embedded, textual, results, strict=True):
            values: list[float | None] = [None] * len(best)
            if bank is not None and text and best:
                judging = partial(
                    chance.confidences,
                    query.vector,
                    [one.similarity for one in best],
                    np.stack([_nearer(query, one) for one in best]),
                    [one.item.modality for one in best],
                    bank,
                    backgrounds,
                )
                values = await self._embedder.in_worker(judging) if len(best) > _INLINE else judging()
            if fdr is not None and None in values:
                raise InvalidRequest("fdr: this store does not tell what chance gives")
            for one, value in zip(best, values, strict=True):
                one.confidence = value
            if fdr is not None:
                best = list(compress(best, chance.surviving(values, fdr)))
            answers.append(best if balanced is None else _balanced(best, balanced))
        return answers

    async def _ordered(
        self, queries: Sequence[_EmbeddedQuery], scope: _Scope, request: SearchOptions
    ) -> list[list[Result]]:
        strength, pool = request.correction or 0.0, request.pool
        if strength and not self._embedder.manifest.means:
            raise InvalidRequest("correction: this bundle has no means of its modalities")
        depth = min(2 * pool, _DEEPEST) if request.deduplicate else pool
        results = []
        async with self._large if len(queries) * depth > _MANY else nullcontext():
            first = await self._candidates(queries, depth, scope, strength)
            for position, query in enumerate(queries):
                async with self._places:  # for each query anew: between two of them others have their turn
                    candidates = await self._chosen(query, first[position], depth, scope, request)
                    if request.diversity:
                        diversifying = partial(_diversified, candidates, request.diversity, request.top_k)
                        candidates = await self._embedder.in_worker(diversifying)
                results.append(candidates[: request.top_k])
                for result in results[-1] if "explain" in request.include else ():
                    result.explanation = _explanation(result, query, request)
        return results

    async def _nearest(
        self,
        queries: Sequence[_EmbeddedQuery],
        depth: int,
        scope: _Scope,
        *,
        with_vector: bool,
        with_shown: bool = False,
        by_modality: bool = False,
    ) -> list[list[Result]]:
        results: list[list[Result]] = []
        size = 0
        with timed("index"):
            for start in range(0, len(queries), _TOGETHER):
                batch = queries[start : start + _TOGETHER]
                left_out = [query.own for query in batch]
                hits = await self._store.search(
                    VectorSearch(
                        scope.collection,
                        np.stack([query.vector for query in batch]),
                        depth,
                        scope.modalities,
                        scope.filter,
                        left_out if any(left_out) else None,
                        with_vector,
                        with_shown,
                        scope.effort,
                        by_modality,
                    )
                )
                size += sum(hit.item.size for matches in hits for hit in matches)
                if size > MOST_FOUND_BYTES:
                    raise InvalidRequest(TOO_MUCH_FOUND)
                results += [
                    [Result(hit.item, hit.score, hit.score, hit.moment, hit.shown) for hit in matches]
                    for matches in hits
                ]
        return results

    async def _candidates(
        self, queries: Sequence[_EmbeddedQuery], depth: int, scope: _Scope, strength: float
    ) -> list[list[Result]]:
        """Return the `depth` best for each query by corrected similarity, best first.

        The correction is the same for all items of a modality, so that the best of each modality hold the best of all.
        """
        # In one search: an item whose modality changes between two of them would be in neither, or in both.
        results = await self._nearest(queries, depth, scope, with_vector=True, by_modality=bool(strength))
        for query, pool in zip(queries, results, strict=True) if strength else ():
            for result in pool:
                result.correction = self._correction(query, result.item.modality, strength)
            pool.sort(key=lambda result: -result.corrected)
            del pool[depth:]
        return results

    def _correction(self, query: _EmbeddedQuery, modality: str, strength: float) -> float:
        means: dict[Any, list[float]] = {**self._embedder.manifest.means}
        mean = means.get("image" if modality == "video" else modality)
        return 0.0 if mean is None or not strength else strength * float(query.vector @ np.asarray(mean, np.float32))

    async def _chosen(
        self, query: _EmbeddedQuery, candidates: list[Result], depth: int, scope: _Scope, request: SearchOptions
    ) -> list[Result]:
        """Return up to `request.pool` candidates in order, after threshold, fusion and deduplication."""
        count = request.pool
        while True:
            if request.threshold is not None:
                candidates = [result for result in candidates if result.corrected >= request.threshold]
            exhausted = len(candidates) < depth
            for result in candidates:
                result.score = result.corrected
            if request.keywords:
                candidates = await self._fused(query, candidates, depth, scope, request)
            if not request.deduplicate:
                return candidates[:count]
            similarity = request.deduplicate
            if candidates:
                stacked = np.stack([result.vector for result in candidates])
                places = await self._embedder.in_worker(partial(distinct, stacked, similarity))
                candidates = [candidates[place] for place in places]
            if len(candidates) >= count or exhausted or depth >= _DEEPEST:
                return candidates[:count]
            depth = min(4 * depth, _DEEPEST)
            [candidates] = await self._candidates([query], depth, scope, request.correction or 0.0)

    async def _fused(
        self, query: _EmbeddedQuery, candidates: list[Result], depth: int, scope: _Scope, request: SearchOptions
    ) -> list[Result]:
        """Fuse the candidates with the results of the words by reciprocal rank; each list has its best `depth`."""
        keywords = request.keywords
        assert keywords is not None
        with timed("keywords"):
            hits = await self._store.keyword_search(
                KeywordSearch(
                    scope.collection,
                    keywords.query or words_of(query.source),
                    depth,
                    keywords.field,
                    keywords.match == "all",
                    scope.modalities,
                    scope.filter,
                    query.own,
                )
            )
        by_id = {result.item.id: result for result in candidates}
        for place, result in enumerate(candidates, start=1):
            result.vector_rank = place
        worded: list[Result] = []
        for hit in hits:
            if hit.item.id not in by_id:
                assert hit.item.vector is not None
                correction = self._correction(query, hit.item.modality, request.correction or 0.0)
                fresh = Result(hit.item, 0.0, float(query.vector @ hit.item.vector), correction=correction)
                if request.threshold is not None and fresh.corrected < request.threshold:
                    continue
                by_id[hit.item.id] = fresh
            candidate = by_id[hit.item.id]
            worded.append(candidate)
            candidate.keyword_score, candidate.keyword_rank = hit.score, len(worded)
        rankings = [[result.item.id for result in candidates], [result.item.id for result in worded]]
        for id, score in fuse(rankings, (1 - keywords.weight, keywords.weight)).items():
            by_id[id].fused = by_id[id].score = score
        # Equal scores: the nearer one first.
        return sorted(by_id.values(), key=lambda result: (-result.score, -result.similarity))

    async def _embedded(
        self, queries: Sequence[Query], scope: _Scope, warn: Callable[[str], None]
    ) -> list[_EmbeddedQuery]:
        """Embed every query as one unit vector, and each of its parts."""
        contents = [content for query in queries for content, _ in parts(query)]
        ids = [content for content in contents if isinstance(content, str)]
        stored_vectors = await self._store.vectors(scope.collection, ids) if ids else {}
        inputs = [content for content in contents if isinstance(content, Input)]
        embedded = iter(await self._embedder.embed(inputs, scope.caller, admit_unknown=True) if inputs else ())
        embedded_queries = []
        for position, query in enumerate(queries):
            vectors: list[Vectors] = []
            weights = [weight for _, weight in parts(query)]
            try:
                for content, _ in parts(query):
                    if isinstance(content, np.ndarray):
                        vectors.append(unit_vector(content, self._embedder.manifest.dimensions))
                    elif isinstance(content, str):
                        vectors.append(stored_vectors[content])
                    else:
                        result = next(embedded)
                        where = scope.field if scope.field == "query" else f"{scope.field}[{position}]"
                        for warning in unknown_warning(where, result):
                            warn(warning)
                        if isinstance(result, InputError):
                            raise result
                        vectors.append(result.vector)
                vector = weighted_sum(vectors, weights) if isinstance(query, list) else vectors[0]
            except InputError as error:
                raise scope.fail(position, error) from None
            stored_id = query if isinstance(query, str) else None
            embedded_queries.append(_EmbeddedQuery(vector, np.stack(vectors), weights, stored_id, query))
        return embedded_queries


def _balanced(results: list[Result], count: int) -> list[Result]:
    """Keep the `count` first results of each modality, and put what is least likely by chance first. The modalities
    take turns among what is surely no chance, and among what cannot be judged, which comes last."""
    pairs = []
    places: Counter[str] = Counter()
    for result in results:
        modality, confidence = result.item.modality, -1.0 if result.confidence is None else result.confidence
        if places[modality] < count:
            turn = 0 if 0 <= confidence < _SURELY else places[modality]
            pairs.append(((-min(confidence, _SURELY), turn, -confidence, -result.similarity), result))
            places[modality] += 1
    return [result for _, result in sorted(pairs, key=itemgetter(0))]


def parts(query: Query) -> list[tuple[Content, float]]:
    return query if isinstance(query, list) else [(query, 1.0)]


def words_of(query: Query) -> str:
    """Return the text of a query, or of the parts of a composed one that speak for an item."""
    return " ".join(part.text for part, weight in parts(query) if isinstance(part, Text) and weight > 0)


def _diversified(candidates: list[Result], diversity: Diversity, count: int) -> list[Result]:
    if not candidates:
        return candidates
    relevance = np.array([result.score for result in candidates])
    if candidates[0].fused is not None:
        # Fused scores are not similarities: scaled to 0 to 1, they can be weighed against similarities.
        relevance = (relevance - relevance.min()) / max(float(np.ptp(relevance)), 1e-12)
    vectors = np.stack([result.vector for result in candidates])
    return [candidates[place] for place in diverse(relevance, vectors, diversity.trade, count)]


def _nearer(query: _EmbeddedQuery, result: Result) -> Vectors:
    """Return the vector that is nearer to the query: the item's, or that of its moment (of a video or a sound)."""
    if result.moment is None or result.moment.vector is None:
        return result.vector
    return max(result.vector, result.moment.vector, key=lambda vector: float(query.vector @ vector))


def _explanation(result: Result, query: _EmbeddedQuery, request: SearchOptions) -> dict[str, Any]:
    explained: dict[str, Any] = {"similarity": result.similarity}
    if isinstance(query.source, list):
        largest = max(map(abs, query.weights))
        scaled = np.array(query.weights) / largest
        length = np.linalg.norm(scaled @ query.parts.astype(np.float64))
        similar = query.parts.astype(np.float64) @ _nearer(query, result)
        explained["parts"] = [
            {"weight": weight, "similarity": alone, "contribution": share * alone}
            for weight, share, alone in zip(query.weights, (scaled / length).tolist(), similar.tolist(), strict=True)
        ]
    if query.untaught is not None:
        explained["feedback"] = result.similarity - float(query.untaught @ _nearer(query, result))
    if request.correction:
        explained["correction"] = result.correction
    if request.keywords:
        explained |= {
            "vector_rank": result.vector_rank,
            "keyword_rank": result.keyword_rank,
            "keyword_score": result.keyword_score,
            "fused": result.fused,
        }
    return explained


def check_modalities(manifest: Manifest, modalities: Iterable[str] | None, what: str = "modalities") -> None:
    """Raises InvalidRequest for a modality that no item can have."""
    for name in modalities or ():
        if name not in manifest.stored_modalities:
            raise InvalidRequest(f"{what}: there is no {name!r} here, only {', '.join(manifest.stored_modalities)}")


def unit_vector(vector: Sequence[float] | NDArray[np.floating], dimensions: int) -> Vectors:
    """Return a client's vector at unit length, float32 (D,). Raises InputError."""
    if len(vector) != dimensions:
        raise InputError(f"the vector has {len(vector)} numbers; this space has {dimensions}")
    try:
        return l2_normalise(np.asarray(vector, np.float64))
    except ValueError:
        raise InputError("the vector has no direction: it is zero or not finite") from None
