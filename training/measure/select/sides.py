"""The sides of a comparison: features of media and of texts row by row, read from memory maps when asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import l2_normalise
from training.data.leaks import subset
from training.pairs import Pairs

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Says which items make up each row: those of row r are items[starts[r]:starts[r + 1]], one at least."""

    items: Rows
    starts: Rows

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Side:
    """One candidate's features by row: the mean over a row's items of what is side by side in `parts`, (N, d)."""

    name: str
    parts: tuple[Floats, ...]
    """(items, …) each, memory-mapped or not."""
    groups: Groups

    def __len__(self) -> int:
        return len(self.groups)

    def rows(self, index: Rows) -> Floats:
        """(n, d) for n rows."""
        starts = self.groups.starts[index]
        counts = self.groups.starts[index + 1] - starts
        first = np.cumsum(counts) - counts
        items = self.groups.items[np.repeat(starts - first, counts) + np.arange(counts.sum())]
        values = np.concatenate([part[items] for part in self.parts], axis=1)
        if len(items) == len(index):
            return values
        return np.asarray(np.add.reduceat(values, first, axis=0) / counts[:, None], np.float32)

    def directions(self, index: Rows) -> Floats:
        """`rows` at unit length; a row of zeros, such as a text without one known word, stays as it is."""
        values = self.rows(index)
        there = values.any(axis=1)
        values[there] = l2_normalise(values[there])
        return values


def blocks(rows: int, size: int) -> Iterator[Rows]:
    """All rows, in order, `size` at a time."""
    return (np.arange(start, min(start + size, rows)) for start in range(0, rows, size))


def each(count: int) -> Groups:
    """Make every item a row of its own."""
    return Groups(np.arange(count), np.arange(count + 1))


def grouped(pairs: Pairs) -> tuple[Groups, Groups]:
    """Media and texts of each row of a comparison.

    A row is a medium with the mean of its captions (arXiv 2409.19425); of labelled pairs it is a class, the mean of its
    media with the mean of its prompts: many media that share a text would be neighbours of one another by that alone.
    """
    media, texts = pairs.links[:, 0], pairs.links[:, 1]
    row = media if pairs.labels is None else pairs.labels[media]
    return _groups(row, media), _groups(row, texts)


def sampled(pairs: Pairs, count: int | None, seed: int) -> Pairs:
    """`count` media drawn at random, in their order, with their texts; all of them where there are no more."""
    if count is None or count >= len(pairs.media):
        return pairs
    kept = np.zeros(len(pairs.media), bool)
    kept[np.random.default_rng(seed).choice(len(pairs.media), count, replace=False)] = True
    return subset(pairs, kept, texts=True)


def _groups(row: Rows, item: Rows) -> Groups:
    """Items by row, each once; rows without items are left out."""
    distinct = np.unique(np.stack([row, item], axis=1), axis=0)
    _, starts = np.unique(distinct[:, 0], return_index=True)
    return Groups(distinct[:, 1], np.append(starts, len(distinct)))
