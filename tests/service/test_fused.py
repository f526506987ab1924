"""One vector of several inputs, at every entrance."""

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from service.api.protocols.cohere import CohereEmbedRequest
from service.api.protocols.jina import JinaRerankRequest
from service.api.protocols.weaviate import WeaviateRequest
from service.engine.inputs import Fused, Media, Text, fused, in_role
from service.retrieval.reembedding import Originals
from service.schemas.classify import ClassifyRequest, LabelSetRequest
from service.schemas.embed import EmbedRequest, ScoreRequest
from service.schemas.items import ItemInput, ItemsRequest
from service.schemas.search import SearchBatchRequest, SearchRequest
from service.settings import Limits
from service.store.carry_over import OldItem
from tests.service.fakes import FakeEmbedder
from tests.service.jobs.processes import ended, submitted

Parts = list[dict[str, Any]]


@pytest.fixture
def red(png: Callable[..., bytes]) -> str:
    return base64.b64encode(png("red")).decode()


def vectors(client: httpx.Client, *inputs: Any, **more: Any) -> np.ndarray:
    answer = client.post("/embed", json={"inputs": list(inputs), **more})
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["embeddings"]])


def weighed(parts: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    total = np.array(weights) @ parts
    return np.asarray(total / np.linalg.norm(total))


def test_it_is_the_weighted_sum_of_its_parts(client: httpx.Client, red: str, wav: Callable[..., bytes]) -> None:
    sound = base64.b64encode(wav()).decode()
    parts: Parts = [{"text": "blue", "weight": 0.5}, {"image": red}, {"audio": sound, "weight": -0.25}]
    answer = client.post("/embed", json={"inputs": ["tone", {"compose": parts}, "blue"]}).json()["embeddings"]
    assert [each["modality"] for each in answer] == ["text", "image", "text"]
    alone = vectors(client, "blue", {"image": red}, {"audio": sound})
    assert np.allclose(answer[1]["embedding"], weighed(alone, [0.5, 1, -0.25]), atol=1e-6)
    asked = {"query": {"compose": parts}, "include": ["explain"]}
    assert client.post("/search", json=asked).status_code == 200


def test_an_item_is_found_by_its_picture_and_its_words(client: httpx.Client, red: str) -> None:
    parts: Parts = [{"text": "blue barks"}, {"image": red}]
    stored = client.post("/items", json={"items": [{"id": "a", "compose": parts}, {"id": "b", "text": "tone"}]})
    assert stored.status_code == 200 and stored.json()["items"][0]["modality"] == "image"
    [item, _] = client.post("/search", json={"query": {"compose": parts}, "include": ["preview", "vector"]}).json()[
        "results"
    ]
    assert item["id"] == "a" and item["score"] > 0.999 and item["preview"]["text"] == "blue barks"
    assert item["preview"]["media_type"].startswith("image/")
    alone = vectors(client, "blue barks", {"image": red}, role="passage")
    assert np.allclose(item["vector"], weighed(alone, [1, 1]), atol=1e-6)
    worded = {"query": "tone", "keywords": {"query": "barks", "weight": 1}, "include": ["explain"]}
    assert client.post("/search", json=worded).json()["results"][0]["id"] == "a"


def test_files_of_a_form_are_parts(client: httpx.Client, png: Callable[..., bytes], red: str) -> None:
    files = [("file", ("a.png", png("red"))), ("file", ("b.png", png("blue")))]
    body = {"inputs": [{"compose": [{"text": "blue"}, {"weight": 2}]}]}
    answer = client.post("/embed", files=files, data={"request": json.dumps(body)}).json()["embeddings"]
    assert len(answer) == 2
    assert np.allclose(answer[0]["embedding"], weighed(vectors(client, "blue", {"image": red}), [1, 2]), atol=1e-6)
    items = {"items": [{"id": "a", "compose": [{"text": "blue"}, {}]}]}
    stored = client.post("/items", files=files, data={"request": json.dumps(items)}).json()
    assert [item["id"] for item in stored["items"]] == ["a", "b.png"]


def test_files_of_a_form_are_given_in_the_order_of_the_items(
    client: httpx.Client, png: Callable[..., bytes], red: str
) -> None:
    files = [("file", (f"{colour}.png", png(colour))) for colour in ("red", "blue", "green")]
    items: Parts = [{"id": "plain"}, {"id": "fused", "compose": [{"weight": 1}, {"text": "red", "weight": 0.5}]}]
    stored = client.post("/items", files=files, data={"request": json.dumps({"items": items})})
    assert stored.status_code == 200, stored.text
    blue = base64.b64encode(png("blue")).decode()
    pictures = vectors(client, {"image": red}, {"image": blue})
    [text] = vectors(client, "red", role="passage")
    item = {id: client.get(f"/items/{id}", params={"include": "vector"}).json()["vector"] for id in ("plain", "fused")}
    assert np.allclose(item["plain"], pictures[0], atol=1e-6)
    assert np.allclose(item["fused"], weighed(np.stack([pictures[1], text]), [1, 0.5]), atol=1e-6)
    assert client.get("/items/green.png").status_code == 200


@pytest.mark.parametrize(
    ("compose", "says"),
    [
        ([], "at least 1 item"),
        ([{"text": "red"}] * 33, "at most 32"),
        ([{"text": "red"}, {"vector": [1]}], "exactly one of: text, image, audio, video"),
        ([{"text": "red"}, {"id": "a"}], "exactly one of: text, image, audio, video"),
        ([{"text": "red"}, {"text": "red", "weight": -1}], "cancel each other out"),
        ([{"text": "red", "weight": "x"}], "valid number"),
        ([{"text": "red"}, {"image": "!"}], "not valid base64"),
        ([{"text": "red"}, {"text": "日本"}], "knows no word"),
        ([{"compose": [{"text": "red"}]}], "exactly one of: text, image, audio, video"),
    ],
)
def test_what_is_wrong_is_said_at_every_entrance(client: httpx.Client, compose: Parts, says: str) -> None:
    for path, body in (
        ("/embed", {"inputs": [{"compose": compose}]}),
        ("/items", {"items": [{"id": "a", "compose": compose}]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 422 and says in answer.text, answer.text
    lenient = client.post("/embed", json={"inputs": ["red", {"compose": compose}], "on_error": "null"})
    if lenient.status_code == 200:  # what can be read fails alone
        assert says in lenient.json()["embeddings"][1]["error"]["detail"]


def test_parts_count_as_inputs(client: httpx.Client) -> None:
    many = [{"compose": [{"text": "red"}] * 32}] * 8
    assert client.post("/embed", json={"inputs": many}).status_code == 200
    over = client.post("/embed", json={"inputs": [*many, "red"]})
    assert over.status_code == 422 and "at most 256 parts of inputs" in over.text


PARTS = {"compose": [{"text": "red"}, {"text": "blue"}]}
COHERE = {"model": "tiny", "input_type": "image"}
CONTENT = [{"type": "text", "text": "red"}, {"type": "text", "text": "blue"}]
JINA = {"model": "tiny", "query": "red"}


@pytest.mark.parametrize(
    ("schema", "inputs", "body"),
    [
        (EmbedRequest, 4, {"inputs": [PARTS, PARTS]}),
        (ItemsRequest, 3, {"items": [{"id": "a", **PARTS}, {"id": "b", "text": "red"}]}),
        (ItemInput, 2, {"id": "a", **PARTS}),  # a line of a job
        (ScoreRequest, 4, {"pairs": [{"a": PARTS, "b": PARTS}]}),
        (ScoreRequest, 4, {"pairs": [{"a": "red", "b": "red"}] * 2}),
        (SearchRequest, 2, {"query": PARTS}),
        (SearchBatchRequest, 4, {"queries": [PARTS, PARTS]}),
        (ClassifyRequest, 2, {"inputs": [PARTS], "labels": ["red"]}),
        (JinaRerankRequest, 3, {**JINA, "documents": [PARTS] * 12}),  # eight times as many documents as inputs
        (JinaRerankRequest, 2, {**JINA, "query": PARTS, "documents": ["red"]}),
        (CohereEmbedRequest, 32, {**COHERE, "inputs": [{"content": CONTENT * 16}]}),
        (WeaviateRequest, 4, {"texts": ["red", "blue"], "images": ["x"], "audio": ["x"]}),
    ],
)
def test_parts_count_at_every_entrance(schema: type[BaseModel], inputs: int, body: dict[str, Any]) -> None:
    schema.model_validate(body, context=Limits(inputs=inputs))
    with pytest.raises(ValidationError, match=r"at most \d+ "):
        schema.model_validate(body, context=Limits(inputs=inputs - 1))


def test_one_input_is_taken_where_a_request_may_have_one() -> None:
    bodies: dict[type[BaseModel], dict[str, Any]] = {
        EmbedRequest: {"inputs": ["red"]},
        ScoreRequest: {"pairs": [{"a": "red", "b": "red"}]},
        CohereEmbedRequest: {**COHERE, "inputs": [{"content": CONTENT[:1]}]},
    }
    for schema, body in bodies.items():
        schema.model_validate(body, context=Limits(inputs=1))


def test_parts_of_examples_count() -> None:
    labels = [{"name": "red", "examples": [PARTS] * 24}, "blue"]
    LabelSetRequest.model_validate({"labels": labels, "off_topic": [PARTS] * 2024})
    with pytest.raises(ValidationError, match="at most 4096 in one label set"):
        LabelSetRequest.model_validate({"labels": labels, "off_topic": [PARTS] * 2025})


def test_deep_parts_are_counted_without_recursion() -> None:
    deep: Any = "red"
    for _ in range(2_000):
        deep = {"compose": [deep]}
    with pytest.raises(ValidationError):
        EmbedRequest.model_validate({"inputs": [deep]})


def test_a_job_stores_it_too(fresh_client: httpx.Client, red: str) -> None:
    job = submitted(fresh_client, [{"id": "a", "compose": [{"text": "blue"}, {"image": red}]}])
    assert ended(fresh_client, job)["state"] == "done"
    item = fresh_client.get("/items/a", params={"include": "vector"}).json()
    alone = vectors(fresh_client, "blue", {"image": red}, role="passage")
    assert np.allclose(item["vector"], weighed(alone, [1, 1]), atol=1e-6)


def test_its_vector_is_not_made_again_of_its_picture_alone() -> None:
    item = OldItem("default", "a", "image", {}, "", "", "", None, 0, np.zeros(2, np.float32), ())
    assert Originals().of(item) == "image: its vector is that of several parts, which are not kept"


def test_roles_reach_the_parts() -> None:
    given = Fused(((Text("red"), 1.0), (Media("image", b"x"), 2.0)))
    [inside] = in_role([given], "passage")
    assert inside == Fused(((Text("red", "passage"), 1.0), (Media("image", b"x"), 2.0)))
    made = asyncio.run(FakeEmbedder().embed([Text("red"), Media("image", b"bad")]))
    assert fused(given, made) is made[1]
