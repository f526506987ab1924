"""An input as a client writes it: text, image, sound, video or array; in JSON, or as a file of a multipart form."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import attrgetter, or_
from typing import Annotated, Any, Literal, Self

import numpy as np
import orjson
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
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema

from service.contract.bundle import Modality
from service.engine.inputs import Fused, Input, Part, read, sent_to
from service.errors import BodyTooLarge, MalformedRequest, words_of
from service.settings import Limits

PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
SOUND = "UklGRigAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQQAAACAyIA4"
"""The smallest of their kind, as examples that work: a red pixel, four samples."""
_MEDIA = "base64, a data: URI, or an https: URL where the server fetches"
_KINDS = ("text", "image", "audio", "video", "vector", "id", "compose")
_NAMED, _NAMED_FILE = "union[named]", "union[named_file]"
"""Tags that name no field: `location` leaves them out."""
ARRAY = "base64 of a .npy file: float numbers of the shape that the tower takes (GET /models)."
_MAX_FIELDS = 40

_SMALL_BYTES = 32_768
"""Bytes of JSON that cannot become much."""
_MOST_MEMORY_BYTES = 200_000_000
"""Memory that a body may take when it is read: 19 MB of `{},{},…` would take 461 MB."""
_MEMORY = {b"{": 240, b"[": 64, b",": 32, b":": 60, b'"': 50}
"""Bytes of memory per mark of JSON: an object with a key, a list, a number, a member of an object, half a text."""
_ALIKE = bytes.maketrans(b"0123456789[: \t\r\n", b"0000000000,,,,,,")
_LONG = (b"," + b"0" * 20, b",-" + b"0" * 19)
"""First characters of an integer of more than 64 bits, after all marks before it and all digits are made alike."""


def parse_json(body: bytes) -> Any:
    """Parse a client's JSON. Raises BodyTooLarge where it would fill the memory, MalformedRequest.

    An integer of more than 64 bits stays one, so that it can be told from a number like 1e300: orjson rounds it. A
    byte-order mark, which some programs write, is passed over.
    """
    body = body.removeprefix(BOM_UTF8)
    if len(body) > _SMALL_BYTES and _memory_of(body) > _MOST_MEMORY_BYTES:
        raise BodyTooLarge("the body holds too many values")
    # orjson refuses NaN, Infinity, numbers that overflow, lone surrogates and bottomless nesting.
    try:
        value = orjson.loads(body)
        alike = body.translate(_ALIKE)
        return json.loads(body) if any(mark in alike for mark in _LONG) else value
    except (ValueError, RecursionError) as error:  # JSONDecodeError is one; so is an integer of thousands of digits
        raise MalformedRequest(f"the body is not valid JSON{_where(body, error)}") from None


def _where(body: bytes, error: Exception) -> str:
    try:
        body.decode()
    except UnicodeDecodeError:
        return ": it is not UTF-8"
    if not isinstance(error, json.JSONDecodeError):
        return ""
    return (
        f": see line {error.lineno}, column {error.colno}"
        if b"\n" in body.strip()
        else f": see character {error.pos + 1}"
    )


def _memory_of(body: bytes) -> int:
    """Return an upper estimate of the parsed body's bytes; text between quotes is first counted as JSON, too."""
    rough = sum(size * body.count(mark) for mark, size in _MEMORY.items())
    if rough <= _MOST_MEMORY_BYTES:
        return rough
    letters = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.logical_xor.accumulate(letters == ord('"'))
    outside = letters[~inside].tobytes()
    # Only one of a text's two quotes is outside.
    return sum(size * outside.count(mark) * (2 if mark == b'"' else 1) for mark, size in _MEMORY.items())


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
        """Return whether null means absent: for optional fields and fields of a union of inputs, because typed
        clients send it."""
        field = cls.model_fields.get(name)
        return name in _KINDS if field is None else not field.is_required()

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        for name, given in schema.get("properties", {}).items():
            null = {"type": "null"}
            if name in schema.get("required", ()) or null in given.get("anyOf", ()):
                continue
            described = {key: given.pop(key) for key in ("title", "description", "default", "examples") if key in given}
            schema["properties"][name] = {"anyOf": [*given["anyOf"], null] if [*given] == ["anyOf"] else [given, null]}
            schema["properties"][name] |= described
        return schema


Number = Annotated[float, Field(strict=True)]
"""A number as in openapi.yaml: not a string of digits, and not true."""


@dataclass(frozen=True)
class File:
    """A file of a multipart form. What it is, its content says; the name is only a name."""

    name: str
    data: bytes


def read_as(kind: Literal["string", "text", "image", "audio", "video", "array"]) -> GetPydanticSchema:
    """Return the schema of a string that is an input of a kind; "string": a text, or the file that a data: URI
    holds."""
    return _schema(Annotated[str, AfterValidator(partial(read, kind))])


def _schema(wire: Any) -> GetPydanticSchema:
    """Return a schema that validates as `wire` does and has its JSON schema."""
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(wire))


