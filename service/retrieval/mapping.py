"""A map turns vectors of one space into those of another; it is learned from items whose vectors are known in both.

Kernel ridge regression with a linear and a local kernel, which is the mean of a Gaussian process. What each vector is
predicted as by all the others has a closed form (Rasmussen and Williams, 2006, 5.4.2): every pair is held out once, so
that the error is that of vectors which were not learned from.

A few pairs of media say little of what queries ask for. Pairs of texts cost nothing: where both bundles embed texts, a
map that learned from them is mixed in, as far as the pairs of media that were held out come out no worse.
"""

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors, l2_normalise

MOST_PAIRS = 3_000
"""Largest number of pairs that are learned from: the time grows with its cube."""
_REGULARISED = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_LOCAL = 0.5
"""Factor of the squared distance in the local kernel. Between 0.25 and 2 figures were nearly the same (docs/LOG.md)."""
_SHARES = (0.5, 0.35, 0.2)
"""Shares of the map of texts that are tried. The largest that does not make the error larger is taken: queries then
find more (chosen on the dev captions of Flickr8k)."""
_ROWS = 1_024
"""Vectors that are mapped at once."""

Floats = NDArray[np.float64]


class Adapter:
    """Maps vectors of a space to another; tells how wrong each of them may be, and is tested on pairs left out."""

    def __init__(self, old: Vectors, new: Vectors, texts: "Adapter | None" = None) -> None:
        """Learn from the unit vectors (N, D) of the old space and (N, E) of the new one, N of at least 2. `texts` is a
        map between these spaces that learned from texts."""
        self._old, self._centre, self._mean = old.astype(np.float64), old.mean(axis=0), new.mean(axis=0)
        values, basis = np.linalg.eigh(self._kernel(self._old))
        values, aims = np.maximum(values, 0), basis.T @ (new - self._mean)
        trials = [self._trial(values, basis, aims, new, strength) for strength in _REGULARISED]
        strength, left_out, variances = max(trials, key=lambda trial: float(np.mean(_cosines(trial[1], new))))
        stretch = self._stretch(left_out, new)
        left_out = (left_out - self._mean) @ stretch + self._mean
        signs = _signs(left_out, variances)
        self.texts_share, self._texts = 0.0, texts
        if texts is not None:
            of_texts = texts(old)[0]
            self._texts_mean = of_texts.mean(axis=0)
            self._texts_scale = _length(left_out - self._mean) / max(_length(of_texts - self._texts_mean), 1e-12)
            self.texts_share, left_out = self._mixture(left_out, of_texts, new)
        self._weights: Floats = basis @ (aims / (values + strength)[:, None]) @ stretch
        self._spread: Floats = basis / np.sqrt(values + strength)
        self.new, self.left_out = new, l2_normalise(left_out)
        """The pairs' vectors in the new space, and what they are mapped to when they are not learned from (N, E)."""
        self.errors: Floats = 1 - _cosines(left_out, new)
        """How far each vector of `left_out` is off: 1 less the cosine similarity."""
        self.estimated: Floats = np.empty(len(new))
        """What the estimate says of each of them, learned from the other half."""
        for half in (0, 1):
            self.estimated[half::2] = signs[half::2] @ _fitted(signs[1 - half :: 2], self.errors[1 - half :: 2])
        self._fit = _fitted(signs, self.errors)

    def _mixture(self, left_out: Floats, of_texts: Vectors, new: Vectors) -> tuple[float, Floats]:
        least = float(np.mean(_cosines(left_out, new)))
        for share in _SHARES:
            mixed = self._mixed(left_out, of_texts, share)
            if float(np.mean(_cosines(mixed, new))) >= least:
                return share, mixed
        return 0.0, left_out

    def _mixed(self, raw: Floats, of_texts: Vectors, share: float) -> Floats:
        """Return vectors (N, E) with a share of those of the map of texts, which is brought to their mean and length:
        media do not lie where texts lie."""
        moved = self._texts_scale * (of_texts - self._texts_mean) + self._mean
        return np.asarray((1 - share) * raw + share * moved)

    def _trial(
        self, values: Floats, basis: Floats, aims: Floats, new: Vectors, strength: float
    ) -> tuple[float, Floats, Floats]:
        inverse = 1 / (values + strength)
        diagonal = (basis * basis) @ inverse
        return strength, new - (basis @ (inverse[:, None] * aims)) / diagonal[:, None], 1 / diagonal - strength

    def _stretch(self, left_out: Floats, new: Vectors) -> Floats:
        """Return the matrix (E, E) that gives each direction back half of the spread which regression takes from it:
        searches tell items apart by directions of little spread too. Chosen on the dev captions of Flickr8k."""
        centred = new - self._mean
        directions = np.linalg.eigh(centred.T @ centred)[1]
        spread, test = ((vectors @ directions).std(axis=0) for vectors in (centred, left_out - self._mean))
        return np.asarray((directions * np.sqrt(np.clip(spread / np.maximum(test, 1e-9), 1, 2))) @ directions.T)

    def _kernel(self, vectors: Floats) -> Floats:
        linear = (vectors - self._centre) @ (self._old - self._centre).T
        return np.asarray(linear + np.exp(_LOCAL * (2 * vectors @ self._old.T - 2)))

    def __call__(self, vectors: Vectors) -> tuple[Vectors, Floats]:
        """Return the unit vectors (M, D) in the new space (M, E), and how far each may be off (M,): 1 less the cosine
        similarity, as it is expected to be."""
        mapped, errors = [], []
        for start in range(0, len(vectors), _ROWS):
            part = vectors[start : start + _ROWS].astype(np.float64)
            alike = self._kernel(part)
            raw = alike @ self._weights + self._mean
            distance = ((part - self._centre) ** 2).sum(axis=1) + 1
            variances = distance - ((alike @ self._spread) ** 2).sum(axis=1)
            errors.append(np.clip(_signs(raw, variances) @ self._fit, 0, 2))
            if self._texts is not None and self.texts_share:
                raw = self._mixed(raw, self._texts(vectors[start : start + _ROWS])[0], self.texts_share)
            mapped.append(l2_normalise(raw))
        return np.concatenate(mapped), np.concatenate(errors)

    @property
    def correlation(self) -> float:
        """Return Spearman's rank correlation of the estimated errors and the real ones, on pairs left out."""
        ranks = [np.argsort(np.argsort(errors)) for errors in (self.estimated, self.errors)]
        return float(np.asarray(np.corrcoef(ranks))[0, 1])


