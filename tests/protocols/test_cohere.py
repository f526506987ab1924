"""Cohere's shapes, as its own client 7.3.1 reads them (cohere/v2/raw_client.py, cohere/types/embed_by_type_response.py,
cohere/v2/types/v2rerank_response.py of cohere-ai/cohere-python), and by that client."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cohere
import httpx
import numpy as np
import pytest

from tests.protocols.conftest import LONG, Native, refused, same

pytestmark = pytest.mark.client("cohere")
EMBED = {"model": "tiny", "input_type": "search_query"}
RERANK = {"model": "tiny", "query": "red"}


@contextmanager
def client_of(server: httpx.Client, key: str = "none") -> Iterator[cohere.ClientV2]:
    with cohere.ClientV2(key, base_url=str(server.base_url)) as client:
        yield client


@pytest.fixture
def official(server: httpx.Client) -> Iterator[cohere.ClientV2]:
    with client_of(server) as client:
        yield client


def test_texts(official: cohere.ClientV2, native: Native) -> None:
    answer = official.embed(texts=["a photo of the dog", "red"], embedding_types=["float"], **EMBED)
    assert answer.response_type == "embeddings_by_type" and answer.texts == ["a photo of the dog", "red"]
    same(answer.embeddings.float_, native("a photo of the dog", "red"))
    assert answer.meta is not None and answer.meta.billed_units is not None
    assert answer.meta.billed_units.input_tokens == 6


def test_the_role_of_a_text(official: cohere.ClientV2, native: Native) -> None:
    answer = official.embed(texts=["red"], model="tiny", input_type="search_document")
    same(answer.embeddings.float_, native("red", role="passage"))


def test_images(official: cohere.ClientV2, native: Native, picture: str) -> None:
    answer = official.embed(images=[picture], model="tiny", input_type="image")
    same(answer.embeddings.float_, native({"image": picture}))


def test_several_parts_share_a_vector(official: cohere.ClientV2, native: Native, picture: str) -> None:
    parts = [{"type": "text", "text": "blue"}, {"type": "image_url", "image_url": {"url": picture}}]
    inputs: list[Any] = [{"content": parts}, {"content": parts[:1]}]
    answer = official.embed(inputs=inputs, **EMBED)
    same(answer.embeddings.float_, native({"compose": [{"text": "blue"}, {"image": picture}]}, "blue"))
    blue, red = native("blue", {"image": picture})
    same(answer.embeddings.float_[0], (blue + red) / np.linalg.norm(blue + red))


def test_a_part_holds_one_thing(server: httpx.Client, picture: str) -> None:
    text = {"type": "text", "text": "red"}
    others: list[dict[str, Any]] = [{"image_url": {"url": picture}}, {"image_url": ""}, {"image": picture}]
    for more in (*others, {"weight": 0}):
        for given in ({"content": [{**text, **more}]}, {"content": [text], **more}):
            body = {**EMBED, "inputs": [given]}
            refused(server, "/v2/embed", body, 422, next(iter(more)), lambda answer: answer["message"])


def test_every_encoding(official: cohere.ClientV2, native: Native) -> None:
    kinds: list[Any] = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = official.embed(texts=["red"], embedding_types=kinds, output_dimension=8, **EMBED).embeddings
    [vector] = native("red", dimensions=8)
    same(answer.float_, vector[None])
    assert answer.int8 == native("red", dimensions=8, encoding="int8").tolist()
    assert (np.array(answer.uint8) - 128 == np.array(answer.int8)).all()
    assert answer.ubinary == np.packbits(vector > 0)[None].tolist()
    assert (np.array(answer.binary) + 128 == np.array(answer.ubinary)).all()
    assert answer.base64 is not None
    same(np.frombuffer(base64.b64decode(answer.base64[0]), "<f4"), vector)


def test_a_text_that_is_cut_is_told(official: cohere.ClientV2) -> None:
    meta = official.embed(texts=["red", LONG], **EMBED).meta
    assert meta is not None and meta.warnings is not None
    assert [warning.partition(":")[0] for warning in meta.warnings] == ["texts[1]"]
    with pytest.raises(cohere.UnprocessableEntityError, match=r"texts\[1\]"):
        official.embed(texts=["red", LONG], truncate="NONE", **EMBED)


def test_a_text_that_is_hardly_known_is_told(server: httpx.Client) -> None:
    unknown = "red \u6f22 \u5b57"
    answer = server.post("/v2/embed", json={**EMBED, "texts": ["red", unknown]}).json()
    [warning] = answer["meta"]["warnings"]
    assert warning.startswith("texts[1]: the model's tokenizer does not know 67% of the text")
    answer = server.post("/v2/rerank", json={**RERANK, "query": LONG, "documents": ["red", LONG, unknown]}).json()
    assert [warning.partition(":")[0] for warning in answer["meta"]["warnings"]] == [
        "query",
        "documents[1]",
        "documents[2]",
    ]


def test_pictures_are_counted_wherever_they_are(server: httpx.Client, picture: str) -> None:
    part = {"type": "image_url", "image_url": {"url": picture}}
    inputs = [{"content": [part]}, {"content": [{"type": "text", "text": "red"}, part]}]
    for body, count in (({"images": [picture]}, 1), ({"inputs": inputs}, 2)):
        answer = server.post("/v2/embed", json={**EMBED, **body}).json()
        assert answer["meta"]["billed_units"]["images"] == count


def test_rerank(official: cohere.ClientV2, native: Native) -> None:
    answer = official.rerank(documents=["blue", "a red dog", "red"], top_n=2, **RERANK)
    assert [result.index for result in answer.results] == [2, 1]
    [query] = native("red")
    documents = native("blue", "a red dog", "red", role="passage")
    same([result.relevance_score for result in answer.results], (documents @ query)[[2, 1]])


def test_the_answers_have_the_fields_of_cohere(server: httpx.Client) -> None:
    answer = server.post("/v2/embed", json={"texts": ["red"], **EMBED}).json()
    assert set(answer) == {"id", "response_type", "embeddings", "texts", "meta"}
    assert answer["meta"] == {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 1, "images": 0}}
    answer = server.post("/v2/rerank", json={"documents": ["red"], **RERANK}).json()
    assert set(answer) == {"id", "results", "meta"} and set(answer["results"][0]) == {"index", "relevance_score"}


@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        ("embed", {"texts": ["red"], "input_type": "search_query", "model": "other"}, 404, "no such model"),
        ("embed", {"texts": ["red"], "model": "tiny"}, 422, "input_type"),
        ("embed", {**EMBED, "texts": ["red"], "images": ["x"]}, 422, "exactly one of: texts, images, inputs"),
        ("embed", {**EMBED, "texts": ["red"], "truncate": "START"}, 422, "truncate"),
        ("embed", {**EMBED, "texts": ["red"], "max_tokens": 5}, 422, "max_tokens"),
        ("embed", {**EMBED, "texts": ["red"], "embedding_types": ["float16"]}, 422, "embedding_types"),
        ("embed", {**EMBED, "texts": ["red"], "output_dimension": 99}, 422, "output_dimension must be"),
        ("embed", {**EMBED, "texts": ["red", ""]}, 422, "texts[1]"),
        ("embed", {**EMBED, "images": ["data:image/png;base64,!"]}, 422, "images[0]"),
        ("embed", {**EMBED, "images": ["https://example.org/a.png"]}, 422, "fetching of URLs is off"),
        ("embed", {**EMBED, "inputs": [{"content": [{"type": "image"}]}]}, 422, "inputs"),
        ("embed", {**EMBED, "texts": ["red"] * 257}, 422, "at most 256 texts"),
        ("rerank", {**RERANK, "documents": []}, 422, "documents"),
        ("rerank", {**RERANK, "documents": ["a"], "max_tokens_per_doc": 10}, 422, "max_tokens_per_doc"),
        ("rerank", {**RERANK, "documents": ["a"], "relevant_spans": {}}, 422, "relevant_spans"),
        ("rerank", {**RERANK, "documents": ["a"], "top_n": 0}, 422, "top_n"),
        ("rerank", {**RERANK, "documents": ["a", "日本"]}, 422, "documents[1]"),
        ("chat", {}, 404, "no such route"),
    ],
)
def test_refusals(server: httpx.Client, path: str, body: Any, status: int, names: str) -> None:
    refused(server, f"/v2/{path}", body, status, names, lambda answer: answer["message"])


def test_a_missing_key_is_the_clients_own_error(keyed: tuple[httpx.Client, str]) -> None:
    client, clear = keyed
    with client_of(client) as keyless, pytest.raises(cohere.UnauthorizedError):
        keyless.embed(texts=["red"], **EMBED)
    with client_of(client, clear) as reader:
        assert reader.embed(texts=["red"], **EMBED).id
