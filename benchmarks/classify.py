"""POST /classify of one image: with labels never seen before, with labels already encoded, and with a stored set."""

from typing import Any

import httpx2

from benchmarks.figures import Figure, latency
from benchmarks.inputs import Inputs

_COLD = 3  # each encodes every label in every template of the bundle; too few for a 95th percentile


def measure(client: httpx2.Client, labels: int, requests: int) -> list[Figure]:
    inputs = Inputs()

    def ask(body: dict[str, Any]) -> None:
        client.post("/classify", **body).raise_for_status()

    def new_labels() -> list[str]:
        return [inputs.label() for _ in range(labels)]

    known = new_labels()
    cold, _ = latency("classify_cold", ask, [inputs.body("image", labels=new_labels()) for _ in range(_COLD)])
    ask(inputs.body("image", labels=known))
    client.put("/label-sets/benchmark", json={"labels": known}).raise_for_status()
    ask(inputs.body("image", label_set="benchmark"))
    stored = [inputs.body("image", label_set="benchmark") for _ in range(requests)]
    return [
        cold,
        *latency("classify_warm", ask, [inputs.body("image", labels=known) for _ in range(requests)]),
        *latency("classify_stored", ask, stored),
    ]
