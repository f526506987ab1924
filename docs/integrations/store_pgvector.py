"""PostgreSQL with pgvector: Isthmus embeds, PostgreSQL keeps and searches.

pip install isthmus-client pgvector 'psycopg[binary]'
"""

from collections.abc import Mapping

import numpy as np
import psycopg
from pgvector.psycopg import register_vector

from isthmus_client import Input, Isthmus


def add(database: psycopg.Connection, space: Isthmus, inputs: Mapping[str, Input]) -> None:
    """Embed and store inputs (texts, paths of images and sounds) under their ids, each replacing the one of its id."""
    made = list(space.embed_many(inputs.values(), role="passage", on_error="fail"))
    database.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(database)
    database.execute(
        "CREATE TABLE IF NOT EXISTS isthmus "
        f"(id text PRIMARY KEY, modality text NOT NULL, embedding vector({len(made[0].vector)}) NOT NULL)"
    )
    database.execute(
        "CREATE INDEX IF NOT EXISTS isthmus_embedding ON isthmus USING hnsw (embedding vector_ip_ops)"  # unit vectors
    )
    with database.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO isthmus VALUES (%s, %s, %s) ON CONFLICT (id) "
            "DO UPDATE SET modality = excluded.modality, embedding = excluded.embedding",
            [(id, one.modality, np.array(one.vector)) for id, one in zip(inputs, made, strict=True)],
        )
    database.commit()


def search(
    database: psycopg.Connection, space: Isthmus, query: Input, count: int = 10, modality: str | None = None
) -> list[tuple[str, float]]:
    """The ids nearest to a query, of one modality or of all, and their cosine similarities, best first."""
    [asked] = space.embed([query], role="query")
    register_vector(database)
    # A filter may leave an index scan with too few rows: it then goes on (pgvector 0.8).
    database.execute("SET hnsw.iterative_scan = strict_order")
    rows = database.execute(
        "SELECT id, -(embedding <#> %(query)s) FROM isthmus "
        "WHERE %(modality)s::text IS NULL OR modality = %(modality)s "
        "ORDER BY embedding <#> %(query)s LIMIT %(count)s",
        {"query": np.array(asked.vector), "modality": modality, "count": count},
    )
    return rows.fetchall()
