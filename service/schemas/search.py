"""Queries and search results."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StrictBool,
    ValidationInfo,
    model_validator,
)

from service.engine.inputs import Input, StoredModality, Text
from service.schemas.inputs import (
    FILE,
    KINDS,
    MAX_PARTS,
    STRING,
    WEIGHTED_KINDS,
    File,
    Number,
    RequestModel,
    append_files,
    at_most,
    branch,
    fill_parts,
    limits_of,
    one_of,
    weighted,
)
from service.schemas.items import Filter, ItemId, ItemPreview, Name, Vector, storable_text
from service.store import DEFAULT_COLLECTION

MAX_RESULTS = 25_600
"""Largest queries × top_k of one request: a response is written at once, and must not hold the event loop."""
MAX_VECTORS = 2_560
"""The same, where the results carry their vectors."""
MAX_WHY = 10
"""Largest number of results of one request that are explained: each embeds some dozens of parts of a medium."""
MAX_POOL = 1_000
FUSED = 100
"""Smallest number of results that are fused from each ranking."""


class VectorQuery(RequestModel):
    vector: Vector


class IdQuery(RequestModel):
    id: ItemId = Field(
        description="A stored item. It is not among its own results, unless as a part of a composed query."
    )


Content = Input | NDArray[np.floating] | str
"""An input of the engine, a vector (D,), or the id of a stored item."""
Part = Annotated[
    tuple[Content, float], one_of(*WEIGHTED_KINDS, weighted(VectorQuery, "vector"), weighted(IdQuery, "id"))
]


class ComposeQuery(RequestModel):
    """The weighted sum of unit vectors, scaled to length 1."""

    compose: Annotated[
        list[Part], Field(min_length=1, max_length=MAX_PARTS), at_most(lambda limits: limits.inputs, "parts")
    ]


Query = Annotated[
    Content | list[tuple[Content, float]],
    one_of(STRING, *KINDS, branch(VectorQuery, "vector"), branch(IdQuery, "id"), branch(ComposeQuery, "compose"), FILE),
]
"""The content to search for, or its weighted parts."""


def _top_k(value: int, info: ValidationInfo) -> int:
    most = limits_of(info).top_k
    if value > most:
        raise ValueError(f"top_k is at most {most}")
    return value


TopK = Annotated[int, Field(ge=1, strict=True), AfterValidator(_top_k)]


class Keywords(RequestModel):
    """A search for words beside the one for meaning; the two rankings are fused by reciprocal rank."""

    query: Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(storable_text)] | None = Field(
        default=None, description='Words and "quoted phrases"; without it the words of the query itself.'
    )
    field: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="`text`, or one of the collection's keyword fields; without it all of them."
    )
    match: Literal["any", "all"] = Field(default="any", description="Whether an item must hold all the words.")
    weight: Number = Field(
        default=0.5, ge=0, le=1, description="Of the words' ranking; that of the vectors has the rest."
    )


class Diversity(RequestModel):
    """Maximal marginal relevance: each result is weighed against its likeness to those before it."""

    trade: Number = Field(
        default=0.5, ge=0, le=1, alias="lambda", description="1: relevance alone. 0: unlike what came before, alone."
    )
    pool: int = Field(default=100, ge=1, le=MAX_POOL, strict=True, description="How many of the best are chosen from.")


class SearchEffort(RequestModel):
    """Effort of the index for this request alone. Options that its kind does not have are ignored."""

    ef_search: int | None = Field(default=None, ge=1, le=4_096, strict=True, description="Of hnsw.")
    nprobe: int | None = Field(default=None, ge=1, le=65_536, strict=True, description="Of ivf_pq.")
    rescore: int | None = Field(
        default=None, ge=1, le=10_000, strict=True, description="Candidates scored by their stored vectors, of codes."
    )
    exact: StrictBool = Field(default=False, description="Look at every item; of an index of codes, at every code.")


class SearchOptions(RequestModel, ABC):
    """The options that a search of one query and one of many share."""

    field: ClassVar[str]
    """What the request calls its queries."""
    top_k: TopK = Field(
        default=10,
        description="Number of results for a query. What comes first is decided in this order: similarity (less the "
        "`correction`), `threshold`, fusion with `keywords`, `deduplicate`, `diversity`, `top_k`.",
    )
    collection: Name = DEFAULT_COLLECTION
    modalities: Annotated[list[StoredModality], Field(min_length=1, max_length=16)] | None = None
    filter: Filter | None = None
    effort: SearchEffort | None = None
    correction: Number | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Takes so much of the query's similarity to the mean of an item's modality off each score, so that "
        "no modality comes first for being nearer as a whole. 0 is none, 1 all of it.",
    )
    threshold: Number | None = Field(default=None, description="Leave out what is less similar (after the correction).")
    keywords: Keywords | None = None
    deduplicate: Number | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Leave out what is as similar as this to a better result. 1: the same content under other ids.",
    )
    fdr: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Keep only results that are no chance: of what is kept, a share of at most `fdr` is expected to "
        "be wrong, and of searches for what is not there, a share of at most `fdr` finds something. For queries that "
        "are texts; judged by the similarity, whatever the order.",
    )
    diversity: Diversity | None = None
    feedback: StrictBool = Field(
        default=True, description="Whether to search with what the collection was taught (POST /feedback)."
    )
    balance: StrictBool = Field(
        default=False,
        description="`top_k` then counts for each modality, and what is least likely by chance among its own kind "
        "comes first. `counts` tells how many items of each there are. It goes without correction, threshold, "
        "keywords, deduplicate, diversity and explain.",
    )
    include: list[Literal["metadata", "vector", "explain", "preview", "confidence", "why"]] = Field(
        default=["metadata"], max_length=8
    )
    why_of: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_WHY)] | None = Field(
        default=None,
        description="With `why` included: the items it is for, where they are among the results; else all.",
    )

    def check_results(self, kinds: int = 1) -> None:
        """Raises ValueError for more results than a request may have, where `balance` counts so many modalities."""
        bound = MAX_VECTORS if {"vector", "explain"} & set(self.include) else MAX_RESULTS
        if len(self.asked) * self.top_k * kinds > bound:
            product = f"queries × top_k × {kinds} modalities" if kinds > 1 else "queries × top_k"
            raise ValueError(f"{product} is at most {bound} with these fields to include")
        explained = self.top_k * kinds if self.why_of is None else len(self.why_of)
        if "why" in self.include and len(self.asked) * explained > MAX_WHY:
            raise ValueError(f"why is for at most {MAX_WHY} results of a request: lower top_k, or name them in why_of")

    @model_validator(mode="after")
    def _bounded(self, info: ValidationInfo) -> Self:
        most = limits_of(info).inputs
        if sum(len(query) if isinstance(query, list) else 1 for query in self.asked) > most:
            raise ValueError(f"at most {most} parts of queries in one request")
        if self.balance and ("explain" in self.include or self.reordered):
            raise ValueError("balance goes without other orders (correction, threshold, keywords, …) and explain")
        self.check_results()
        if self.why_of is not None and "why" not in self.include:
            raise ValueError('why_of goes with "why" in include')
        if len(self.asked) * self.pool > MAX_RESULTS:
            raise ValueError(f"queries × pool is at most {MAX_RESULTS}")
        if self.keywords is not None and self.keywords.query is None:
            for query in self.asked:
                if not any(
                    isinstance(part, Text) and part.text and weight > 0
                    for part, weight in (query if isinstance(query, list) else [(query, 1.0)])
                ):
                    raise ValueError("keywords.query is needed where a query has no text")
        return self

    @property
    def reordered(self) -> bool:
        """Return whether another order is asked for than that of cosine similarity."""
        others = (self.correction, self.threshold, self.keywords, self.deduplicate, self.diversity)
        return any(other is not None for other in others)

    @property
    def pool(self) -> int:
        """Return the number of candidates that each query needs."""
        diversity_pool = self.diversity.pool if self.diversity else 0
        return max(self.top_k, diversity_pool, FUSED if self.keywords else 0)

    @property
    @abstractmethod
    def asked(self) -> Sequence[Query]:
        """Return the queries."""


def _without(value: Any, field: str, advice: str) -> Any:
    """Return a body without a field of the other route, where that is null. Raises ValueError where it is not."""
    if isinstance(value, dict) and value.get(field) is not None:
        raise ValueError(advice)
    return {name: given for name, given in value.items() if name != field} if isinstance(value, dict) else value


class SearchRequest(SearchOptions):
    """A query, and how to search for it."""

    field: ClassVar[str] = "query"
    query: Query

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return _without(value, "queries", "this route takes one query: send several to POST /search/batch, as queries")

    @property
    def asked(self) -> Sequence[Query]:
        return [self.query]


class SearchBatchRequest(SearchOptions):
    """Several queries, and how to search for each of them."""

    field: ClassVar[str] = "queries"
    queries: Annotated[list[Query], Field(min_length=1), at_most(lambda limits: limits.inputs, "queries")]

    @model_validator(mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        return _without(value, "query", "this route takes queries, a list: send one query to POST /search")

    @property
    def asked(self) -> Sequence[Query]:
        return self.queries


class ScriptRequest(RequestModel):
    """Steps that a video or a long sound is to have one after the other, with any time between them."""

    script: Annotated[list[Query], Field(min_length=2, max_length=16), at_most(lambda limits: limits.inputs, "steps")]
    top_k: Annotated[int, Field(ge=1, le=100, strict=True), AfterValidator(_top_k)] = 10
    collection: Name = DEFAULT_COLLECTION
    modalities: Annotated[list[Literal["video", "audio"]], Field(min_length=1, max_length=2)] | None = None
    filter: Filter | None = None
    include: list[Literal["metadata", "preview"]] = Field(default=["metadata"], max_length=2)


def place_steps(body: dict[str, Any], files: list[File]) -> None:
    """Give files, in order, to the steps that have no input, or append them."""
    body["script"] = append_files(body.get("script", []), files)


def place_query(body: dict[str, Any], files: list[File]) -> None:
    """Give files, in order, to a query, or the parts of a composed one, without an input; otherwise one file is the
    query."""
    files = fill_parts(body.get("query"), files)
    if len(files) == 1 and "query" not in body:
        body["query"] = files[0]
    elif files:
        body["queries"] = files  # which SearchRequest refuses, and says where they go


def place_queries(body: dict[str, Any], files: list[File]) -> None:
    """Give files, in order, to the queries that have no input, or append them."""
    body["queries"] = append_files(body.get("queries", []), files)


class ExplainedPart(BaseModel):
    weight: float
    similarity: float = Field(description="Of the part alone.")
    contribution: float = Field(description="To the similarity of the whole; they add up to it.")


class Explanation(BaseModel):
    similarity: float = Field(description="Cosine similarity of the query and the item.")
    parts: list[ExplainedPart] | None = Field(default=None, description="Of a composed query.")
    feedback: float | None = Field(default=None, description="What the collection's feedback added to the similarity.")
    correction: float | None = Field(default=None, description="What was taken off the similarity.")
    vector_rank: int | None = Field(default=None, description="With keywords: the place among the vectors, from 1.")
    keyword_rank: int | None = Field(default=None, description="With keywords: the place among the words, from 1.")
    keyword_score: float | None = Field(default=None, description="BM25.")
    fused: float | None = Field(default=None, description="Σ weight / (60 + rank).")


class ResultMoment(BaseModel):
    """The part of a video or a long sound that is most like the query."""

    start: float = Field(description="Seconds.")
    end: float
    modality: Literal["image", "audio"] = Field(description="image: a frame from the middle; audio: the sound.")


class ScriptStep(ResultMoment):
    similarity: float = Field(description="Cosine similarity of the step and the moment.")


class ScriptResult(BaseModel):
    id: str
    score: float = Field(
        description="Power mean (exponent 1/2) over the steps of how much more similar their moments are than the "
        "average moment of their kind; 0 for a step without a moment."
    )
    modality: StoredModality
    metadata: dict[str, Any] | None = None
    preview: ItemPreview | None = None
    steps: list[ScriptStep | None] = Field(
        description="The moment of each step, each later than the one before; null where there is none."
    )


class ScriptResponse(BaseModel):
    results: list[ScriptResult] = Field(description="Best first.")
    took_ms: float
    warnings: list[str] | None = None


class WhyPart(ResultMoment):
    """A part of a sound or a film."""

    similarity: float = Field(
        description="Of a moment to the query; of a second the mean over windows of 3 s that hold it."
    )


class WhyWord(BaseModel):
    text: str = Field(description="A word of the query; several words where it has more than 24.")
    contribution: float = Field(description="What the similarity loses without it; below 0 where it gains.")


class Why(BaseModel):
    """Holds what carried a result. A field that there is nothing for is absent."""

    cells: list[list[float]] | None = Field(
        default=None,
        description="Of a picture, 6 × 6, row by row from the top left: by how much the cell is more similar to the "
        "query than the whole picture.",
    )
    parts: list[WhyPart] | None = Field(
        default=None,
        description="Of a sound of up to 20 s: its seconds; one part of a sound of up to 3 s. Of a film or a longer "
        "sound: its stored moments, the 200 best. In the order of time.",
    )
    words: list[WhyWord] | None = Field(default=None, description="Of the query, in their order.")


class SearchResult(BaseModel):
    id: str
    score: float = Field(description="Cosine similarity, less the correction; with keywords the fused score.")
    confidence: float | None = Field(
        default=None,
        description="The chance that no item would fit the query as well by chance: comparable between queries, "
        "modalities and collections. null where it cannot be judged: the query is no text.",
    )
    modality: StoredModality
    metadata: dict[str, Any] | None = None
    vector: list[float] | None = None
    preview: ItemPreview | None = None
    moment: ResultMoment | None = Field(default=None, description="Of a video, or of a sound longer than 10 s.")
    explain: Explanation | None = None
    why: Why | None = Field(
        default=None,
        description="With `why` included; null where nothing is at hand: no preview, no original, no moments, and a "
        "query without words.",
    )


class SearchAnswer(BaseModel):
    """The fields that the answers to one query and to many share."""

    counts: dict[StoredModality, int] | None = Field(
        default=None, description="With `balance`: how many items of each modality there are that pass the filter."
    )
    feedback: int | None = Field(
        default=None, description="The version of the collection's feedback that was searched with; absent for none."
    )
    took_ms: float
    warnings: list[str] | None = Field(
        default=None,
        description="Queries of which the model's tokenizer knows little or nothing; absent if there are none.",
    )


class SearchResponse(SearchAnswer):
    results: list[SearchResult] = Field(description="Best first.")
    nothing: bool | None = Field(
        default=None,
        description="With `confidence` included: whether an `fdr` of 0.3 would keep nothing. null where no result can "
        "be judged.",
    )


class SearchBatchResponse(SearchAnswer):
    results: list[list[SearchResult]] = Field(description="A list for each query, in their order; best first.")
    nothing: list[bool | None] | None = Field(
        default=None, description="With `confidence` included: for each query, as POST /search answers it."
    )
