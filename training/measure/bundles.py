"""A bundle's own graphs on a data set: zero-shot labels, retrieval both ways, pairs that never met in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle
from training.features import cached_features
from training.heads.bundled import as_encoder
from training.measure.data import DataError, Wording
from training.measure.emergent import average_precision, chance_precision
from training.measure.intervals import interval
from training.measure.ranks import class_vectors, label_ranks, ranks, with_prompts
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
    """From 0, of the right class; ties count against the model."""

    def per_class(self) -> NDArray[np.float64]:
        """Top-1 in percent per class (C,); NaN for a class of which there is nothing."""
        return _per_class(self.rank < 1, _labels(self.pairs), len(self.pairs.classes)) * 100


@dataclass(frozen=True)
class Captioned:
    """Retrieval between one modality and its captions."""

    pairs: Pairs
    vectors: Floats
    texts: Floats
    found: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Per direction, m2t and t2m: each query's rank from 0, and the medium that it belongs to."""


Result = Labelled | Captioned
Results = Mapping[Literal["image", "audio"], Result]


def measure(bundle: Bundle, pairs: Pairs, wording: Wording, cache: Path) -> tuple[Result, dict[str, Any]]:
    """Encode and judge one modality of a data set: what was found, and figures. Percent; ranks from 1.

    Media that cannot be decoded are left out and counted as `unreadable`. Raises DataError where nothing is left, or
    where the bundle lacks a tower.
    """
    modality = pairs.modality
    for needed in (modality, "text"):
        if needed not in bundle.manifest.towers:
            has = ", ".join(bundle.manifest.towers)
            raise DataError(f"{bundle.path} has no {needed} tower, which {pairs.name} needs; it has {has}")
    encoder = as_encoder(bundle, modality)
    media = cached_features(encoder, pairs.media, cache, lenient=True, what=f"{pairs.name} {modality}").pooled
    good = ~np.isnan(media[:, 0])
    if not good.any():
        raise DataError(
            f"{pairs.name}: none of {len(good)} {modality} files can be decoded; the first: {pairs.media[0]}"
        )
    kept, vectors = _kept(pairs, good), np.array(media[good])
    text = as_encoder(bundle, "text")
    result: Result
    if kept.labels is None:
        texts = np.array(cached_features(text, kept.texts, cache, what=f"{pairs.name} captions").pooled)
        result = Captioned(kept, vectors, texts, ranks(vectors, texts, kept.links))
        figures = _retrieval_figures(result)
    else:
        templates = wording.of(modality, bundle.manifest.templates.get(modality, []))
        prompts = [template.format(name) for name in kept.classes for template in templates]
        own = [(index, prompt) for index, name in enumerate(kept.classes) for prompt in _prompts(wording, name)]
        encoded = np.array(
            cached_features(
                text, [*prompts, *(prompt for _, prompt in own)], cache, what=f"{pairs.name} prompts"
            ).pooled
        )
        classes = class_vectors(encoded[: len(prompts)], len(templates))
        classes = with_prompts(classes, encoded[len(prompts) :], np.array([index for index, _ in own], np.int64))
        result = Labelled(kept, vectors, classes, *_judge(vectors, classes, kept.labels, bundle.manifest.temperature))
        figures = _label_figures(result)
    if len(kept.media) < len(pairs.media):
        figures["unreadable"] = len(pairs.media) - len(kept.media)
    seen = bundle.manifest.towers[modality].labels
    figures["concept_informed"] = None if seen is None else bool(seen)
    return result, figures


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
        each = np.concatenate(precision)
        chance = chance_precision(np.concatenate(relevant), len(shown)) * 100
        figures |= {
            f"{name}.map": round(float(each.mean()), 2),
            f"{name}.map.ci95": interval(each),
            f"{name}.chance": round(float(chance.mean()), 2),
        }
    return figures


def hits(result: Result) -> dict[str, tuple[NDArray[np.floating], NDArray[np.int64] | None]]:
    """What is compared between bundles: per figure, 0 or 100 per query, and what is drawn together."""
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


def _label_figures(result: Labelled) -> dict[str, Any]:
    labels = _labels(result.pairs)
    figures: dict[str, Any] = {}
    for name, (right, _) in hits(result).items():
        figures |= {name: round(float(right.mean()), 2), f"{name}.ci95": interval(right)}
    return figures | {
        "mean_per_class": round(float(np.nanmean(result.per_class())), 2),
        "mean_per_class.ci95": interval((result.rank < 1) * 100.0, classes=labels),
        "ece": calibration(result)[1],
        "n": len(labels),
        "classes": len(result.pairs.classes),
    }


def _retrieval_figures(result: Captioned) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, (right, owner) in hits(result).items():
        figures |= {name: round(float(right.mean()), 2), f"{name}.ci95": interval(right, owner)}
    short = result.pairs.modality[0]
    for direction, (rank, _) in result.found.items():
        figures[f"{direction.replace('m', short)}.median_rank"] = float(np.median(rank) + 1)
    return figures | {"n": len(result.pairs.media), "texts": len(result.pairs.texts)}


def _judge(
    vectors: Floats, classes: Floats, labels: NDArray[np.int64], temperature: float
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
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
    return predicted, confidence, rank


def _per_class(right: NDArray[np.bool_], labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    sizes = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels, right, minlength=classes) / sizes


def _prompts(wording: Wording, name: str) -> list[str]:
    own = wording.prompts.get(name)
    if own is None:
        own = [
            prompt
            for label, named in wording.names.items()
            if named == name
            for prompt in wording.prompts.get(label, [])
        ]
    return own


def _labels(pairs: Pairs) -> NDArray[np.int64]:
    assert pairs.labels is not None
    return pairs.labels


def _kept(pairs: Pairs, good: NDArray[np.bool_]) -> Pairs:
    """The pairs without the media that could not be read, nor the texts that then have none."""
    if good.all():
        return pairs
    place = np.cumsum(good) - 1
    links = pairs.links[good[pairs.links[:, 0]]]
    used = np.unique(links[:, 1])
    links = np.stack([place[links[:, 0]], np.searchsorted(used, links[:, 1])], 1) if len(links) else links
    return Pairs(
        name=pairs.name,
        modality=pairs.modality,
        media=[path for path, fine in zip(pairs.media, good, strict=True) if fine],
        texts=[pairs.texts[index] for index in used],
        links=links,
        labels=None if pairs.labels is None else pairs.labels[good],
        classes=pairs.classes,
        weight=pairs.weight,
    )
