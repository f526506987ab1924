"""Items, collections, and the filter over metadata."""

import base64
import binascii
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from service.engine.inputs import Fused, Input, StoredModality, sent_to
from service.errors import InvalidRequest
from service.schemas.embed import InputProblem
from service.schemas.inputs import (
    A_FILE,
    ARRAY,
    File,
    FusedParts,
    RequestModel,
    at_most,
    fill_parts,
    first_problem,
    present,
    read_as,
)
from service.settings import Limits
from service.store import DEFAULT_COLLECTION, IndexRequest, Kind, Precision, filters

MAX_METADATA_BYTES = 16_384
MAX_DELETED_IDS = 10_000
MAX_MOVES = 1_000
_MAX_DEPTH = 16
_CONTENT = {"text", "image", "audio", "video", "array", "compose", "vector", "file"}
_MAX_FILTER_VALUES = 4 * filters.MAX_NODES * filters.MAX_VALUES
_MAX_DIMENSIONS = 16_384
_INT64 = range(-(2**63), 2**63)


def _plain_text(value: str) -> str:
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in value):
        raise ValueError("control characters are not allowed")
    return storable_text(value)


def storable_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("the NUL character is not allowed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode: a lone surrogate") from None
    return value


def _storable(value: Any, most: int) -> Any:
    """Check that a value is JSON that SQLite and clients read back unchanged, with at most so many values and keys."""
    waiting = [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        most -= 1 + (len(node) if isinstance(node, list | dict) else 0)
        if most < 0:
            raise ValueError("too many values")
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
        if isinstance(node, str):
            storable_text(node)
        elif isinstance(node, int) and node not in _INT64:
            raise ValueError("an integer does not fit in 64 bits: write it as a text, or as a number such as 1e300")
        elif isinstance(node, float) and (node != node or abs(node) == float("inf")):
            raise ValueError("a number is not finite")
        elif isinstance(node, dict):
            waiting += [(part, depth + 1) for pair in node.items() for part in pair]
        elif isinstance(node, list):
            waiting += [(part, depth + 1) for part in node]
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    if value and len(orjson.dumps(value)) > MAX_METADATA_BYTES:
        raise ValueError(f"the metadata are larger than {MAX_METADATA_BYTES} bytes of JSON")
    return value


ItemId = Annotated[
    str,
    Field(min_length=1, max_length=256, json_schema_extra={"pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"}),
    AfterValidator(_plain_text),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
# Each value takes at least one byte, and most take one more for a separator.
Metadata = Annotated[
    dict[str, Any], BeforeValidator(lambda value: _storable(value, MAX_METADATA_BYTES)), AfterValidator(_small)
]
Scalar = str | int | float | bool | None


def _parsed(value: Any) -> filters.Filter:
    return filters.parse(_storable(value, _MAX_FILTER_VALUES))


Filter = Annotated[
    filters.Filter,
    PlainValidator(_parsed),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": True,
            "description": (
                "Conditions on the metadata, all of which must hold. A key with a scalar, or a list of which it must "
                "hold one, or an object of operators: $eq, $in, $gt, $gte, $lt, $lte (numbers, or texts), $contains "
                "(part of a text, or a member of a list), $exists. $and and $or take lists of filters, $not takes one."
            ),
            "examples": [{"year": {"$gte": 2000, "$lt": 2010}, "$or": [{"set": "train"}, {"set": {"$exists": False}}]}],
        }
    ),
]


def read_filter(text: str) -> filters.Filter:
    """Read a filter that is written as JSON in a query parameter. Raises InvalidRequest."""
    try:
        return _parsed(orjson.loads(text))
    except ValueError as error:  # JSONDecodeError is one
        why = "it is not JSON" if isinstance(error, orjson.JSONDecodeError) else str(error)
        raise InvalidRequest(f"filter: {why}") from None


MetadataKey = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(storable_text)]


def _numbers(value: Any) -> Any:
    """Turn a vector into float64 (D,). NumPy looks at the numbers of a list, and not Python at one after the other."""
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("the vector is not valid base64") from None
        if len(data) % 4:
            raise ValueError("the vector is no float32: its bytes are not a multiple of 4")
        numbers: NDArray[np.floating] = np.frombuffer(data, "<f4")
    elif isinstance(value, list):
        if len(value) > _MAX_DIMENSIONS:
            raise ValueError(f"a vector has at most {_MAX_DIMENSIONS} items")
        # A boolean or a nested list would pass for numbers.
        if not set(map(type, value)) <= {float, int}:
            raise ValueError("a vector holds numbers only: each should be a valid number")
        numbers = np.array(value, np.float64)
        if not np.isfinite(numbers).all():
            raise ValueError("a vector holds finite numbers only")
    else:
        raise ValueError("a vector is a list of numbers, or base64 of little-endian float32")
    if not 1 <= numbers.size <= _MAX_DIMENSIONS:
        raise ValueError(f"a vector has at least 1 item and at most {_MAX_DIMENSIONS}")
    return numbers


