"""Ollama's shapes, as its own client 0.6.3 reads them (ollama/_types.py: EmbedRequest, EmbedResponse, ListResponse of
ollama/ollama-python), by that client, LangChain and Haystack."""

from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from tests.protocols.conftest import LONG, Native, refused, same

WORDS = ["a photo of the dog", "red"]


@pytest.fixture
def official(server: httpx.Client) -> Iterator[ollama.Client]:
    client = ollama.Client(str(server.base_url))
    yield client
    client._client.close()


@pytest.mark.client("ollama")
def test_embed(official: ollama.Client, native: Native, picture: str) -> None:
    answer = official.embed("tiny", WORDS)
    same(answer.embeddings, native(*WORDS))
    assert answer.model == "tiny" and answer.prompt_eval_count == 6
    assert answer.total_duration is not None and answer.total_duration > 0
    same(official.embed("tiny:latest", "red", dimensions=8).embeddings, native("red", dimensions=8))
    same(official.embed("tiny", picture, options={"temperature": 0.0}, keep_alive=5).embeddings, native(picture))
    assert len(official.embed("tiny", LONG).embeddings) == 1
    with pytest.raises(ollama.ResponseError, match="longer than the model reads"):
        official.embed("tiny", LONG, truncate=False)


@pytest.mark.client("ollama")
def test_no_input_has_no_embeddings_as_in_ollama(official: ollama.Client, server: httpx.Client) -> None:
    # EmbedHandler of ollama/ollama, server/routes.go
    for given in ("", []):
        answer = official.embed("tiny", given)
        assert answer.model == "tiny" and answer.embeddings == []
    for body in ({"model": "tiny"}, {"model": "tiny", "input": None}):
        assert server.post("/api/embed", json=body).json()["embeddings"] == []


@pytest.mark.client("ollama")
def test_tags(official: ollama.Client) -> None:
    model, alias = official.list().models
    assert alias.model == "nomic:latest"
    for name in ("tiny", "tiny:latest", "nomic:latest", "nomic"):
        assert official.embed(name, "red").embeddings
    assert model.model == "tiny" and model.modified_at is not None and model.digest
    assert model.details is not None and model.details.families == ["image", "audio", "text"]


@pytest.mark.client("ollama")
@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        ("embed", {"input": "red"}, 422, "model"),
        ("embed", {"model": "other", "input": "red"}, 404, "no such model"),
        ("embed", {"model": "other", "input": []}, 404, "no such model"),
        ("embed", {"model": "tiny:older", "input": "red"}, 404, "no such model"),
        (
            "embed",
            {"model": "tiny", "input": 5},
            422,
            "body.input: expected a string, or a list of strings",
        ),
        ("embed", {"model": "tiny", "input": ["red", 5]}, 422, "expected a string, or a list of strings"),
        ("embed", {"model": "tiny", "input": ["red"] * 257}, 422, "at most 256 inputs"),
        ("embed", {"model": "tiny", "input": ["red", ""]}, 422, "input[1]"),
        ("embed", {"model": "tiny", "input": "red", "options": {"num_ctx": 8}}, 422, "options.num_ctx"),
        ("embed", {"model": "tiny", "input": "red", "dimensions": 99}, 422, "dimensions"),
        ("embed", {"model": "tiny", "input": "red", "prompt": "x"}, 422, "prompt"),
        ("generate", {"model": "tiny", "prompt": "x"}, 404, "no such route"),
    ],
)
def test_refusals(server: httpx.Client, path: str, body: Any, status: int, names: str) -> None:
    refused(server, f"/api/{path}", body, status, names, lambda answer: answer["error"])


@pytest.mark.client("langchain-ollama")
def test_langchain(server: httpx.Client, native: Native) -> None:
    from langchain_ollama import OllamaEmbeddings

    embeddings = OllamaEmbeddings(model="tiny", base_url=str(server.base_url), validate_model_on_init=True)
    try:
        same(embeddings.embed_documents(WORDS), native(*WORDS))
        same(embeddings.embed_query("red"), native("red")[0])
    finally:
        assert embeddings._client is not None
        embeddings._client._client.close()


@pytest.mark.client("ollama-haystack")
def test_haystack(server: httpx.Client, native: Native) -> None:
    from haystack_integrations.components.embedders.ollama import OllamaTextEmbedder

    embedder = OllamaTextEmbedder(model="tiny", url=str(server.base_url))
    same(embedder.run("red")["embedding"], native("red")[0])
    embedder._client._client.close()
