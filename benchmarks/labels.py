"""What examples give `/classify`, and how it tells what is none of the labels, on a recipe's labelled test splits.

    python -m benchmarks.labels RECIPE --work WORK [--cache CACHE] [--set key=value]

Off topic: half of the classes are the labels, the media of the other half are off topic, over four draws and their
complements. AUROC of each score alone, of the detector that training learned, and of one learned from a label set's own
five examples per label and as many off-topic inputs. Examples (`--shots`): half of the classes are taught by some media
of the train split, the other half by none. `base` and `new`: top-1 of each half among its own labels; H: their harmonic
mean; `all`: among all labels. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.abstention import SCORES, Detector, auroc, fit, scores
from service.retrieval.adapters import own_similarities, shifted, shifts
from training import pipeline
from training.features import cached_features, default_cache
from training.fit.abstention import halves
from training.fit.ladder import label_prompts, project
from training.measure.prepared import Prepared
from training.measure.ranks import class_vectors
from training.recipe import load_recipe

Floats = NDArray[np.float32]
_TAUGHT = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="holds projectors.safetensors")
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    cache = options.cache or default_cache()
    frozen, _, data = pipeline.prepare(recipe, cache)
    trained = pipeline.saved(recipe, options.work / "projectors.safetensors")
    figures: dict[str, Any] = {}
    for name, splits in data.items():
        test = splits["test"]
        if test.pairs.labels is None or not len(test.pairs.media):
            continue
        modality = test.pairs.modality
        prompts = cached_features(frozen["text"], label_prompts(recipe, test.pairs), cache, what=f"{name} prompts")
        classes = class_vectors(project(trained.heads["text"], prompts), len(recipe.templates[modality]))
        media = {split: _media(trained.heads[modality], part) for split, part in splits.items()}
        learned = trained.abstention.get(modality)
        figures[name] = {
            "off_topic_auroc": _off_topic(media, classes, trained.temperature, learned),
            "examples": {
                str(shots): _examples(media, classes, shots) for shots in options.shots if media["train"] is not None
            },
        }
        _print(name, figures[name])
    print(json.dumps(figures))


def _media(head: Any, part: Prepared) -> tuple[Floats, NDArray[np.int64]] | None:
    """Unit vectors (N, D) and labels (N,) of a split; None where it has none."""
    if part.pairs.labels is None or not len(part.pairs.media):
        return None
    return project(head, part.media), part.pairs.labels


def _off_topic(
    media: Mapping[Any, Any], classes: Floats, temperature: float, learned: Detector | None
) -> dict[str, float]:
    """Mean AUROC, in percent, over the draws, of telling test media of the labels from the others."""
    vectors, labels = media["test"]
    found: dict[str, list[float]] = {}
    for half in halves(len(classes)):
        on = np.isin(labels, half)
        scored = scores(vectors @ classes[half].T, temperature)
        for place, name in enumerate(SCORES):
            found.setdefault(name, []).append(auroc(scored[on, place], scored[~on, place]))
        if learned is not None:
            likely = learned.probability(scored)
            found.setdefault("detector of training", []).append(auroc(likely[on], likely[~on]))
        if media["train"] is not None:
            likely_or_not = _of_label_set(media["train"], half, classes, temperature, vectors)
            found.setdefault("detector and examples of a label set", []).append(
                auroc(likely_or_not[on], likely_or_not[~on])
            )
    return {name: round(100 * float(np.mean(values)), 1) for name, values in found.items()}


def _of_label_set(
    train: tuple[Floats, NDArray[np.int64]],
    half: NDArray[np.int64],
    classes: Floats,
    temperature: float,
    queries: Floats,
) -> NDArray[np.float64]:
    """What a label set of `half` says about queries, taught by five examples of each and as many off-topic media.

    The off-topic media that it learns from are of a third of the other classes: what it meets later is of all of them.
    """
    vectors, labels = train
    rng = np.random.default_rng(0)
    own, owners = _drawn(rng, vectors, labels, half, _TAUGHT)
    others = np.setdiff1d(np.arange(len(classes)), half)
    foreign, _ = _drawn(rng, vectors, labels, rng.permutation(others)[: len(others) // 3], _TAUGHT)
    place = np.searchsorted(half, owners)
    moved = shifted(classes[half], shifts(own, place, len(half)))
    on = scores(np.concatenate(list(own_similarities(own, place, classes[half]))), temperature)
    off = scores(foreign @ moved.T, temperature)
    detector = fit([row[None] for row in on], [row[None] for row in off])
    return detector.probability(scores(queries @ moved.T, temperature))


def _examples(media: Mapping[Any, Any], classes: Floats, shots: int) -> dict[str, float]:
    """Mean figures, in percent, over the draws: without examples (`zero.`) and with them."""
    train, labels = media["train"]
    vectors, truth = media["test"]
    rng = np.random.default_rng(0)
    rows: list[dict[str, float]] = []
    for base in halves(len(classes)):
        new = np.setdiff1d(np.arange(len(classes)), base)
        own, owners = _drawn(rng, train, labels, base, shots)
        moved = shifted(classes, shifts(own, owners, len(classes)))
        rows.append(
            dict(_tops("zero.", vectors, truth, classes, base, new)) | dict(_tops("", vectors, truth, moved, base, new))
        )
    return {name: round(float(np.mean([row[name] for row in rows])), 1) for name in rows[0]}


def _tops(
    prefix: str,
    vectors: Floats,
    truth: NDArray[np.int64],
    classes: Floats,
    base: NDArray[np.int64],
    new: NDArray[np.int64],
) -> Iterator[tuple[str, float]]:
    def top1(of: NDArray[np.int64], among: NDArray[np.int64]) -> float:
        chosen = np.isin(truth, of)
        return 100 * float((among[(vectors[chosen] @ classes[among].T).argmax(1)] == truth[chosen]).mean())

    every = np.arange(len(classes))
    for suffix, first, second in (
        ("", top1(base, base), top1(new, new)),
        (".all", top1(base, every), top1(new, every)),
    ):
        yield f"{prefix}base{suffix}", first
        yield f"{prefix}new{suffix}", second
        yield f"{prefix}h{suffix}", 2 * first * second / max(first + second, 1e-9)


def _drawn(
    rng: np.random.Generator, vectors: Floats, labels: NDArray[np.int64], classes: NDArray[np.int64], count: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Up to `count` media of each class, and their labels."""
    chosen = [rng.permutation(np.flatnonzero(labels == each))[:count] for each in classes]
    places = np.concatenate(chosen)
    return vectors[places], labels[places]


def _print(name: str, found: Mapping[str, Any]) -> None:
    print(f"\n{name}\n{'AUROC on off-topic media':40}{'%':>8}")
    for score, value in found["off_topic_auroc"].items():
        print(f"{score:40}{value:8.1f}")
    columns = ("zero.base", "zero.new", "zero.h", "base", "new", "h", "zero.h.all", "base.all", "new.all", "h.all")
    if found["examples"]:
        print(f"{'examples per label':20}" + "".join(f"{column:>12}" for column in columns))
    for shots, row in found["examples"].items():
        print(f"{shots:20}" + "".join(f"{row[column]:12.1f}" for column in columns))


if __name__ == "__main__":
    main()
