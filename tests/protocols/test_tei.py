"""text-embeddings-inference: the shapes of its docs/openapi.json 1.6.0 (huggingface/text-embeddings-inference, commit
a28ad28f39e0633749a21b74af23617fa86a0d0c), and clients of it: huggingface_hub's InferenceClient, which LangChain's and
Haystack's embedders call, and Haystack's own components."""

from typing import Any

import httpx
import pytest

from tests.protocols.conftest import LONG, Native, refused, same

WORDS = ["a photo of the dog", "red"]


@pytest.fixture
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a developer's HF_HUB_OFFLINE=1 away: with it, the hub's library asks no server, not even this one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.client("httpx")
def test_embed(server: httpx.Client, native: Native, picture: str) -> None:
    same(server.post("/tei/embed", json={"inputs": WORDS}).json(), native(*WORDS))
    same(server.post("/tei/embed", json={"inputs": "red", "normalize": True}).json(), native("red"))
    passage = {"inputs": "red", "prompt_name": "passage", "truncate": True, "truncation_direction": "right"}
    same(server.post("/tei/embed", json=passage).json(), native("red", role="passage"))
    same(server.post("/tei/embed", json={"inputs": picture}).json(), native({"image": picture}))
    same(server.post("/tei", json={"inputs": WORDS, "dimensions": 8}).json(), native(*WORDS, dimensions=8))


@pytest.mark.client("httpx")
@pytest.mark.parametrize("path", ["/tei/rerank", "/tei", "/rerank"])
def test_rerank(server: httpx.Client, native: Native, path: str) -> None:
    body = {"query": "red", "texts": ["blue", "a red dog"]}
    [query], documents = native("red"), native("blue", "a red dog", role="passage")
    answer = server.post(path, json={**body, "raw_scores": True, "return_text": True}).json()
    assert [rank["index"] for rank in answer] == [1, 0] and [rank["text"] for rank in answer] == ["a red dog", "blue"]
    same([rank["score"] for rank in answer], (documents @ query)[::-1])
    answer = server.post(path, json=body).json()
    assert set(answer[0]) == {"index", "score"}
    same([rank["score"] for rank in answer], (1 + (documents @ query)[::-1]) / 2)


@pytest.mark.client("httpx")
def test_info_has_the_required_fields(server: httpx.Client) -> None:
    required = {"model_id", "model_dtype", "model_type", "max_concurrent_requests", "max_input_length"}
    required |= {"max_batch_tokens", "max_client_batch_size", "auto_truncate", "tokenization_workers", "version"}
    info = server.get("/tei/info").json()
    assert required <= set(info) and info["model_id"] == "tiny" and info["max_input_length"] == 32


@pytest.mark.client("httpx")
@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        ("/tei/embed", {}, 422, "inputs"),
        ("/tei/embed", {"inputs": []}, 422, "body.inputs: List should have at least 1 item"),
        ("/tei/embed", {"inputs": [[1, 2]]}, 422, "body.inputs: expected a string, or a list of strings"),
        ("/tei/embed", {"inputs": [1, 2]}, 422, "token ids are not read here"),
        ("/tei/embed", {"inputs": ["red"] * 257}, 422, "at most 256 inputs"),
        ("/tei/embed", {"inputs": LONG}, 422, "inputs[0]"),
        ("/tei/embed", {"inputs": "red", "normalize": False}, 422, "normalize"),
        (
            "/tei/embed",
            {"inputs": "red", "truncate": True, "truncation_direction": "left"},
            422,
            "truncation_direction",
        ),
        ("/tei/embed", {"inputs": "red", "prompt_name": "poem"}, 422, "prompt_name"),
        ("/tei/embed", {"inputs": "red", "pooling": "cls"}, 422, "pooling"),
        ("/tei", {"text": "red"}, 422, "inputs"),
        ("/tei", {"query": "red"}, 422, "texts"),
        ("/tei/rerank", {"query": "red", "texts": []}, 422, "texts"),
        ("/tei/rerank", {"query": "red", "texts": ["a", ""]}, 422, "texts[1]"),
        ("/tei/rerank", {"query": LONG, "texts": ["a"]}, 422, "query"),
        ("/tei/predict", {"inputs": "red"}, 404, "no such route"),
    ],
)
def test_refusals(server: httpx.Client, path: str, body: Any, status: int, names: str) -> None:
    refused(server, path, body, status, names, lambda answer: answer["error"])
    assert server.post(path, json=body).json()["error_type"] == "Validation"


@pytest.mark.client("huggingface_hub")
@pytest.mark.usefixtures("_online")
def test_the_inference_client(server: httpx.Client, native: Native) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    with InferenceClient(base_url=f"{server.base_url}/tei") as client:
        same(client.feature_extraction("red"), native("red"))  # type: ignore[arg-type]
        same(client.feature_extraction(WORDS, truncate=True), native(*WORDS))  # type: ignore[arg-type]
        with pytest.raises(HfHubHTTPError):
            client.feature_extraction("red", normalize=False)


@pytest.mark.client("huggingface-api-haystack")
@pytest.mark.usefixtures("_online")
def test_haystack(server: httpx.Client, native: Native) -> None:
    from haystack import Document
    from haystack_integrations.components.embedders.huggingface_api import HuggingFaceAPITextEmbedder
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    embedder = HuggingFaceAPITextEmbedder(
        "text_embeddings_inference", {"url": f"{server.base_url}/tei"}, token=None, truncate=True, normalize=True
    )
    same(embedder.run("red")["embedding"], native("red")[0])
    ranker = HuggingFaceTEIRanker(url=f"{server.base_url}/tei", token=None)
    documents = ranker.run("red", [Document(content="blue"), Document(content="a red dog")])["documents"]
    assert [document.content for document in documents] == ["a red dog", "blue"]


@pytest.mark.client("langchain-huggingface")
def test_langchain(server: httpx.Client, native: Native) -> None:
    huggingface = pytest.importorskip("langchain_huggingface", reason="it needs huggingface-hub < 1")
    embeddings = huggingface.HuggingFaceEndpointEmbeddings(model=f"{server.base_url}/tei")
    same(embeddings.embed_documents(WORDS), native(*WORDS))