Vector = Annotated[
    Any,
    PlainValidator(_numbers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": _MAX_DIMENSIONS},
                {"type": "string", "description": "base64 of little-endian float32"},
            ],
        }
    ),
]
"""A NumPy array (D,) of float64 or float32, not yet of unit length."""


class ItemInput(RequestModel):
    """An item with exactly one of text, image, audio, video, array, compose, vector; in a form, one without any takes
    a file."""

    id: ItemId
    text: Annotated[Input, read_as("text")] | None = None
    image: Annotated[Input, read_as("image")] | None = Field(default=None, description="base64, or a data: URI")
    audio: Annotated[Input, read_as("audio")] | None = Field(default=None, description="base64, or a data: URI")
    video: Annotated[Input, read_as("video")] | None = Field(default=None, description="base64, or a data: URI")
    array: Annotated[Input, read_as("array")] | None = Field(default=None, description=ARRAY)
    compose: FusedParts | None = Field(
        default=None,
        description="One vector of several inputs, such as a picture and its caption: their weighted sum. The item has "
        "the modality, and the preview, of the first part that is no text.",
    )
    vector: Vector | None = None
    file: SkipJsonSchema[Annotated[Input, A_FILE] | None] = None
    modality: StoredModality | None = Field(
        default=None,
        description="Of a vector; of another input, which of the bundle's further modalities takes it. Other inputs "
        "say it themselves.",
    )
    metadata: Metadata = Field(default_factory=dict)
    collection: Name = DEFAULT_COLLECTION

    @model_validator(mode="after")
    def _one_input(self) -> "ItemInput":
        if len(self._given) != 1:
            raise ValueError("an item has exactly one of: text, image, audio, video, array, compose, vector")
        if self.modality is not None and (self.video is not None or self.compose is not None):
            raise ValueError("modality goes with text, image, audio, array and vector only")
        return self

    @property
    def _given(self) -> list[Input | NDArray[np.floating]]:
        kinds = (self.text, self.image, self.audio, self.video, self.array, self.compose, self.vector, self.file)
        return [given for given in kinds if given is not None]

    @property
    def content(self) -> Input | NDArray[np.floating]:
        """Return the input to embed, or the given vector."""
        given = self._given[0]
        if self.modality is None or isinstance(given, np.ndarray | Fused):
            return given
        return sent_to(given, self.modality)


class InvalidItem(ValueError):
    """Raised where an item is not valid: the message says why, without the offending input."""


def read_item(value: Any, limits: Limits) -> ItemInput:
    """Read one item as a client writes it. Raises InvalidItem."""
    try:
        return ItemInput.model_validate(value, context=limits)
    except ValidationError as error:
        raise InvalidItem(first_problem(error)) from None


class ItemsRequest(RequestModel):
    items: Annotated[list[ItemInput], Field(min_length=1), at_most(lambda limits: limits.inputs, "items")]
    on_error: Literal["fail", "null"] = Field(
        default="fail", description="null: an item whose input is bad is answered by an error, and the others stored."
    )

    @model_validator(mode="after")
    def _each_id_once(self) -> "ItemsRequest":
        ids: set[tuple[str, str]] = set()
        for item in self.items:
            if (item.collection, item.id) in ids:
                raise ValueError(f"the id {item.id!r} is there twice in the collection {item.collection!r}")
            ids.add((item.collection, item.id))
        return self


def place_items(body: dict[str, Any], files: list[File]) -> None:
    """Give files, in order, to the items without an input and the parts without one of fused items, as they stand in
    the list; each further file is an item whose id is its name."""
    items = body.setdefault("items", [])
    if not isinstance(items, list):
        return
    for item in items:
        files = fill_parts(item, files)
        if files and isinstance(item, dict) and not present(item) & _CONTENT:
            item["file"], *files = files
    items += [{"id": file.name, "file": file} for file in files]


class DeleteItemsRequest(RequestModel):
    """Exactly one of ids and filter."""

    ids: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_DELETED_IDS, fail_fast=True)] | None = None
    filter: Filter | None = None
    collection: Name = DEFAULT_COLLECTION

    @model_validator(mode="after")
    def _one_choice(self) -> "DeleteItemsRequest":
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give exactly one of: ids, filter")
        if self.filter == filters.All(()):
            raise ValueError("an empty filter would delete everything: drop the collection instead")
        return self


class Move(RequestModel):
    id: ItemId
    to: ItemId = Field(
        description="The item's new id. Another item that has it already is replaced; with its own the metadata change."
    )
    metadata: Metadata | None = Field(
        default=None, description="The item's metadata from now on. Default: as they are."
    )


