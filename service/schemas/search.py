"""Queries, and what is found."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, InstanceOf, StrictBool, Tag, ValidationInfo, model_validator
from pydantic.json_schema import SkipJsonSchema

from service.schemas.inputs import (
    AudioInput,
    File,
    ImageInput,
    Number,
    RequestModel,
    TextInput,
    VideoInput,
    at_most,
    discriminator,
    present,
    uri_kind,
)
from service.schemas.items import Filter, ItemId, ItemPreview, Name, StoredModality, Vector, storable_text
from service.settings import Limits
from service.store import DEFAULT_COLLECTION

MAX_RESULTS = 25_600
"""Queries × top_k of one request: a response is written in one go, and must not hold the event loop."""
MAX_VECTORS = 2_560
"""The same, where the results carry their vectors."""
MAX_POOL = 1_000
FUSED = 100
"""Of each ranking that are fused, at least."""


class VectorQuery(RequestModel):
    vector: Vector


class IdQuery(RequestModel):
    id: ItemId = Field(description="A stored item; it is not among its own results.")


class _Weighted(RequestModel):
    weight: Number = 1.0


class WeightedText(TextInput, _Weighted): ...


class WeightedImage(ImageInput, _Weighted): ...


class WeightedAudio(AudioInput, _Weighted): ...


class WeightedFile(_Weighted):
    """A part that takes a file of the form; see place_query."""

    file: InstanceOf[File]


class WeightedVideo(VideoInput, _Weighted): ...


class WeightedVector(VectorQuery, _Weighted): ...


class WeightedId(IdQuery, _Weighted): ...


Part = Annotated[
    Annotated[WeightedText, Tag("text")]
    | Annotated[WeightedImage, Tag("image")]
    | Annotated[WeightedAudio, Tag("audio")]
    | SkipJsonSchema[Annotated[WeightedFile, Tag("named_file")]]
    | Annotated[WeightedVideo, Tag("video")]
    | Annotated[WeightedVector, Tag("vector")]
    | Annotated[WeightedId, Tag("id")],
    discriminator("text", "image", "audio", "video", "vector", "id"),
]


class ComposeQuery(RequestModel):
    """The weighted sum of unit vectors, scaled to length 1."""

    compose: list[Part] = Field(min_length=1, max_length=32)


Query = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[TextInput, Tag("text")]
    | Annotated[ImageInput, Tag("image")]
    | Annotated[AudioInput, Tag("audio")]
    | Annotated[VideoInput, Tag("video")]
    | Annotated[VectorQuery, Tag("vector")]
    | Annotated[IdQuery, Tag("id")]
    | Annotated[ComposeQuery, Tag("compose")]
    | SkipJsonSchema[Annotated[InstanceOf[File], Tag("file")]],
    discriminator("text", "image", "audio", "video", "vector", "id", "compose"),
]


def _top_k(value: int, info: ValidationInfo) -> int:
    limits = info.context if isinstance(info.context, Limits) else Limits()
    if value > limits.top_k:
        raise ValueError(f"top_k is at most {limits.top_k}")
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


class Rerank(RequestModel):
    """Order the best again by their tokens, where the bundle has token vectors and the collection keeps them."""

    method: Literal["maxsim", "transport"]
    weight: Number = Field(default=0.5, ge=0, le=1, description="Of the tokens' score; the similarity has the rest.")
    pool: int = Field(default=100, ge=1, le=MAX_POOL, strict=True, description="How many of the best are reranked.")


class SearchEffort(RequestModel):
    """How hard an index tries, for this request alone. What its kind does not know is left aside."""

    ef_search: int | None = Field(default=None, ge=1, le=4_096, strict=True, description="Of hnsw.")
    nprobe: int | None = Field(default=None, ge=1, le=65_536, strict=True, description="Of the ivf kinds, binary.")
    rescore: int | None = Field(
        default=None, ge=1, le=10_000, strict=True, description="Candidates scored by their stored vectors, of codes."
    )
    exact: StrictBool = Field(default=False, description="Look at every item; of an index of codes, at every code.")


class SearchRequest(RequestModel):
    """Exactly one of query and queries.

    What comes first is decided in this order: similarity (less the `correction`), `threshold`, fusion with `keywords`,
    `deduplicate`, `rerank`, `diversity`, `top_k`.
    """

    query: Query | None = None
    queries: Annotated[list[Query], Field(min_length=1), at_most(lambda limits: limits.inputs, "queries")] | None = None
    top_k: TopK = 10
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
    rerank: Rerank | None = None
    diversity: Diversity | None = None
    include: list[Literal["metadata", "vector", "explain", "preview"]] = Field(default=["metadata"], max_length=8)

    @model_validator(mode="after")
    def _bounded(self, info: ValidationInfo) -> "SearchRequest":
        if (self.query is None) == (self.queries is None):
            raise ValueError("give exactly one of: query, queries")
        limits = info.context if isinstance(info.context, Limits) else Limits()
        if sum(len(parts(each)) for each in self.asked) > limits.inputs:
            raise ValueError(f"at most {limits.inputs} parts of queries in one request")
        bound = MAX_VECTORS if {"vector", "explain"} & set(self.include) else MAX_RESULTS
        if len(self.asked) * self.top_k > bound:
            raise ValueError(f"queries × top_k is at most {bound} with these fields to include")
        if len(self.asked) * self.pool > MAX_RESULTS:
            raise ValueError(f"queries × pool is at most {MAX_RESULTS}")
        if self.keywords is not None and self.keywords.query is None:
            for each in self.asked:
                if not words_of(each):
                    raise ValueError("keywords.query is needed where a query has no text")
        return self

    @property
    def pool(self) -> int:
        """How many candidates each query needs."""
        pools = [each.pool for each in (self.rerank, self.diversity) if each is not None]
        return max([self.top_k, *pools, *([FUSED] if self.keywords else [])])

    @property
    def asked(self) -> Sequence[Query]:
        return self.queries if self.queries is not None else [] if self.query is None else [self.query]


def words_of(query: Query) -> str:
    """The text of a query, or of the parts of a composed one that speak for an item; empty where there is none."""
    texts = []
    for part in parts(query):
        if isinstance(part, str):
            texts += [] if uri_kind(part) else [part]
        elif isinstance(part, TextInput) and not (isinstance(part, _Weighted) and part.weight <= 0):
            texts.append(part.text)
    return " ".join(texts)


def parts(query: Query) -> Sequence[Query | Part]:
    return query.compose if isinstance(query, ComposeQuery) else [query]


def place_query(body: dict[str, Any], files: list[File]) -> None:
    """Files go, in order, to the parts of a composed query that have no input. Else one is the query, several the
    queries."""
    query = body.get("query")
    if isinstance(query, dict) and isinstance(query.get("compose"), list):
        waiting = [part for part in query["compose"] if isinstance(part, dict) and not present(part) - {"weight"}]
        for part, file in zip(waiting, files, strict=False):
            part["file"] = file
        files = files[len(waiting) :]
    if len(files) == 1 and not body.keys() & {"query", "queries"}:
        body["query"] = files[0]
    elif files:
        given = body.get("queries", [])
        body["queries"] = [*given, *files] if isinstance(given, list) else given


class ExplainedPart(BaseModel):
    weight: float
    similarity: float = Field(description="Of the part alone.")
    contribution: float = Field(description="To the similarity of the whole; they add up to it.")


class Explanation(BaseModel):
    similarity: float = Field(description="Cosine similarity of the query and the item.")
    parts: list[ExplainedPart] | None = Field(default=None, description="Of a composed query.")
    correction: float | None = Field(default=None, description="What was taken off the similarity.")
    vector_rank: int | None = Field(default=None, description="With keywords: the place among the vectors, from 1.")
    keyword_rank: int | None = Field(default=None, description="With keywords: the place among the words, from 1.")
    keyword_score: float | None = Field(default=None, description="BM25.")
    fused: float | None = Field(default=None, description="Σ weight / (60 + rank).")
    tokens: float | None = Field(default=None, description="The reranker's score; null for an item without tokens.")
    heat: list[float] | None = Field(
        default=None, description="With maxsim: of each of the item's tokens, the similarity to the query's nearest."
    )


class ResultMoment(BaseModel):
    """What of a video or a long sound is most like the query."""

    start: float = Field(description="Seconds.")
    end: float
    modality: Literal["image", "audio"] = Field(description="image: a frame from the middle; audio: the sound.")


class SearchResult(BaseModel):
    id: str
    score: float = Field(
        description="Cosine similarity, less the correction; with keywords the fused score, with rerank the weighted "
        "mean of the similarity and the tokens' score."
    )
    modality: StoredModality
    metadata: dict[str, Any] | None = None
    vector: list[float] | None = None
    preview: ItemPreview | None = None
    moment: ResultMoment | None = Field(default=None, description="Of a video, or of a sound longer than 10 s.")
    explain: Explanation | None = None


class SearchResponse(BaseModel):
    results: list[SearchResult] | list[list[SearchResult]] = Field(
        description="Best first; for `queries` one list for each."
    )
    took_ms: float
    warnings: list[str] | None = Field(
        default=None,
        description="Queries of which the model's tokenizer knows little or nothing; absent if there are none.",
    )
