"""Batches of prepared pairs: which links a step draws, and their features as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from training.distributed import ALONE, Ranks
from training.measure.prepared import Prepared, Rows, tensors
from training.pairs import Pairs
from training.recipe import Recipe


@dataclass(frozen=True)
class Part:
    """Holds what a batch holds of one source: features by the names of Head.forward, and keys for `same_pairs`.

    Without texts and keys where the media's own scores are their captions.
    """

    source: int
    media: dict[str, Tensor]
    texts: dict[str, Tensor]
    keys: tuple[Tensor, ...]
    others: dict[str, Tensor] = field(default_factory=dict)
    """Other texts of the source that the media are told from, and their keys."""
    other_keys: tuple[Tensor, ...] = ()

    def pinned(self) -> "Part":
        """Returns a copy in page-locked memory, from which a GPU copies while it computes."""
        media, texts, others = (
            {key: value.pin_memory() for key, value in side.items()} for side in (self.media, self.texts, self.others)
        )
        return Part(self.source, media, texts, self.keys, others, self.other_keys)


class Sampler:
    """Draws batches of links: the media in random order, each at most once until every one was drawn; then anew.

    The last batch of such an epoch is filled up with media of its beginning. Of a medium's captions one is drawn at
    random, or so many as `captions` says.
    """

    def __init__(self, pairs: Pairs, batch_size: int, captions: int = 1) -> None:
        order = np.argsort(pairs.links[:, 0], kind="stable")
        self._links = pairs.links[order]
        counts = np.bincount(self._links[:, 0], minlength=len(pairs.media))
        self._starts, self._counts = np.cumsum(counts) - counts, counts
        self._media = np.flatnonzero(counts)
        self._batch = min(max(1, batch_size // captions), len(self._media))
        self._captions = captions
        self._seed, self._position = 0, len(self._media)
        self._order = self._media

    @property
    def state(self) -> list[int]:
        """The epoch's seed, and how many of its media were drawn: with `restore`, the same batches follow."""
        return [self._seed, self._position]

    def restore(self, state: Sequence[int]) -> None:
        self._begin(*state)

    def draw(self, rng: np.random.Generator) -> Rows:
        """(batch, 2) links; with several captions, each medium's as often as it has different ones, up to so many."""
        if self._position >= len(self._media):
            self._begin(int(rng.integers(2**62)), 0)
        media = self._order[self._position : self._position + self._batch]
        self._position += self._batch
        if len(media) < self._batch:
            media = np.concatenate([media, self._order[: self._batch - len(media)]])
        if self._captions == 1:
            return self._links[self._starts[media] + rng.integers(0, self._counts[media])]
        # The captions of a medium in random order: the ranks of random numbers, an absent caption's being last.
        most = int(self._counts.max())
        keys = np.where(np.arange(most) < self._counts[media][:, None], rng.random((len(media), most)), np.inf)
        order = np.argsort(keys, axis=1)[:, : self._captions]
        there = np.arange(order.shape[1]) < self._counts[media][:, None]
        return self._links[(self._starts[media][:, None] + order)[there]]

    def _begin(self, seed: int, position: int) -> None:
        self._seed, self._position = seed, position
        self._order = np.random.default_rng(seed).permutation(self._media)


class Batches:
    """The batches of a run: one source per step by weight, or with `objective.mixed` every source in each.

    `train.batch_size` pairs come to each process; all of them draw the same batch, and take their shares of it.
    """

    def __init__(self, recipe: Recipe, sources: Sequence[Prepared], ranks: Ranks = ALONE) -> None:
        spec = recipe.train
        self._sources, self._ranks = sources, ranks
        self._shares = np.array([source.pairs.weight if len(source.pairs.links) else 0.0 for source in sources])
        steps = steps_of(recipe, sources, ranks)
        self._ends = [int(spec.until.get(source.pairs.name, 1.0) * steps) for source in sources]
        self._mixed = spec.objective.mixed
        parts = self._shares / self._shares.sum() if self._mixed else np.ones(len(sources))
        self._samplers = [
            Sampler(source.pairs, max(2, round(spec.batch_size * part)) * ranks.count, spec.objective.captions)
            for source, part in zip(sources, parts, strict=True)
        ]
        self._tokens, self._other_texts = recipe.projector.needs_tokens, spec.objective.other_texts

    @property
    def state(self) -> list[list[int]]:
        """The place of each source's sampler in its epoch."""
        return [sampler.state for sampler in self._samplers]

    def restore(self, state: Sequence[Sequence[int]]) -> None:
        for sampler, place in zip(self._samplers, state, strict=True):
            sampler.restore(place)

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
        several = source.media.views is not None or source.media.online is not None
        media = tensors(source.media, links[:, 0], self._tokens, int(rng.integers(2**62)) if several else None)
        if source.pairs.supervision == "concepts":
            return Part(pick, media, {}, ())
        part = Part(pick, media, tensors(source.texts, links[:, 1], self._tokens), _keys(source.pairs, links, pick))
        if not self._other_texts:
            return part
        more = source.pairs.links[rng.integers(len(source.pairs.links), size=self._other_texts)]
        others = tensors(source.texts, more[:, 1], self._tokens)
        return replace(part, others=others, other_keys=_keys(source.pairs, more, pick))


def _keys(pairs: Pairs, links: Rows, pick: int) -> tuple[Tensor, ...]:
    # Numbers of another source's media, texts and classes are other things: `offset` keeps them apart.
    offset = pick << 40
    held = np.full(len(links), -1) if pairs.labels is None else pairs.labels[links[:, 0]] + offset
    return torch.from_numpy(links[:, 0]) + offset, torch.from_numpy(links[:, 1]) + offset, torch.from_numpy(held)


def steps_of(recipe: Recipe, sources: Sequence[Prepared], ranks: Ranks = ALONE) -> int:
    """The steps of a run: `train.steps`, or those of `train.epochs` times the media that are trained on."""
    spec = recipe.train
    if spec.epochs is None:
        return spec.steps
    return max(1, spec.epochs * epoch_steps(recipe, sources, ranks))


def epoch_steps(recipe: Recipe, sources: Sequence[Prepared], ranks: Ranks = ALONE) -> int:
    """Steps in which every medium of the sources is drawn once, if all were drawn alike."""
    media = sum(len(source.pairs.media) for source in sources if source.pairs.weight and len(source.pairs.links))
    return -(-media // max(1, recipe.train.batch_size * ranks.count // recipe.train.objective.captions))
