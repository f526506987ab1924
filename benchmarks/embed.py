"""POST /embed: one at a time, and many at once."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from benchmarks.figures import Figure, latency
from benchmarks.inputs import Inputs


def measure(client: httpx2.Client, modality: str, requests: int, concurrency: int) -> list[Figure]:
    """Latency of lone requests, and inputs per second with `concurrency` requests under way at any time."""
    inputs = Inputs()

    def ask(body: dict[str, Any]) -> None:
        client.post("/embed", **body).raise_for_status()

    ask(inputs.body(modality))
    alone = latency(f"embed_{modality}", ask, [inputs.body(modality) for _ in range(requests)])
    bodies = [inputs.body(modality) for _ in range(2 * requests)]
    with ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        for _ in pool.map(ask, bodies):
            pass
        seconds = time.perf_counter() - started
    rate = Figure(f"embed_{modality}_per_second", round(len(bodies) / seconds, 1), "inputs/s", len(bodies))
    return [*alone, rate]
