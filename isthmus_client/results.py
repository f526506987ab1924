"""The service's answers as typed values. Fields that this version does not know are ignored."""

import base64
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import httpx2

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Says why one input of a batch failed."""

    code: str
    detail: str


@dataclass(frozen=True)
class Embedding:
    """The unit vector of one input; where `error` is there, `vector` is not."""

    index: int
    modality: str | None = None
    vector: list[float] | None = field(default=None, repr=False)
    truncated: bool = False
    error: Problem | None = None
    unknown: float = 0.0
    """The share of a text's words that the model does not know, 0 to 1."""


@dataclass(frozen=True)
class Moment:
    """The part of a video that is most like the query, in seconds. `modality`: its picture or its sound."""

    start: float
    end: float
    modality: str


@dataclass(frozen=True)
class Found:
    """One result of a search."""

    id: str
    score: float
    modality: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    vector: list[float] | None = field(default=None, repr=False)
    explain: Mapping[str, Any] | None = None
    moment: Moment | None = None
    """The best moment of a video."""
    preview: Mapping[str, Any] | None = None
    """The item's preview, where `include` asks for it; `Isthmus.preview` returns the picture or the sound."""
    confidence: float | None = None
    """The chance that no item would fit as well by chance, 0 to 1, where `include` asks for it. If it is below 0.7 for
    the best result, there is probably nothing."""
    why: Mapping[str, Any] | None = field(default=None, repr=False)
    """What carried the result, where `include` asks for it: `cells` of a picture, `parts` of a sound or a film, `words`
    of the query."""


@dataclass(frozen=True)
class Step(Moment):
    """The moment of a step of a script, and how alike they are, -1 to 1."""

    similarity: float


@dataclass(frozen=True)
class Followed:
    """A video or a long sound that follows a script; a step that no moment was found for is None."""

    id: str
    score: float
    modality: str
    steps: Sequence[Step | None]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    preview: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ScoredLabel:
    label: str
    score: float
    similarity: float
    probability: float | None = None
    """The label's own probability, whatever the others are; None unless the model is a SigLIP."""


@dataclass(frozen=True)
class Classified:
    """The labels of one input, best first, or with `on_error="null"` the error that there are none for. `cells` where a
    grid was asked for, row by row."""

    labels: Sequence[ScoredLabel]
    abstained: bool
    on_topic: float | None = None
    cells: Sequence[Sequence["Classified"]] | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Written:
    """The outcome of one upserted item: stored, or the error that it was refused with."""

    id: str
    collection: str
    modality: str | None = None
    error: Problem | None = None
    truncated: bool = False
    """Whether the text was cut, or the file ends early or is damaged in places: what can be read of it is stored."""


@dataclass(frozen=True)
class Item:
    """A stored item."""

    id: str
    collection: str
    modality: str
    metadata: Mapping[str, Any]
    created: str
    updated: str
    vector: list[float] | None = field(default=None, repr=False)
    preview: Mapping[str, Any] | None = None
    """What can be shown of the item, where it was asked for: a text's beginning, a picture's size."""
    original: str | None = None
    """Media type of the file that `Isthmus.original` returns, where it was asked for and the server gives it out."""


@dataclass(frozen=True)
class Page:
    items: Sequence[Item]
    next_cursor: str | None
    total: int | None = None
    """The number of all items, where `include` asks for it."""


@dataclass(frozen=True)
class Collection:
    name: str
    count: int
    space: str
    dimensions: int
    index: str
    keywords: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """An item's place in the plane, -1 to 1."""

    id: str
    modality: str
    x: float
    y: float
    label: str | None = None


@dataclass(frozen=True)
class Map:
    """A collection in the plane: what lies near is about the same. `points` are a sample where `count` is larger."""

    count: int
    points: Sequence[Point] = field(repr=False)
    keys: Sequence[str] = ()
    """Metadata keys that `label` may name."""


@dataclass(frozen=True)
class Facets:
    """Says how many items there are: all, of each modality, and with each value of metadata keys."""

    total: int
    modalities: Mapping[str, int]
    facets: Mapping[str, Mapping[str, Any]]
    """By key: `values`, each a `value` and its `count`, `missing` (items without it), `more` (values not listed)."""


