"""Measure whether `"include": ["why"]` points at what was planted: an object in a mosaic, a clip among others, a word.

Mosaics of 2 × 2 and 3 × 3 Caltech101 test photographs and rows of ESC-50 clips of fold 5 go through a real server that
keeps previews. The query names the class of one part, and the peak is to lie in that part. `told_apart` is how often
the towers find the part among the exact parts, with no window to guess: what a map is to be measured against.
`--bundle` names another space, such as one that was taught these classes. The windows were chosen on other data:
Caltech101's training photographs and fold 4.
"""

import argparse
import csv
import io
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from benchmarks.servers import isthmus
from isthmus_client import Isthmus, NewItem, audio, image
from service.contract.images import ImageLimits
from service.retrieval.crops import crops
from training.measure.intervals import interval

_CLIP_S, _RATE = 5, 16_000
_COUNT = 200
_LEFT_OUT = {"BACKGROUND_Google", "Faces_easy"}
"""No object, and the same as another class."""


@dataclass(frozen=True)
class Planted:
    """A medium of several parts, one of which the query names."""

    data: bytes
    query: str
    named: str
    place: int


def by_class(index: Path, values: Mapping[str, str]) -> dict[str, list[str]]:
    """The files of an index by class, of rows that have these values."""
    files: dict[str, list[str]] = {}
    with index.open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            if row["class"] not in _LEFT_OUT and all(row[key] == value for key, value in values.items()):
                files.setdefault(row["class"].replace("_", " ").lower(), []).append(row["file"])
    return files


def drawn(files: Mapping[str, list[str]], parts: int, rng: np.random.Generator) -> tuple[list[str], list[str], int]:
    """So many classes, a file of each, and the place of the one that is named."""
    classes = [str(name) for name in rng.choice(sorted(files), parts, replace=False)]
    return classes, [str(rng.choice(files[name])) for name in classes], int(rng.integers(parts))


def mosaics(folder: Path, split: str, side: int, count: int, seed: int = 0) -> list[Planted]:
    """Pictures of side × side photographs of different classes, 240 pixels each."""
    files, rng, planted = by_class(folder / "index.csv", {"split": split}), np.random.default_rng(seed), []
    for _ in range(count):
        classes, chosen, place = drawn(files, side * side, rng)
        canvas = Image.new("RGB", (240 * side, 240 * side))
        for at, name in enumerate(chosen):
            part = Image.open(folder / "images" / name).convert("RGB").resize((240, 240))
            canvas.paste(part, (at % side * 240, at // side * 240))
        file = io.BytesIO()
        canvas.save(file, "JPEG", quality=90)
        planted.append(Planted(file.getvalue(), f"a photo of a {classes[place]}", classes[place], place))
    return planted


def rows_of_clips(folder: Path, fold: str, parts: int, count: int, seed: int = 0) -> list[Planted]:
    """Sounds of so many clips of different classes, 5 s each."""
    files, rng, planted = by_class(folder / "index.csv", {"fold": fold}), np.random.default_rng(seed), []
    for _ in range(count):
        classes, chosen, place = drawn(files, parts, rng)
        clips = [
            soundfile.read(folder / "audio" / name, dtype="float32", frames=_CLIP_S * _RATE, fill_value=0)[0]
            for name in chosen
        ]
        planted.append(Planted(_flac(np.concatenate(clips)), f"the sound of a {classes[place]}", classes[place], place))
    return planted


def _flac(samples: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, _RATE, format="FLAC")
    return file.getvalue()


def where(why: Mapping[str, Any], parts: int) -> int:
    """The part that the peak lies in: of a mosaic's parts row by row, or of clips one after the other."""
    if "cells" in why:
        cells, side = np.array(why["cells"]), math.isqrt(parts)
        row, column = divmod(int(cells.argmax()), len(cells))
        return row * side // len(cells) * side + column * side // len(cells)
    best = max(why["parts"], key=lambda part: part["similarity"])
    middle: float = (best["start"] + best["end"]) / 2
    return int(middle // _CLIP_S)


def told_apart(client: Isthmus, one: Planted, parts: int) -> bool:
    """Say whether the towers find the part that is named among the parts as they were before they were put together."""
    if one.query.startswith("a photo"):
        side = math.isqrt(parts)
        inputs = [image(part) for part in crops(one.data, side, side, ImageLimits())]
    else:
        inputs = [
            audio(_flac(clip)) for clip in np.split(soundfile.read(io.BytesIO(one.data), dtype="float32")[0], parts)
        ]
    query, *vectors = [np.array(result.vector) for result in client.embed([one.query, *inputs])]
    return int(np.argmax(np.stack(vectors) @ query)) == one.place


def embedded(client: Isthmus, address: str, query: str, **options: Any) -> int:
    """Return how many inputs a search embeds, by the server's own count of what its cache did not have."""

    def misses() -> float:
        counted = re.search(r'^isthmus_cache_total\{result="miss"\} (\S+)', httpx2.get(f"{address}/metrics").text, re.M)
        return float(counted[1]) if counted else 0.0

    before = misses()
    client.search(query, **options)
    return int(misses() - before)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    data = options.data / "data"
    galleries = {
        "2 x 2": (4, image, mosaics(data / "caltech101", "test", 2, _COUNT)),
        "3 x 3": (9, image, mosaics(data / "caltech101", "test", 3, _COUNT)),
        "4 clips": (4, audio, rows_of_clips(data / "esc50", "5", 4, _COUNT)),
    }
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        isthmus("isthmus", options.bundle, Path(folder, "store"), previews=True) as server,
        Isthmus(server.address) as client,
    ):
        for name, (parts, read, planted) in galleries.items():
            rows = []
            for number, one in enumerate(planted):
                only = {"number": f"{name} {number}"}
                client.upsert([NewItem(only["number"], read(one.data), only)])
                [result] = client.search(one.query, top_k=1, filter=only, include=["why"])
                assert result.why is not None
                best = max(result.why["words"], key=lambda word: word["contribution"])
                right, known = where(result.why, parts) == one.place, told_apart(client, one, parts)
                rows.append((right, known, best["text"] in one.named.split()))
            right, known, words = 100.0 * np.array(rows).T
            figures[name] = {
                "right": round(float(right.mean()), 1),
                "interval": interval(right),
                "told_apart": round(float(known.mean()), 1),
                "right_of_told_apart": round(float(right[known > 0].mean()), 1),
                "interval_of_told_apart": interval(right[known > 0]),
                "words": round(float(words.mean()), 1),
            }
            print(f"{name:10}{figures[name]} (chance {100 / parts:.1f})", flush=True)
        [fresh] = mosaics(data / "caltech101", "test", 2, 1, seed=1)
        client.upsert([NewItem("fresh", image(fresh.data), only := {"number": "fresh"})])
        for key, include in (("embedded_without", []), ("embedded_with", ["why"])):
            figures[key] = embedded(client, server.address, f"a {key} thing", top_k=1, filter=only, include=include)
    print(f"a search embeds {figures['embedded_without']} input, with why {figures['embedded_with']}")
    right_parts = all(figures[name]["right"] >= 90 for name in galleries)
    return {"holds": right_parts and figures["embedded_without"] == 1, "media": _COUNT, **figures}
