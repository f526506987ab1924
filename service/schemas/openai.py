"""Schemas of POST /v1/embeddings and GET /v1/models, as clients of OpenAI and of similar servers write and read
them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)

from service.contract.tokens import Role
from service.engine.inputs import Input, Part, TokenIds, in_role, read
from service.errors import InvalidRequest
from service.schemas.inputs import (
    AudioInput,
    ImageInput,
    RequestModel,
    TextInput,
    VideoInput,
    at_most,
    kind_of,
    present,
    shape_of,
)

TokenList = Annotated[
    list[StrictInt], Field(min_length=1), at_most(lambda limits: limits.text_chars, "token ids in a text")
]

_LOOKED_AT = 1_000  # longer lists are told by their beginning
_MAX_PARTS = 64
"""Largest number of parts of a message, and of messages of a request: all but one of them must be empty."""

ROLES: Mapping[str, Role] = {
    # NVIDIA's, Cohere's and Voyage's `input_type`
    "query": "query",
    "search_query": "query",
    "passage": "passage",
    "document": "passage",
    "search_document": "passage",
    # Jina's `task`
    "retrieval.query": "query",
    "retrieval.passage": "passage",
    # Google's `task_type`
    "retrieval_query": "query",
    "retrieval_document": "passage",
    "question_answering": "query",
    "fact_verification": "query",
    # Both sides are alike, as two queries are.
    "text-matching": "query",
    "semantic_similarity": "query",
    "classification": "query",
    "clustering": "query",
    "separation": "query",
    "image": "query",
}
"""Names that other servers use for a text's role."""
_ROLE_FIELDS = ("input_type", "task", "task_type", "prompt_name")

_UNREAD: Mapping[str, tuple[Sequence[Any], str]] = {
    name: (neutral, advice)
    for names, neutral, advice in (
        (
            ("embedding_type", "embedding_types", "output_dtype", "embed_dtype", "precision", "quantization"),
            ("float", "float32", ["float"], ["float32"]),
            "encoding_format says float or base64, and POST /embed has int8 and binary",
        ),
        (("endianness",), ("native", "little"), "base64 is of little-endian numbers"),
        (("output_dimension", "output_dimensionality"), (), "say dimensions"),
        (("normalized", "normalize", "normalize_embeddings"), (True,), "vectors are of unit length"),
        (("truncate_prompt_tokens",), (-1,), "a text is cut to what the model reads"),
        (("late_chunking",), (False,), "every text is embedded by itself"),
        (("return_multivector", "multivector"), (False,), "an input has one vector"),
        (("return_sparse", "sparse"), (False,), "vectors are dense"),
        (("pooling",), (), "the bundle says how its texts are pooled"),
        (("instruction", "instruct", "prompt"), ("",), "the bundle has its own instructions: say role"),
        (("chat_template", "chat_template_kwargs"), ("", {}), "a message is embedded as its one part is"),
        (("mm_processor_kwargs",), ({},), "the bundle says how its images are read"),
        (("add_special_tokens",), (True,), "texts get the special tokens that the model was trained with"),
        # Further inputs, which would have no vector in the answer.
        (("inputs", "texts", "text", "images", "image", "image_url"), ([],), "inputs are in input"),
        (("audios", "audio", "videos", "video", "documents", "content"), ([],), "inputs are in input"),
    )
    for name in names
}
"""Fields of other servers that change the answer and are not supported: the values that ask for the default anyway,
and advice for all other values."""


class Address(BaseModel):
    url: str = Field(description="base64 in a data: URI, or an https: URL where the server fetches")


Location = Annotated[
    Annotated[str, Tag("string")] | Annotated[Address, Tag("object")],
    Discriminator(shape_of, custom_error_type="address", custom_error_message='expected a string, or {"url": …}'),
]


class Samples(BaseModel):
    data: str = Field(description="base64")


_PART_KINDS: Mapping[str, Literal["text", "image", "audio", "video"]] = {
    "text": "text",
    "input_text": "text",
    "image_url": "image",
    "input_image": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}


