"""Measure what 50 thumbs teach: R@1 of the judged concepts on items and wordings nobody judged, and of everything else.

One collection of a real server holds photographs of Caltech101, sounds of ESC-50 and photographs of Flickr8k. Concepts
are the classes of the first two, ten at a time. Somebody asks for each by its name among the items that may be
judged (16 of each class of Caltech101's train split, ESC-50's folds 1 and 2) and judges five of the first 60 results:
the first three that are right and the first that are wrong. Held out are the test split, fold 5 and other wordings; all
other classes, and one caption of each of Flickr8k's test photographs, are everything else. A hostile judge says the
opposite, or judges items drawn at random. `guard`: the share of the bank's bare queries that find anything else.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.beyond.fdr import embedded, plain, rows_of
from benchmarks.servers import isthmus
from isthmus_client import Found, Isthmus, Judgement, NewItem, vector
from service.contract.bundle import read_bundle
from service.engine.cache import MemoryCache
from service.engine.opening import open_engine
from service.retrieval.chance import background_texts
from service.runtime.metrics import Metrics
from service.settings import Settings
from training.measure.intervals import interval

ROUNDS, CONCEPTS, THUMBS, RIGHT, LOOKED_AT, OF_A_CLASS = 15, 10, 5, 3, 60, 16
WORDINGS = {
    "caltech101": ("a photo of a {}", "a picture of a {}", "there is a {}", "show me the {}", "a close-up of a {}"),
    "esc50": ("the sound of a {}", "a {} can be heard", "recording of {}"),
}
KINDS = {"caltech101": "image", "esc50": "audio", "flickr8k": "image"}
_TOGETHER = 200


@dataclass(frozen=True)
class Medium:
    file: Path
    set: str
    answer: str
    """Its class, or its file's name."""
    part: str
    """seen: it may be judged; held: it may not."""


@dataclass(frozen=True)
class Asked:
    text: str
    set: str
    answer: str
    concept: bool
    """Whether it asks for a class, in a wording that is held out."""


def media(data: Path) -> tuple[list[Medium], list[Asked]]:
    items, asked, counts = [], [], dict[str, int]()
    for row in rows_of(data / "caltech101/index.csv"):
        name, test = row["class"], row["split"] == "test"
        counts[name] = counts.get(name, 0) + (not test)
        if test or counts[name] <= OF_A_CLASS:
            file = data / "caltech101/images" / row["file"]
            items.append(Medium(file, "caltech101", name, "held" if test else "seen"))
    for row in rows_of(data / "esc50/index.csv"):
        if row["fold"] in "125":
            file = data / "esc50/audio" / Path(row["file"]).name
            items.append(Medium(file, "esc50", row["class"], "held" if row["fold"] == "5" else "seen"))
    for name, wordings in WORDINGS.items():
        classes = sorted({one.answer for one in items if one.set == name})
        asked += [Asked(form.format(plain(label)), name, label, True) for label in classes for form in wordings]
    names = set((data / "flickr8k/split_test.txt").read_text().split())
    for row in rows_of(data / "flickr8k/captions.csv"):
        if row["image"] in names:
            names.discard(row["image"])
            items.append(Medium(data / "flickr8k/images" / row["image"], "flickr8k", row["image"], "held"))
            asked.append(Asked(row["caption"], "flickr8k", row["image"], False))
    return items, asked


async def _vectors(bundle: Path, cache: Path, items: Sequence[Medium]) -> NDArray[np.float32]:
    kept = cache / f"feedback-{read_bundle(bundle).manifest.space}.npy"
    if not kept.exists():
        settings = Settings(bundle=bundle, device="cpu", queue_s=3_600, request_deadline_s=3_600)
        embedder = open_engine(settings).embedder(MemoryCache(0), settings, Metrics())
        np.save(kept, await embedded(embedder, [one.file for one in items]))
        await embedder.close()
    stored: NDArray[np.float32] = np.load(kept, allow_pickle=False)
    return stored


def _found(
    client: Isthmus, texts: Sequence[str], top_k: int, filter: Mapping[str, str], kind: str, feedback: bool = True
) -> Iterator[list[Found]]:
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        yield from client.search_many(some, top_k=top_k, modalities=[kind], feedback=feedback, filter=filter)


