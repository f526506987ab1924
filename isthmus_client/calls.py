"""Every route is a value: the request, and the function that reads the answer. No I/O, so that both clients share
it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar

import httpx2

from isthmus_client import results
from isthmus_client.errors import IsthmusWarning
from isthmus_client.inputs import Input, file_of, to_wire

T = TypeVar("T")


class EmbedOptions(TypedDict, total=False):
    model: str
    dimensions: int
    role: Literal["query", "passage"]
    on_error: Literal["fail", "null"]


class SearchOptions(TypedDict, total=False):
    """Options of a search, as in openapi.yaml's SearchRequest."""

    top_k: int
    collection: str
    modalities: Sequence[str]
    filter: Mapping[str, Any]
    effort: Mapping[str, Any]
    correction: float
    threshold: float
    keywords: Mapping[str, Any]
    deduplicate: float
    diversity: Mapping[str, Any]
    fdr: float
    feedback: bool
    balance: bool
    include: Sequence[Literal["metadata", "vector", "explain", "preview", "confidence", "why"]]
    why_of: Sequence[str]


class ScriptOptions(TypedDict, total=False):
    top_k: int
    collection: str
    modalities: Sequence[Literal["video", "audio"]]
    filter: Mapping[str, Any]
    include: Sequence[Literal["metadata", "preview"]]


class ClassifyOptions(TypedDict, total=False):
    model: str
    labels: Sequence[str | Mapping[str, Any]]
    label_set: str
    templates: Sequence[str] | Mapping[str, Sequence[str]]
    top_k: int
    threshold: float
    abstain: bool | float
    grid: Mapping[str, int]
    on_error: Literal["fail", "null"]


class ListOptions(TypedDict, total=False):
    cursor: str | None
    limit: int
    collection: str
    modality: str
    filter: Mapping[str, Any]
    sort: str
    order: Literal["asc", "desc"]
    include: Literal["preview", "total"] | Sequence[Literal["preview", "total"]]


class CollectionOptions(TypedDict, total=False):
    keywords: Sequence[str]
    index: str
    precision: str


@dataclass(frozen=True)
class NewItem:
    """An item to be stored under the caller's id. `content` is an input, or `vector(numbers)` with a modality."""

    id: str
    content: Input
    metadata: Mapping[str, Any] = field(default_factory=dict)
    collection: str = "default"
    modality: str | None = None

    def to_wire(self, *, as_file: bool = False) -> dict[str, Any]:
        """Return the item as JSON has it; with `as_file` a medium is `file`, its bytes, for a form. Raises OSError."""
        data = file_of(self.content) if as_file and self.modality is None else None
        content = to_wire(self.content) if data is None else {"file": data}
        wire = {"id": self.id, "metadata": dict(self.metadata), "collection": self.collection}
        if self.modality is not None:
            wire["modality"] = self.modality
        return wire | ({"text": content} if isinstance(content, str) else content)


@dataclass(frozen=True)
class Judgement:
    """A query, and the ids of stored items that are, or are not, what was looked for."""

    query: Input
    relevant: Sequence[str] = ()
    not_relevant: Sequence[str] = ()


@dataclass(frozen=True)
class Call(Generic[T]):
    method: str
    path: str
    read: Callable[[httpx2.Response], T]
    body: Any = None
    parameters: Mapping[str, Any] | None = None
    answers: frozenset[int] = frozenset()
    """Statuses that count as answers here, although they look like errors."""
    headers: Mapping[str, str] | None = None
    files: Sequence[bytes] = ()
    """Files that go with the body, which is then the part `request` of a form."""


def embed(inputs: Sequence[str | Mapping[str, Any]], options: Mapping[str, Any]) -> Call[list[results.Embedding]]:
    body = {"inputs": inputs, "encoding": "base64", **options}
    return Call("POST", "/embed", results.embeddings, body)


def upsert(items: Sequence[Mapping[str, Any]], on_error: str) -> Call[list[results.Written]]:
    """Return the call that stores items. Those with a `file` go as a form, which base64 would make a third larger."""
    files = [item["file"] for item in items if "file" in item]
    bodies = [{name: value for name, value in item.items() if name != "file"} for item in items]
    body = {"items": bodies, "on_error": on_error}
    return Call("POST", "/items", results.listed("items", results.Written), body, files=files)


def answered(kind: type[T]) -> Callable[[httpx2.Response], list[T]]:
    """Return a function that reads the results of an answer, all of this kind."""
    return lambda reply: [results.from_json(kind, result) for result in body_of(reply)["results"]]


def body_of(reply: httpx2.Response) -> Any:
    """Return the body of an answer; what the service warns of in it becomes an `IsthmusWarning`."""
    body = reply.json()
    for warning in body.get("warnings") or ():
        warnings.warn(str(warning), IsthmusWarning, stacklevel=2)
    return body