class ContentModel(RequestModel):
    """A part or a message. A field that is not known may hold a second input, or a weight: it is an error."""

    unread: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_unread(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: content for name, content in value.items() if content is not None and name not in cls.unread}


class ContentPart(ContentModel):
    """A part of a message, as OpenAI and vLLM write it; `type` names the one field that it is in."""

    unread: ClassVar = frozenset({"detail", "uuid", "cache_control"})
    """Fields that change no vector: how closely a chat model looks, and caches of other servers."""

    type: Literal["text", "input_text", "image_url", "input_image", "audio_url", "input_audio", "video_url"]
    text: str | None = None
    image_url: Location | None = None
    audio_url: Location | None = None
    video_url: Location | None = None
    input_audio: Samples | None = None

    @model_validator(mode="after")
    def _there(self) -> "ContentPart":
        if self._content is None:
            raise ValueError(f"a part of the type {self.type} holds {self._field}")
        for name in ("text", "image_url", "audio_url", "video_url", "input_audio"):
            if name != self._field and getattr(self, name) is not None:
                raise ValueError(f"a part of the type {self.type} holds {self._field}, and {name} is another part")
        return self

    @property
    def _field(self) -> str:
        return {"input_text": "text", "input_image": "image_url"}.get(self.type, self.type)

    @property
    def _content(self) -> str | None:
        value: str | Address | Samples | None = getattr(self, self._field)
        return value.url if isinstance(value, Address) else value.data if isinstance(value, Samples) else value

    @property
    def empty(self) -> bool:
        return not self._content

    @property
    def written(self) -> "_Written":
        return _PART_KINDS[self.type], self._content or ""

    @property
    def input(self) -> Part:
        return read(_PART_KINDS[self.type], self._content or "")


Content = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[list[ContentPart], Field(min_length=1, max_length=_MAX_PARTS), Tag("list")],
    Discriminator(shape_of, custom_error_type="content", custom_error_message="expected a string, or a list of parts"),
]


class ContentInput(ContentModel):
    content: Content = Field(description="One part: a text, an image, a sound or a video.")


class Message(ContentInput):
    unread: ClassVar = frozenset({"name"})

    role: str


def _kind(value: Any) -> str | None:
    if isinstance(value, list):
        return "ids" if value and all(type(item) is int for item in value[:_LOOKED_AT]) else "list"
    return _element_kind(value)


def _element_kind(value: Any) -> str | None:
    if isinstance(value, dict) and (keys := present(value) & {"type", "content"}):
        return "part" if "type" in keys else "content"
    return "ids" if isinstance(value, list) else kind_of(value)


_EXPECTED = (
    "expected a string, token ids, an object with exactly one of: text, image, audio, video, "
    "or a part of a message, which has a type"
)

_Object = (
    Annotated[TextInput, Tag("text")]
    | Annotated[ImageInput, Tag("image")]
    | Annotated[AudioInput, Tag("audio")]
    | Annotated[VideoInput, Tag("video")]
    | Annotated[ContentPart, Tag("part")]
    | Annotated[ContentInput, Tag("content")]
)
OpenAIInput = Annotated[
    Annotated[str, Tag("string")] | Annotated[TokenList, Tag("ids")] | _Object,
    Discriminator(_element_kind, custom_error_type="input_kind", custom_error_message=_EXPECTED),
]

InputList = Annotated[list[OpenAIInput], Field(min_length=1), at_most(lambda limits: limits.openai_inputs, "inputs")]


