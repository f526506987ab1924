"""Does `fdr` keep its promise? Concepts that a gallery holds, and concepts that it does not, at a rate of 0.1.

Galleries are of test media: Flickr8k's photographs, where a concept is absent once every photograph is taken out whose
captions name it or what goes with it; half of Caltech101's and of ESC-50's classes, where the other half is absent
(what is nearly the same is left out together); and photographs with sounds. Each concept is asked for as a word and
with "a". Of what is found the ten nearest of each kind count. The threshold with hindsight is the cosine similarity,
one for each gallery, that answers at most a tenth of the absent concepts. `recall` is the share of the right items (ten
at most) that are kept, `concepts` that of the present concepts for which a right item is kept.

The verdict "probably nothing here" is tried on parts of the same galleries, of 20 and 200 items, and on the whole:
`missed` is the share of present concepts that are called nothing, `false` that of absent ones for which something is
said to be there, and `nonsense` the same of strings that are no words.
"""

import argparse
import asyncio
import csv
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import read_bundle
from service.contract.vectors import Vectors
from service.engine.cache import MemoryCache
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Input, Text, of_file, raise_first
from service.engine.opening import open_engine
from service.retrieval import chance
from service.retrieval.chance import Bank
from service.runtime.metrics import Metrics
from service.settings import Settings
from service.store.background import SAMPLE, Background, measured

RATE, TOP, WITHIN, MOST_MS = 0.1, 10, 0.05, 0.2
_SEED, _DRAWS, _TOGETHER, _TIMES, _MILLION = 2, 3, 32, 300, 1_000_000
_SIZES = (20, 200, 100_000)
CONCEPTS = {
    "dog": "pup|terrier|labrador|retriever|poodle|hound|greyhound|collie|shepherd|beagle|husk|animal|mutt|spaniel",
    "snow": "ski|sled|ice|icy|slope|winter",
    "beach": "sand|shore|ocean|sea|surf|wave|coast",
    "bicycle": "bik|cycl|bmx",
    "motorcycle": "motor|dirt ?bike|bik|racer|scooter|moped|atv",
    "horse": "pony|ponies|rodeo|cowboy|bronco|jockey|polo|bull",
    "basketball": "ball|hoop|dunk|player",
    "skateboard": "skat|ramp|board",
    "mountain": "cliff|peak|hill|climb|rock|slope|hik",
    "tent": "camp|canop|tarp",
    "guitar": "music|band|instrument|banjo|concert|strum|sing|perform",
    "baby": "babies|infant|toddler|child|kid|boy|girl|little",
    "bird": "gull|seagull|duck|pigeon|geese|goose|swan|hawk|eagle|parrot|flock|owl|flamingo|wing",
    "boat": "ship|kayak|canoe|raft|sail|row|vessel|paddl|oar|dock|pier|wakeboard",
    "train": "rail|subway|track|locomotive|tram|station|trolley",
    "flower": "bloom|blossom|petal|dais|rose|garden|bouquet|plant",
    "tennis": "rac|court|ball|player",
    "baseball": "bat|pitch|softball|ball|catcher|player|umpire|mitt|team",
    "hockey": "ice|stick|rink|player|goal|puck|team",
    "frisbee": "disc|disk|toy|frisbe",
    "umbrella": "parasol|rain",
    "trampoline": "bounc|jump",
    "waterfall": "falls|water|cascade|stream|river",
    "balloon": "inflat|ball|bubble",
    "wedding": "bride|groom|gown|bouquet|tux|dress|veil|church|marri",
    "playground": "slide|sliding|swing|park|bars|gym|sandbox|rope|ladder",
    "camera": "photo|picture|film|tripod|lens|video|pos",
    "parade": "march|costume|band|flag|festival|uniform|crowd|street|celebrat|protest",
    "helicopter": "aircraft|plane|airplane",
    "fire": "flam|burn|smok|sparkl|bonfire|grill|torch|candle",
    "sunglasses": "glasses|goggles|shades",
    "sheep": "lamb|goat|cow|cattle|herd|animal|farm",
    "crowd": "people|group|audience|fan|spectator|many|gather|several|men|women|team|children|kids",
}
"""What captions call the things that go with a concept, from the beginning of a word."""
ALIKE = (
    *("crocodile crocodile_head", "cougar_body cougar_face Leopards wild_cat", "flamingo flamingo_head ibis emu"),
    *("ketch schooner ferry", "okapi gerenuk llama kangaroo", "brontosaurus stegosaurus", "Faces Faces_easy"),
    *("chair windsor_chair wheelchair", "lobster crayfish crab scorpion", "lotus water_lilly sunflower"),
    *("rooster pigeon", "mandolin electric_guitar", "euphonium saxophone gramophone", "pagoda minaret buddha"),
    *("lamp chandelier", "dolphin bass hawksbill sea_horse platypus", "butterfly dragonfly mayfly ant tick"),
    *("cup ewer", "headphone cellphone", "snoopy garfield", "elephant rhino hedgehog beaver", "starfish octopus"),
    *("car_side Motorbikes inline_skate", "accordion grand_piano", "airplanes helicopter", "nautilus trilobite"),
    *("wrench scissors stapler", "camera binocular", "watch metronome", "revolver cannon", "bonsai joshua_tree"),
    *("Rooster Hen", "Crickets Insects", "Rain Thunderstorm Water_drops Pouring_water Drinking_-_sipping"),
    *("Clock_alarm Clock_tick", "Mouse_click Keyboard_typing", "Chirping_birds Crow", "Coughing Sneezing"),
    *("Engine Airplane Helicopter Train", "Vacuum_cleaner Washing_machine", "Chainsaw Hand_saw", "Cow Sheep Pig"),
    *("Door_-_wood_creaks Door_knock", "Sea_waves Wind", "Breathing Snoring"),
)
"""Classes that are left out together."""
BOTH = {
    "dog": "Dog",
    "bird": "Chirping_birds Crow",
    "train": "Train",
    "helicopter": "Helicopter",
    "beach": "Sea_waves",
    "sheep": "Sheep",
    "baby": "Crying_baby",
    "fire": "Crackling_fire",
    "waterfall": "Pouring_water Water_drops",
    "motorcycle": "Engine",
    "crowd": "Clapping Laughing",
}
"""Classes of sounds that belong to a concept of photographs."""


