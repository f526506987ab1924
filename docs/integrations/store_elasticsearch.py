"""Elasticsearch: Isthmus embeds, Elasticsearch keeps and searches. pip install isthmus-client elasticsearch"""

from collections.abc import Mapping
from typing import Any

from elasticsearch import Elasticsearch, helpers

from isthmus_client import Input, Isthmus

INDEX = "isthmus"


def add(elasticsearch: Elasticsearch, space: Isthmus, inputs: Mapping[str, Input]) -> None:
    """Embed and store inputs (texts, paths of images and sounds) under their ids, each replacing the one of its id."""
    made = list(space.embed_many(inputs.values(), role="passage", on_error="fail"))
    if not elasticsearch.indices.exists(index=INDEX):
        vector = {"type": "dense_vector", "dims": len(made[0].vector), "similarity": "cosine"}
        properties = {"modality": {"type": "keyword"}, "embedding": vector}
        elasticsearch.indices.create(index=INDEX, mappings={"properties": properties})
    documents = (
        {"_index": INDEX, "_id": id, "modality": one.modality, "embedding": one.vector}
        for id, one in zip(inputs, made, strict=True)
    )
    helpers.bulk(elasticsearch, documents, refresh=True)


def search(
    elasticsearch: Elasticsearch, space: Isthmus, query: Input, count: int = 10, modality: str | None = None
) -> list[tuple[str, float]]:
    """The ids nearest to a query, of one modality or of all, and their cosine similarities, best first."""
    [asked] = space.embed([query], role="query")
    nearest: dict[str, Any] = {
        "field": "embedding",
        "query_vector": asked.vector,
        "k": count,
        "num_candidates": max(100, 2 * count),
    }
    if modality:
        nearest["filter"] = {"term": {"modality": modality}}
    hits = elasticsearch.search(index=INDEX, knn=nearest, size=count, source=False)["hits"]["hits"]
    return [(hit["_id"], 2 * hit["_score"] - 1) for hit in hits]  # a score is (1 + cosine) / 2
