"""Every route as a value: the request, and the function that reads the answer. No I/O, so that both clients share
it."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

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
    rerank: Mapping[str, Any]
    diversity: Mapping[str, Any]
    balance: bool
    include: Sequence[Literal["metadata", "vector", "explain", "preview", "confidence"]]


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
    tokens: bool
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
        """The item as JSON has it; with `as_file` a medium is `file`, its bytes, for a form. Raises OSError."""
        data = file_of(self.content) if as_file and self.modality is None else None
        content = to_wire(self.content) if data is None else {"file": data}
        wire = {"id": self.id, "metadata": dict(self.metadata), "collection": self.collection}
        if self.modality is not None:
            wire["modality"] = self.modality
        return wire | ({"text": content} if isinstance(content, str) else content)


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


def embed(inputs: Iterable[Input], options: Mapping[str, Any]) -> Call[list[results.Embedding]]:
    return embed_wire([to_wire(value) for value in inputs], options)


def embed_wire(inputs: Sequence[str | Mapping[str, Any]], options: Mapping[str, Any]) -> Call[list[results.Embedding]]:
    body = {"inputs": inputs, "encoding": "base64", **options}
    return Call("POST", "/embed", lambda got: [results.embedding(vector) for vector in got.json()["embeddings"]], body)


def search(query: Input, options: Mapping[str, Any]) -> Call[list[results.Found]]:
    body = {"query": to_wire(query), **options}
    return Call("POST", "/search", lambda got: [results.found(result) for result in _answer(got)["results"]], body)


def search_many(queries: Iterable[Input], options: Mapping[str, Any]) -> Call[list[list[results.Found]]]:
    body = {"queries": [to_wire(query) for query in queries], **options}

    def read(got: httpx2.Response) -> list[list[results.Found]]:
        return [[results.found(result) for result in ranked] for ranked in _answer(got)["results"]]

    return Call("POST", "/search/batch", read, body)


def classify(inputs: Iterable[Input], options: Mapping[str, Any]) -> Call[list[results.Classified]]:
    body = {"inputs": [to_wire(value) for value in inputs], **options}
    return Call(
        "POST", "/classify", lambda got: [results.classified(result) for result in _answer(got)["results"]], body
    )


def score(pairs: Iterable[tuple[Input, Input]], model: str | None) -> Call[list[float]]:
    body: dict[str, Any] = {"pairs": [{"a": to_wire(a), "b": to_wire(b)} for a, b in pairs]}
    if model is not None:
        body["model"] = model
    return Call("POST", "/score", lambda got: list(got.json()["scores"]), body)


def upsert_wire(items: Sequence[Mapping[str, Any]], on_error: str) -> Call[list[results.Written]]:
    """Return the call that stores items. Those with a `file` go as a form, which base64 would make a third larger."""
    files = [item["file"] for item in items if "file" in item]
    named = [{name: value for name, value in item.items() if name != "file"} for item in items]
    body = {"items": named, "on_error": on_error}
    return Call(
        "POST", "/items", lambda got: [results.written(item) for item in got.json()["items"]], body, files=files
    )


def list_items(options: Mapping[str, Any]) -> Call[results.Page]:
    def read(got: httpx2.Response) -> results.Page:
        body = got.json()
        return results.Page([results.item(item) for item in body["items"]], body["next_cursor"], body.get("total"))

    parameters = {name: value for name, value in options.items() if value is not None}
    if "filter" in parameters:
        parameters["filter"] = json.dumps(parameters["filter"])
    return Call("GET", "/items", read, parameters=parameters)


def get_item(
    item: str, collection: str, with_vector: bool, with_preview: bool, with_original: bool
) -> Call[results.Item]:
    wanted = {"vector": with_vector, "preview": with_preview, "original": with_original}
    include = [name for name in wanted if wanted[name]]
    parameters = {"collection": collection, "include": include}
    return Call("GET", f"/items/{quote(item, safe='')}", lambda got: results.item(got.json()), parameters=parameters)


def delete_items(ids: Sequence[str] | None, filter: Mapping[str, Any] | None, collection: str) -> Call[int]:
    body: dict[str, Any] = {"collection": collection}
    if ids is not None:
        body["ids"] = ids
    if filter is not None:
        body["filter"] = filter
    return Call("POST", "/items/delete", lambda got: int(got.json()["deleted"]), body)


def move_items(ids: Mapping[str, str], metadata: Mapping[str, Mapping[str, Any]] | None, collection: str) -> Call[int]:
    described = {id: {"metadata": given} for id, given in (metadata or {}).items()}
    body = {
        "moves": [{"id": id, "to": to, **described.get(id, {})} for id, to in ids.items()],
        "collection": collection,
    }
    return Call("POST", "/items/move", lambda got: int(got.json()["moved"]), body)


def list_collections() -> Call[list[results.Collection]]:
    return Call(
        "GET", "/collections", lambda got: [results.collection(collection) for collection in got.json()["collections"]]
    )


def get_collection(name: str) -> Call[results.Collection]:
    return Call("GET", f"/collections/{quote(name, safe='')}", lambda got: results.collection(got.json()))


def put_collection(name: str, options: Mapping[str, Any]) -> Call[results.Collection]:
    path = f"/collections/{quote(name, safe='')}"
    return Call("PUT", path, lambda got: results.collection(got.json()), dict(options))


def drop_collection(name: str) -> Call[None]:
    return Call("DELETE", f"/collections/{quote(name, safe='')}", _nothing)


def map_collection(name: str, limit: int | None, label: str | None) -> Call[results.Map]:
    parameters = {key: value for key, value in (("limit", limit), ("label", label)) if value is not None}
    path = f"/collections/{quote(name, safe='')}/map"
    return Call("GET", path, lambda got: results.map_(got.json()), parameters=parameters)


def facets(
    name: str, keys: Sequence[str], filter: Mapping[str, Any] | None, modality: str | None
) -> Call[results.Facets]:
    parameters: dict[str, Any] = {"key": list(keys)} | ({} if modality is None else {"modality": modality})
    if filter is not None:
        parameters["filter"] = json.dumps(filter)
    path = f"/collections/{quote(name, safe='')}/facets"
    return Call("GET", path, lambda got: results.facets(got.json()), parameters=parameters)


def preview(item: str, collection: str) -> Call[results.Preview]:
    def read(got: httpx2.Response) -> results.Preview:
        return results.Preview(got.headers["content-type"], got.content)

    return Call("GET", f"/previews/{quote(item, safe='')}", read, parameters={"collection": collection})


def original(item: str, collection: str) -> Call[results.Preview]:
    def read(got: httpx2.Response) -> results.Preview:
        return results.Preview(got.headers["content-type"], got.content)

    return Call("GET", f"/media/{quote(item, safe='')}", read, parameters={"collection": collection})


def put_label_set(
    name: str,
    labels: Sequence[str | Mapping[str, Any]],
    templates: Sequence[str] | Mapping[str, Sequence[str]] | None,
    off_topic: Iterable[Input],
) -> Call[results.LabelSet]:
    """Return the call that stores a label set. A label's `examples` are inputs, like `off_topic`. Raises OSError."""
    body: dict[str, Any] = {
        "labels": [_taught(label) for label in labels],
        "off_topic": [to_wire(value) for value in off_topic],
    }
    if templates is not None:
        body["templates"] = templates
    return Call("PUT", f"/label-sets/{quote(name, safe='')}", lambda got: results.label_set(got.json()), body)


