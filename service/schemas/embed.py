"""POST /embed and POST /score."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.contract.bundle import Modality
from service.contract.tokens import Role
from service.schemas.inputs import AnyInput, Inputs, ModelName, RequestModel, at_most

Encoding = Literal["float", "base64", "int8", "binary"]
OnError = Annotated[
    Literal["fail", "null"],
    Field(description="fail: one bad input fails the request. null: an error object stands in its place."),
]


class EmbedRequest(RequestModel):
    inputs: Inputs
    model: ModelName = None
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        default=None, description="Keep this many leading dimensions, renormalised. Default: all."
    )
    encoding: Encoding = Field(
        default="float",
        description="float: numbers. base64: of little-endian float32. "
        "int8: round(127 x / r), cut to [-127, 127], where r = min(1, 5 / sqrt(dimensions)) for every vector. "
        "binary: the bits x > 0, eight to a byte, first dimension in the highest bit, zeros at the end.",
    )
    role: Role = Field(
        default="query",
        description="Which instruction goes before the texts, where the encoder wants one: that of what is asked, or "
        "that of what is stored and found.",
    )
    on_error: OnError = "fail"


class InputProblem(BaseModel):
    code: str
    detail: str


class Embedding(BaseModel):
    index: int
    modality: Modality | None = None
    embedding: list[float] | list[int] | str | None = None
    truncated: bool = Field(
        default=False,
        description="The text was cut to the tower's length; or the file of an image or a sound ends early or is "
        "damaged in places, and what can be read of it was embedded.",
    )
    unknown: float = Field(
        default=0.0,
        description="The share of the text's words and signs that the model's tokenizer does not know, 0 to 1; a text "
        "of which it knows nothing is an error.",
    )
    error: InputProblem | None = None


class EmbedResponse(BaseModel):
    space: str
    dimensions: int
    encoding: Encoding
    embeddings: list[Embedding]


class Pair(RequestModel):
    a: AnyInput
    b: AnyInput


class ScoreRequest(RequestModel):
    model: ModelName = None
    pairs: Annotated[list[Pair], Field(min_length=1), at_most(lambda limits: max(2, limits.inputs), "pairs", "a", "b")]


class ScoreResponse(BaseModel):
    space: str
    scores: list[float] = Field(description="Cosine similarity of each pair, in [-1, 1].")
