"""The judgement of vectors on a data set: zero-shot labels, retrieval both ways, pairs that never met in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.measure.emergent import average_precision, chance_precision
from training.measure.intervals import interval
from training.measure.ranks import label_ranks, ranks
from training.pairs import Pairs

Floats = NDArray[np.float32]
_BLOCK = 2**24  # similarities at a time
_BINS = 15


@dataclass(frozen=True)
class Labelled:
    """Zero-shot labelling of one modality. The arrays are (N,), in the order of `pairs.media`."""

    pairs: Pairs
    vectors: Floats
    """(N, D) unit vectors."""
    classes: Floats
    """(C, D) unit vectors."""
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    """Softmax of the predicted class at the bundle's temperature."""
    rank: NDArray[np.int64]
    """The rank from 0 of the right class; ties count against the model."""

    def per_class(self) -> NDArray[np.float64]:
        """Top-1 in percent per class (C,); NaN for a class of which there is nothing."""
        labels, classes = _labels(self.pairs), len(self.pairs.classes)
        with np.errstate(invalid="ignore"):
            right = np.bincount(labels, self.rank < 1, minlength=classes)
            return right / np.bincount(labels, minlength=classes) * 100


@dataclass(frozen=True)
class Captioned:
    """Retrieval between one modality and its captions."""

    pairs: Pairs
    vectors: Floats
    texts: Floats
    found: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """What each direction, m2t and t2m, found: each query's rank from 0, and the medium that it belongs to."""


Result = Labelled | Captioned
Results = Mapping[str, Result]


def captioned(pairs: Pairs, vectors: Floats, texts: Floats) -> Captioned:
    """Retrieval between media and captions, unit vectors (M, D) and (T, D)."""
    return Captioned(pairs, vectors, texts, ranks(vectors, texts, pairs.links))


def labelled(pairs: Pairs, vectors: Floats, classes: Floats, temperature: float) -> Labelled:
    """Zero-shot labelling of media by the vectors of classes, unit vectors (M, D) and (C, D)."""
    labels = _labels(pairs)
    predicted, rank = np.zeros(len(vectors), np.int64), np.zeros(len(vectors), np.int64)
    confidence = np.zeros(len(vectors), np.float32)
    size = max(1, _BLOCK // len(classes))
    for start in range(0, len(vectors), size):
        rows = slice(start, start + size)
        scores = vectors[rows] @ classes.T
        rank[rows] = label_ranks(scores, labels[rows])
        confidence[rows] = 1 / np.exp((scores - scores.max(1, keepdims=True)) / temperature).sum(1)
        np.put_along_axis(scores, labels[rows, None], -np.inf, 1)  # a tie with another class is that class
        predicted[rows] = np.where(rank[rows] < 1, labels[rows], scores.argmax(1))
    return Labelled(pairs, vectors, classes, predicted, confidence, rank)


def figures_of(result: Result) -> dict[str, Any]:
    """Figures of a result with their 95 % intervals; percent, and ranks from 1."""
    figures: dict[str, Any] = {}
    for name, (right, owner) in hits(result).items():
        figures |= {name: round(float(right.mean()), 2), f"{name}.ci95": interval(right, owner)}
    if isinstance(result, Labelled):
        labels = _labels(result.pairs)
        return figures | {
            "mean_per_class": round(float(np.nanmean(result.per_class())), 2),
            "mean_per_class.ci95": interval((result.rank < 1) * 100.0, classes=labels),
            "ece": calibration(result)[1],
            "n": len(labels),
            "classes": len(result.pairs.classes),
        }
    for direction, (rank, _) in result.found.items():
        short = result.pairs.modality[0]
        figures[f"{direction.replace('m', short)}.median_rank"] = float(np.median(rank) + 1)
    return figures | {"n": len(result.pairs.media), "texts": len(result.pairs.texts)}


def between(results: Results) -> dict[str, Any]:
    """Retrieval between sounds and images of one class, which may never have met in training: mean average precision.

    Empty where the data set has not both, with labels. Classes of which one side has nothing are no queries.
    """
    image, audio = results.get("image"), results.get("audio")
    if not isinstance(image, Labelled) or not isinstance(audio, Labelled):
        return {}
    figures: dict[str, Any] = {}
    for name, query, gallery in (("a2i", audio, image), ("i2a", image, audio)):
        asked, shown = _labels(query.pairs), _labels(gallery.pairs)
        rows = np.flatnonzero(np.isin(asked, shown))
        if not len(rows):
            continue
        size = max(1, _BLOCK // len(shown))
        precision, relevant = [], []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            right = asked[part, None] == shown[None]
            precision.append(average_precision(query.vectors[part] @ gallery.vectors.T, right) * 100)
            relevant.append(right.sum(1))
        precisions = np.concatenate(precision)
        chance = chance_precision(np.concatenate(relevant), len(shown)) * 100
        figures |= {
            f"{name}.map": round(float(precisions.mean()), 2),
            f"{name}.map.ci95": interval(precisions),
            f"{name}.chance": round(float(chance.mean()), 2),
        }
    return figures


def hits(result: Result) -> dict[str, tuple[NDArray[np.floating], NDArray[np.int64] | None]]:
    """Return what is compared between bundles: per figure, 0 or 100 per query, and what is drawn together."""
    if isinstance(result, Labelled):
        return {f"top{k}": ((result.rank < k) * 100.0, None) for k in (1, 5)}
    short = result.pairs.modality[0]
    return {
        f"{direction.replace('m', short)}.r{k}": ((rank < k) * 100.0, owner)
        for direction, (rank, owner) in result.found.items()
        for k in (1, 5, 10)
    }


def calibration(result: Labelled) -> tuple[list[tuple[float, float, int]], float]:
    """Bins of (mean confidence, accuracy, count), and the expected calibration error in percent.

    Guo et al. 2017 (arXiv 1706.04599): the mean distance of confidence and accuracy over 15 bins of equal width.
    """
    inside = np.minimum((result.confidence * _BINS).astype(int), _BINS - 1)
    right = result.rank < 1
    bins = [
        (float(result.confidence[inside == index].mean()), float(right[inside == index].mean()), int(count))
        for index, count in enumerate(np.bincount(inside, minlength=_BINS))
        if count
    ]
    error = sum(abs(confidence - accuracy) * count for confidence, accuracy, count in bins) / len(right) * 100
    return bins, round(error, 2)


def _labels(pairs: Pairs) -> NDArray[np.int64]:
    assert pairs.labels is not None
    return pairs.labels
