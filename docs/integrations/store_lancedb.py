"""LanceDB: Isthmus embeds, LanceDB keeps and searches. pip install isthmus-client lancedb"""

from collections.abc import Mapping

import pyarrow as pa
from lancedb.db import DBConnection

from isthmus_client import Input, Isthmus

TABLE = "isthmus"


def add(database: DBConnection, space: Isthmus, inputs: Mapping[str, Input]) -> None:
    """Embed and store inputs (texts, paths of images and sounds) under their ids, each replacing the one of its id."""
    made = list(space.embed_many(inputs.values(), role="passage", on_error="fail"))
    rows = [{"id": id, "modality": one.modality, "vector": one.vector} for id, one in zip(inputs, made, strict=True)]
    vector = pa.list_(pa.float32(), len(made[0].vector))
    schema = pa.schema([("id", pa.string()), ("modality", pa.string()), ("vector", vector)])
    table = database.create_table(TABLE, schema=schema, exist_ok=True)
    table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)


def search(
    database: DBConnection, space: Isthmus, query: Input, count: int = 10, modality: str | None = None
) -> list[tuple[str, float]]:
    """The ids nearest to a query, of one modality or of all, and their cosine similarities, best first."""
    [asked] = space.embed([query], role="query")
    found = database.open_table(TABLE).search(asked.vector).distance_type("cosine").limit(count)
    if modality:
        found = found.where(f"modality = '{modality}'", prefilter=True)
    return [(row["id"], 1 - row["_distance"]) for row in found.to_list()]
