"""Qdrant: Isthmus embeds, Qdrant keeps and searches. pip install isthmus-client qdrant-client"""

from collections.abc import Mapping
from uuid import NAMESPACE_URL, uuid5

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, FieldCondition, Filter, MatchValue, PointStruct, VectorParams

from isthmus_client import Input, Isthmus

COLLECTION = "isthmus"


def add(qdrant: QdrantClient, space: Isthmus, inputs: Mapping[str, Input]) -> None:
    """Embed and store inputs (texts, paths of images and sounds) under their ids, each replacing the one of its id."""
    made = list(space.embed_many(inputs.values(), role="passage", on_error="fail"))
    if not qdrant.collection_exists(COLLECTION):
        size = len(made[0].vector)
        qdrant.create_collection(COLLECTION, vectors_config=VectorParams(size=size, distance=Distance.COSINE))
    points = [
        # Qdrant's own ids are numbers or UUIDs.
        PointStruct(id=str(uuid5(NAMESPACE_URL, id)), vector=one.vector, payload={"id": id, "modality": one.modality})
        for id, one in zip(inputs, made, strict=True)
    ]
    qdrant.upsert(COLLECTION, points)


def search(
    qdrant: QdrantClient, space: Isthmus, query: Input, count: int = 10, modality: str | None = None
) -> list[tuple[str, float]]:
    """The ids nearest to a query, of one modality or of all, and their cosine similarities, best first."""
    [asked] = space.embed([query], role="query")
    only = Filter(must=[FieldCondition(key="modality", match=MatchValue(value=modality))]) if modality else None
    hits = qdrant.query_points(COLLECTION, query=asked.vector, query_filter=only, limit=count).points
    return [(hit.payload["id"], hit.score) for hit in hits]