@dataclass(frozen=True)
class Asked:
    """A concept in one gallery: for each kind, the items that are there, and those that are right."""

    word: str
    there: Sequence[NDArray[np.bool_]]
    right: Sequence[NDArray[np.bool_]] | None = None
    """None: the concept is absent."""


@dataclass(frozen=True)
class Answer:
    present: bool
    similarities: NDArray[np.floating]
    confidences: list[float | None]
    right: NDArray[np.bool_]
    all_right: int


Gallery = Mapping[str, Vectors]


def nonsense() -> list[str]:
    """Strings of three kinds that are no words: syllables, runs of keys, and letters with digits."""
    rng = np.random.default_rng(_SEED)

    def drawn(letters: str, count: int) -> str:
        return "".join(rng.choice(list(letters), count))

    made = []
    for _ in range(20):
        made.append("".join(drawn("bcdfgklmnprstvz", 1) + drawn("aeiou", 1) for _ in range(rng.integers(2, 5))))
        starts = rng.integers(0, 22, rng.integers(2, 4)).tolist()
        made.append("".join("qwertyuiopasdfghjklzxcvbnm"[start : start + 4] for start in starts))
        made.append(drawn("abcdefghijklmnopqrstuvwxyz0123456789", int(rng.integers(5, 11))))
    return made


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


async def embedded(embedder: Embedder, inputs: Sequence[Path | str]) -> Vectors:
    vectors = []
    for start in range(0, len(inputs), _TOGETHER):
        some = inputs[start : start + _TOGETHER]
        read: list[Input] = [Text(one) if isinstance(one, str) else of_file(one.read_bytes()) for one in some]
        results = await embedder.embed(read, admit_unknown=True)
        raise_first(results)
        vectors += [result.vector for result in results if isinstance(result, Embedded)]
    return np.stack(vectors)


