"""Zero-shot labelling, retrieval in both directions and the modality gap, from projected vectors."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Modality
from service.contract.vectors import l2_normalise

Floats = NDArray[np.float32]


def retrieval(media: Floats, texts: Floats, links: NDArray[np.int64]) -> dict[str, float]:
    """Recall in percent, both ways, between unit vectors (M, D) and (T, D) linked by (pairs, 2) true pairs.

    A media query counts when any of its texts is within the top k; ties count against the model.
    """
    figures: dict[str, float] = {}
    for direction, (rank, _) in ranks(media, texts, links).items():
        figures |= {f"{direction}.r{k}": round(float((rank < k).mean() * 100), 2) for k in (1, 5, 10)}
    return figures


def ranks(
    media: Floats, texts: Floats, links: NDArray[np.int64]
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Per direction, the rank from 0 of each query's best true partner, and the medium that the query belongs to."""
    similarity = media @ texts.T
    linked = np.zeros(similarity.shape, bool)
    linked[links[:, 0], links[:, 1]] = True
    result = {}
    for direction, scores, right in (("m2t", similarity, linked), ("t2m", similarity.T, linked.T)):
        queries = right.any(axis=1)
        owner = np.flatnonzero(queries) if direction == "m2t" else right[queries].argmax(axis=1)
        scores, right = scores[queries], right[queries]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        result[direction] = (((scores >= best) & ~right).sum(axis=1), owner)
    return result


def class_vectors(prompts: Floats, templates: int) -> Floats:
    """Unit vectors of prompts (classes × templates, D), class by class → one unit vector per class (classes, D)."""
    return l2_normalise(prompts.reshape(-1, templates, prompts.shape[-1]).mean(axis=1))


def top1(media: Floats, classes: Floats, labels: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
    """Zero-shot accuracy in percent of unit vectors (M, D) over class vectors (C, D), and per class (NaN if absent)."""
    right = (media @ classes.T).argmax(axis=1) == labels
    each = np.array([right[labels == c].mean() * 100 if (labels == c).any() else np.nan for c in range(len(classes))])
    return round(float(right.mean() * 100), 2), each


def gap(vectors: Mapping[Modality, Floats]) -> dict[str, float]:
    """Distance between modality centroids, and uniformity per modality (Wang & Isola, arXiv 2005.10242).

    Uniformity is log mean exp(-2 |x - y|²) over pairs of at most 2,000 vectors; lower is more spread out.
    """
    names: Sequence[Modality] = sorted(vectors)
    figures = {}
    for i, first in enumerate(names):
        sample = vectors[first][:2000]
        squared = 2 - 2 * (sample @ sample.T)[np.triu_indices(len(sample), 1)]
        figures[f"uniformity.{first}"] = round(float(np.log(np.exp(-2 * squared).mean())), 4)
        for second in names[i + 1 :]:
            distance = np.linalg.norm(vectors[first].mean(0) - vectors[second].mean(0))
            figures[f"gap.{first}_{second}"] = round(float(distance), 4)
    return figures
