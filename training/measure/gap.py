"""The modality gap (Liang et al., arXiv 2203.02053): how far modalities lie apart, before and after a correction.

The correction takes `strength` times the mean of its modality off each vector and normalises again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Modality
from service.contract.vectors import l2_normalise
from training.measure.ranks import Floats, retrieval

_SAMPLE = 1000  # vectors of each modality
_NEIGHBOURS = 10
_STRENGTHS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Paired:
    """Unit vectors of the media (M, D) and texts (T, D) of one source, and its true pairs (P, 2)."""

    name: str
    modality: Modality
    media: Floats
    texts: Floats
    links: NDArray[np.int64]
    captions: bool = True
    """Whether the texts are captions, for which R@1 is said, rather than labels."""


def corrected(vectors: Floats, mean: Sequence[float], strength: float) -> Floats:
    """Unit vectors (N, D) without `strength` times their modality's mean (D,)."""
    return l2_normalise(vectors - np.float32(strength) * np.asarray(mean, np.float32))


def gap_figures(
    test: Sequence[Paired], validation: Sequence[Paired], means: Mapping[Modality, Sequence[float]]
) -> dict[str, Any]:
    """The gap of `test` as it is and, under `corrected.`, after the correction; R@1 of each source of captions with it.

    The strength of the correction is the largest at which no source's R@1 on `validation` falls, in either direction;
    0 where every one lowers it, or where nothing is there to choose by. See `gap` for the figures.
    """
    strength = next((s for s in _STRENGTHS if validation and not _falls(validation, means, s)), 0.0)
    figures = gap(test) | {"corrected.strength": strength}
    after = [_corrected(paired, means, strength) for paired in test]
    figures |= {f"corrected.{key}": value for key, value in gap(after).items()}
    for paired in (paired for paired in after if paired.captions):
        short = paired.modality[0]
        for key, value in _recall(paired).items():
            figures[f"corrected.{paired.name}.{key.replace('m', short)}"] = value
    return figures


def gap(sets: Sequence[Paired]) -> dict[str, Any]:
    """Return how modalities lie to each other, from samples of equal size of the paired vectors.

    `gap.A_B`: distance of centroids. `uniformity.A`: log mean exp(-2 |x - y|²), and `alignment.A_text`: mean |x - y|²
    of true pairs (Wang & Isola, arXiv 2005.10242); lower is better in both. `modality_classifier`: percent of held-out
    vectors whose modality a logistic regression tells; chance is 100 over the modalities. `top10.A.B`: percent of B
    among the ten nearest neighbours of A, in a gallery that holds as much of each modality.
    """
    vectors, partners = _samples(sets)
    names = sorted(vectors)
    figures: dict[str, Any] = {}
    for i, first in enumerate(names):
        squared = 2 - 2 * (vectors[first] @ vectors[first].T)[np.triu_indices(len(vectors[first]), 1)]
        if len(squared):
            figures[f"uniformity.{first}"] = round(float(np.log(np.exp(-2 * squared).mean())), 4)
        for second in names[i + 1 :]:
            distance = np.linalg.norm(vectors[first].mean(0) - vectors[second].mean(0))
            figures[f"gap.{first}_{second}"] = round(float(distance), 4)
        if first in partners:
            distances = ((vectors[first] - partners[first]) ** 2).sum(1)
            figures[f"alignment.{first}_text"] = round(float(distances.mean()), 4)
    if len(names) < 2 or len(vectors[names[0]]) < 4:
        return figures
    gallery = np.concatenate([vectors[name] for name in names])
    owner = np.repeat(np.arange(len(names)), [len(vectors[name]) for name in names])
    figures["modality_classifier"] = _classifier(gallery, owner)
    for index, name in enumerate(names):
        similarity = vectors[name] @ gallery.T
        similarity[np.arange(len(similarity)), np.flatnonzero(owner == index)] = -np.inf
        near = owner[np.argpartition(-similarity, min(_NEIGHBOURS, len(gallery) - 1), axis=1)[:, :_NEIGHBOURS]]
        for other, called in enumerate(names):
            figures[f"top10.{name}.{called}"] = round(float((near == other).mean() * 100), 2)
    return figures


def _classifier(vectors: Floats, owner: NDArray[np.int64]) -> float:
    """Percent of one half of the vectors whose modality is told by a logistic regression fitted to the other half."""
    from sklearn.linear_model import LogisticRegression

    fitted = np.random.default_rng(0).permutation(len(vectors)) < len(vectors) // 2
    model = LogisticRegression(max_iter=1000).fit(vectors[fitted], owner[fitted])
    return round(float((model.predict(vectors[~fitted]) == owner[~fitted]).mean() * 100), 2)


def _samples(sets: Sequence[Paired]) -> tuple[dict[Modality, Floats], dict[Modality, Floats]]:
    """Draws as many vectors of every modality, and the text that belongs to each medium."""
    rng = np.random.default_rng(0)
    media: dict[Modality, list[Floats]] = {}
    texts: dict[Modality, list[Floats]] = {}
    for paired in sets:
        # One text of each medium: captions of one picture are near to each other as nothing else is.
        order = rng.permutation(len(paired.links))
        media_rows, first = np.unique(paired.links[order, 0], return_index=True)
        media.setdefault(paired.modality, []).append(paired.media[media_rows])
        texts.setdefault(paired.modality, []).append(paired.texts[paired.links[order[first], 1]])
    joined = {modality: np.concatenate(parts) for modality, parts in media.items()}
    partner = {modality: np.concatenate(parts) for modality, parts in texts.items()}
    size = min(_SAMPLE, *(len(rows) for rows in joined.values())) if joined else 0
    for modality, rows in joined.items():
        chosen = rng.permutation(len(rows))[:size]
        joined[modality], partner[modality] = rows[chosen], partner[modality][chosen]
    if partner:
        every = np.unique(np.concatenate(list(partner.values())), axis=0)  # a label's prompt belongs to many media
        joined["text"] = every[rng.permutation(len(every))[:size]]
    return joined, partner


def _corrected(paired: Paired, means: Mapping[Modality, Sequence[float]], strength: float) -> Paired:
    sides: list[tuple[Modality, Floats]] = [(paired.modality, paired.media), ("text", paired.texts)]
    media, texts = (corrected(v, means[m], strength) if m in means else v for m, v in sides)
    return Paired(paired.name, paired.modality, media, texts, paired.links, paired.captions)


def _recall(paired: Paired) -> dict[str, float]:
    figures = retrieval(paired.media, paired.texts, paired.links)
    return {key: value for key, value in figures.items() if key.endswith(".r1")}


def _falls(sets: Sequence[Paired], means: Mapping[Modality, Sequence[float]], strength: float) -> bool:
    return any(
        after < before
        for paired in sets
        for before, after in zip(
            _recall(paired).values(), _recall(_corrected(paired, means, strength)).values(), strict=True
        )
    )