def plain(name: str) -> str:
    return re.sub(r"[_ -]+", " ", name).lower()


@dataclass(frozen=True)
class Media:
    captions: Sequence[str]
    """Of each photograph of Flickr8k's test split, one caption to a line."""
    objects: NDArray[np.str_]
    """Class of each photograph of Caltech101's test split."""
    sounds: NDArray[np.str_]
    """Class of each clip of ESC-50's fold 5."""
    files: Sequence[Path]
    """Photographs, objects, and sounds."""


def media(data: Path) -> Media:
    names = sorted((data / "flickr8k/split_test.txt").read_text().split())
    captions: dict[str, list[str]] = {name: [] for name in names}
    for row in rows_of(data / "flickr8k/captions.csv"):
        captions.get(row["image"], []).append(row["caption"].lower())
    objects = [row for row in rows_of(data / "caltech101/index.csv") if row["split"] == "test"]
    sounds = [row for row in rows_of(data / "esc50/index.csv") if row["fold"] == "5"]
    files = [data / "flickr8k/images" / name for name in names]
    files += [data / "caltech101/images" / row["file"] for row in objects]
    files += [data / "esc50/audio" / Path(row["file"]).name for row in sounds]
    classes = [np.array([row["class"].replace(" ", "_") for row in rows]) for rows in (objects, sounds)]
    return Media(["\n".join(captions[name]) for name in names], classes[0], classes[1], files)


def _drawn(classes: NDArray[np.str_], rng: np.random.Generator) -> list[str]:
    """About half of the classes, with those that are like one of them."""
    out: set[str] = set()
    known = sorted(set(classes.tolist()))
    for name in rng.permutation(known).tolist():
        if len(out) < len(known) / 2:
            out |= {name}.union(*(group.split() for group in ALIKE if name in group.split()))
    return sorted(out & set(known))


def _of_classes(classes: NDArray[np.str_], out: Sequence[str]) -> list[Asked]:
    there = ~np.isin(classes, out)
    return [
        Asked(plain(name), [there], None if name in out else [classes == name])
        for name in sorted(set(classes.tolist()))
    ]


def tasks(known: Media, vectors: Vectors) -> Iterator[tuple[str, Gallery, list[Asked]]]:
    """Galleries by name, and what is asked of them."""
    rng = np.random.default_rng(_SEED)
    count, objects = len(known.captions), len(known.objects)
    photographs, things, clips = np.split(vectors, [count, count + objects])

    def naming(pattern: str, least: int = 1) -> NDArray[np.bool_]:
        word = re.compile(rf"^.*\b(?:{pattern})", re.MULTILINE)
        return np.array([len(word.findall(text)) >= least for text in known.captions])

    shown = {word: naming(word, 2) for word in CONCEPTS}
    named = {word: naming(f"{word}|{others}") for word, others in CONCEPTS.items()}
    every, none = np.ones(count, np.bool_), np.zeros(count, np.bool_)
    seen = [word for word in CONCEPTS if shown[word].sum() > 2]
    present = [Asked(word, [every], [shown[word]]) for word in seen]
    yield "flickr8k", {"image": photographs}, present + [Asked(word, [~named[word]]) for word in CONCEPTS]
    for _ in range(_DRAWS):
        yield "caltech101", {"image": things}, _of_classes(known.objects, _drawn(known.objects, rng))
        out = _drawn(known.sounds, rng)
        yield "esc50", {"audio": clips}, _of_classes(known.sounds, out)
        heard = ~np.isin(known.sounds, out)
        both: list[Asked] = []
        for word in CONCEPTS:
            owners = np.isin(known.sounds, BOTH.get(word, "").split())
            both += [Asked(word, [every, heard], [shown[word], owners & heard])] if word in seen else []
            both.append(Asked(word, [~named[word], heard & ~owners]))
        for asked in _of_classes(known.sounds, out):
            words = [word for word, names in BOTH.items() if asked.word in map(plain, names.split())]
            if asked.right is None:
                pictured = np.any([naming("|".join(asked.word.split())), none, *(named[w] for w in words)], axis=0)
                both.append(Asked(asked.word, [~pictured, heard]))
            else:
                right = np.any([none, *(shown[word] for word in words)], axis=0)
                both.append(Asked(asked.word, [every, heard], [right, asked.right[0]]))
        yield "mixed", {"image": photographs, "audio": clips}, both


