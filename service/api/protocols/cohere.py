"""`cohere`: POST /v2/embed and POST /v2/rerank, for Cohere's clients."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from fastapi import APIRouter, Depends
from numpy.typing import NDArray
from pydantic import BaseModel, Field, PrivateAttr, model_validator

from service.api.protocols.protocol import Protocol, Refusal
from service.api.protocols.vectors import ranked, vectors_of, warning_field, warnings_of
from service.api.reading import documented, reader
from service.api.responses import JSON, encoded
from service.api.state import CallerDep, StateDep
from service.engine.inputs import Fused, Input, Media, Text, Url, in_role, parts_of
from service.runtime.logs import request_id
from service.schemas.inputs import MAX_PARTS, RequestModel, at_most, read_as
from service.schemas.openai import ROLES, ContentPart

router = APIRouter(prefix="/v2", tags=["cohere"])
_DIMENSIONS = "output_dimension"
Kind = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
ATextInput = Annotated[Input, read_as("text")]
Priority = Annotated[int, Field(ge=0, le=999, description="Not read: it changes no answer.")]


class CohereInput(RequestModel):
    """An input whose parts share one vector: the sum of their unit vectors, scaled to length 1."""

    content: Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS)]

    @property
    def input(self) -> Input:
        parts = [part.input for part in self.content]
        return parts[0] if len(parts) == 1 else Fused(tuple((part, 1.0) for part in parts))


class CohereEmbedRequest(RequestModel):
    """Exactly one of texts, images, inputs."""

    model: str
    input_type: Literal["search_document", "search_query", "classification", "clustering", "image"]
    texts: Annotated[list[ATextInput], Field(min_length=1), at_most(lambda limits: limits.inputs, "texts")] | None = (
        None
    )
    images: (
        Annotated[
            list[Annotated[Input, read_as("image")]],
            Field(min_length=1),
            at_most(lambda limits: limits.inputs, "images"),
        ]
        | None
    ) = None
    inputs: (
        Annotated[list[CohereInput], Field(min_length=1), at_most(lambda limits: limits.inputs, "inputs", "content")]
        | None
    ) = None
    embedding_types: Annotated[list[Kind], Field(min_length=1, max_length=6)] = Field(default=["float"])
    output_dimension: Annotated[int, Field(ge=1, strict=True)] | None = None
    truncate: Literal["NONE", "END"] = "END"
    priority: Priority = 0

    _inputs: Sequence[Input] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        fused = None if self.inputs is None else [value.input for value in self.inputs]
        sources = [source for source in (self.texts, self.images, fused) if source is not None]
        if len(sources) != 1:
            raise ValueError("give exactly one of: texts, images, inputs")
        self._inputs = in_role(sources[0], ROLES[self.input_type])
        return self

    @property
    def given(self) -> Sequence[Input]:
        return self._inputs

    @property
    def field(self) -> str:
        return "texts" if self.texts is not None else "images" if self.images is not None else "inputs"


class CohereRerankRequest(RequestModel):
    model: str
    query: ATextInput
    documents: Annotated[
        list[ATextInput], Field(min_length=1), at_most(lambda limits: limits.openai_inputs, "documents")
    ]
    top_n: Annotated[int, Field(ge=1, strict=True)] | None = Field(default=None, description="Default: all.")
    priority: Priority = 0


class CohereEmbedResponse(BaseModel):
    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: dict[Kind, list[list[float] | list[int] | str]] = Field(
        description="float, int8 and base64 as in POST /embed; uint8 is int8 + 128; ubinary is its binary, and binary "
        "is that - 128."
    )
    texts: list[str]
    meta: dict[str, Any]


class CohereRanked(BaseModel):
    index: int
    relevance_score: float = Field(description="Cosine similarity of the query and the document, in [-1, 1].")


class CohereRerankResponse(BaseModel):
    id: str
    results: list[CohereRanked] = Field(description="Best first.")
    meta: dict[str, Any]


class CohereError(BaseModel):
    id: str
    message: str


EmbedBody = Annotated[CohereEmbedRequest, Depends(reader(CohereEmbedRequest))]
RerankBody = Annotated[CohereRerankRequest, Depends(reader(CohereRerankRequest))]
_EMBED_EXAMPLE = {"model": "starter", "input_type": "search_query", "texts": ["a dog on a beach"]}
_RERANK_EXAMPLE = {"model": "starter", "query": "a dog on a beach", "documents": ["waves and a dog", "heavy rain"]}


@router.post("/embed", response_model=CohereEmbedResponse, openapi_extra=documented(CohereEmbedRequest, _EMBED_EXAMPLE))
async def embed_like_cohere(body: EmbedBody, state: StateDep, caller: CallerDep) -> JSON:
    """Embed texts, images, or inputs of several parts that share one vector."""
    model = state.model(body.model)
    results = await vectors_of(model, body.given, caller, field=body.field, cut=body.truncate == "END")
    embeddings = {
        kind: [_encoded(result.vector, body.output_dimension, kind) for result in results]
        for kind in body.embedding_types
    }
    texts = [] if body.texts is None else [input.text for input in body.texts if isinstance(input, Text)]
    units = {"input_tokens": sum(result.tokens for result in results), "images": _count_pictures(body.given)}
    answer = {"id": request_id.get(), "response_type": "embeddings_by_type", "embeddings": embeddings, "texts": texts}
    return JSON(answer | {"meta": _meta(units, warnings_of(body.field, results))})


@router.post(
    "/rerank", response_model=CohereRerankResponse, openapi_extra=documented(CohereRerankRequest, _RERANK_EXAMPLE)
)
async def rerank_like_cohere(body: RerankBody, state: StateDep, caller: CallerDep) -> JSON:
    """Order texts by their similarity to a query, in the model's space: there is no cross-encoder here."""
    ranking = await ranked(state.model(body.model), body.query, body.documents, caller, field="documents")
    results = [{"index": index, "relevance_score": score} for index, score in ranking.best[: body.top_n]]
    return JSON({"id": request_id.get(), "results": results, "meta": _meta({"search_units": 1}, ranking.warnings)})


def _count_pictures(inputs: Sequence[Input]) -> int:
    parts = [part for input in inputs for part in parts_of(input)]
    return sum(isinstance(part, Media | Url) and part.modality == "image" for part in parts)


def _encoded(vector: NDArray[np.float32], dimensions: int | None, kind: Kind) -> NDArray[Any] | str:
    match kind:
        case "float" | "int8" | "base64":
            return encoded(vector, dimensions, kind, _DIMENSIONS)
        case "uint8":
            return np.asarray(encoded(vector, dimensions, "int8", _DIMENSIONS), np.int16) + np.int16(128)
        case "ubinary":
            return encoded(vector, dimensions, "binary", _DIMENSIONS)
        case "binary":
            return np.asarray(encoded(vector, dimensions, "binary", _DIMENSIONS), np.int16) - np.int16(128)


def _meta(units: dict[str, int], warnings: Sequence[str]) -> dict[str, Any]:
    return {"api_version": {"version": "2"}, "billed_units": units} | warning_field(warnings)


def _error(refusal: Refusal) -> dict[str, Any]:
    return {"id": request_id.get(), "message": refusal.message}


PROTOCOL = Protocol("cohere", router, ("/v2",), frozenset({"/v2/embed", "/v2/rerank"}), _error, CohereError)
