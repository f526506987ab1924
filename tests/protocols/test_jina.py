"""Jina's rerank shape: the request and answer that LangChain's JinaRerank (langchain-community 0.4.2,
document_compressors/jina_rerank.py) and Haystack's JinaRanker (jina-haystack 2.0.1) write and read, and those of
boxxxie/jina-clojure src/jina/api/rerank.clj."""

from typing import Any

import httpx
import pytest

from tests.protocols.conftest import LONG, Native, refused, same

BODY = {"model": "tiny", "query": "red"}


@pytest.mark.client("httpx")
def test_documents_of_every_kind(server: httpx.Client, native: Native, picture: str, sound: str) -> None:
    documents = ["blue", {"image": picture}, {"audio": sound}, {"compose": [{"text": "blue"}, {"image": picture}]}]
    answer = server.post("/v1/rerank", json={**BODY, "documents": documents}).json()
    assert set(answer) == {"model", "usage", "results"} and answer["usage"] == {"total_tokens": 3}
    [query], vectors = native("red"), native(*documents, role="passage")
    assert [result["index"] for result in answer["results"]] == (-(vectors @ query)).argsort().tolist()
    for result in answer["results"]:
        same(result["relevance_score"], vectors[result["index"]] @ query)
        assert result.get("document") == ({"text": "blue"} if result["index"] == 0 else None)
    warned = server.post("/v1/rerank", json={**BODY, "documents": ["red", LONG]}).json()
    [warning] = warned["warnings"]
    assert warning.startswith("documents[1]: only a part was read")
    by_picture = server.post("/v1/rerank", json={"model": "tiny", "query": {"image": picture}, "documents": ["red"]})
    assert by_picture.json()["results"][0]["relevance_score"] > 0.99


@pytest.mark.client("httpx")
@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        ({"query": "red", "documents": ["a"]}, 422, "model"),
        ({**BODY, "model": "other", "documents": ["a"]}, 404, "no such model"),
        ({**BODY, "documents": []}, 422, "documents"),
        ({**BODY, "documents": ["a", {"vector": [1]}]}, 422, "documents.1"),
        ({**BODY, "documents": ["a", {"image": "!"}]}, 422, "documents[1]"),
        ({**BODY, "documents": [{"image": "!"}], "return_documents": True}, 422, "return_documents"),
        ({**BODY, "query": "", "documents": ["a"]}, 422, "query"),
        ({**BODY, "documents": ["a"], "top_n": 0}, 422, "top_n"),
        ({**BODY, "documents": ["a"], "max_chunks_per_doc": 1}, 422, "max_chunks_per_doc"),
        ({**BODY, "documents": ["a"] * 2_049}, 422, "at most 2048 documents"),
    ],
)
def test_refusals(server: httpx.Client, body: Any, status: int, names: str) -> None:
    refused(server, "/v1/rerank", body, status, names, lambda answer: answer["detail"])


@pytest.mark.client("langchain-community")
@pytest.mark.filterwarnings("ignore:`langchain-community` is being sunset:DeprecationWarning")
def test_langchains_jina_reranker(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain_community.document_compressors import jina_rerank
    from langchain_core.documents import Document

    monkeypatch.setattr(jina_rerank, "JINA_API_URL", f"{server.base_url}/v1/rerank")
    reranker = jina_rerank.JinaRerank(model="tiny", jina_api_key="none", top_n=1)
    try:
        [best] = reranker.compress_documents([Document("blue"), Document("a red dog")], "red")
        assert best.page_content == "a red dog" and best.metadata["relevance_score"] > 0.5
        with pytest.raises(RuntimeError, match="no such model"):
            reranker.rerank(["a"], "red", model="other")
    finally:
        reranker.session.close()


@pytest.mark.client("jina-haystack")
def test_haystacks_jina_ranker(server: httpx.Client, native: Native) -> None:
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.jina import JinaTextEmbedder
    from haystack_integrations.components.rankers.jina import JinaRanker

    url, key = f"{server.base_url}/v1", Secret.from_token("none")
    ranker = JinaRanker(model="tiny", api_key=key, base_url=f"{url}/rerank")
    documents = ranker.run("red", [Document(content="blue"), Document(content="a red dog")])["documents"]
    assert [document.content for document in documents] == ["a red dog", "blue"]
    embedder = JinaTextEmbedder(model="tiny", api_key=key, base_url=f"{url}/embeddings")
    same(embedder.run("red")["embedding"], native("red")[0])
    with pytest.raises(RuntimeError, match="no such model"):
        JinaTextEmbedder(model="other", api_key=key, base_url=f"{url}/embeddings").run("red")