class TextInput(RequestModel):
    text: Annotated[Input, read_as("text")]


class ImageInput(RequestModel):
    image: Annotated[Input, read_as("image")] = Field(description=_MEDIA, examples=[PICTURE])


class AudioInput(RequestModel):
    audio: Annotated[Input, read_as("audio")] = Field(description=_MEDIA, examples=[SOUND])


class VideoInput(RequestModel):
    video: Annotated[Input, read_as("video")] = Field(description="base64, or a data: URI")


class NamedInput(RequestModel):
    """An input of a modality that the bundle has besides, with exactly one of array, text, image, audio."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["modality"]}, {"required": ["array"]}]})

    modality: Modality = Field(
        default="array", description="Its name. Without it an array is of the only modality that takes arrays."
    )
    array: Annotated[Part, read_as("array")] | None = Field(default=None, description=ARRAY)
    text: Annotated[Part, read_as("text")] | None = None
    image: Annotated[Part, read_as("image")] | None = Field(default=None, description=_MEDIA)
    audio: Annotated[Part, read_as("audio")] | None = Field(default=None, description=_MEDIA)

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if len(self._given) != 1:
            raise ValueError("an input with a modality has exactly one of: array, text, image, audio")
        return self

    @property
    def _given(self) -> list[Part]:
        return [part for part in (self.array, self.text, self.image, self.audio) if part is not None]

    @property
    def named(self) -> Part:
        """Return the input for the tower of its modality."""
        return sent_to(self._given[0], self.modality)


def kind_of(value: Any) -> str | None:
    """Return the tag of an input, from its type or from the one key that says what it is; None where nothing does."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, File):
        return "file"
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("file"), File):
        return _NAMED_FILE
    if value.get("modality") is not None or value.get("array") is not None:
        return _NAMED
    kinds = [kind for kind in _KINDS if value.get(kind) is not None]
    return kinds[0] if len(kinds) == 1 else None


def shape_of(value: Any) -> Literal["string", "list", "object"] | None:
    """Return the tag of a value that may be written in several ways, from its JSON type."""
    return (
        "string"
        if isinstance(value, str)
        else "list"
        if isinstance(value, list)
        else ("object" if isinstance(value, dict) else None)
    )


def present(value: dict[str, Any]) -> set[str]:
    """Return the fields that are there: one that is null is not."""
    return {name for name, given in value.items() if given is not None}


def branch(wire: type[RequestModel], *fields: str) -> Any:
    """Return a branch of a union: an object whose first field identifies it, with the value of the field, or fields."""
    return Annotated[wire, AfterValidator(attrgetter(*fields)), Tag(_NAMED if fields[0] == "named" else fields[0])]


def one_of(*branches: Any) -> GetPydanticSchema:
    """Return a union whose branch is chosen by `kind_of`; what was expected is said where there is none."""
    kinds = [
        tag.tag for branch_type in branches for tag in getattr(branch_type, "__metadata__", ()) if isinstance(tag, Tag)
    ]
    expected = ", ".join("array" if kind == _NAMED else kind for kind in kinds if kind in (*_KINDS, _NAMED))
    choice = Discriminator(
        kind_of,
        custom_error_type="input_kind",
        custom_error_message=f"expected a string, or an object with exactly one of: {expected}",
    )
    return _schema(Annotated[reduce(or_, branches), choice])


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
        raise ValueError("expected a string, or a list of strings; token ids are not read here: send the text itself")
    return value


STRING = Annotated[str, AfterValidator(partial(read, "string")), Tag("string")]
"""A text; or the file that it holds, where it is a data: URI of an image, a sound or a video."""
_FILE = Annotated[InstanceOf[File], AfterValidator(lambda file: read("file", file.data))]
A_FILE = _schema(_FILE)
FILE = SkipJsonSchema[Annotated[_FILE, Tag("file")]]


class NamedFile(RequestModel):
    """An input that takes a file of the form, perhaps for the tower of a modality; see `fill_parts`."""

    file: Annotated[Part, A_FILE]
    modality: Modality | None = None

    @property
    def content(self) -> Part:
        return self.file if self.modality is None else sent_to(self.file, self.modality)


KINDS = (
    branch(TextInput, "text"),
    branch(ImageInput, "image"),
    branch(AudioInput, "audio"),
    branch(VideoInput, "video"),
    branch(NamedInput, "named"),
    SkipJsonSchema[Annotated[NamedFile, AfterValidator(attrgetter("content")), Tag(_NAMED_FILE)]],
)


class Weighted(RequestModel):
    weight: Number = 1.0


class WeightedFile(NamedFile, Weighted):
    """The same as a part of several inputs."""


def weighted(wire: type[RequestModel], kind: str) -> Any:
    """Return a part of several: its content and its weight."""
    name = wire.__name__.removesuffix("Input").removesuffix("Query")
    return branch(create_model(f"Weighted{name}", __base__=(wire, Weighted)), kind, "weight")


