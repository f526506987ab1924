"""Batches of prepared pairs: which links a step draws, and their features as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.distributed import ALONE, Ranks
from training.features import Features
from training.losses import fusemix
from training.pairs import Pairs
from training.recipe import Recipe

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """The pairs of one source and split with the frozen features of both sides."""

    pairs: Pairs
    media: Features
    texts: Features


@dataclass(frozen=True)
class Part:
    """What a batch holds of one source: features by the names of Head.forward, and keys for `same_pairs`.

    Without texts and keys where the media's own scores are their captions.
    """

    source: int
    media: dict[str, Tensor]
    texts: dict[str, Tensor]
    keys: tuple[Tensor, ...]


class Sampler:
    """Draws batches of links with each medium at most once until every medium was drawn; captions at random."""

    def __init__(self, pairs: Pairs, batch_size: int, captions: int = 1) -> None:
        order = np.argsort(pairs.links[:, 0], kind="stable")
        self._links = pairs.links[order]
        counts = np.bincount(self._links[:, 0], minlength=len(pairs.media))
        self._starts, self._counts = np.cumsum(counts) - counts, counts
        self._media = np.flatnonzero(counts)
        self._batch = min(max(1, batch_size // captions), len(self._media))
        self._captions = captions

    def draw(self, rng: np.random.Generator) -> Rows:
        """(batch, 2) links; with several captions, each medium's as often as it has different ones, up to so many."""
        media = rng.choice(self._media, self._batch, replace=False)
        if self._captions == 1:
            return self._links[self._starts[media] + rng.integers(0, self._counts[media])]
        # The captions of a medium in random order: the ranks of random numbers, an absent caption's being last.
        most = int(self._counts.max())
        keys = np.where(np.arange(most) < self._counts[media][:, None], rng.random((len(media), most)), np.inf)
        order = np.argsort(keys, axis=1)[:, : self._captions]
        there = np.arange(order.shape[1]) < self._counts[media][:, None]
        return self._links[(self._starts[media][:, None] + order)[there]]


class Batches:
    """The batches of a run: one source per step by weight, or with `objective.mixed` every source in each."""

    def __init__(self, recipe: Recipe, sources: Sequence[Prepared], ranks: Ranks = ALONE) -> None:
        spec = recipe.train
        self._sources, self._ranks, self._spec = sources, ranks, spec
        self._shares = np.array([source.pairs.weight if len(source.pairs.links) else 0.0 for source in sources])
        self._ends = [int(spec.until.get(source.pairs.name, 1.0) * spec.steps) for source in sources]
        self._mixed = spec.objective.mixed
        parts = self._shares / self._shares.sum() if self._mixed else np.ones(len(sources))
        self._samplers = [
            Sampler(source.pairs, max(2, round(spec.batch_size * part)), spec.objective.captions)
            for source, part in zip(sources, parts, strict=True)
        ]
        self._tokens = recipe.projector.needs_tokens

    def draw(self, step: int, rng: np.random.Generator) -> list[Part]:
        """The parts of one step's batch: one, or one per source that is still drawn where batches are mixed."""
        lasting = np.array([step < end for end in self._ends])
        if self._mixed:
            return [self._part(int(pick), rng) for pick in np.flatnonzero(self._shares * lasting)]
        shares = self._shares * lasting
        return [self._part(int(rng.choice(len(self._sources), p=shares / shares.sum())), rng)]

    def _part(self, pick: int, rng: np.random.Generator) -> Part:
        source = self._sources[pick]
        links = self._ranks.share(self._samplers[pick].draw(rng))
        media = tensors(source.media, links[:, 0], self._tokens)
        if source.pairs.supervision == "concepts":
            return Part(pick, media, {}, ())
        texts = tensors(source.texts, links[:, 1], self._tokens)
        if alpha := self._spec.regularise.fusemix:
            share = float(rng.beta(alpha, alpha))
            share = max(share, 1 - share)  # a pair's own features lead, so that its keys are those of the mixture
            order = torch.from_numpy(rng.permutation(len(links)))
            for side in (media, texts):
                side["pooled"] = fusemix(side["pooled"], order, share)
        # Numbers of another source's media, texts and classes are other things: `offset` keeps them apart.
        offset = pick << 40
        keys = [torch.from_numpy(links[:, 0]) + offset, torch.from_numpy(links[:, 1]) + offset]
        labels = source.pairs.labels
        held = np.full(len(links), -1) if labels is None else labels[links[:, 0]] + offset
        return Part(pick, media, texts, (*keys, torch.from_numpy(held)))


def tensors(features: Features, rows: Rows, tokens: bool) -> dict[str, Tensor]:
    """The arguments of Head.forward for some rows; local vectors only where they are asked for."""
    result = {"pooled": torch.from_numpy(np.asarray(features.pooled[rows]))}
    if tokens and features.tokens is not None and features.weights is not None:
        result["tokens"] = torch.from_numpy(features.tokens[rows].astype(np.float32))
        result["weights"] = torch.from_numpy(features.weights[rows])
    return result
