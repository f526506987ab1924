"""Zero-shot labelling and retrieval in both directions, from projected vectors."""

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import l2_normalise
from training.measure.emergent import average_precision

Floats = NDArray[np.float32]
_BLOCK = 2**25  # similarities at a time


def retrieval(media: Floats, texts: Floats, links: NDArray[np.int64]) -> dict[str, float]:
    """Recall in percent, both ways, between unit vectors (M, D) and (T, D) linked by (pairs, 2) true pairs.

    A media query counts when any of its texts is within the top k; ties count against the model, and so does NaN.
    """
    figures: dict[str, float] = {}
    for direction, (rank, _) in ranks(media, texts, links).items():
        figures |= {f"{direction}.r{k}": round(float((rank < k).mean() * 100), 2) for k in (1, 5, 10)}
    return figures


def mean_recall(media: Floats, texts: Floats, links: NDArray[np.int64]) -> float:
    """R@1 in percent, the mean of both directions; see `retrieval`."""
    recall = retrieval(media, texts, links)
    return (recall["m2t.r1"] + recall["t2m.r1"]) / 2


def ranks(
    media: Floats, texts: Floats, links: NDArray[np.int64]
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Returns per direction the rank from 0 of each query's best true partner, and the medium that the query belongs
    to.

    Queries that no pair names are left out. Works through blocks of queries: memory does not grow with their number.
    """
    result = {}
    for direction, queries_side, other, pairs in (("m2t", media, texts, links), ("t2m", texts, media, links[:, ::-1])):
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        queries, first = np.unique(pairs[:, 0], return_index=True)
        rank = np.zeros(len(queries), np.int64)
        size = max(1, _BLOCK // max(1, len(other)))
        for start in range(0, len(queries), size):
            rows = queries[start : start + size]
            scores = queries_side[rows] @ other.T
            mine = pairs[first[start] : first[start + size] if start + size < len(queries) else len(pairs)]
            right = np.zeros(scores.shape, bool)
            right[np.searchsorted(rows, mine[:, 0]), mine[:, 1]] = True
            best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
            rank[start : start + size] = (~(scores < best) & ~right).sum(axis=1)
        result[direction] = (rank, queries if direction == "m2t" else pairs[first, 1])
    return result


def class_vectors(prompts: Floats, templates: int) -> Floats:
    """Unit vectors of prompts (classes × templates, D), class by class → one unit vector per class (classes, D)."""
    return l2_normalise(prompts.reshape(-1, templates, prompts.shape[-1]).mean(axis=1))


def with_prompts(classes: Floats, prompts: Floats, owner: NDArray[np.int64]) -> Floats:
    """Class vectors (C, D); those with prompts of their own, (P, D), are these prompts' mean, as `/classify` has it.

    `owner` (P,) says whose each prompt is.
    """
    result = np.array(classes)
    for index in np.unique(owner):
        result[index] = l2_normalise(prompts[owner == index].mean(0)[None])[0]
    return result


def label_ranks(scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank from 0 of the right class in each row of scores (M, C); ties and NaN count against the model."""
    right = np.take_along_axis(scores, labels[:, None], 1)
    return np.asarray((~(scores < right)).sum(1) - 1, np.int64)


def top1(media: Floats, classes: Floats, labels: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
    """Zero-shot accuracy in percent of unit vectors (M, D) over class vectors (C, D), and per class (NaN if absent).

    Ties count against the model, as everywhere.
    """
    right = label_ranks(media @ classes.T, labels) < 1
    per_class = np.array(
        [right[labels == c].mean() * 100 if (labels == c).any() else np.nan for c in range(len(classes))]
    )
    return round(float(right.mean() * 100), 2), per_class


def word_precision(media: Floats, texts: Floats, links: NDArray[np.int64]) -> float:
    """Mean average precision, in percent, of words (T, D) that search media (M, D); `links` (pairs, 2) are right.

    Words that belong to none of the media are left out.
    """
    right = np.zeros((len(texts), len(media)), bool)
    right[links[:, 1], links[:, 0]] = True
    asked = right.any(axis=1)
    return round(float(average_precision(texts[asked] @ media.T, right[asked]).mean() * 100), 2)
