"""OpenSearch: Isthmus embeds, OpenSearch keeps and searches. pip install isthmus-client opensearch-py"""

from collections.abc import Mapping
from typing import Any

from opensearchpy import OpenSearch, helpers

from isthmus_client import Input, Isthmus

INDEX = "isthmus"


def add(opensearch: OpenSearch, space: Isthmus, inputs: Mapping[str, Input]) -> None:
    """Embed and store inputs (texts, paths of images and sounds) under their ids, each replacing the one of its id."""
    made = list(space.embed_many(inputs.values(), role="passage", on_error="fail"))
    if not opensearch.indices.exists(index=INDEX):
        method = {"name": "hnsw", "engine": "lucene", "space_type": "cosinesimil"}
        vector = {"type": "knn_vector", "dimension": len(made[0].vector), "method": method}
        properties = {"modality": {"type": "keyword"}, "embedding": vector}
        opensearch.indices.create(
            index=INDEX, body={"settings": {"index.knn": True}, "mappings": {"properties": properties}}
        )
    documents = (
        {"_index": INDEX, "_id": id, "modality": one.modality, "embedding": one.vector}
        for id, one in zip(inputs, made, strict=True)
    )
    helpers.bulk(opensearch, documents, refresh=True)


def search(
    opensearch: OpenSearch, space: Isthmus, query: Input, count: int = 10, modality: str | None = None
) -> list[tuple[str, float]]:
    """The ids nearest to a query, of one modality or of all, and their cosine similarities, best first."""
    [asked] = space.embed([query], role="query")
    nearest: dict[str, Any] = {"vector": asked.vector, "k": count}
    if modality:
        nearest["filter"] = {"term": {"modality": modality}}
    body = {"size": count, "query": {"knn": {"embedding": nearest}}, "_source": False}
    hits = opensearch.search(index=INDEX, body=body)["hits"]["hits"]
    return [(hit["_id"], 2 * hit["_score"] - 1) for hit in hits]  # a score is (1 + cosine) / 2
