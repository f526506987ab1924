"""A detector of inputs that are of none of the labels, for the manifest: learned with half of the classes withheld.

On the validation split that calibrates the temperature: half of a set's classes are the labels, media of the other half
are off topic, and then the other way round. A modality without labelled validation media learns from captions, each a
class of its own.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from service.contract.abstention import Detector, fit, scores
from service.contract.bundle import Modality
from training.measure.prepared import Prepared
from training.measure.validation import Data, Heads, classes_of, project
from training.pairs import Split
from training.recipe import Recipe

_DRAWS = 4
_CAPTIONED = 200
"""Media with captions that are taken as classes: sets of labels have tens of them, and not thousands."""

Floats = NDArray[np.float32]


def learn(recipe: Recipe, heads: Heads, data: Data, temperature: float) -> dict[Modality, Detector]:
    """A detector for each modality of media that has validation media of at least four classes."""
    detectors: dict[Modality, Detector] = {}
    for modality in heads:
        if modality == "text":
            continue
        sources = [splits for splits in data.values() if splits["validation"].pairs.modality == modality]
        sources = [splits for splits in sources if not splits["validation"].pairs.words]
        labelled = [splits for splits in sources if splits["validation"].pairs.labels is not None]
        on: list[NDArray[np.float64]] = []
        off: list[NDArray[np.float64]] = []
        for splits in labelled or sources:
            if len(splits["validation"].pairs.media):
                for inside, outside in by_class(*_labelled(recipe, heads, splits), temperature):
                    on.append(inside)
                    off.append(outside)
        if len(on) >= 4:
            detectors[modality] = fit(on, off)
    return detectors


def by_class(
    media: Floats, labels: NDArray[np.int64], classes: Floats, temperature: float
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Returns, for each class that has media, the scores of these with it among the labels, and without.

    `media` (N, D) with labels (N,), `classes` (C, D), all of unit length.
    """
    if len(classes) < 2:  # no half would have a label
        return
    similar = media.astype(np.float64) @ classes.T.astype(np.float64)
    inside: dict[int, list[NDArray[np.float64]]] = {}
    outside: dict[int, list[NDArray[np.float64]]] = {}
    for half in halves(len(classes)):
        scored = scores(similar[:, half], temperature)
        among = np.isin(labels, half)
        for label in np.unique(labels):
            rows = scored[labels == label]
            (inside if among[labels == label][0] else outside).setdefault(int(label), []).append(rows)
    for label in sorted(inside.keys() & outside.keys()):
        yield np.concatenate(inside[label]), np.concatenate(outside[label])


def halves(classes: int) -> Iterator[NDArray[np.int64]]:
    """Halves of the classes, each followed by the other half, so that every class is in and out as often."""
    rng = np.random.default_rng(0)
    for _ in range(_DRAWS):
        order = rng.permutation(classes)
        yield np.sort(order[: classes // 2])
        yield np.sort(order[classes // 2 :])


def _labelled(
    recipe: Recipe, heads: Heads, splits: Mapping[Split, Prepared]
) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Validation media, their labels and the classes' vectors; of captioned media one caption each is its class."""
    validation = splits["validation"]
    media = project(heads[validation.pairs.modality], validation.media)
    if validation.pairs.labels is not None:
        return media, validation.pairs.labels, classes_of(recipe, heads["text"], splits)
    captioned, first = np.unique(validation.pairs.links[:, 0], return_index=True)
    captioned, first = captioned[:_CAPTIONED], first[:_CAPTIONED]
    texts = project(heads["text"], validation.texts)[validation.pairs.links[first, 1]]
    return media[captioned], np.arange(len(captioned)), texts
