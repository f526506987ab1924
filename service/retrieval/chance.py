"""The probability that a match is mere chance is told from what the queries of a bank find in the same collection.

A query fits an item by its similarity less that of the queries of the bank that suit the item best: an item that is
like everything fits nothing. The best fits that the bank's queries reach in a collection are what a query would reach
whose thing is not there. A share of them gives the p-value of a match, for the best of all items (Westfall and Young,
1993; conformal as in Bates et al., 2023). What the collection does hold of the bank makes it cautious, never bold. Each
kind has its own queries and fits, which puts photographs and recordings on one scale.

What the words of a query say beforehand weighs the p-values (Genovese, Roeder and Wasserman, 2006): a query that is
like the bank's sounds expects a recording; one that is more like random letters than words are expects nothing, and
only what fits very well counts.
"""

import math
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Text, raise_first
from service.retrieval.bank import SIGHTS, SOUNDS, listed
from service.retrieval.single_flight import SingleFlight
from service.store import Background
from service.store.background import rivals

PROBABLY = 0.3
"""False-discovery rate at which nothing survives where "probably nothing" is said. Chosen on Flickr8k's dev
photographs, Caltech101's train split and ESC-50's folds 1 and 2 (docs/LOG.md, 2026-11-30)."""
_SIGHTS, _SOUNDS = listed(SIGHTS), listed(SOUNDS)
_HELD = 0.02
"""Share of the bank, the best fitting, that is taken to be in the collection. Chosen on the same media."""
_NEAREST = 8
"""Number of the bank's queries by which it is told what a query is like."""
_LEANING, _EVEN = 0.05, 0.1
"""Similarity that makes a kind e times as likely as another, and the share of all weights that is the same for each."""
_UNUSUAL = 0.05
"""Share of the bank's words that are least like words: a query that is even less so weighs less."""
_DRAW = random.Random(0)
_NONSENSE = ["".join(_DRAW.choices(string.ascii_lowercase, k=_DRAW.randint(4, 12))) for _ in range(64)]
_TEXTS_AT_ONCE = 600
_BANK = list(dict.fromkeys(_SIGHTS + _SOUNDS))
_ROWS = {"image": list(map(_BANK.index, _SIGHTS)), "audio": list(map(_BANK.index, _SOUNDS))}
"""Which queries of the bank are looked for among the items of a modality; all of them among others."""


def background_texts() -> list[str]:
    """Return the queries of the bank, always the same."""
    return _BANK


@dataclass(frozen=True, eq=False)
class Bank:
    words: Vectors
    """Of the background texts (Q, D)."""
    nonsense: Vectors
    """Of random letters (M, D)."""
    usual: NDArray[np.float32]
    """How much more each of the words is like the others than like nonsense, in ascending order (Q,)."""

    @classmethod
    def of(cls, words: Vectors, nonsense: Vectors) -> Self:
        alike = words @ words.T
        np.fill_diagonal(alike, -2)
        return cls(words, nonsense, np.sort(_nearness(alike) - _nearness(words @ nonsense.T)))

    def weights(self, query: Vectors, modalities: Sequence[str]) -> tuple[dict[str, float], float]:
        """Return the weight of each modality, 1 in all, and that of the query: 1 where it is like words."""
        alike = self.words @ query
        of_kinds = {modality: float(_nearness(alike[rows])) for modality, rows in _ROWS.items()}
        leaning = np.array([of_kinds.get(modality, max(of_kinds.values())) for modality in modalities]) / _LEANING
        shares = np.exp(leaning - leaning.max())
        shares = (1 - _EVEN) * shares / shares.sum() + _EVEN / len(shares)
        margin = _nearness(alike) - _nearness(self.nonsense @ query)
        unusual = (np.searchsorted(self.usual, margin) + 1) / (len(self.usual) + 1)
        return dict(zip(modalities, shares.tolist(), strict=True)), min(1.0, float(unusual) / _UNUSUAL)


def _nearness(similarities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of the largest of each row."""
    mean: NDArray[np.float32] = np.partition(similarities, -_NEAREST, axis=-1)[..., -_NEAREST:].mean(axis=-1)
    return mean


async def text_vectors(embedder: Embedder, texts: Sequence[str]) -> Vectors:
    """Return texts as unit vectors (N, D), embedded some hundreds at a time."""
    vectors: list[Vectors] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        results = await embedder.embed(list(map(Text, texts[start : start + _TEXTS_AT_ONCE])), admit_unknown=True)
        raise_first(results)
        vectors += [result.vector for result in results if isinstance(result, Embedded)]
    return np.stack(vectors)


class BackgroundQueries:
    """The vectors of the background queries, which are embedded when they are first needed."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._bank: Bank | None = None
        self._once = SingleFlight[Bank]()

    async def bank(self) -> Bank:
        """Return the bank, always the same. The bundle embeds texts."""
        if self._bank is None:
            self._bank = await self._once(self._embed)
        return self._bank

    async def _embed(self) -> Bank:
        if self._bank is not None:
            return self._bank
        vectors = await text_vectors(self._embedder, _BANK + _NONSENSE)
        return Bank.of(vectors[: len(_BANK)], vectors[len(_BANK) :])


def confidences(
    query: Vectors,
    similarities: Sequence[float],
    vectors: Vectors,
    modalities: Sequence[str],
    bank: Bank,
    backgrounds: Mapping[str, Background],
) -> list[float | None]:
    """Return for each item (N, D) the chance that no item of any kind would fit the query (D,) as well by chance, 0
    to 1; None where its kind has no background. Texts may hold what is no word: nonsense counts among them."""
    if not similarities:
        return []
    fits = np.asarray(similarities, np.float32) - rivals(bank.words, vectors)
    confidences: list[float | None] = [None] * len(similarities)
    shares, wordlikeness = bank.weights(query, list(backgrounds)) if backgrounds else ({}, 1.0)
    for modality, background in backgrounds.items():
        places = [place for place, kind in enumerate(modalities) if kind == modality]
        best = np.sort(background.fits[_ROWS[modality]] if modality in _ROWS else background.fits)
        best = best[: len(best) - int(_HELD * len(best))]
        below = np.searchsorted(best, fits[places]) / (len(best) + 1)
        chance = 1 - below ** (1 / shares[modality])
        if modality != "text":
            chance = np.minimum(1.0, chance / wordlikeness)
        for place, share in zip(places, (1 - chance).tolist(), strict=True):
            confidences[place] = share
    return confidences


def surviving(confidences: Sequence[float | None], fdr: float) -> list[bool]:
    """Return which results are discoveries at a false-discovery rate.

    The query is tested first, by its best result, and then each result by Benjamini and Hochberg's step-up procedure
    (Yekutieli, 2008): the k best survive where -log(confidence), the number of items that would fit as well as the k-th
    by chance, is at most fdr · k.
    """
    best = sorted((value for value in confidences if value is not None), reverse=True)
    if not best or best[0] < 1 - fdr:
        return [False] * len(confidences)
    enough = [value for place, value in enumerate(best, 1) if value >= math.exp(-fdr * place)]
    least = min(best[:1] + enough[-1:])
    return [value is not None and value >= least for value in confidences]


def nothing(confidences: Sequence[float | None]) -> bool | None:
    """Return whether results with these confidences are probably none; None where none can be judged."""
    if confidences and all(confidence is None for confidence in confidences):
        return None
    return not any(surviving(confidences, PROBABLY))