def background(bank: Vectors, vectors: Vectors) -> Background:
    """Return the background as a store measures it, of a sample."""
    some = np.unique(np.random.default_rng(0).integers(0, len(vectors), SAMPLE)) if len(vectors) > SAMPLE else ...
    return replace(measured(bank, vectors[some]), count=len(vectors))


def answer(query: Vectors, asked: Asked, gallery: Gallery, bank: Bank, known: Mapping[str, Background]) -> Answer:
    """Return what `balance` finds: the TOP nearest of each kind, with their confidences."""
    places = [
        np.argsort(-np.where(there, vectors @ query, -2))[:TOP]
        for vectors, there in zip(gallery.values(), asked.there, strict=True)
    ]
    chosen = np.concatenate([vectors[place] for vectors, place in zip(gallery.values(), places, strict=True)])
    kinds = [kind for kind, place in zip(gallery, places, strict=True) for _ in place]
    right = [place < 0 for place in places]
    if asked.right is not None:
        right = [good[place] for good, place in zip(asked.right, places, strict=True)]
    similar = chosen @ query
    confident = chance.confidences(query, similar.tolist(), chosen, kinds, bank, known)
    total = 0 if asked.right is None else int(sum(good.sum() for good in asked.right))
    return Answer(asked.right is not None, similar, confident, np.concatenate(right), total)