class MoveItemsRequest(RequestModel):
    moves: Annotated[list[Move], Field(min_length=1, max_length=MAX_MOVES, fail_fast=True)]
    collection: Name = DEFAULT_COLLECTION

    @model_validator(mode="after")
    def _each_id_once(self) -> "MoveItemsRequest":
        seen: set[str] = set()
        for move in self.moves:
            ids = (move.id, move.to)
            for id in ids if move.metadata is None else dict.fromkeys(ids):
                if id in seen:
                    raise ValueError(f"the id {id!r} is there twice")
                seen.add(id)
        return self


class CollectionRequest(RequestModel):
    """A change of a collection: omitted fields stay as they are."""

    keywords: Annotated[list[MetadataKey], Field(max_length=16)] | None = Field(
        default=None,
        description="Metadata keys whose strings, or lists of strings, /search finds words in, besides the text of "
        "text items. Items that are there already are indexed too, before the answer.",
    )
    index: Literal[Kind, "auto"] | None = Field(
        default=None,
        description="The index of every modality; auto goes by size. It is built in the background, while searches go "
        "on. A new collection's is auto.",
    )
    precision: Precision | None = Field(default=None, description="Of hnsw; the other kinds have one.")

    @model_validator(mode="after")
    def _fitting(self) -> "CollectionRequest":
        if self.index is None and self.precision is not None:
            raise ValueError("precision is given with index")
        IndexRequest(self.index or "auto", self.precision)
        return self


class StoredItem(BaseModel):
    id: str
    collection: str
    modality: StoredModality
    truncated: bool = Field(default=False, description="As in POST /embed.")


class RefusedItem(BaseModel):
    id: str
    collection: str
    index: int
    error: InputProblem


class ItemsResponse(BaseModel):
    upserted: int
    items: list[StoredItem | RefusedItem]


class ItemPreview(BaseModel):
    """Holds what can be shown of an item: the text of a text item; with `previews` set, what `/previews` returns."""

    text: str | None = Field(default=None, description="Its first 1,000 characters.")
    media_type: Literal["image/jpeg", "image/webp", "audio/mpeg"] | None = Field(
        default=None, description="Of GET /previews/{id}. WebP: stored by an earlier version."
    )
    width: int | None = None
    height: int | None = None
    seconds: float | None = Field(default=None, description="Of the preview.")
    whole_seconds: float | None = Field(default=None, description="Of the sound that was sent.")
    peaks: list[int] | None = Field(default=None, description="The waveform of the preview: 80 heights, 0 to 100.")
    embedded: bool | None = Field(
        default=None,
        description="true: the item's vector was made from this preview, since its file was not at hand when the store "
        "was carried over to another bundle.",
    )
    mapped: float | None = Field(
        default=None,
        description="Of a vector that was mapped from another bundle's and not embedded: how far it may be off, as 1 "
        "less the cosine similarity to the vector that embedding would give.",
    )


class ItemResponse(StoredItem):
    metadata: dict[str, Any]
    created: str
    updated: str
    vector: list[float] | None = None
    preview: ItemPreview | None = None
    original: str | None = Field(
        default=None, description="Media type of GET /media/{id}; null where the server gives out no such file."
    )


class PageResponse(BaseModel):
    items: list[ItemResponse]
    next_cursor: str | None = Field(description="null on the last page")
    total: int | None = Field(default=None, description="Number of items of all pages, where `include` asks for it.")


class FacetValue(BaseModel):
    value: str | int | float | bool | None
    count: int


class Facet(BaseModel):
    """Says how often a metadata key holds each value."""

    values: list[FacetValue] = Field(description="The most frequent first, at most 1,000.")
    missing: int = Field(description="Items without the key, or with a list or an object there.")
    more: int = Field(description="Number of values that are not listed.")


class FacetsResponse(BaseModel):
    total: int
    modalities: dict[StoredModality, int]
    facets: dict[str, Facet]


class DeletedResponse(BaseModel):
    deleted: int


class MovedResponse(BaseModel):
    moved: int


class CollectionPart(BaseModel):
    """Says how the items of one modality are indexed at present."""

    modality: StoredModality
    kind: Kind
    precision: Precision | None
    count: int
    indexed: int = Field(description="Of the count; the rest is searched one by one.")
    building: bool


class CollectionResponse(BaseModel):
    name: str
    count: int
    space: str
    dimensions: int
    index: Kind | Literal["auto"] = Field(description="What was asked for.")
    precision: Precision | None
    parts: list[CollectionPart] | None = Field(default=None, description="Of one collection; not in a list of them.")
    created: str
    keywords: list[str]


class MapPoint(BaseModel):
    id: str
    modality: StoredModality
    x: float = Field(description="-1 to 1, as y is.")
    y: float
    label: str | None = None


class MapResponse(BaseModel):
    count: int = Field(description="Items of the collection; the points are of a sample where there are more.")
    keys: list[str] = Field(description="Metadata keys that can label points.")
    points: list[MapPoint]


class CollectionsResponse(BaseModel):
    collections: list[CollectionResponse]
