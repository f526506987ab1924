"""Choose how much each space's text tower says in the joint one: weights by validation (after OmniBind's routers).

OmniBind (arXiv 2407.11895) learns routers that weigh the spaces for each input; here one weight holds for every text,
so that the tower stays one small graph, and is the best of a grid on the recipe's validation splits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle, Modality
from service.contract.vectors import l2_normalise
from training.bundle.bind.maps import Map
from training.errors import TrainingError
from training.features import cached_features
from training.heads.bundled import as_encoder
from training.measure.ranks import class_vectors, mean_recall, top1
from training.measure.validation import label_prompts
from training.pairs import Pairs, read_pairs
from training.recipe import Recipe

Floats = NDArray[np.float32]
WEIGHTS = tuple(round(step / 10, 1) for step in range(11))


class RoutingError(TrainingError):
    """No routing weight can be learned: the message says what is missing."""


def mixed(native: Floats, mapped: Floats, weight: float) -> Floats:
    """Unit vectors (N, D) of (1 - weight) native + weight mapped."""
    return l2_normalise((1 - weight) * native + weight * mapped)


def learn(recipe: Recipe, target: Bundle, other: Bundle, through: Map, cache: Path) -> dict[float, dict[str, float]]:
    """Figures per source of the recipe's validation splits, for each weight of the other space's texts.

    R@1, the mean of both directions, for captions; top-1 for labels. `through` leads from `other` into `target`.
    Raises RoutingError where the recipe has no validation split of a modality that the joint space has.
    """
    joint = {*target.manifest.towers, *other.manifest.towers} - {"text"}
    figures: dict[float, dict[str, float]] = {weight: {} for weight in WEIGHTS}
    seen: set[Modality] = set()
    for name, source in recipe.pairs.items():
        pairs = read_pairs(recipe, name)["validation"]
        if not pairs.media or source.modality not in joint:
            continue
        seen.add(source.modality)
        texts = pairs.texts if pairs.labels is None else label_prompts(recipe, pairs)
        ours, theirs = (_vectors(bundle, "text", texts, cache) for bundle in (target, other))
        if source.modality in target.manifest.towers:
            media = _vectors(target, source.modality, pairs.media, cache)
        else:
            media = through(_vectors(other, source.modality, pairs.media, cache))
        for weight in WEIGHTS:
            vectors = mixed(ours, through(theirs), weight)
            figures[weight][name] = _score(pairs, media, vectors, len(recipe.templates.get(source.modality, ())))
    if absent := sorted(joint - seen):
        raise RoutingError(f"{recipe.name} has no validation split of {absent[0]} to learn the routing weight from")
    return figures


def best(figures: Mapping[float, Mapping[str, float]]) -> float:
    """The weight with the highest mean, each source relative to its own best; the lowest of equals."""
    top = {name: max(row[name] for row in figures.values()) or 1.0 for name in next(iter(figures.values()))}
    return max(figures, key=lambda weight: (np.mean([figures[weight][name] / top[name] for name in top]), -weight))


def _vectors(bundle: Bundle, modality: Modality, items: Any, cache: Path) -> Floats:
    what = f"{bundle.manifest.name} {modality}"
    return np.asarray(cached_features(as_encoder(bundle, modality), items, cache, what=what).pooled)


def _score(pairs: Pairs, media: Floats, texts: Floats, templates: int) -> float:
    if pairs.labels is not None:
        return top1(media, class_vectors(texts, templates), pairs.labels)[0]
    return mean_recall(media, texts, pairs.links)
