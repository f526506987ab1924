"""Do the demo's queries still find their photographs among 200 others? python -m benchmarks.everyday --data DATA

The others are drawn by a fixed seed, half from the test photographs of Flickr8k and half from those of Corel5k, which
serve no training and no choice. Some of them may rightly answer a query too (there is grass in many): the table says
what came first, for people to look at. The last line is one JSON object.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path

import httpx
import numpy as np

from examples.demo import IMAGE_QUERIES, index, post, print_table, serving
from examples.photos import PHOTOS, write_photos

_SEED, _EACH = 7, 100


def others(data: Path) -> list[Path]:
    """The drawn photographs: 100 of each set's test split."""
    rng = np.random.default_rng(_SEED)
    flickr = (data / "data/flickr8k/split_test.txt").read_text(encoding="utf-8").split()
    with (data / "data/corel5k/index.csv").open(newline="", encoding="utf-8") as stream:
        corel = [row["file"] for row in csv.DictReader(stream) if row["split"] == "test"]
    sets = [(data / "data/flickr8k/images", sorted(flickr)), (data / "data/corel5k", sorted(corel))]
    return [folder / names[place] for folder, names in sets for place in rng.choice(len(names), _EACH, replace=False)]


def ranked(client: httpx.Client, query: str, count: int) -> list[str]:
    """The ids of all photographs, the most similar first."""
    results = post(client, "/search", {"query": query, "modalities": ["image"], "top_k": count})["results"]
    return [result["id"] for result in results]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.everyday", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds data/flickr8k and data/corel5k")
    options = parser.parse_args(arguments)
    drawn = others(options.data)
    with tempfile.TemporaryDirectory() as name, serving(options.bundle, Path(name, "store")) as client:
        index(client, write_photos(Path(name, "media")), PHOTOS)
        for file in drawn:
            post(client, "/items", {"items": [{"id": file.name}]}, [file])
        ranks, rows = {}, []
        for query, wanted in IMAGE_QUERIES.items():
            order = ranked(client, query, len(PHOTOS) + len(drawn))
            ranks[query] = order.index(f"{wanted}.jpg") + 1
            rows.append((query, str(ranks[query]), ", ".join(order[:3])))
    print_table(f"Among {len(PHOTOS)} + {len(drawn)} photographs", ("query", "rank", "found first"), rows)
    places = list(ranks.values())
    print(json.dumps({"queries": len(places), "first": places.count(1), "ranks": ranks}))


if __name__ == "__main__":
    main()
