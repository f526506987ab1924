"""Haystack: components that embed texts and documents, and a retriever over what Isthmus keeps."""

from pathlib import Path
from typing import Any

from haystack import Document, component

from isthmus_client import Isthmus, NewItem


@component
class IsthmusTextEmbedder:
    """A query → its vector."""

    def __init__(self, client: Isthmus) -> None:
        self.client = client

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        return {"embedding": self.client.embed([text], role="query")[0].vector}


@component
class IsthmusDocumentEmbedder:
    """Documents → the same with vectors, for Haystack's own stores. `meta["path"]` names an image or a sound."""

    def __init__(self, client: Isthmus) -> None:
        self.client = client

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        given = [each.content if each.content is not None else Path(each.meta["path"]) for each in documents]
        vectors = self.client.embed_many(given, role="passage", on_error="fail")
        from dataclasses import replace

        return {"documents": [replace(d, embedding=e.vector) for d, e in zip(documents, vectors, strict=True)]}


@component
class IsthmusWriter:
    """Documents → items of a collection; the service embeds them."""

    def __init__(self, client: Isthmus, collection: str = "haystack") -> None:
        self.client = client
        self.collection = collection

    @component.output_types(documents_written=int)
    def run(self, documents: list[Document]) -> dict[str, Any]:
        items = [
            NewItem(
                each.id,
                each.content if each.content is not None else Path(each.meta["path"]),
                {**each.meta, **({"content": each.content} if each.content is not None else {})},
                self.collection,
            )
            for each in documents
        ]
        return {"documents_written": sum(outcome.error is None for outcome in self.client.upsert_many(items))}


@component
class IsthmusRetriever:
    """A text → the documents nearest to it, pictures and sounds among them."""

    def __init__(self, client: Isthmus, collection: str = "haystack", top_k: int = 10) -> None:
        self.client = client
        self.collection = collection
        self.top_k = top_k

    @component.output_types(documents=list[Document])
    def run(self, query: str, filter: dict[str, Any] | None = None, top_k: int | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {"top_k": top_k or self.top_k, "collection": self.collection}
        if filter is not None:
            options["filter"] = filter
        found = self.client.search(query, **options)
        return {
            "documents": [
                Document(
                    id=each.id,
                    content=each.metadata.get("content"),
                    meta={name: value for name, value in each.metadata.items() if name != "content"},
                    score=each.score,
                )
                for each in found
            ]
        }
