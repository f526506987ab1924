"""How fast are the routes of a bundle? Starts the service on a free port, asks it over HTTP, stops it.

python -m benchmarks.routes [--bundle build/starter] [--requests 100] [--vectors 10000] [--labels 100]
                            [--concurrency 16]

The client that asks runs on the same machine and takes its share of the cores. Prints a table and, as its last line,
one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import httpx2

from benchmarks import classify, embed, search
from benchmarks.figures import Figure
from examples.demo import DemoError, serving


def measure(client: httpx2.Client, options: argparse.Namespace) -> tuple[dict[str, object], list[Figure]]:
    """What was served, and the figures."""
    space = client.post("/embed", json={"inputs": ["the size of the space"]}).raise_for_status().json()
    figures: list[Figure] = []
    for modality in ("text", "image", "audio"):
        figures += embed.measure(client, modality, options.requests, options.concurrency)
    figures += search.measure(client, space["dimensions"], options.vectors, options.requests)
    figures += classify.measure(client, options.labels, options.requests)
    served: dict[str, object] = {
        "bundle": options.bundle.name,
        "space": space["space"],
        "dimensions": space["dimensions"],
        "cores": len(os.sched_getaffinity(0)),
        **{name: getattr(options, name) for name in ("requests", "vectors", "labels", "concurrency")},
    }
    return served, figures


def table(figures: list[Figure]) -> str:
    lines = [f"{'figure':28}{'value':>12}  {'unit':10}{'requests':>10}"]
    lines += [f"{each.name:28}{each.value:>12,.2f}  {each.unit:10}{each.n:>10}" for each in figures]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routes", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--requests", type=_positive, default=100, help="per latency; twice as many per throughput")
    parser.add_argument("--vectors", type=_positive, default=10_000, help="in the store that is searched")
    parser.add_argument("--labels", type=_positive, default=100, help="of a classification")
    parser.add_argument("--concurrency", type=_positive, default=16, help="requests under way for a throughput")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as store, serving(options.bundle, Path(store)) as client:
            served, figures = measure(client, options)
    except (DemoError, httpx2.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    print(json.dumps(served | {each.name: each.value for each in figures}))
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