def right(client: Isthmus, asked: Sequence[Asked]) -> NDArray[np.bool_]:
    """Return whether each query finds first what it asks for, among the held-out items of its set."""
    result = np.zeros(len(asked), np.bool_)
    for name, kind in KINDS.items():
        places = [place for place, one in enumerate(asked) if one.set == name]
        texts = [asked[place].text for place in places]
        for place, hits in zip(places, _found(client, texts, 1, {"set": name, "part": "held"}, kind), strict=True):
            result[place] = hits[0].metadata["answer"] == asked[place].answer
    return result


def thumbs(client: Isthmus, concept: tuple[str, str], judge: str, rng: np.random.Generator) -> Judgement:
    """Return what a judge says of what is found for a concept by its name."""
    name, answer = concept
    query = plain(answer)
    [hits] = _found(client, [query], LOOKED_AT, {"set": name, "part": "seen"}, KINDS[name], feedback=False)
    good = [hit.id for hit in hits if hit.metadata["answer"] == answer][:RIGHT]
    bad = [hit.id for hit in hits if hit.metadata["answer"] != answer][: THUMBS - len(good)]
    if judge == "random":
        drawn = rng.permutation([hit.id for hit in hits])[:THUMBS].tolist()
        good, bad = drawn[:RIGHT], drawn[RIGHT:]
    return Judgement(query, bad, good) if judge == "inverted" else Judgement(query, good, bad)


def guarded(client: Isthmus) -> float:
    """The share of the guard's bare queries for which feedback changes what is found, or a score."""
    answers = [
        list(_found(client, background_texts(), 5, {"part": "held"}, "image", feedback)) for feedback in (True, False)
    ]
    seen = [[[(hit.id, hit.score) for hit in hits] for hits in answer] for answer in answers]
    return float(np.mean([now != before for now, before in zip(*seen, strict=True)]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    all_media, asked = media(options.data / "data")
    options.cache.mkdir(parents=True, exist_ok=True)
    vectors = asyncio.run(_vectors(options.bundle, options.cache, all_media))
    classes = sorted({(one.set, one.answer) for one in asked if one.concept})
    drawn = np.random.default_rng(0).permutation(len(classes))[: ROUNDS * CONCEPTS].reshape(ROUNDS, CONCEPTS)
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        isthmus("isthmus", options.bundle, Path(folder, "store")) as server,
        Isthmus(server.address, timeout_s=600) as client,
    ):
        items = [
            NewItem(
                str(place),
                vector(row),
                {"set": one.set, "part": one.part, "answer": one.answer},
                modality=KINDS[one.set],
            )
            for place, (one, row) in enumerate(zip(all_media, vectors.tolist(), strict=True))
        ]
        assert all(result.error is None for result in client.upsert_many(items))
        before = right(client, asked)
        for judge in ("honest", "inverted", "random"):
            gains: list[float] = []
            losses, guard, base = [], [], []
            for number, places in enumerate(drawn):
                concepts = [classes[place] for place in places]
                rng = np.random.default_rng(number)
                client.teach([thumbs(client, concept, judge, rng) for concept in concepts])
                after = right(client, asked)
                guard.append(guarded(client))
                client.delete_feedback()
                judged = np.array([(one.set, one.answer) in concepts for one in asked])
                losses.append(np.where(judged, np.nan, 100.0 * before - 100.0 * after))
                for concept in concepts:
                    rows = np.array([(one.set, one.answer) == concept for one in asked])
                    gains.append(100.0 * (after[rows].mean() - before[rows].mean()))
                    base.append(100.0 * before[rows].mean())
            # A query is everything else in most of the rounds: its mean over them is one observation.
            lost = np.nanmean(losses, axis=0)
            worst = {
                name: round(max(float(np.nanmean(one[[query.set == name for query in asked]])) for one in losses), 2)
                for name in KINDS
            }
            figures[judge] = {
                "before": round(float(np.mean(base)), 1),
                "gain": round(float(np.mean(gains)), 1),
                "gain_interval": interval(np.array(gains)),
                "others_fall": round(float(np.nanmean(lost)), 2),
                "others_fall_interval": interval(lost[~np.isnan(lost)]),
                "worst_fall": worst,
                "guard": round(100 * float(np.max(guard)), 1),
            }
            print(f"{judge:10}{figures[judge]}", flush=True)
    honest = figures["honest"]
    others = all(one["others_fall"] < 1 for one in figures.values())
    return {"holds": honest["gain"] >= 10 and others, "concepts": drawn.size, "thumbs": CONCEPTS * THUMBS, **figures}
