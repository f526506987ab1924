"""Chroma: Isthmus embeds, Chroma keeps and searches. pip install isthmus-client chromadb"""

from collections.abc import Mapping

from chromadb.api import ClientAPI
from chromadb.api.models.Collection import Collection

from isthmus_client import Input, Isthmus


def collection(chroma: ClientAPI) -> Collection:
    """The collection, made where it is not there. Without a function of its own, Chroma embeds nothing itself."""
    configuration = {"hnsw": {"space": "cosine"}}
    return chroma.get_or_create_collection("isthmus", configuration=configuration, embedding_function=None)


def add(chroma: ClientAPI, space: Isthmus, inputs: Mapping[str, Input]) -> None:
    """Embed and store inputs (texts, paths of images and sounds) under their ids, each replacing the one of its id."""
    made = list(space.embed_many(inputs.values(), role="passage", on_error="fail"))
    modalities = [{"modality": one.modality} for one in made]
    collection(chroma).upsert(list(inputs), embeddings=[one.vector for one in made], metadatas=modalities)


def search(
    chroma: ClientAPI, space: Isthmus, query: Input, count: int = 10, modality: str | None = None
) -> list[tuple[str, float]]:
    """The ids nearest to a query, of one modality or of all, and their cosine similarities, best first."""
    [asked] = space.embed([query], role="query")
    only = {"modality": modality} if modality else None
    found = collection(chroma).query(query_embeddings=[asked.vector], n_results=count, where=only)
    return [(id, 1 - distance) for id, distance in zip(found["ids"][0], found["distances"][0], strict=True)]