@dataclass(frozen=True)
class Preview:
    media_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Job:
    """A bulk job. `state` is queued, running, done, failed (as a whole: `error` says why) or cancelled."""

    id: str
    state: str
    form: str
    collection: str
    total: int | None
    """Number of items; None until they are counted."""
    done: int
    failed: int
    """Number of refused items; `job_errors` says why for each."""
    rate: float | None
    """Items per second."""
    eta_s: float | None
    created: str
    started: str | None
    ended: str | None
    error: Problem | None = None


@dataclass(frozen=True)
class JobError:
    """An item of a job that was refused, and its line in the input."""

    line: int
    id: str | None
    code: str
    detail: str


@dataclass(frozen=True)
class LabelSet:
    name: str
    space: str
    labels: Sequence[str]


@dataclass(frozen=True)
class FeedbackVersion:
    """Holds what a collection was taught by: the numbers of judged items and of judged queries."""

    version: int
    created: str
    judgements: int
    queries: int


@dataclass(frozen=True)
class Feedback:
    """The versions of what a collection was taught, newest last, and the one in use; None: none."""

    current: int | None
    versions: Sequence[FeedbackVersion]


@dataclass(frozen=True)
class Model:
    """A served bundle. `towers` is by modality, `evaluation` the figures that it was released with.

    `licences` are those of what it is made of, each {of, licence, commercial, note}; `commercial` says whether all of
    them allow commercial use, None where that is not known.
    """

    name: str
    space: str
    dimensions: int
    temperature: float
    towers: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    licences: Sequence[Mapping[str, Any]]
    commercial: bool | None = None


@dataclass(frozen=True)
class Readiness:
    ready: bool
    checks: Mapping[str, bool]
    providers: Mapping[str, str]


def from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """Return a result of this kind from the fields of an answer that it has."""
    readers = _field_readers(kind)  # type: ignore[arg-type]
    return kind(
        **{name: read(data[name]) for name, (read, optional) in readers.items() if _given(data, name, optional)}
    )


def _given(data: Mapping[str, Any], name: str, optional: bool) -> bool:
    """Return whether an answer says something of a field: a null counts only where the field may be None."""
    return name in data and (optional or data[name] is not None)


@cache
def _field_readers(kind: Any) -> dict[str, tuple[Callable[[Any], Any], bool]]:
    hints = get_type_hints(kind)
    return {
        field.name: (_reader_of(hint := hints[field.name]), hint is Any or NoneType in get_args(hint))
        for field in fields(kind)
    }


def _reader_of(hint: Any) -> Callable[[Any], Any]:
    """Return a function that turns a value of JSON into a field of this type, and with it the results that it holds."""
    if isinstance(hint, type) and is_dataclass(hint):
        return partial(from_json, hint)
    types = [argument for argument in get_args(hint) if argument is not NoneType]
    if len(types) != 1 or get_origin(hint) not in (UnionType, Sequence):
        return lambda value: value
    read = _reader_of(types[0])
    if get_origin(hint) is UnionType:
        return lambda value: None if value is None else read(value)
    return lambda values: [read(value) for value in values]


def reader(kind: type[T]) -> Callable[[httpx2.Response], T]:
    """Return a function that reads an answer as one result of this kind."""
    return lambda reply: from_json(kind, reply.json())


def listed(key: str, kind: type[T]) -> Callable[[httpx2.Response], list[T]]:
    """Return a function that reads a list in an answer as results of this kind."""
    return lambda reply: [from_json(kind, element) for element in reply.json()[key]]


def embeddings(reply: httpx2.Response) -> list[Embedding]:
    """Read an answer of `/embed` with `encoding: base64`."""
    rows = reply.json()["embeddings"]
    vectors = [None if row.get("embedding") is None else floats(row["embedding"]) for row in rows]
    return [from_json(Embedding, {**row, "vector": vector}) for row, vector in zip(rows, vectors, strict=True)]


def floats(encoded: str) -> list[float]:
    """Decode base64 of little-endian float32."""
    numbers = array("f", base64.b64decode(encoded))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def label_set(reply: httpx2.Response) -> LabelSet:
    data = reply.json()
    names = [label if isinstance(label, str) else label["name"] for label in data["labels"]]
    return from_json(LabelSet, {**data, "labels": names})


def file(reply: httpx2.Response) -> Preview:
    return Preview(reply.headers["content-type"], reply.content)
