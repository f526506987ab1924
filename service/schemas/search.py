"""Queries, and what is found."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, InstanceOf, Tag, ValidationInfo, model_validator
from pydantic.json_schema import SkipJsonSchema

from service.schemas.inputs import (
    AudioInput,
    File,
    ImageInput,
    RequestModel,
    TextInput,
    at_most,
    discriminator,
)
from service.schemas.items import Filter, ItemId, Name, StoredModality, Vector
from service.settings import Limits
from service.store import DEFAULT_COLLECTION

MAX_RESULTS = 25_600
"""Queries × top_k of one request: a response is written in one go, and must not hold the event loop."""
MAX_VECTORS = 2_560
"""The same, where the results carry their vectors."""


class VectorQuery(RequestModel):
    vector: Vector


class IdQuery(RequestModel):
    id: ItemId = Field(description="A stored item; it is not among its own results.")


class _Weighted(RequestModel):
    weight: float = 1.0


class WeightedText(TextInput, _Weighted): ...


class WeightedImage(ImageInput, _Weighted): ...


class WeightedAudio(AudioInput, _Weighted): ...


class WeightedVector(VectorQuery, _Weighted): ...


class WeightedId(IdQuery, _Weighted): ...


Part = Annotated[
    Annotated[WeightedText, Tag("text")]
    | Annotated[WeightedImage, Tag("image")]
    | Annotated[WeightedAudio, Tag("audio")]
    | Annotated[WeightedVector, Tag("vector")]
    | Annotated[WeightedId, Tag("id")],
    discriminator("text", "image", "audio", "vector", "id"),
]


class ComposeQuery(RequestModel):
    """The weighted sum of unit vectors, scaled to length 1."""

    compose: list[Part] = Field(min_length=1, max_length=32)


Query = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[TextInput, Tag("text")]
    | Annotated[ImageInput, Tag("image")]
    | Annotated[AudioInput, Tag("audio")]
    | Annotated[VectorQuery, Tag("vector")]
    | Annotated[IdQuery, Tag("id")]
    | Annotated[ComposeQuery, Tag("compose")]
    | SkipJsonSchema[Annotated[InstanceOf[File], Tag("file")]],
    discriminator("text", "image", "audio", "vector", "id", "compose"),
]


def _top_k(value: int, info: ValidationInfo) -> int:
    limits = info.context if isinstance(info.context, Limits) else Limits()
    if value > limits.top_k:
        raise ValueError(f"top_k is at most {limits.top_k}")
    return value


TopK = Annotated[int, Field(ge=1, strict=True), AfterValidator(_top_k)]


class SearchRequest(RequestModel):
    """Exactly one of query and queries."""

    query: Query | None = None
    queries: Annotated[list[Query], Field(min_length=1), at_most(lambda limits: limits.inputs, "queries")] | None = None
    top_k: TopK = 10
    collection: Name = DEFAULT_COLLECTION
    modalities: Annotated[list[StoredModality], Field(min_length=1)] | None = None
    filter: Filter | None = None
    include: list[Literal["metadata", "vector"]] = Field(default=["metadata"])

    @model_validator(mode="after")
    def _bounded(self, info: ValidationInfo) -> "SearchRequest":
        if (self.query is None) == (self.queries is None):
            raise ValueError("give exactly one of: query, queries")
        limits = info.context if isinstance(info.context, Limits) else Limits()
        if sum(len(parts(each)) for each in self.asked) > limits.inputs:
            raise ValueError(f"at most {limits.inputs} parts of queries in one request")
        bound = MAX_VECTORS if "vector" in self.include else MAX_RESULTS
        if len(self.asked) * self.top_k > bound:
            raise ValueError(f"queries × top_k is at most {bound} with these fields to include")
        return self

    @property
    def asked(self) -> Sequence[Query]:
        return self.queries if self.queries is not None else [] if self.query is None else [self.query]


def parts(query: Query) -> Sequence[Query | Part]:
    return query.compose if isinstance(query, ComposeQuery) else [query]


def place_query(body: dict[str, Any], files: list[File]) -> None:
    """One file is the query, several are the queries."""
    if len(files) == 1 and not body.keys() & {"query", "queries"}:
        body["query"] = files[0]
    elif files:
        given = body.get("queries", [])
        body["queries"] = [*given, *files] if isinstance(given, list) else given


class SearchResult(BaseModel):
    id: str
    score: float = Field(description="Cosine similarity.")
    modality: StoredModality
    metadata: dict[str, Any] | None = None
    vector: list[float] | None = None


class SearchResponse(BaseModel):
    results: list[SearchResult] | list[list[SearchResult]] = Field(
        description="Best first; for `queries` one list for each."
    )
    took_ms: float
