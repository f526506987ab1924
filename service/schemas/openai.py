"""POST /v1/embeddings and GET /v1/models, as OpenAI's clients write and read them."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictInt, Tag

from service.contract.tokens import Role
from service.schemas.inputs import AudioInput, ImageInput, RequestModel, TextInput, at_most, kind_of

TokenList = Annotated[
    list[StrictInt], Field(min_length=1), at_most(lambda limits: limits.text_chars, "token ids in a text")
]


_LOOKED_AT = 1_000  # longer lists are told by their beginning


def _kind(value: Any) -> str | None:
    if isinstance(value, list):
        return "ids" if value and all(type(each) is int for each in value[:_LOOKED_AT]) else "list"
    return kind_of(value)


def _element_kind(value: Any) -> str | None:
    return "ids" if isinstance(value, list) else kind_of(value)


_EXPECTED = "expected a string, token ids, or an object with exactly one of: text, image, audio"

OpenAIInput = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[TokenList, Tag("ids")]
    | Annotated[TextInput, Tag("text")]
    | Annotated[ImageInput, Tag("image")]
    | Annotated[AudioInput, Tag("audio")],
    Discriminator(_element_kind, custom_error_type="input_kind", custom_error_message=_EXPECTED),
]

InputList = Annotated[list[OpenAIInput], Field(min_length=1), at_most(lambda limits: limits.openai_inputs, "inputs")]


class EmbeddingsRequest(RequestModel):
    # Clients of OpenAI's many imitators send parameters of their own; those servers ignore what they do not know.
    model_config = ConfigDict(extra="ignore")

    input: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[TokenList, Tag("ids")]
        | Annotated[InputList, Tag("list")]
        | Annotated[TextInput, Tag("text")]
        | Annotated[ImageInput, Tag("image")]
        | Annotated[AudioInput, Tag("audio")],
        Discriminator(_kind, custom_error_type="input_kind", custom_error_message=_EXPECTED),
    ]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = None
    user: str | None = None
    role: Role = Field(default="query", description="As in POST /embed.")

    def inputs(self) -> list[OpenAIInput]:
        """The input as a list, which it need not be."""
        match self.input:
            case [int(), *_] as ids:
                return [cast("list[int]", ids)]
            case list() as many:
                return cast("list[OpenAIInput]", many)
            case one:
                return [one]


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: Usage


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class OpenAIModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIProblem(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class OpenAIError(BaseModel):
    error: OpenAIProblem
