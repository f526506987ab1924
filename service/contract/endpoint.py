"""An embedding API is asked for vectors of texts here, and its answer is read.

The three shapes that servers have: OpenAI's (`…/v1/embeddings`), Ollama's (`…/api/embed`) and that of
text-embeddings-inference (`…/embed`).
"""

import json
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field

from service.contract.tokens import Prefixed
from service.contract.vectors import Vectors

Shape = Literal["openai", "ollama", "tei"]
PROBE = "a dog barks"
"""A text whose vector a bundle keeps, to know the model again."""
SAME = 0.99
"""Cosine similarity of two vectors of one text by one model, however it rounds."""
_ROUTES: tuple[tuple[str, Shape], ...] = (("/api/embed", "ollama"), ("/embeddings", "openai"), ("/embed", "tei"))


class EndpointPreprocessing(Prefixed):
    """Names the model that an API is to embed texts with; its address is the operator's to say."""

    kind: Literal["endpoint"] = "endpoint"
    shape: Shape
    model: str = Field(min_length=1, max_length=256)
    probe: tuple[float, ...] = Field(min_length=1, max_length=16_384)
    """The model's vector of PROBE."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the name of the graph's input: float32 (B, d), what the API gave."""
        return ("features",)

    def knows(self, vector: Vectors) -> bool:
        """Return whether a vector of PROBE is this model's."""
        return of_one_model(vector, np.asarray(self.probe, np.float32))


def of_one_model(vector: Vectors, other: Vectors) -> bool:
    """Return whether two vectors of one text (d,) are of one model, as far as one text can tell."""
    if len(vector) != len(other):
        return False
    return bool(vector @ other >= SAME * np.linalg.norm(vector) * np.linalg.norm(other))


def shape_of(url: str) -> Shape:
    """Return the shape that a route has. Raises ValueError."""
    path = urlsplit(url).path.rstrip("/")
    for end, shape in _ROUTES:
        if path.endswith(end):
            return shape
    raise ValueError(f"{url} is no route that embeds texts: it ends in /v1/embeddings, /api/embed or /embed")


def request_of(shape: Shape, model: str, texts: Sequence[str]) -> bytes:
    """Return the body that asks for vectors of texts."""
    fields = {"inputs": list(texts)} if shape == "tei" else {"model": model, "input": list(texts)}
    return json.dumps(fields).encode()


def vectors_of(shape: Shape, body: bytes, count: int) -> Vectors:
    """Return the vectors (count, d) in an answer. Raises ValueError for what is none."""
    try:
        answer: Any = json.loads(body)
        if shape == "openai":
            by_place = {int(row["index"]): row["embedding"] for row in answer["data"]}
            rows = [by_place[place] for place in range(count)]
        else:
            rows = answer["embeddings"] if shape == "ollama" else answer
        with np.errstate(over="ignore"):  # what is no float32 is infinite, and refused below
            vectors = np.array(rows, np.float32)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError("the answer holds no vectors") from None
    if vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
        raise ValueError(f"the answer does not hold one vector for each of {count} texts, of one length")
    if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        raise ValueError("the answer holds vectors without a direction")
    return vectors
