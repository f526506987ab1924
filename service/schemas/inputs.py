"""An input as a client writes it: text, an image, a sound or a video; in JSON, or as a file of a multipart form."""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from service.contract.containers import UNKNOWN, container_of, is_footage
from service.contract.errors import BadMedia, UnsupportedMedia
from service.contract.structure import is_picture, is_sound
from service.contract.tokens import Role
from service.errors import FetchDisabled
from service.pipeline import Input, Media, Text
from service.settings import Limits
from service.videos import Video

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
SOUND = "UklGRigAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQQAAACAyIA4"
"""The smallest of their kind, as examples that work: a red pixel, four samples."""
_MAX_FIELDS = 40
_WHITESPACE = str.maketrans("", "", " \t\r\n")
_URL_SAFE = str.maketrans("-_", "+/")


class RequestModel(BaseModel):
    """Base of every request's schema: a misspelt field is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        # Each of a million unknown fields would be an error of its own, before the first is told.
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError("many more fields than there are")
        return value


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
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, BaseModel) else ()
    if isinstance(value, dict) and isinstance(value.get("file"), File):
        return "named_file"
    kinds = [kind for kind in ("text", "image", "audio", "video", "vector", "id", "compose") if kind in keys]
    return kinds[0] if len(kinds) == 1 else None


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


def to_input(value: AnyInput, role: Role = "query") -> Input | Video:
    """A validated input → what the pipeline takes. Decodes base64, so call it in a worker thread for large data.

    Raises InputError: not base64, a URL, a file that is none of them.
    """
    if isinstance(value, str):
        return Text(value, role)
    if isinstance(value, TextInput):
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


def of_video(data: bytes) -> Media | Video:
    """What was sent as a video: a container without moving pictures is a sound."""
    return Media("audio", data) if container_of(data) is not None and not is_footage(data) else Video(data)


def url_of(value: AnyInput) -> tuple[Literal["image", "audio"], str] | None:
    """Kind and URL of an input that is one."""
    if isinstance(value, ImageInput) and _is_url(value.image):
        return "image", value.image
    if isinstance(value, AudioInput) and _is_url(value.audio):
        return "audio", value.audio
    return None


def _is_url(text: str) -> bool:
    return text[:8].lower().startswith(("http:", "https:"))


def size_of(value: AnyInput) -> int:
    """About how many bytes `to_input` has to go through."""
    if isinstance(value, ImageInput):
        return len(value.image)
    if isinstance(value, AudioInput):
        return len(value.audio)
    if isinstance(value, VideoInput):
        return len(value.video)
    return len(value.data) if isinstance(value, File) else 0


def is_opened(value: AnyInput) -> bool:
    """Whether `to_input` opens the file to tell what it is, which is not for the event loop."""
    return isinstance(value, VideoInput) or (isinstance(value, File) and container_of(value.data) is not None)


def media_bytes(text: str) -> bytes:
    """base64 (standard or URL-safe, white space allowed) or a base64 data: URI → bytes. Raises InputError."""
    if _is_url(text):
        raise FetchDisabled("fetching of URLs is off on this server: send the data itself as base64")
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
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