def kept(
    queries: Vectors, real: Vectors, mapped: Vectors, other_queries: Vectors | None = None, top: int = 10
) -> float:
    """Return the share of the `top` best answers to each query that the mapped vectors give too; where the mapped ones
    are of another space than the real ones, `other_queries` are the same queries there."""
    queries_of = ((real, queries), (mapped, queries if other_queries is None else other_queries))
    top = max(1, min(top, len(real) // 2))
    best = [np.argpartition(-(queries @ vectors.T), top - 1, axis=1)[:, :top] for vectors, queries in queries_of]
    return float(np.mean([len(np.intersect1d(*answers)) / top for answers in zip(*best, strict=True)]))


def _signs(raw: Floats, variances: Floats) -> Floats:
    """Return what goes with an error: a vector that came out short is a mean of different ones; one that lies apart
    from all that was learned from has a large variance."""
    return np.stack([np.ones(len(raw)), 1 - np.linalg.norm(raw, axis=1), variances], axis=1)


def _length(vectors: Floats) -> float:
    return float(np.linalg.norm(vectors, axis=1).mean())


def _fitted(signs: Floats, errors: Floats) -> Floats:
    return np.asarray(np.linalg.lstsq(signs, errors, rcond=None)[0])


def _cosines(raw: Floats, new: Vectors) -> Floats:
    return np.asarray((raw * new).sum(axis=1) / np.maximum(np.linalg.norm(raw, axis=1), 1e-12))
