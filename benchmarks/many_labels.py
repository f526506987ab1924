"""How long a call of the classifier takes with 10,000 labels that are encoded: python -m benchmarks.many_labels

A real store and real vectors' sizes; inputs and labels are vectors by chance, so that no tower is measured. `cpu` is
what the process computed, which other work on the machine does not change. The last line is one JSON object, in
milliseconds.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.contract.bundle import Encoder, Manifest, Projector, Tower, space_id
from service.contract.tokens import TextPreprocessing
from service.contract.vectors import l2_normalise
from service.engine.inputs import Embedded, Text
from service.retrieval.classify import Classifier
from service.schemas.classify import ClassifyRequest
from service.store import SqliteStore

_HASH = "0" * 64


class _ByChance:
    """Stands for an embedder: any input gets some unit vector at once."""

    def __init__(self, dimensions: int) -> None:
        tower = Tower(
            file="text.onnx",
            sha256=_HASH,
            encoder=Encoder(source="chance", weights_sha256=_HASH),
            projector=Projector(kind="linear", features=1, weights_sha256=_HASH),
            preprocessing=TextPreprocessing(max_length=16),
        )
        self.manifest = Manifest(
            name="chance",
            created="2026-01-01",
            space=space_id(dimensions, {"text": tower}),
            dimensions=dimensions,
            towers={"text": tower},
            temperature=0.05,
            files={"tokenizer.json": _HASH},
        )
        self._rng = np.random.default_rng(0)

    async def embed(self, inputs: Sequence[Any], *arguments: Any, **options: Any) -> list[Embedded]:
        vectors = l2_normalise(self._rng.standard_normal((len(inputs), self.manifest.dimensions)))
        return [Embedded(vector, "text", truncated=False, cached=False) for vector in vectors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--calls", type=int, default=20)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(_measure(options.labels, options.dimensions, options.calls))))


async def _measure(count: int, dimensions: int, calls: int) -> dict[str, float]:
    embedder: Any = _ByChance(dimensions)
    labels = [f"label {number}" for number in range(count)]
    figures: dict[str, float] = {"labels": count, "dimensions": dimensions}
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore.open(Path(folder), embedder.manifest)
        try:
            classifier = Classifier(embedder, store)
            await classifier.save_label_set("set", labels, None)
            for name, inputs, asked in (
                ("stored", 1, {"label_set": "set"}),
                ("given", 1, {"labels": labels}),
                ("stored, 256 inputs", 256, {"label_set": "set"}),
            ):
                request = ClassifyRequest.model_construct(inputs=[Text("x")] * inputs, **asked)
                taken, computed = [], []
                for _ in range(calls + 1):
                    started, before = time.perf_counter(), time.process_time()
                    await classifier.classify(request)
                    taken.append(1_000 * (time.perf_counter() - started))
                    computed.append(1_000 * (time.process_time() - before))
                figures[name] = round(float(np.median(taken[1:])), 2)
                figures[f"{name}, cpu"] = round(float(np.median(computed[1:])), 2)
                print(f"{name:24}{figures[name]:10.2f} ms a call, cpu {figures[f'{name}, cpu']:10.2f}")
        finally:
            await store.close()
    return figures


if __name__ == "__main__":
    main()
