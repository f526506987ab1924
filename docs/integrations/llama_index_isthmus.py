"""LlamaIndex: `IsthmusEmbedding`, a multimodal embedding, and `IsthmusVectorStore`, which keeps what it is given."""

from typing import Any

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from isthmus_client import AsyncIsthmus, Input, Isthmus, NewItem, vector

_OPERATORS = {
    FilterOperator.EQ: "$eq",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.CONTAINS: "$contains",
    FilterOperator.TEXT_MATCH: "$contains",
}


class IsthmusEmbedding(MultiModalEmbedding):
    """Texts and image files → vectors of one space. Asynchronous calls use a client of their own."""

    _client: Isthmus = PrivateAttr()

    def __init__(self, client: Isthmus, **more: Any) -> None:
        super().__init__(model_name=client.models()[0].name, **more)
        self._client = client

    @classmethod
    def class_name(cls) -> str:
        return "IsthmusEmbedding"

    def _one(self, value: Input, role: Any) -> Embedding:
        return list(self._client.embed([value], role=role)[0].vector or ())

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._one(query, "query")

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._one(text, "passage")

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return [list(each.vector or ()) for each in self._client.embed_many(texts, role="passage", on_error="fail")]

    def _get_image_embedding(self, img_file_path: Any) -> Embedding:
        from pathlib import Path

        return self._one(Path(img_file_path), "passage")

    async def _asked(self, value: Input, role: Any) -> Embedding:
        async with AsyncIsthmus(self._client.url) as client:
            return list((await client.embed([value], role=role))[0].vector or ())

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await self._asked(query, "query")

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await self._asked(text, "passage")

    async def _aget_image_embedding(self, img_file_path: Any) -> Embedding:
        from pathlib import Path

        return await self._asked(Path(img_file_path), "passage")


class IsthmusVectorStore(BasePydanticVectorStore):
    """A collection of a server, filled with vectors that LlamaIndex had made (by IsthmusEmbedding)."""

    stores_text: bool = True
    flat_metadata: bool = True
    collection: str = "llama_index"
    _client: Isthmus = PrivateAttr()

    def __init__(self, client: Isthmus, collection: str = "llama_index") -> None:
        super().__init__(collection=collection)
        self._client = client

    @property
    def client(self) -> Isthmus:
        return self._client

    def add(self, nodes: list[BaseNode], **kwargs: Any) -> list[str]:
        items = [
            NewItem(
                node.node_id,
                vector(node.get_embedding()),
                {name: value for name, value in _metadata(node).items() if value is not None},
                self.collection,
                "text",
            )
            for node in nodes
        ]
        for outcome in self._client.upsert_many(items):
            if outcome.error:
                raise ValueError(f"{outcome.id}: {outcome.error.detail}")
        return [item.id for item in items]

    def delete(self, ref_doc_id: str, **kwargs: Any) -> None:
        self._client.delete(filter={"ref_doc_id": ref_doc_id}, collection=self.collection)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        if query.query_embedding is None:
            raise ValueError("the query has no embedding")
        options: dict[str, Any] = {"top_k": query.similarity_top_k, "collection": self.collection}
        if query.filters is not None:
            options["filter"] = _filter(query.filters)
        found = self._client.search(vector(query.query_embedding), **options)
        return VectorStoreQueryResult(
            nodes=[metadata_dict_to_node(dict(each.metadata)) for each in found],
            similarities=[each.score for each in found],
            ids=[each.id for each in found],
        )


def _metadata(node: BaseNode) -> dict[str, Any]:
    return node_to_metadata_dict(node, remove_text=False, flat_metadata=True)


def _filter(filters: MetadataFilters) -> dict[str, Any]:
    """LlamaIndex' filters as Isthmus writes them."""
    parts = [_condition(each) if isinstance(each, MetadataFilter) else _filter(each) for each in filters.filters]
    if filters.condition == FilterCondition.OR:
        return {"$or": parts}
    return {"$not": parts[0]} if filters.condition == FilterCondition.NOT else {"$and": parts}


def _condition(asked: MetadataFilter) -> dict[str, Any]:
    if asked.operator == FilterOperator.IN:
        return {asked.key: asked.value}
    if asked.operator == FilterOperator.NE:
        return {"$not": {asked.key: asked.value}}
    if asked.operator == FilterOperator.EQ:
        return {asked.key: asked.value}
    if asked.operator not in _OPERATORS:
        raise ValueError(f"the operator {asked.operator.value} is not one of Isthmus")
    return {asked.key: {_OPERATORS[asked.operator]: asked.value}}
