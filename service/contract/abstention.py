"""A detector tells from an input's similarities to the labels whether it is of any of them, or "none of these".

`SCORES` are what the literature thresholds; a Detector weighs several of them (logistic regression), fitted on inputs
that are known to be of the labels and on others that are not. Training fits one per modality for the manifest, with
classes withheld; the service fits one for a label set that came with examples and off-topic inputs.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Floats = NDArray[np.float64]

SCORES = ("max_similarity", "max_softmax", "energy", "margin", "spread")
_PENALTY = 1e-2
_STEPS = 50
_FOLDS = 5


class Detector(BaseModel):
    """on-topic probability = sigmoid(bias + Σ weight · (score - centre) / scale), of SCORES in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    auroc: float = Field(ge=0, le=1)
    """On inputs that it was not fitted on."""

    @model_validator(mode="after")
    def _whole(self) -> "Detector":
        if not len(self.centre) == len(self.scale) == len(self.weights) == len(SCORES):
            raise ValueError(f"a detector weighs {len(SCORES)} scores")
        if min(self.scale) <= 0:
            raise ValueError("a scale must be above 0")
        return self

    def probability(self, scores: Floats) -> Floats:
        """Return the probability (N,) that inputs with these scores (N, S) are of one of the labels."""
        standard = (scores - np.array(self.centre)) / np.array(self.scale)
        return _sigmoid(standard @ np.array(self.weights) + self.bias)


def scores(similarities: NDArray[np.floating], temperature: float) -> Floats:
    """Return SCORES (N, S) of inputs with these similarities to the labels (N, L); higher is more on-topic in each.

    max_softmax: Hendrycks and Gimpel, arXiv 1610.02136. energy: T log Σ exp(s / T), Liu et al., arXiv 2010.03759.
    max_similarity: the best label's similarity. margin: what it leads the second by; spread: what it leads the mean by,
    in standard deviations. A single label has neither: they are 0.
    """
    values = np.asarray(similarities, np.float64)
    best = values.max(axis=1)
    exponentials = np.exp((values - best[:, None]) / temperature).sum(axis=1)
    if values.shape[1] == 1:
        margin = spread = np.zeros(len(values))
    else:
        margin = best - np.partition(values, -2, axis=1)[:, -2]
        spread = (best - values.mean(axis=1)) / np.maximum(values.std(axis=1), 1e-12)
    return np.stack([best, 1 / exponentials, best + temperature * np.log(exponentials), margin, spread], axis=1)


def fit(on_topic: Sequence[Floats], off_topic: Sequence[Floats]) -> Detector:
    """Fit a detector to scores (n_i, S); each member of a list is a group that is left out as a whole to measure the
    AUROC.

    Both kinds weigh the same, however many there are of each. Raises ValueError where a kind has fewer than two groups.
    """
    if min(len(on_topic), len(off_topic)) < 2:
        raise ValueError("a detector is fitted on at least two inputs of each kind")
    features = np.concatenate([*on_topic, *off_topic])
    counts = [sum(map(len, groups)) for groups in (on_topic, off_topic)]
    kind = np.repeat([1.0, 0.0], counts)
    folds = min(_FOLDS, len(on_topic), len(off_topic))
    fold = np.concatenate(
        [np.full(len(group), place % folds) for groups in (on_topic, off_topic) for place, group in enumerate(groups)]
    )
    guesses = np.zeros(len(features))
    for left_out in range(folds):
        train = fold != left_out
        guesses[~train] = _regression(features[train], kind[train]).probability(features[~train])
    return _regression(features, kind).model_copy(update={"auroc": auroc(guesses[kind == 1], guesses[kind == 0])})


def auroc(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """Return how often one of `positive` is above one of `negative`; a tie is half."""
    scores = np.concatenate([positive, negative])
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    above = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / (len(positive) * len(negative)))


def _regression(features: Floats, kind: Floats) -> Detector:
    """Fit a logistic regression whose weights are not negative: by definition each score is higher on topic, and a
    negative weight would be the accident of a few inputs."""
    centre, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
    design = np.column_stack([(features - centre) / scale, np.ones(len(features))])
    weights = np.zeros(design.shape[1])
    columns = list(range(design.shape[1]))
    while True:
        fitted = _newton(design[:, columns], kind)
        lowest = int(np.argmin(fitted[:-1])) if len(columns) > 1 else 0
        if len(columns) == 1 or fitted[lowest] >= 0:
            weights[columns] = fitted
            break
        del columns[lowest]
    return Detector(
        centre=tuple(centre.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(weights[:-1].tolist()),
        bias=float(weights[-1]),
        auroc=0.5,
    )


def _newton(design: Floats, kind: Floats) -> Floats:
    """Return the weights of a logistic regression by Newton's method, with a small ridge penalty but on the last."""
    share = np.where(kind == 1, 0.5 / max(kind.sum(), 1), 0.5 / max((1 - kind).sum(), 1))
    penalty = np.diag([*np.full(design.shape[1] - 1, _PENALTY), 1e-6])
    weights = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        guess = _sigmoid(design @ weights)
        gradient = design.T @ (share * (guess - kind)) + penalty @ weights
        curvature = (design.T * (share * guess * (1 - guess))) @ design + penalty
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(values / 2)))