class EmbeddingsRequest(RequestModel):
    """Exactly one of input and messages."""

    # Clients of OpenAI's many imitators send parameters of their own. Those that change no vector are left aside.
    model_config = ConfigDict(extra="ignore")

    input: (
        Annotated[
            Annotated[str, Tag("string")]
            | Annotated[TokenList, Tag("ids")]
            | Annotated[InputList, Tag("list")]
            | _Object,
            Discriminator(_kind, custom_error_type="input_kind", custom_error_message=_EXPECTED),
        ]
        | None
    ) = Field(default=None, description="A string that is a data: URI of an image, a sound or a video is that file.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_PARTS)] | None = Field(
        default=None, description="In place of input: one message, as vLLM takes it."
    )
    modality: Literal["text", "image", "audio", "video"] | None = Field(
        default=None,
        description="Of strings in input, which are then base64, data: URIs or URLs, as infinity takes them.",
    )
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = None
    user: str | None = None
    role: Role = Field(default="query", description="As in POST /embed.")
    truncate: StrictBool | Literal["NONE", "END"] = Field(
        default=True, description="false, NONE: a text that is longer than the model reads is an error."
    )

    _inputs: list[Input] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _nothing_unread(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # LiteLLM writes null for what its caller does not say.
        value = {name: given for name, given in value.items() if given is not None}
        for name, (neutral, advice) in _UNREAD.items():
            if name in value and not any(_same(value[name], default) for default in neutral):
                raise ValueError(f"{name} is not read here as it is given, and would change the answer: {advice}")
        for name in _ROLE_FIELDS:
            if name in value:
                given = value[name]
                role = ROLES.get(given.lower()) if isinstance(given, str) else None
                if role is None:
                    raise ValueError(f"{name} is none that is known here: say role, which is query or passage")
                if value.get("role", role) != role:
                    raise ValueError(f"{name} and role say different things")
                value["role"] = role
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "EmbeddingsRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("give exactly one of: input, messages")
        inputs = [read(kind, value) if isinstance(value, str) else value for kind, value in self._written()]
        self._inputs = in_role(inputs, self.role)
        return self

    @property
    def cut(self) -> bool:
        """Return whether a text that is too long is cut."""
        return self.truncate in (True, "END")

    @property
    def inputs(self) -> Sequence[Input]:
        """Return the inputs to embed, one vector each."""
        return self._inputs

    def _written(self) -> "list[_Written]":
        """Return the kind of each input, and the input or how it is written. Raises InvalidRequest."""
        if self.messages is not None:
            if any(message.role in ("system", "developer") and message.content for message in self.messages):
                raise InvalidRequest("messages: a system message is an instruction, which this model does not read")
            return [_only([part for message in self.messages for part in _parts(message.content)], "messages")]
        match self.input:
            case [int(), *_] as ids:
                given: Sequence[OpenAIInput] = [cast("list[int]", ids)]
            case list() as many:
                given = cast("list[OpenAIInput]", many)
            case one:
                given = [cast("OpenAIInput", one)]
        written = []
        for index, value in enumerate(given):
            kind, content = _element(value, f"input[{index}]")
            if self.modality is not None and kind != "string" and kind != self.modality:
                raise InvalidRequest(f"input[{index}] is of another kind than modality says")
            written.append((self.modality or kind, content))
        return written


_Written = tuple[Literal["string", "text", "image", "audio", "video"], str | Input]


def _element(value: OpenAIInput, where: str) -> _Written:
    match value:
        case str():
            return "string", value
        case list():
            return "text", TokenIds(tuple(value))
        case ContentPart():
            return value.written
        case ContentInput():
            return _only(_parts(value.content), where)
        case TextInput():
            return "text", value.text
        case ImageInput():
            return "image", value.image
        case AudioInput():
            return "audio", value.audio
        case VideoInput():
            return "video", value.video


def _same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)  # 1 is not true here


def _parts(content: Content) -> list[_Written]:
    """Return the parts that are not empty."""
    if isinstance(content, str):
        return [("string", content)] if content else []
    return [part.written for part in content if not part.empty]


def _only(parts: Sequence[_Written], where: str) -> _Written:
    if len(parts) != 1:
        raise InvalidRequest(
            f"{where}: {len(parts)} parts hold something, and one vector is of one part: send each as an input of its "
            "own, or search with their weighted sum (POST /search, compose)"
        )
    return parts[0]


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    truncated: bool = Field(default=False, description="As in POST /embed; only there where it is true.")
    unknown: float = Field(default=0.0, description="As in POST /embed; only there where it is more than 0.")


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
    detail: str = Field(description="The same message, where clients of Jina's embeddings look for it.")
