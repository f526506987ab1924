"""An input as a client writes it: text, an image, a sound or a video; in JSON, or as a file of a multipart form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    GetPydanticSchema,
    InstanceOf,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema

from service.engine.inputs import Input, of_base64, of_file, of_string, of_text, read
from service.settings import Limits

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
SOUND = "UklGRigAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQQAAACAyIA4"
"""The smallest of their kind, as examples that work: a red pixel, four samples."""
_KINDS = ("text", "image", "audio", "video", "vector", "id", "compose")
_MAX_FIELDS = 40


class RequestModel(BaseModel):
    """Base of every request's schema: a misspelt field is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        # Each of a million unknown fields would be an error of its own, before the first is told.
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError("many more fields than there are")
        if isinstance(value, dict) and None in value.values():
            return {name: given for name, given in value.items() if given is not None or not cls._may_be_null(name)}
        return value

    @classmethod
    def _may_be_null(cls, name: str) -> bool:
        """Of what need not be there, and of what else an input could be, null means absent: typed clients write it."""
        field = cls.model_fields.get(name)
        return name in _KINDS if field is None else not field.is_required()

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        for name, given in schema.get("properties", {}).items():
            null = {"type": "null"}
            if name in schema.get("required", ()) or null in given.get("anyOf", ()):
                continue
            told = {key: given.pop(key) for key in ("title", "description", "default", "examples") if key in given}
            schema["properties"][name] = {"anyOf": [*given["anyOf"], null] if [*given] == ["anyOf"] else [given, null]}
            schema["properties"][name] |= told
        return schema


Number = Annotated[float, Field(strict=True)]
"""As openapi.yaml says: neither a text that reads like one, nor true."""


@dataclass(frozen=True)
class File:
    """A file of a multipart form. What it is, its content says; the name is only a name."""

    name: str
    data: bytes


class TextInput(RequestModel):
    text: str


class ImageInput(RequestModel):
    image: str = Field(description="base64, a data: URI, or an https: URL where the server fetches", examples=[PICTURE])


class AudioInput(RequestModel):
    audio: str = Field(description="base64, a data: URI, or an https: URL where the server fetches", examples=[SOUND])


class VideoInput(RequestModel):
    video: str = Field(description="base64, or a data: URI")


def kind_of(value: Any) -> str | None:
    """The tag of an input, from its type or from the one key that says what it is; None where nothing does."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, File):
        return "file"
    if not isinstance(value, dict):
        return None
    keys = present(value)
    if isinstance(value.get("file"), File):
        return "named_file"
    kinds = [kind for kind in _KINDS if kind in keys]
    return kinds[0] if len(kinds) == 1 else None


def present(value: dict[str, Any]) -> set[str]:
    """The fields that are there: one that is null is not."""
    return {name for name, given in value.items() if given is not None}


def discriminator(*kinds: str) -> Discriminator:
    """Chooses the branch of a union by `kind_of`, and says what was expected where there is none."""
    return Discriminator(
        kind_of,
        custom_error_type="input_kind",
        custom_error_message=f"expected a string, or an object with exactly one of: {', '.join(kinds)}",
    )


def read_as(wire: Any, reading: Callable[[Any], Any]) -> GetPydanticSchema:
    """Validates as `wire` does and has its JSON schema; the value is what `reading` makes of that."""
    schema = Annotated[wire, AfterValidator(reading)]
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(schema))


def to_input(given: Any) -> Any:
    """What a client wrote, as an input of the engine; other things as they are."""
    match given:
        case str():
            return read(of_string, given)
        case TextInput():
            return read(of_text, given.text)
        case ImageInput():
            return read(of_base64, "image", given.image)
        case AudioInput():
            return read(of_base64, "audio", given.audio)
        case VideoInput():
            return read(of_base64, "video", given.video)
        case File():
            return read(of_file, given.data)
    return given


_Wire = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[TextInput, Tag("text")]
    | Annotated[ImageInput, Tag("image")]
    | Annotated[AudioInput, Tag("audio")]
    | Annotated[VideoInput, Tag("video")]
    | SkipJsonSchema[Annotated[InstanceOf[File], Tag("file")]],
    discriminator("text", "image", "audio", "video"),
]
AnyInput = Annotated[Input, read_as(_Wire, to_input)]
"""An input of the engine. A string that is a data: URI of an image, a sound or a video is that file."""


def limits_of(info: ValidationInfo) -> Limits:
    return info.context if isinstance(info.context, Limits) else Limits()


def at_most(limit: Callable[[Limits], int], what: str) -> BeforeValidator:
    """A list no longer than a setting, checked before any of its members is looked at.

    The settings' limits are the validation context (`api.reading` passes them).
    """

    def check(value: Any, info: ValidationInfo) -> Any:
        limits = limits_of(info)
        if isinstance(value, list) and len(value) > limit(limits):
            raise ValueError(f"at most {limit(limits)} {what} in one request")
        return value

    return BeforeValidator(check)


ModelName = Annotated[str | None, Field(max_length=64, description="One of GET /models. Default: the first of them.")]

Inputs = Annotated[list[AnyInput], Field(min_length=1), at_most(lambda limits: limits.inputs, "inputs")]
