"""Is "probably nothing here" said of what is absent, and not of what is there? python -m benchmarks.nothing --data DATA

Galleries are drawn from validation media alone: Flickr8k's dev photographs and some of its train split, Corel5k's train
split, and ESC-50's folds 1 to 4. Present are everyday words that captions or tags name, absent are words that none
names and classes of sounds that were left out; the rest are strings without a meaning. Captions name little of what a
photograph shows, so that some of what counts as absent is there. `--vectors` keeps the vectors of the media for a
second run. The last line is one JSON object: percentages of present queries that are called nothing, and of absent and
meaningless ones that are not, by gallery.
"""

import argparse
import asyncio
import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors
from service.engine.cache import MemoryCache
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Input, Text, of_file, raise_first
from service.engine.opening import open_engine
from service.retrieval import chance
from service.runtime.metrics import Metrics
from service.settings import Settings
from service.store.background import SAMPLE, Background, measured

PRESENT = """dog man woman child girl boy baby people crowd beach grass snow ball bicycle car tree street mountain horse
skateboard swing pool rock hat helmet football soccer motorcycle sand river ocean tent camera guitar bird sky
flower tiger bear cat fox train plane boat bridge house building garden sunset forest lake field water desert
cloud sun leaf jet coral reef elk deer zebra elephant locomotive market temple ruins statue pillar window
castle ice valley waterfall frisbee stick surfer wave bench sidewalk fence playground slide climber cliff
kayak wheel race basketball tennis baseball bus bike sled skier snowboard fountain park city light balloon
umbrella dress jacket sunglasses beard hair sofa bed table cup food"""
ABSENT = """microscope|toothbrush|violin|submarine|x-ray|chessboard|spreadsheet|washing machine|circuit board|sushi|
astronaut|giraffe|penguin|octopus|lobster|stethoscope|anvil|typewriter|jellyfish|wedding cake|satellite|
bulldozer|toaster|tax form|stapler|kangaroo|hedgehog|koala|parrot|broccoli|croissant|pineapple|avocado|
spaghetti|hamburger|teapot|frying pan|refrigerator|microwave|vacuum cleaner|sewing machine|blood cells|
galaxy|moon surface|handwritten letter|passport|credit card|computer mouse|printer|server rack|screwdriver|
chainsaw|drill|wrench|tape measure|dentist|brain scan|skeleton|scorpion|caterpillar|mosquito|harp|trombone|
accordion|missile|aircraft carrier|igloo|pyramid|oil rig|barcode|invoice|banknote|diamond ring|wristwatch|
alarm clock|hourglass|compass|globe|volcano|tornado|robot|drone|telescope"""
MEANINGLESS = """qwertyzxc asdfgh zzzzz xkcdqw qqqq blorptz a1b2c3 xxyyzz hjklhjkl mnbvcxz uiop wug fnord snrk plugh
vbnmq qpwoei zmxncb aoeuhtns dvorakq gfdsa trewq lkjhg poiuy nbvcx ytrewq rtyfgh wertsd ghjkbn tyuvbn"""
GALLERIES = ((200, 0), (1_000, 0), (0, 60), (0, 200), (0, 500), (200, 60), (1_000, 200))
"""Photographs and sounds of each."""
_SEED, _DRAWS, _LEFT_OUT = 1, 6, 15
_TOGETHER = 32


def media(data: Path) -> tuple[list[str], list[str], list[str]]:
    """Files of photographs and of sounds, and the classes of the sounds."""
    rng = np.random.default_rng(_SEED)
    flickr = {split: sorted((data / f"flickr8k/split_{split}.txt").read_text().split()) for split in ("dev", "train")}
    corel = [row["file"] for row in _rows(data / "corel5k/index.csv") if row["split"] == "train"]
    photographs = [f"flickr8k/images/{name}" for name in [*flickr["dev"], *rng.choice(flickr["train"], 700, False)]]
    photographs += [f"corel5k/{name}" for name in rng.choice(corel, 1_300, False)]
    sounds = [row for row in _rows(data / "esc50/index.csv") if row["fold"] != "5"]
    drawn = [sounds[place] for place in rng.choice(len(sounds), 800, False)]
    return photographs, [f"esc50/audio/{Path(row['file']).name}" for row in drawn], [row["class"] for row in drawn]


def words_of(data: Path) -> dict[str, list[set[str]]]:
    """What names a photograph: the words of each of its captions, or its tags."""
    named: dict[str, list[set[str]]] = defaultdict(list)
    for row in _rows(data / "flickr8k/captions.csv"):
        named[f"flickr8k/images/{row['image']}"].append(set(re.findall("[a-z]+", row["caption"].lower())))
    for row in _rows(data / "corel5k/index.csv"):
        tags = set(re.findall("[a-z]+", row["tags"].lower()))
        named[f"corel5k/{row['file']}"] = [tags, tags]  # counts as much as two captions
    return named


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _forms(word: str) -> set[str]:
    return {word, f"{word}s", f"{word}es", word.removesuffix("s")}


