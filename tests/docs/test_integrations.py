"""The programs in docs/integrations/ against a live server, with the real libraries."""

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from isthmus_client import Isthmus
from tests import tiny_bundle

FOLDER = Path(__file__).parents[2] / "docs/integrations"

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # before it is imported: tests ask nobody outside


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_openai(space: Isthmus) -> None:
    same, other = program("openai_client").similarities(space.url, "red", ["a photo of red", "blue"])
    assert same > 0.9 > other


@pytest.mark.full
def test_langchain(space: Isthmus, media: Path) -> None:
    langchain = program("langchain_isthmus")
    embeddings = langchain.IsthmusEmbeddings(space)
    query, [red, _] = embeddings.embed_query("red"), embeddings.embed_documents(["red", "blue"])
    assert query == pytest.approx(red, abs=1e-5) and len(query) == tiny_bundle.DIMENSIONS
    assert len(embeddings.embed_images([media / "red.png"])) == 1

    store = langchain.IsthmusStore.from_texts(["a red dog", "a blue cat"], embeddings, [{"n": 1}, {"n": 2}])
    [first] = store.similarity_search("red", k=1)
    assert (first.page_content, first.metadata) == ("a red dog", {"n": 1})
    [(second, score)] = store.similarity_search_with_score("red", k=1, filter={"n": 2})
    assert second.page_content == "a blue cat" and score < 1
    [(best, relevance)] = store.similarity_search_with_relevance_scores("red", k=1)
    assert best.id == first.id and 0.9 < relevance <= 1
    assert store.similarity_search_by_vector(red, k=1)[0].id == first.id
    assert len(store.max_marginal_relevance_search("red", k=2)) == 2
    assert store.as_retriever(search_kwargs={"k": 1}).invoke("blue")[0].page_content == "a blue cat"

    store.add_images([media / "red.png", media / "tone.wav"])
    [picture] = store.similarity_search("red", k=1, modalities=["image"])
    assert picture.page_content == str(media / "red.png")
    assert store.get_by_ids([str(first.id), "nobody"])[0].page_content == "a red dog"
    assert store.delete([str(first.id)])
    assert store.get_by_ids([str(first.id)]) == []
    with pytest.raises(ValueError, match=r"not a sound|neither"):
        store.add_images([FOLDER / "openai_client.py"])
    assert store.delete()


@pytest.mark.full
def test_llama_index(space: Isthmus, media: Path) -> None:
    from llama_index.core import StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters

    llama = program("llama_index_isthmus")
    embedding, store = llama.IsthmusEmbedding(space), llama.IsthmusVectorStore(space)
    assert embedding.get_image_embedding(str(media / "red.png")) != embedding.get_text_embedding("blue")
    waited = asyncio.run(embedding.aget_query_embedding("red"))
    assert waited == pytest.approx(embedding.get_query_embedding("red"), abs=1e-5)

    nodes = [
        TextNode(text=f"a {colour} dog", metadata={"colour": colour, "n": n})
        for n, colour in enumerate(("red", "blue"))
    ]
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex(nodes, storage_context=context, embed_model=embedding)
    [found] = index.as_retriever(similarity_top_k=1).retrieve("red")
    assert found.node.get_content() == "a red dog" and found.node.metadata == {"colour": "red", "n": 0}
    again = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    wanted = MetadataFilters(filters=[MetadataFilter(key="n", value=1, operator=FilterOperator.GTE)])
    [found] = again.as_retriever(similarity_top_k=2, filters=wanted).retrieve("red")
    assert found.node.get_content() == "a blue dog"
    unlike = MetadataFilters(filters=[MetadataFilter(key="colour", value="blue", operator=FilterOperator.NE)])
    assert len(again.as_retriever(similarity_top_k=2, filters=unlike).retrieve("red")) == 1
    store.delete(found.node.ref_doc_id or "None")
    with pytest.raises(ValueError, match="operator"):
        llama._condition(MetadataFilter(key="n", value=[1], operator=FilterOperator.ALL))


@pytest.mark.full
def test_haystack(space: Isthmus, media: Path) -> None:
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    haystack = program("haystack_isthmus")
    documents = [
        Document(content="a red dog", meta={"n": 1}),
        Document(content="a blue cat", meta={"n": 2}),
        Document(meta={"path": str(media / "tone.wav")}),
    ]
    kept = InMemoryDocumentStore(embedding_similarity_function="cosine")
    kept.write_documents(haystack.IsthmusDocumentEmbedder(space).run(documents)["documents"])
    pipeline = Pipeline()
    pipeline.add_component("embedder", haystack.IsthmusTextEmbedder(space))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(kept, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    [found] = pipeline.run({"embedder": {"text": "red"}})["retriever"]["documents"]
    assert found.content == "a red dog"

    assert haystack.IsthmusWriter(space).run(documents) == {"documents_written": 3}
    retriever = haystack.IsthmusRetriever(space, top_k=1)
    assert retriever.run("blue")["documents"][0].content == "a blue cat"
    [sound] = retriever.run("tone")["documents"]
    assert sound.content is None and sound.meta == {"path": str(media / "tone.wav")}
    assert retriever.run("red", filter={"n": 2})["documents"][0].meta == {"n": 2}


@pytest.mark.full
def test_notebook(space: Isthmus, media: Path) -> None:
    execute = "import nbclient, nbformat, sys; nbclient.execute(nbformat.read(sys.argv[1], 4), timeout=120)"
    (media / "broken.png").unlink()
    env = os.environ | {"ISTHMUS_URL": space.url, "ISTHMUS_MEDIA": str(media), "PYTHONPATH": str(FOLDER.parents[1])}
    command = [sys.executable, "-c", execute, str(FOLDER / "notebook.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=media)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [each.name for each in space.collections() if each.name == "notebook"] == []
