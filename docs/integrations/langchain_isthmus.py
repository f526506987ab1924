"""LangChain: `IsthmusEmbeddings`, and `IsthmusStore`, a vector store whose vectors Isthmus makes and keeps.

The store's documents may be texts, images and sounds: `add_images`, `add_sounds`; every search looks among all of them.
"""

import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from isthmus_client import Found, Isthmus, NewItem, NotFound, vector

_TEXT = "text"
"""The metadata key under which a document's text is kept: the service gives back metadata, not content."""


class IsthmusEmbeddings(Embeddings):
    def __init__(self, client: Isthmus) -> None:
        self.client = client

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [_vector(each) for each in self.client.embed_many(texts, role="passage", on_error="fail")]

    def embed_query(self, text: str) -> list[float]:
        return _vector(self.client.embed([text], role="query")[0])

    def embed_images(self, paths: Sequence[Path]) -> list[list[float]]:
        """Embed pictures, as the multimodal embeddings of other integrations do."""
        return [_vector(each) for each in self.client.embed_many(paths, on_error="fail")]


class IsthmusStore(VectorStore):
    """A collection of a server. Scores are cosine similarities."""

    def __init__(self, client: Isthmus, collection: str = "langchain") -> None:
        self.client = client
        self.collection = collection

    @property
    def embeddings(self) -> IsthmusEmbeddings:
        return IsthmusEmbeddings(self.client)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        given = list(texts)
        metadatas = metadatas or [{} for _ in given]
        ids = ids or [str(uuid.uuid4()) for _ in given]
        rows = zip(ids, given, metadatas, strict=True)
        return self._add([NewItem(i, t, {**m, _TEXT: t}, self.collection) for i, t, m in rows])

    def add_images(self, paths: Sequence[Path]) -> list[str]:
        """Or sounds; each under its path."""
        return self._add([NewItem(str(path), path, {"path": str(path)}, self.collection) for path in paths])

    add_sounds = add_images

    def _add(self, items: list[NewItem]) -> list[str]:
        for outcome in self.client.upsert_many(items):
            if outcome.error:
                raise ValueError(f"{outcome.id}: {outcome.error.detail}")
        return [item.id for item in items]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        if ids is None:
            self.client.drop_collection(self.collection)
            return True
        return self.client.delete(ids, collection=self.collection) == len(ids)

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        documents = []
        for each in ids:
            try:
                item = self.client.item(each, collection=self.collection)
            except NotFound:
                continue
            documents.append(_document(item.id, item.metadata))
        return documents

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """`filter` is Isthmus' own: {"year": {"$gte": 2000}}. Other keywords are /search's, such as `modalities`."""
        return [(_document(f.id, f.metadata), f.score) for f in self._found(query, k, filter, kwargs)]

    def similarity_search(
        self, query: str, k: int = 4, filter: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, filter, **kwargs)]

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        return [_document(f.id, f.metadata) for f in self._found(vector(embedding), k, None, kwargs)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Diversity is the service's own."""
        spread = {"lambda": lambda_mult, "pool": max(k, fetch_k)}
        return self.similarity_search(query, k, diversity=spread, **kwargs)

    def _found(self, query: Any, k: int, filter: dict[str, Any] | None, more: dict[str, Any]) -> list[Found]:
        if filter is not None:
            more = {**more, "filter": filter}
        return self.client.search(query, top_k=k, collection=self.collection, **more)

    def _select_relevance_score_fn(self) -> Any:
        return lambda similarity: (similarity + 1) / 2  # LangChain's relevance is of 0 to 1

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        collection: str = "langchain",
        **kwargs: Any,
    ) -> "IsthmusStore":
        """`embedding` must be IsthmusEmbeddings: the service embeds what it stores."""
        if not isinstance(embedding, IsthmusEmbeddings):
            raise TypeError("IsthmusStore embeds by IsthmusEmbeddings only")
        store = cls(embedding.client, collection)
        store.add_texts(texts, metadatas, ids=ids)
        return store


def _document(id: str, metadata: Any) -> Document:
    """A picture or a sound has no text: its page is its path."""
    rest = {name: value for name, value in metadata.items() if name != _TEXT}
    return Document(page_content=metadata.get(_TEXT) or metadata.get("path") or "", metadata=rest, id=id)


def _vector(embedding: Any) -> list[float]:
    if embedding.vector is None:
        raise ValueError(embedding.error.detail)
    return list(embedding.vector)
