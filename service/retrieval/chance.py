"""How likely a match is mere chance: told from what the queries of a bank find in the same collection.

A query fits an item by its similarity less that of the queries of the bank that suit the item best: an item that is
like everything fits nothing. The best fits that the bank's queries reach in a collection are what a query would reach
whose thing is not there. A share of them gives the p-value of a match, for the best of all items (Westfall and Young,
1993; conformal as in Bates et al., 2023). What the collection does hold of the bank makes it cautious, never bold. Each
kind has its own queries and fits, which puts photographs and recordings on one scale.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from service.contract.vectors import Vectors
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Text, raise_first
from service.retrieval.bank import SIGHTS, SOUNDS
from service.retrieval.single_flight import SingleFlight
from service.store import Background
from service.store.background import rivals

PROBABLY = 0.3
"""False-discovery rate at which nothing survives where "probably nothing" is said. Chosen on Flickr8k's dev
photographs, Caltech101's train split and ESC-50's folds 1 and 2 (docs/LOG.md, 2026-11-30)."""
_SIGHTS, _SOUNDS = ([text.replace("\n", " ").strip() for text in words.split(",")] for words in (SIGHTS, SOUNDS))
_HELD = 0.02
"""Share of the bank, the best fitting, that is taken to be in the collection. Chosen on the same media."""
_BANK = list(dict.fromkeys(_SIGHTS + _SOUNDS))
_ROWS = {"image": list(map(_BANK.index, _SIGHTS)), "audio": list(map(_BANK.index, _SOUNDS))}
"""Which queries of the bank are looked for among the items of a modality; all of them among others."""


def background_texts() -> list[str]:
    """Return the queries of the bank, always the same."""
    return _BANK


class BackgroundQueries:
    """The vectors of the background queries, which are embedded when they are first needed."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._vectors: Vectors | None = None
        self._once = SingleFlight[Vectors]()

    async def vectors(self) -> Vectors:
        """Return the vectors (N, D), always the same array. The bundle embeds texts."""
        if self._vectors is None:
            self._vectors = await self._once(self._embed)
        return self._vectors

    async def _embed(self) -> Vectors:
        if self._vectors is not None:
            return self._vectors
        results = await self._embedder.embed(list(map(Text, background_texts())), admit_unknown=True)
        raise_first(results)
        return np.stack([result.vector for result in results if isinstance(result, Embedded)])


def confidences(
    similarities: Sequence[float],
    vectors: Vectors,
    modalities: Sequence[str],
    bank: Vectors,
    backgrounds: Mapping[str, Background],
) -> list[float | None]:
    """For each item (N, D), the chance that no item of any of the kinds would fit as well by chance, 0 to 1; None where
    its kind has no background."""
    if not similarities:
        return []
    fits = np.asarray(similarities, np.float32) - rivals(bank, vectors)
    confidences: list[float | None] = [None] * len(similarities)
    for modality, background in backgrounds.items():
        places = [place for place, kind in enumerate(modalities) if kind == modality]
        best = np.sort(background.fits[_ROWS[modality]] if modality in _ROWS else background.fits)
        best = best[: len(best) - int(_HELD * len(best))]
        below = np.searchsorted(best, fits[places]) / (len(best) + 1)
        for place, share in zip(places, below.tolist(), strict=True):
            confidences[place] = share ** len(backgrounds)
    return confidences


def surviving(confidences: Sequence[float | None], fdr: float) -> list[bool]:
    """Which results are discoveries at a false-discovery rate.

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
