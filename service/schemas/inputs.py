"""An input as a client writes it: text, an image, a sound or a video; in JSON, or as a file of a multipart form."""

import base64
import binascii
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    InstanceOf,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema

from service.contract.containers import UNKNOWN, container_of, is_footage
from service.contract.errors import BadMedia, InputError, UnsupportedMedia
from service.contract.structure import is_picture, is_sound
from service.contract.tokens import Role
from service.engine.embedder import Input, Media, Text, TokenIds
from service.engine.videos import Video
from service.errors import FetchDisabled
from service.settings import Limits

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
SOUND = "UklGRigAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQQAAACAyIA4"
"""The smallest of their kind, as examples that work: a red pixel, four samples."""
_KINDS = ("text", "image", "audio", "video", "vector", "id", "compose")
_MAX_FIELDS = 40
_WHITESPACE = str.maketrans("", "", " \t\r\n")
_URL_SAFE = str.maketrans("-_", "+/")
_LONGEST_URI_HEADER = 256
"""Characters before the comma of a data: URI."""


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
    keys: Collection[str] = type(value).model_fields if isinstance(value, BaseModel) else ()
    if isinstance(value, dict):
        keys = present(value)
    if isinstance(value, dict) and isinstance(value.get("file"), File):
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


AnyInput = Annotated[
    Annotated[str, Tag("string")]
    | Annotated[TextInput, Tag("text")]
    | Annotated[ImageInput, Tag("image")]
    | Annotated[AudioInput, Tag("audio")]
    | Annotated[VideoInput, Tag("video")]
    | SkipJsonSchema[Annotated[InstanceOf[File], Tag("file")]],
    discriminator("text", "image", "audio", "video"),
]


def at_most(limit: Callable[[Limits], int], what: str) -> BeforeValidator:
    """A list no longer than a setting, checked before any of its members is looked at.

    The settings' limits are the validation context (`read_request` passes them).
    """

    def check(value: Any, info: ValidationInfo) -> Any:
        limits = info.context if isinstance(info.context, Limits) else Limits()
        if isinstance(value, list) and len(value) > limit(limits):
            raise ValueError(f"at most {limit(limits)} {what} in one request")
        return value

    return BeforeValidator(check)


ModelName = Annotated[str | None, Field(max_length=64, description="One of GET /models. Default: the first of them.")]

Inputs = Annotated[list[AnyInput], Field(min_length=1), at_most(lambda limits: limits.inputs, "inputs")]


def to_input(value: AnyInput | TokenIds, role: Role = "query") -> Input | Video:
    """A validated input → what the pipeline takes. Decodes base64, so call it in a worker thread for large data.

    A string that is a data: URI of an image, a sound or a video is that file; other strings are texts.
    Raises InputError: not base64, a URL, a file that is none of them, a data: URI that is said to be a text.
    """
    if isinstance(value, TokenIds):
        return value
    if isinstance(value, str):
        match uri_kind(value):
            case None:
                return Text(value, role)
            case "video":
                return of_video(media_bytes(value))
            case "file":
                return of_file(media_bytes(value))
            case kind:
                return Media(kind, media_bytes(value))
    if isinstance(value, TextInput):
        if uri_kind(value.text):
            raise InputError(
                "the text is a data: URI: send the file that it holds as an image, audio or video, for the vector of "
                "its letters says nothing"
            )
        return Text(value.text, role)
    if isinstance(value, ImageInput):
        return Media("image", media_bytes(value.image))
    if isinstance(value, AudioInput):
        return Media("audio", media_bytes(value.audio))
    if isinstance(value, VideoInput):
        return of_video(media_bytes(value.video))
    return of_file(value.data)


def of_file(data: bytes) -> Media | Video:
    """What a file is, its content says. Raises UnsupportedMedia."""
    kind = sniff(data)
    return Video(data) if kind == "video" else Media(kind, data)


def uri_kind(text: str) -> Literal["image", "audio", "video", "file"] | None:
    """What a string holds that is a data: URI from its first word on: a file of a kind that it does not say counts too,
    where it is base64. None for every other string, and for a sentence about such URIs."""
    header = text[:_LONGEST_URI_HEADER].lstrip().partition(",")[0].lower().replace("; ", ";").rstrip()
    if not header.startswith("data:") or any(map(str.isspace, header)):
        return None
    kinds: tuple[Literal["image", "audio", "video"], ...] = ("image", "audio", "video")
    for kind in kinds:
        if header.startswith(f"data:{kind}/"):
            return kind
    return "file" if header.endswith(";base64") else None


def of_video(data: bytes) -> Media | Video:
    """What was sent as a video: a container without moving pictures is a sound."""
    return Media("audio", data) if container_of(data) is not None and not is_footage(data) else Video(data)


def url_of(value: AnyInput | TokenIds) -> tuple[Literal["image", "audio"], str] | None:
    """Kind and URL of an input that is one."""
    if isinstance(value, ImageInput) and _is_url(value.image):
        return "image", value.image
    if isinstance(value, AudioInput) and _is_url(value.audio):
        return "audio", value.audio
    return None


def _is_url(text: str) -> bool:
    return text[:8].lower().startswith(("http:", "https:"))


def size_of(value: AnyInput | TokenIds) -> int:
    """About how many bytes `to_input` has to go through."""
    if isinstance(value, str):
        return len(value) if uri_kind(value) else 0
    if isinstance(value, ImageInput):
        return len(value.image)
    if isinstance(value, AudioInput):
        return len(value.audio)
    if isinstance(value, VideoInput):
        return len(value.video)
    return len(value.data) if isinstance(value, File) else 0


def is_opened(value: AnyInput | TokenIds) -> bool:
    """Whether `to_input` opens the file to tell what it is, which is not for the event loop."""
    if isinstance(value, str):
        return uri_kind(value) in ("video", "file")
    return isinstance(value, VideoInput) or (isinstance(value, File) and container_of(value.data) is not None)


def media_bytes(text: str) -> bytes:
    """base64 (standard or URL-safe, white space allowed) or a base64 data: URI → bytes. Raises InputError."""
    if _is_url(text):
        raise FetchDisabled("fetching of URLs is off on this server: send the data itself as base64")
    text = text.lstrip()
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().rstrip().endswith(";base64"):
            raise BadMedia("the data: URI is not base64")
    try:
        data = base64.b64decode(text.translate(_WHITESPACE).translate(_URL_SAFE), validate=True)
    except (binascii.Error, ValueError):
        raise BadMedia("the data is not valid base64") from None
    if not data:
        raise BadMedia("the data is empty")
    return data


def sniff(data: bytes) -> Literal["image", "audio", "video"]:
    """What a file is, by its first bytes; of a container, by whether it holds moving pictures, for which it is opened.

    Raises UnsupportedMedia where it is neither image, sound nor video.
    """
    if is_picture(data):
        return "image"
    if is_sound(data):
        return "audio"
    if container_of(data) is not None:
        return "video" if is_footage(data) else "audio"
    raise UnsupportedMedia(UNKNOWN)