def part(gallery: Gallery, asked: Sequence[Asked], size: int, rng: np.random.Generator) -> tuple[Gallery, list[Asked]]:
    """About `size` items of a gallery, of each kind as many, and what is asked of them: a concept of which an item is
    left, or one of which there was none."""
    most = size // len(gallery)
    places = [rng.permutation(len(vectors))[:most] for vectors in gallery.values()]

    def kept(masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
        return [mask[place] for mask, place in zip(masks, places, strict=True)]

    left = [
        Asked(one.word, kept(one.there), one.right and kept(one.right))
        for one in asked
        if one.right is None or any(mask.any() for mask in kept(one.right))
    ]
    return {kind: gallery[kind][place] for kind, place in zip(gallery, places, strict=True)}, left


def verdicts(answers: Sequence[Answer], of_nonsense: Sequence[Answer]) -> dict[str, float]:
    def empty(some: Iterable[Answer]) -> float:
        return float(np.mean([bool(chance.nothing(one.confidences)) for one in some]))

    return {
        "missed": empty(one for one in answers if one.present),
        "false": 1 - empty(one for one in answers if not one.present),
        "nonsense": 1 - empty(of_nonsense),
    }


def rates(answers: Sequence[Answer], kept: Sequence[NDArray[np.bool_]]) -> dict[str, float]:
    absent = [keep.any() for one, keep in zip(answers, kept, strict=True) if not one.present]
    right = [((keep & one.right).sum(), one.all_right) for one, keep in zip(answers, kept, strict=True) if one.present]
    return {
        "absent": float(np.mean(absent)),
        "recall": float(np.mean([count / min(TOP, total) for count, total in right])),
        "concepts": float(np.mean([count > 0 for count, _ in right])),
    }


def compared(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """The rates of `fdr`, and those of the best fixed threshold with hindsight."""
    best = np.sort([one.similarities.max() for one in answers if not one.present])
    threshold = best[-1 - int(RATE * len(best))]
    survive = [np.array(chance.surviving(one.confidences, RATE)) for one in answers]
    return {
        "fdr": rates(answers, survive),
        "hindsight": rates(answers, [one.similarities > threshold for one in answers]),
    }


def milliseconds(bank: Bank, vectors: Vectors) -> float:
    """Return what one search of TOP results takes more, of a million items: the median of many, processor time."""
    known = {"image": replace(measured(bank.words, vectors[:SAMPLE]), count=_MILLION)}
    similar, taken = (vectors[:TOP] @ bank.words[0]).tolist(), []
    for _ in range(_TIMES):
        started = time.thread_time()
        values = chance.confidences(bank.words[0], similar, vectors[:TOP], ["image"] * TOP, bank, known)
        chance.surviving(values, RATE)
        taken.append(1_000 * (time.thread_time() - started))
    return float(np.median(taken))


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(bundle=options.bundle, device="cpu", queue_s=3_600, request_deadline_s=3_600)
    embedder = open_engine(settings).embedder(MemoryCache(0), settings, Metrics())
    known = media(options.data / "data")
    options.cache.mkdir(parents=True, exist_ok=True)
    kept = options.cache / f"fdr-{read_bundle(options.bundle).manifest.space}.npy"
    if not kept.exists():
        np.save(kept, await embedded(embedder, known.files))
    bank = await chance.BackgroundQueries(embedder).bank()
    strings = await embedded(embedder, nonsense())
    answers: dict[str, list[Answer]] = {}
    of_sizes: dict[tuple[str, int], tuple[list[Answer], list[Answer]]] = {}
    rng = np.random.default_rng(_SEED)
    for name, gallery, asked in tasks(known, np.load(kept, allow_pickle=False)):
        words = [form.format(one.word) for form in ("{}", "a {}") for one in asked]
        queries = dict(zip(words, await embedded(embedder, words), strict=True))
        for size in _SIZES:
            some, left = part(gallery, asked, size, rng)
            backgrounds = {kind: background(bank.words, vectors) for kind, vectors in some.items()}
            given = [
                answer(queries[form.format(one.word)], one, some, bank, backgrounds)
                for form in ("{}", "a {}")
                for one in left
            ]
            everything = Asked("", [np.ones(len(vectors), np.bool_) for vectors in some.values()])
            of_words, of_strings = of_sizes.setdefault((name, size), ([], []))
            of_words += given
            of_strings += [answer(string, everything, some, bank, backgrounds) for string in strings]
        answers.setdefault(name, []).extend(given)  # of the whole gallery
    await embedder.close()
    figures = {name: compared(given) for name, given in answers.items()}
    print(f"{'gallery':12}{'rule':12}{'absent':>8}{'recall':>8}{'concepts':>10}")
    for name, rules in figures.items():
        for rule, rate in rules.items():
            print(f"{name:12}{rule:12}{rate['absent']:8.3f}{rate['recall']:8.3f}{rate['concepts']:10.3f}")
    said = {name: verdicts(*given) for name, given in of_sizes.items()}
    print(f"{'gallery':12}{'items':>8}{'missed':>8}{'false':>8}{'nonsense':>10}")
    for (name, size), verdict in said.items():
        items = "all" if size == max(_SIZES) else str(size)
        print(f"{name:12}{items:>8}{verdict['missed']:8.3f}{verdict['false']:8.3f}{verdict['nonsense']:10.3f}")
    cost = milliseconds(bank, np.load(kept, allow_pickle=False))
    print(f"one search more: {cost:.3f} ms of processor time")

    def within(key: str) -> bool:
        return all(rules["fdr"][key] >= rules["hindsight"][key] - WITHIN for rules in figures.values())

    controlled = all(rules["fdr"]["absent"] <= RATE for rules in figures.values())
    return {
        "holds": controlled and within("recall") and cost < MOST_MS,
        "controlled": controlled,
        "recall_within": within("recall"),
        "concepts_within": within("concepts"),
        "ms": round(cost, 4),
        "nonsense": round(max(verdict["nonsense"] for verdict in said.values()), 3),
        "galleries": {n: {r: {k: round(v, 3) for k, v in f.items()} for r, f in g.items()} for n, g in figures.items()},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return asyncio.run(_measure(options))