WEIGHTED_KINDS = (
    weighted(TextInput, "text"),
    weighted(ImageInput, "image"),
    weighted(AudioInput, "audio"),
    SkipJsonSchema[Annotated[WeightedFile, AfterValidator(attrgetter("content", "weight")), Tag(_NAMED_FILE)]],
    weighted(VideoInput, "video"),
    weighted(NamedInput, "named"),
)


_MEMBER_OF_UNION = re.compile(
    r"(function-\w+|list|dict|literal|nullable|(tagged-)?union|chain)\[.*|constrained-\w+|\[key\]", re.DOTALL
)
"""Pydantic's names of the ways in which a field may be written, which would show the names of functions."""


def location(problem: Mapping[str, Any]) -> list[int | str]:
    """Return the place of one of Pydantic's errors in what the client wrote, names cut to 64 characters."""
    *path, last = problem["loc"] or ("",)
    parts = [part for part in path if isinstance(part, int) or not _MEMBER_OF_UNION.fullmatch(part)]
    # A field that is unknown has whatever name the client gave it.
    if isinstance(last, int) or problem["type"] == "extra_forbidden" or not _MEMBER_OF_UNION.fullmatch(last):
        parts.append(last)
    return [part if isinstance(part, int) else part[:64] for part in parts if part != ""]


def first_problem(error: ValidationError) -> str:
    """Return where the first of Pydantic's errors is, and what is wrong there."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, location(first)))
    return f"{where}: {words_of(first)}" if where else words_of(first)


def limits_of(info: ValidationInfo) -> Limits:
    return info.context if isinstance(info.context, Limits) else Limits()


def at_most(limit: Callable[[Limits], int], what: str, *holders: str) -> BeforeValidator:
    """Limit a list to the length that a setting says, before any of its members is looked at; parts of a fused input
    count, and so does each input in the fields `holders` of a member.

    The settings' limits are the validation context (`api.reading` passes them).
    """
    nested = ("compose", *holders)

    def check(value: Any, info: ValidationInfo) -> Any:
        most = limit(limits_of(info))
        if isinstance(value, list) and len(value) > most:
            raise ValueError(f"at most {most} {what} in one request")
        if isinstance(value, list) and sum(_count_parts(item, nested) for item in value) > most:
            raise ValueError(f"at most {most} parts of {what} in one request")
        return value

    return BeforeValidator(check)


def _count_parts(value: Any, nested: Sequence[str], depth: int = 2) -> int:
    """Return the number of inputs in a member of a list, from its JSON: a pair's two may be fused, no deeper."""
    if not isinstance(value, dict) or depth == 0:
        return 1
    counts = [
        sum(_count_parts(part, nested, depth - 1) for part in (given if isinstance(given, list) else [given]))
        for name in nested
        if (given := value.get(name)) is not None
    ]
    return max(1, sum(counts))


MAX_PARTS = 32
_FusedParts = Annotated[
    list[Annotated[tuple[Part, float], one_of(*WEIGHTED_KINDS)]],
    Field(min_length=1, max_length=MAX_PARTS),
    at_most(lambda limits: limits.inputs, "parts"),
    AfterValidator(lambda parts: Fused(tuple(parts))),
]
FusedParts = Annotated[Fused, _schema(_FusedParts)]


class FusedInput(RequestModel):
    """Several inputs that share a vector: the weighted sum of their unit vectors, scaled to length 1."""

    compose: FusedParts


def fill_parts(given: Any, files: list[File]) -> list[File]:
    """Give files, in order, to what has no input: `given` itself, where it only names a modality, or the parts of its
    compose; return the files that are left."""
    parts = given.get("compose") if isinstance(given, dict) else None
    if isinstance(given, dict) and present(given) == {"modality"}:
        parts = [given]
    if not isinstance(parts, list):
        return files
    waiting = [part for part in parts if isinstance(part, dict) and not present(part) - {"weight", "modality"}]
    for part, file in zip(waiting, files, strict=False):
        part["file"] = file
    return files[len(waiting) :]


def append_files(given: Any, files: list[File]) -> Any:
    """Give files, in order, to the inputs of a list that have none, as `fill_parts` does, and append the others."""
    for value in given if isinstance(given, list) else ():
        files = fill_parts(value, files)
    return [*given, *files] if isinstance(given, list) else given


AnyInput = Annotated[Input, one_of(STRING, *KINDS, branch(FusedInput, "compose"), FILE)]


Strings = Annotated[
    list[Annotated[Input, read_as("string")]],
    at_most(lambda limits: limits.inputs, "inputs"),
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""A string or a list of them, as other servers take them: always a list here."""

ModelName = Annotated[str | None, Field(max_length=64, description="One of GET /models. Default: the first of them.")]

Inputs = Annotated[list[AnyInput], Field(min_length=1), at_most(lambda limits: limits.inputs, "inputs")]
