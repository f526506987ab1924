"""POST /items and POST /search over a store of given vectors."""

import time

import httpx2
import numpy as np

from benchmarks.figures import Figure, latency
from benchmarks.inputs import Inputs

_BATCH = 250
_TOP_K = 10


def measure(client: httpx2.Client, dimensions: int, stored: int, requests: int) -> list[Figure]:
    """Vectors stored per second, and the latency of a search by a vector and by a new text."""
    inputs = Inputs()
    vectors = inputs.vectors(stored, dimensions)
    seconds = 0.0
    for start in range(0, stored, _BATCH):
        batch = vectors[start : start + _BATCH].tolist()
        items = [{"id": str(start + row), "vector": vector, "modality": "image"} for row, vector in enumerate(batch)]
        started = time.perf_counter()
        client.post("/items", json={"items": items}).raise_for_status()
        seconds += time.perf_counter() - started
    batches = -(-stored // _BATCH)

    def by_vector(vector: np.ndarray) -> None:
        answer = client.post("/search", json={"query": {"vector": vector.tolist()}, "top_k": _TOP_K})
        _check(answer, min(stored, _TOP_K))

    def by_text(text: str) -> None:
        _check(client.post("/search", json={"query": text, "top_k": _TOP_K}), min(stored, _TOP_K))

    by_vector(inputs.vectors(1, dimensions)[0])
    return [
        Figure("store_vectors_per_second", round(stored / seconds, 1), "vectors/s", batches),
        *latency("search_vector", by_vector, inputs.vectors(requests, dimensions)),
        *latency("search_text", by_text, [inputs.text() for _ in range(requests)]),
    ]


def _check(answer: httpx2.Response, expected: int) -> None:
    """A search that finds nothing would be fast, and no measurement."""
    answer.raise_for_status()
    found = len(answer.json()["results"])
    if found != expected:
        raise RuntimeError(f"a search found {found} items, not {expected}")
