"""Tell what a million of each thing costs: python -m benchmarks.cost [--core-hour 0.04] [--bundle build/starter]

A server embeds real photographs, sounds and captions, stores items and answers searches by text, over HTTP. Each rate
is what it did over the processor time that its process took, so that neither the client nor other work on the machine
counts: per second and core. The price of a core hour is yours to state. Memory is what the server's resident memory
grew by, for a million items with vectors and three metadata values, in the index that `auto` gives them. Prints a table
and, as its last line, one JSON object.
"""

import base64
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import real
from benchmarks.commands import finish, parser_of
from benchmarks.inputs import Inputs
from benchmarks.servers import Server, isthmus
from examples.demo import print_table
from service.contract.bundle import read_bundle

_ITEMS, _BATCH = 30_000, 250
_MEDIA, _TEXTS, _SEARCHES, _QUIET_S = 120, 2_000, 500, 2.0


def _rate(server: Server, bodies: Sequence[Any], ask: Callable[[Any], object], per_request: int) -> float:
    """Things done per second of the server's processor time."""
    ask(bodies[0])
    started = server.cpu_s
    for body in bodies[1:]:
        ask(body)
    return (len(bodies) - 1) * per_request / max(server.cpu_s - started, 1e-3)


def measure(bundle: Path, work: Path) -> dict[str, float]:
    dimensions = read_bundle(bundle).manifest.dimensions
    inputs = Inputs()
    captions = real.captions()
    with isthmus("isthmus", bundle, work, cache_bytes=0) as server, httpx2.Client(base_url=server.address) as client:
        client.timeout = httpx2.Timeout(300)

        def post(path: str) -> Callable[[Any], object]:
            return lambda body: client.post(path, json=body).raise_for_status()

        def of(kind: str, files: Sequence[bytes], size: int) -> list[Any]:
            return [{"inputs": [{kind: real.in_base64(file)} for file in group]} for group in real.groups(files, size)]

        rates = {
            "photographs": _rate(server, of("image", real.jpegs(_MEDIA), 8), post("/embed"), 8),
            "sounds": _rate(server, of("audio", real.sounds(_MEDIA), 4), post("/embed"), 4),
            "texts": _rate(
                server, [{"inputs": list(texts)} for texts in real.groups(captions[:_TEXTS], 32)], post("/embed"), 32
            ),
        }
        before = server.rss
        items = [
            {
                "items": [
                    {
                        "id": f"item {start + place}",
                        "vector": base64.b64encode(vector.tobytes()).decode(),
                        "modality": "image",
                        "metadata": {"title": f"photo {start + place}", "year": 2000 + place % 26, "kept": True},
                    }
                    for place, vector in enumerate(inputs.vectors(_BATCH, dimensions))
                ]
            }
            for start in range(0, _ITEMS, _BATCH)
        ]
        rates["items stored"] = _rate(server, items, post("/items"), _BATCH)
        while client.get("/collections/default").raise_for_status().json()["parts"][0]["building"]:
            time.sleep(1)
        time.sleep(_QUIET_S)
        grown = server.rss - before
        queries = [{"query": text, "top_k": 10} for text in captions[_TEXTS : _TEXTS + _SEARCHES]]
        rates["searches"] = _rate(server, queries, post("/search"), 1)
    return {
        **{f"{name.replace(' ', '_')}_per_core_s": round(rate, 1) for name, rate in rates.items()},
        "memory_gb_per_million": round(grown / _ITEMS * 1e6 / 1e9, 3),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("cost", __doc__)
    parser.add_argument("--core-hour", type=float, default=0.04, help="the price of a core for an hour")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(options.bundle, Path(scratch) / "store")
    rows = []
    for name, value in list(figures.items()):
        if name.endswith("_per_core_s"):
            what = name.removesuffix("_per_core_s")
            price = options.core_hour * 1e6 / value / 3_600
            figures[f"{what}_price_per_million"] = round(price, 4)
            rows.append((what.replace("_", " "), f"{value:,.1f}", f"{price:,.3f}"))
    rows.append(("memory per million items", f"{figures['memory_gb_per_million']:.2f} GB", ""))
    print_table(f"At {options.core_hour:g} a core hour", ("", "per second and core", "price of a million"), rows)
    print(json.dumps({"core_hour": options.core_hour, **figures}))
    return 0


if __name__ == "__main__":
    finish(main)