def _taught(label: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A label as JSON has it, with the inputs that show it."""
    if isinstance(label, str):
        return label
    wire = dict(label)
    if "examples" in wire:
        wire["examples"] = [to_wire(example) for example in wire["examples"]]
    return wire


def list_label_sets(limit: int, after: str | None) -> Call[list[str]]:
    parameters: dict[str, Any] = {"limit": limit} | ({} if after is None else {"after": after})
    return Call(
        "GET", "/label-sets", lambda got: [each["name"] for each in got.json()["label_sets"]], parameters=parameters
    )


def get_label_set(name: str) -> Call[results.LabelSet]:
    return Call("GET", f"/label-sets/{quote(name, safe='')}", lambda got: results.label_set(got.json()))


def delete_label_set(name: str) -> Call[None]:
    return Call("DELETE", f"/label-sets/{quote(name, safe='')}", _nothing)


def models() -> Call[list[results.Model]]:
    return Call("GET", "/models", lambda got: [results.model(model) for model in got.json()["models"]])


def keeps_previews() -> Call[bool]:
    return Call("GET", "/models", lambda got: bool(got.json().get("previews", False)))


def ready() -> Call[results.Readiness]:
    def read(got: httpx2.Response) -> results.Readiness:
        body = got.json()
        return results.Readiness(body["status"] == "ready", body["checks"], body.get("providers", {}))

    return Call("GET", "/readyz", read, answers=frozenset({503}))


def _answer(got: httpx2.Response) -> Any:
    """The body of an answer; what the service warns of in it becomes an `IsthmusWarning`."""
    body = got.json()
    for warning in body.get("warnings") or ():
        warnings.warn(str(warning), IsthmusWarning, stacklevel=2)
    return body


def _nothing(_: httpx2.Response) -> None:
    return None
