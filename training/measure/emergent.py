"""Retrieval between modalities that never met in training, judged by what a picture shows."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.measure.intervals import interval
from training.pairs import PairError, Pairs
from training.recipe import EmergentSpec

Floats = NDArray[np.float32]


def emergent_figures(
    name: str, spec: EmergentSpec, queries: Pairs, vectors: Floats, gallery: Sequence[Pairs], media: Floats
) -> dict[str, Any]:
    """Mean average precision of queries whose modality never met the gallery's in training, beside chance.

    `vectors` (Q, D) are unit vectors of the queries' media, `media` (N, D) those of the galleries' one after the other.
    Raises PairError where the spec does not fit the pairs.
    """
    check_queries(name, spec, queries)
    assert queries.labels is not None
    showing = [shown(one, spec.shows) for one in gallery]
    relevant = {label: np.concatenate([one[label] for one in showing]) for label in spec.shows}
    labels = [queries.classes[label] for label in queries.labels]
    rows = [row for row, label in enumerate(labels) if label in relevant and relevant[label].any()]
    if not rows:
        raise PairError(f"emergent.{name}: nothing in {', '.join(spec.gallery)} shows what {spec.queries} asks for")
    right = np.stack([relevant[labels[row]] for row in rows])
    precision = average_precision(vectors[rows] @ media.T, right) * 100
    chance = chance_precision(right.sum(1), right.shape[1]) * 100
    return {
        f"{name}.map": round(float(precision.mean()), 2),
        f"{name}.map.ci95": interval(precision),
        f"{name}.chance": round(float(chance.mean()), 2),
        f"{name}.queries": len(rows),
    }


def check_queries(name: str, spec: EmergentSpec, queries: Pairs) -> None:
    """Raises PairError where the queries' test split has not the classes that the spec names."""
    if queries.labels is None:
        raise PairError(f"emergent.{name}: {spec.queries} has no labels in its test split")
    if unknown := sorted(set(spec.shows) - set(queries.classes)):
        raise PairError(f"emergent.{name}.shows: {unknown[0]} is no class of {spec.queries}")


def shown(pairs: Pairs, words: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.bool_]]:
    """Finds for each class which media of `pairs` show it, (media,): their class is one of its words, or a caption
    has one.

    Words are compared whole and without case, spaces of a class name included.
    """
    result = {}
    for label, names in words.items():
        if pairs.labels is not None:
            lower = {word.lower() for word in names}
            right = np.array([name.lower() in lower for name in pairs.classes])
            result[label] = right[pairs.labels]
        else:
            pattern = re.compile(rf"\b({'|'.join(re.escape(word) for word in names)})\b", re.IGNORECASE)
            said = np.array([bool(pattern.search(text)) for text in pairs.texts])
            rows = np.zeros(len(pairs.media), bool)
            np.logical_or.at(rows, pairs.links[:, 0], said[pairs.links[:, 1]])
            result[label] = rows
    return result


def average_precision(similarity: Floats, relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Average precision (Q,) of each row of similarities (Q, N) whose relevant columns are (Q, N), at least one each.

    Ties count against the ranking.
    """
    order = np.lexsort((relevant, -similarity), axis=1)
    ranked = np.take_along_axis(relevant, order, axis=1)
    precision = np.cumsum(ranked, axis=1) / np.arange(1, ranked.shape[1] + 1)
    return np.asarray((precision * ranked).sum(1) / ranked.sum(1), np.float64)


def chance_precision(relevant: NDArray[np.int64], total: int) -> NDArray[np.float64]:
    """Expected average precision of a random ranking of `total` items, of which `relevant` (Q,) are right.

    E = (H + (r - 1)(N - H) / (N - 1)) / N with the harmonic number H of N (Bestgen, 2015).
    """
    harmonic = float(np.sum(1 / np.arange(1, total + 1)))
    if total == 1:
        return np.ones(len(relevant))
    return (harmonic + (relevant - 1) * (total - harmonic) / (total - 1)) / total
