"""The client asks what openapi.yaml allows, and it asks every operation but those for others."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
import yaml

from isthmus_client import ClientError, Isthmus, Judgement, NewItem, composed, stored, vector
from isthmus_client.retries import Retries

DOCUMENT: dict[str, Any] = yaml.load((Path(__file__).parents[2] / "openapi.yaml").read_text(), yaml.CSafeLoader)
OF_OTHERS = {"/", "/healthz", "/metrics", *(path for path in DOCUMENT["paths"] if path.startswith("/v1/"))}
"""Browsers, probes, scrapers and the clients of other projects' protocols ask these."""
OPERATIONS = {
    (method, path)
    for path, methods in DOCUMENT["paths"].items()
    for method in set(methods) & {"get", "post", "put", "delete"}
    if path not in OF_OTHERS
} - {("delete", "/items/{id}")}  # it deletes several at once
ONES: dict[str, Callable[[Isthmus, Path], object]] = {
    "embed": lambda space, _: space.embed(["red"], dimensions=8, role="query", on_error="null"),
    "embed a file": lambda space, media: space.embed([media / "red.png", "red"]),
    "search": lambda space, _: space.search("red", top_k=3, filter={"n": {"$gte": 1}}, include=["explain"]),
    "search by an item": lambda space, _: space.search(stored("a"), collection="c", modalities=["image"]),
    "search by parts": lambda space, media: space.search(composed(("red", 1.0), (media / "blue.png", -0.5))),
    "search by a vector": lambda space, _: space.search_many([vector([0.0] * 16), "red"], threshold=0.1),
    "follow": lambda space, media: space.follow([media / "red.png", "blue"], modalities=["video"], include=["preview"]),
    "teach": lambda space, media: space.teach([Judgement("red", ["a"]), Judgement(media / "red.png", ["a"], ["b"])]),
    "feedback": lambda space, _: space.feedback("c"),
    "use feedback": lambda space, _: space.use_feedback(None, collection="c"),
    "delete feedback": lambda space, _: space.delete_feedback(2, collection="c"),
    "classify": lambda space, media: space.classify([media / "red.png"], labels=["red", "blue"], top_k=1),
    "classify by a set": lambda space, _: space.classify(["red"], label_set="colours", abstain=True),
    "score": lambda space, media: space.score([("red", media / "red.png")]),
    "upsert": lambda space, media: space.upsert([NewItem("a", "red", {"n": 1}), NewItem("b", media / "tone.wav")]),
    "page": lambda space, _: space.page(collection="c", modality="image", limit=3),
    "item": lambda space, _: space.item("a/b c", collection="c", with_vector=True),
    "delete": lambda space, _: space.delete(["a"], collection="c"),
    "move": lambda space, _: space.move({"a": "b"}, collection="c"),
    "facets": lambda space, _: space.facets("c", keys=["year"], filter={"n": 1}, modality="image"),
    "delete by filter": lambda space, _: space.delete(filter={"n": [1, None]}),
    "collections": lambda space, _: space.collections(),
    "collection": lambda space, _: space.collection("c"),
    "put collection": lambda space, _: space.put_collection("c", index="hnsw", precision="int8", keywords=["title"]),
    "drop collection": lambda space, _: space.drop_collection("c"),
    "map": lambda space, _: space.map("c", limit=10, label="what"),
    "preview": lambda space, _: space.preview("a", collection="c"),
    "create job": lambda space, _: space.create_job([NewItem("a", "red")], collection="c", idempotency_key="k"),
    "job": lambda space, _: space.job("x"),
    "jobs": lambda space, _: space.jobs(limit=3, before="x", states=["done", "failed"]),
    "job errors": lambda space, _: space.job_errors("x"),
    "cancel job": lambda space, _: space.cancel_job("x"),
    "put label set": lambda space, _: space.put_label_set("s", ["red", {"name": "blue", "prompts": ["a blue thing"]}]),
    "label sets": lambda space, _: space.label_sets(limit=3, after="s"),
    "label set": lambda space, _: space.label_set("s"),
    "delete label set": lambda space, _: space.delete_label_set("s"),
    "models": lambda space, _: space.models(),
    "original": lambda space, _: space.original("a/b", collection="c"),
    "item and its file": lambda space, _: space.item("a", with_vector=True, with_preview=True, with_original=True),
    "list": lambda space, _: list(space.items(collection="c", filter={"n": 1}, sort="n", order="desc")),
    "keeps previews": lambda space, _: space.keeps_previews(),
    "ready": lambda space, _: space.ready(),
}


def asked(ask: Callable[[Isthmus, Path], object], media: Path) -> httpx2.Request:
    """The request that a call begins with; it is answered by an error."""
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        request.read()
        requests.append(request)
        return httpx2.Response(404, json={"code": "not_found", "detail": "none", "status": 404, "title": "Not Found"})

    with (
        Isthmus("http://x", transport=httpx2.MockTransport(answer), retries=Retries(attempts=1)) as space,
        pytest.raises(ClientError),
    ):
        ask(space, media)
    return requests[0]


def operation(request: httpx2.Request) -> tuple[str, str]:
    """The method and the path as the document writes it."""
    path = request.url.raw_path.decode().partition("?")[0]
    patterns = {each: re.sub(r"\\{\w+\\}", "[^/]+", re.escape(each)) for each in DOCUMENT["paths"]}
    fitting = [each for each, pattern in patterns.items() if re.fullmatch(pattern, path)]
    assert fitting, path
    return request.method.lower(), min(fitting, key=lambda each: each.count("{"))


def checked(body: Any, schema: dict[str, Any]) -> None:
    import jsonschema  # takes a second, for the grammars of its formats

    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(body)


@pytest.mark.parametrize("name", ONES)
def test_a_request_is_one_that_the_document_allows(name: str, media: Path) -> None:
    request = asked(ONES[name], media)
    method, path = operation(request)
    described = DOCUMENT["paths"][path][method]
    queries = {each["name"]: each for each in described.get("parameters", []) if each["in"] == "query"}
    assert set(request.url.params) <= set(queries), path
    headers = {each["name"].lower() for each in described.get("parameters", []) if each["in"] == "header"}
    assert "idempotency-key" not in request.headers or "idempotency-key" in headers
    kind = request.headers.get("content-type", "").partition(";")[0]
    if not request.content:
        assert not described.get("requestBody", {}).get("required")
        return
    content = described["requestBody"]["content"]
    assert kind in content, f"{kind} is none of {set(content)}"
    if kind == "application/json":
        checked(orjson.loads(request.content), content[kind]["schema"])
    elif kind == "multipart/form-data":
        [part] = re.findall(rb'name="request".*?\r\n\r\n(.*?)\r\n--', request.content, re.DOTALL)
        checked(orjson.loads(part), content[kind]["schema"]["properties"]["request"])


def test_every_operation_is_asked(media: Path) -> None:
    assert {operation(asked(ask, media)) for ask in ONES.values()} == OPERATIONS
