"""Do everyday queries find the right photographs first?

`python -m benchmarks.everyday --data DATA --media FOLDER` draws 200 test photographs of Flickr8k and Corel5k into a
folder, with their captions and tags in labels.csv. `python -m benchmarks.everyday --media FOLDER --queries FILE`
indexes the photographs of a folder and runs the queries of a CSV file with the columns `query` and `right`, a regular
expression: a photograph is right where its name or its labels match. A query for which no photograph is right is left
out. `python -m benchmarks.everyday --data DATA` looks for the demo's photographs among those drawn. The last line is
one JSON object.
"""

import argparse
import csv
import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import httpx2
import numpy as np

from examples.demo import IMAGE_QUERIES, index, post, print_table, serving
from examples.photos import PHOTOS, write_photos

_SEED, _PHOTOGRAPHS_PER_SET = 7, 100
_LABELS = "labels.csv"


def others(data: Path) -> list[Path]:
    """The drawn photographs: 100 of each set's test split, which serve no training and no choice."""
    rng = np.random.default_rng(_SEED)
    flickr = (data / "data/flickr8k/split_test.txt").read_text(encoding="utf-8").split()
    corel = [row["file"] for row in _rows(data / "data/corel5k/index.csv") if row["split"] == "test"]
    sets = [(data / "data/flickr8k/images", sorted(flickr)), (data / "data/corel5k", sorted(corel))]
    return [
        folder / names[place]
        for folder, names in sets
        for place in rng.choice(len(names), _PHOTOGRAPHS_PER_SET, replace=False)
    ]


def draw(data: Path, media: Path) -> None:
    """Writes the drawn photographs and labels.csv, the captions and tags of each, into a folder."""
    labels: dict[str, list[str]] = defaultdict(list)
    for row in _rows(data / "data/flickr8k/captions.csv"):
        labels[row["image"]].append(row["caption"])
    for row in _rows(data / "data/corel5k/index.csv"):
        labels[Path(row["file"]).name].append(row["tags"])
    media.mkdir(parents=True, exist_ok=True)
    with (media / _LABELS).open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(("file", "labels"))
        for path in others(data):
            shutil.copyfile(path, media / path.name)
            table.writerow((path.name, " ".join(labels[path.name])))


def ranked(client: httpx2.Client, query: str, count: int) -> list[str]:
    """The ids of all photographs, the most similar first."""
    results = post(client, "/search", {"query": query, "modalities": ["image"], "top_k": count})["results"]
    return [result["id"] for result in results]


def right_files(queries: Path, labels: Mapping[str, str]) -> dict[str, set[str]]:
    """The right photographs of each query that has any."""
    texts = {name: f"{name} {label}" for name, label in labels.items()}
    right = {
        row["query"]: {name for name, text in texts.items() if re.search(row["right"], text, re.IGNORECASE)}
        for row in _rows(queries)
    }
    return {query: names for query, names in right.items() if names}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _labelled(client: httpx2.Client, media: Path, queries: Path) -> dict[str, object]:
    """Runs the queries of a file; for each, the rank of the first right photograph."""
    labels = {path.name: "" for path in sorted(media.iterdir()) if path.is_file() and path.suffix != ".csv"}
    if (media / _LABELS).is_file():
        labels |= {row["file"]: row["labels"] for row in _rows(media / _LABELS) if row["file"] in labels}
    for name in labels:
        post(client, "/items", {"items": [{"id": name}]}, [media / name])
    ranks, rows = [], []
    for query, names in right_files(queries, labels).items():
        order = ranked(client, query, len(labels))
        ranks.append(1 + next(place for place, name in enumerate(order) if name in names))
        rows.append((query, str(len(names)), str(ranks[-1]), ", ".join(order[:3])))
    print_table(f"Among {len(labels)} photographs", ("query", "right", "first right at", "found first"), rows)
    return {
        "top1": round(100 * sum(rank == 1 for rank in ranks) / len(ranks), 1),
        "top5": round(100 * sum(rank <= 5 for rank in ranks) / len(ranks), 1),
        "n": len(ranks),
    }


def _demo(client: httpx2.Client, data: Path) -> dict[str, object]:
    """Runs the demo's queries over its own photographs and the drawn ones.

    Some of the others may rightly answer a query too (there is grass in many): the table says what came first.
    """
    drawn = others(data)
    with tempfile.TemporaryDirectory() as name:
        index(client, write_photos(Path(name)), PHOTOS)
    for file in drawn:
        post(client, "/items", {"items": [{"id": file.name}]}, [file])
    ranks, rows = {}, []
    for query, photo in IMAGE_QUERIES.items():
        order = ranked(client, query, len(PHOTOS) + len(drawn))
        ranks[query] = order.index(f"{photo}.jpg") + 1
        rows.append((query, str(ranks[query]), ", ".join(order[:3])))
    print_table(f"Among {len(PHOTOS)} + {len(drawn)} photographs", ("query", "rank", "found first"), rows)
    places = list(ranks.values())
    return {"queries": len(places), "first": places.count(1), "ranks": ranks}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everyday", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--data", type=Path, help="folder that holds data/flickr8k and data/corel5k")
    parser.add_argument("--media", type=Path, help="folder of photographs; labels.csv has `file` and `labels`")
    parser.add_argument("--queries", type=Path, help="CSV file of `query` and `right`")
    options = parser.parse_args(arguments)
    if options.data is None and (options.media is None or options.queries is None):
        parser.error("give --media and --queries, or --data")
    if options.data is not None and options.media is not None:
        draw(options.data, options.media)
        if options.queries is None:
            return
    with tempfile.TemporaryDirectory() as name, serving(options.bundle, Path(name, "store")) as client:
        if options.media is not None:
            figures = _labelled(client, options.media, options.queries)
        else:
            figures = _demo(client, options.data)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
