"""What the service answers, as typed values. Fields that this version does not know are left aside."""

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Why one input of a batch failed."""

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


@dataclass(frozen=True)
class Found:
    """One result of a search."""

    id: str
    score: float
    modality: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    vector: list[float] | None = field(default=None, repr=False)
    explain: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ScoredLabel:
    label: str
    score: float
    similarity: float


@dataclass(frozen=True)
class Classified:
    """The labels of one input, best first. `cells` where a grid was asked for, row by row."""

    labels: Sequence[ScoredLabel]
    abstained: bool
    on_topic: float | None = None
    cells: Sequence[Sequence["Classified"]] | None = None


@dataclass(frozen=True)
class Written:
    """The outcome of one upserted item: stored, or the error that it was refused with."""

    id: str
    collection: str
    modality: str | None = None
    error: Problem | None = None


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


@dataclass(frozen=True)
class Page:
    items: Sequence[Item]
    next_cursor: str | None


@dataclass(frozen=True)
class Collection:
    name: str
    count: int
    space: str
    dimensions: int
    index: str
    keywords: Sequence[str] = ()


@dataclass(frozen=True)
class LabelSet:
    name: str
    space: str
    labels: Sequence[str]


@dataclass(frozen=True)
class Model:
    """A served bundle. `towers` is by modality, `evaluation` the figures that it was released with."""

    name: str
    space: str
    dimensions: int
    temperature: float
    towers: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    licences: Sequence[str]


@dataclass(frozen=True)
class Readiness:
    ready: bool
    checks: Mapping[str, bool]
    providers: Mapping[str, str]


def embedding(data: Mapping[str, Any]) -> Embedding:
    """From `/embed` with `encoding: base64`."""
    given = data.get("embedding")
    return Embedding(
        data["index"],
        data.get("modality"),
        given if given is None else floats(given),
        data.get("truncated", False),
        problem(data.get("error")),
    )


def floats(encoded: str) -> list[float]:
    """base64 of little-endian float32 → numbers."""
    numbers = array("f", base64.b64decode(encoded))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def problem(data: Mapping[str, Any] | None) -> Problem | None:
    return None if data is None else Problem(data["code"], data["detail"])


def found(data: Mapping[str, Any]) -> Found:
    return Found(
        data["id"],
        data["score"],
        data["modality"],
        data.get("metadata") or {},
        data.get("vector"),
        data.get("explain"),
    )


def classified(data: Mapping[str, Any]) -> Classified:
    cells = data.get("cells")
    return Classified(
        [ScoredLabel(each["label"], each["score"], each["similarity"]) for each in data["labels"]],
        data["abstained"],
        data.get("on_topic"),
        None if cells is None else [[classified(cell) for cell in row] for row in cells],
    )


def written(data: Mapping[str, Any]) -> Written:
    return Written(data["id"], data["collection"], data.get("modality"), problem(data.get("error")))


def item(data: Mapping[str, Any]) -> Item:
    return Item(
        data["id"],
        data["collection"],
        data["modality"],
        data["metadata"],
        data["created"],
        data["updated"],
        data.get("vector"),
    )


def collection(data: Mapping[str, Any]) -> Collection:
    return Collection(
        data["name"],
        data["count"],
        data["space"],
        data["dimensions"],
        data["index"],
        data.get("keywords", ()),
    )


def label_set(data: Mapping[str, Any]) -> LabelSet:
    names = [each if isinstance(each, str) else each["name"] for each in data["labels"]]
    return LabelSet(data["name"], data["space"], names)


def model(data: Mapping[str, Any]) -> Model:
    return Model(
        data["name"],
        data["space"],
        data["dimensions"],
        data["temperature"],
        data["towers"],
        data["evaluation"],
        data["licences"],
    )