async def embedded(embedder: Embedder, inputs: Sequence[Path | str]) -> Vectors:
    """Return the vectors (N, D) of files and texts."""
    vectors = []
    for start in range(0, len(inputs), _TOGETHER):
        some = inputs[start : start + _TOGETHER]
        read: list[Input] = [Text(one) if isinstance(one, str) else of_file(one.read_bytes()) for one in some]
        results = await embedder.embed(read, admit_unknown=True)
        raise_first(results)
        vectors += [result.vector for result in results if isinstance(result, Embedded)]
    return np.stack(vectors)


def verdicts(queries: Vectors, gallery: Sequence[Vectors], background: Vectors) -> NDArray[np.bool_]:
    """Whether each query is called nothing in a gallery of one part or several."""
    best = np.zeros(len(queries))
    for vectors in gallery:
        measures = measured(background, vectors[:SAMPLE])
        judged = Background(len(vectors), measures.centre, measures.spread)
        confidences = [chance.confidence(score, judged) or 0.0 for score in (queries @ vectors.T).max(axis=1).tolist()]
        best = np.maximum(best, confidences)
    return np.array([bool(chance.nothing([value])) for value in best])


@dataclass(frozen=True)
class Queries:
    present: Vectors
    """One of each word of PRESENT."""
    absent: Vectors
    sounds: Vectors
    """One of each class of sounds."""


@dataclass(frozen=True)
class Material:
    pictures: Vectors
    recordings: Vectors
    heard: NDArray[np.str_]
    """Classes of the recordings."""
    shown: NDArray[np.bool_]
    """Whether a picture (column) shows a word of PRESENT (row)."""
    queries: Sequence[Queries]
    """In several forms."""
    meaningless: Vectors
    background: Vectors

    @property
    def kinds(self) -> NDArray[np.str_]:
        return np.unique(self.heard)


async def material(bundle: Path, data: Path, saved: Mapping[str, Vectors] | None) -> Material:
    settings = Settings(bundle=bundle, device="cpu", queue_s=3_600, request_deadline_s=3_600)
    embedder = open_engine(settings).embedder(MemoryCache(0), settings, Metrics())
    photographs, sounds, classes = media(data)
    if saved is None:
        saved = {
            "pictures": await embedded(embedder, [data / name for name in photographs]),
            "recordings": await embedded(embedder, [data / name for name in sounds]),
        }
    named, present = words_of(data), PRESENT.split()
    every = set().union(*(words for name in photographs for words in named[name]))
    words = [" ".join(word.split()) for word in ABSENT.split("|")]
    absent = [word for word in words if not any(_forms(part) & every for part in word.split())]
    shown = [
        [sum(bool(_forms(word) & words) for words in named[name]) >= 2 for name in photographs] for word in present
    ]
    kinds = [kind.lower().replace("_", " ") for kind in sorted(set(classes))]
    queries = [
        Queries(
            *[await embedded(embedder, [form.format(word) for word in words]) for words in (present, absent, kinds)]
        )
        for form in ("{}", "a {}")
    ]
    meaningless = await embedded(embedder, MEANINGLESS.split())
    background = await embedded(embedder, chance.background_texts())
    await embedder.close()
    return Material(
        saved["pictures"], saved["recordings"], np.array(classes), np.array(shown), queries, meaningless, background
    )


def rates(held: Material, photos: int, clips: int) -> dict[str, float]:
    """Percentages of wrong verdicts in galleries of so many photographs and sounds, by what was asked for."""
    rng = np.random.default_rng(_SEED)
    wrong: dict[str, list[NDArray[np.bool_]]] = {"present": [], "absent": [], "meaningless": []}
    for _ in range(_DRAWS):
        left_out = rng.choice(held.kinds, _LEFT_OUT, False)
        some = rng.choice(len(held.pictures), photos, False)
        others = rng.choice(np.flatnonzero(~np.isin(held.heard, left_out)), clips, False)
        gallery = [vectors for vectors in (held.pictures[some], held.recordings[others]) if len(vectors)]
        for queries in held.queries:
            there = queries.sounds[np.isin(held.kinds, held.heard[others])]
            if photos:
                seen = held.shown[:, some].sum(axis=1) >= max(2, photos // 200)
                there = np.concatenate([queries.present[seen], there])
            gone = queries.absent if photos else queries.sounds[np.isin(held.kinds, left_out)]
            wrong["present"].append(verdicts(there, gallery, held.background))
            wrong["absent"].append(~verdicts(gone, gallery, held.background))
        wrong["meaningless"].append(~verdicts(held.meaningless, gallery, held.background))
    return {name: round(100 * float(np.concatenate(parts).mean()), 1) for name, parts in wrong.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nothing", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds data/flickr8k and so on")
    parser.add_argument("--vectors", type=Path, help="file (.npz) that keeps the vectors of the media")
    options = parser.parse_args(arguments)
    kept: Path | None = options.vectors
    saved = np.load(kept, allow_pickle=False) if kept is not None and kept.exists() else None
    held = asyncio.run(material(options.bundle, options.data / "data", saved))
    if kept is not None:
        np.savez(kept, pictures=held.pictures, recordings=held.recordings)
    figures = {f"{photos}+{clips}": rates(held, photos, clips) for photos, clips in GALLERIES}
    for gallery, wrong in figures.items():
        print(f"{gallery:>9} photographs + sounds: {wrong}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
