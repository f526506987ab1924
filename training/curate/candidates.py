"""The best rows for each concept, from a pool that is never whole in memory.

Every concept has a bounded heap, and so has every source that is chosen by similarity. What a heap holds in the end
follows from the set of rows alone, whatever their order; heaps of parts of a pool merge into those of the whole.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from training.curate.blocks import DECIMALS, Block, Record
from training.curate.encoding import Floats

BINS = 20_000
"""The bins of similarities from -1 to 1."""


class Heap:
    """The `top` records of highest score; of equal scores, those of lowest key. A key is held once."""

    def __init__(self, top: int) -> None:
        self.top = top
        self._entries: list[tuple[float, int]] = []
        """(score, -key): the worst is first."""
        self._records: dict[int, Record] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def least(self) -> float:
        """Below this score nothing enters."""
        return self._entries[0][0] if len(self._entries) == self.top else -np.inf

    def add(self, score: float, key: int, record: Record) -> None:
        known = self._records.get(key)
        if known is not None:  # the same text and medium from elsewhere: whichever comes first in the sources' order
            self._records[key] = min(known, record)
            return
        entry = (score, -key)
        if len(self._entries) < self.top:
            heapq.heappush(self._entries, entry)
        elif entry > self._entries[0]:
            del self._records[-heapq.heapreplace(self._entries, entry)[1]]
        else:
            return
        self._records[key] = record

    def ranked(self) -> Iterator[tuple[float, int, Record]]:
        """(score, key, record) from best to worst."""
        for score, negative in sorted(self._entries, reverse=True):
            yield score, -negative, self._records[-negative]


@dataclass
class Candidates:
    """A heap per concept, a heap per source that is chosen by similarity, and counts of what they were shown."""

    concepts: list[Heap]
    sources: dict[int, Heap] = field(default_factory=dict)
    matching: list[int] = field(default_factory=list)
    """Rows of the pool about each concept, repetitions included."""
    rows: Counter[int] = field(default_factory=Counter)
    """How many rows each source had."""
    dropped: Counter[tuple[int, str]] = field(default_factory=Counter)
    """How many rows of each source were left out for which reason."""

    def __post_init__(self) -> None:
        self.matching = self.matching or [0] * len(self.concepts)

    def add(self, block: Block, prototypes: Floats, least: float, similar: float) -> None:
        """Offer a block's records; `least` is the concepts' lowest cosine, `similar` its source's lowest similarity."""
        fits = np.array([record.similarity is None or record.similarity >= similar for record in block.records], bool)
        self.rows[block.source] += block.rows
        self.dropped.update({(block.source, reason): count for reason, count in block.dropped.items()})
        self._drop(block.source, "dissimilar", int((~fits).sum()))
        rows = np.flatnonzero(fits)
        keys: dict[int, int] = {row: block.records[row].key() for row in rows.tolist()}
        if block.source in self.sources:
            for row, key in keys.items():
                record = block.records[row]
                assert record.similarity is not None
                self.sources[block.source].add(record.similarity, key, record)
            return
        # float64, rounded: equal on every machine, and 1.0 is 1.0 (the paper's int8 scores overflowed there).
        scores = np.round(block.vectors[rows].astype(np.float64) @ prototypes.T.astype(np.float64), DECIMALS)
        about = scores >= least
        self._drop(block.source, "about no concept", int((~about.any(1)).sum()))
        for concept, count in enumerate(about.sum(0).tolist()):
            self.matching[concept] += count
        entering = about & (scores >= np.array([heap.least for heap in self.concepts]))
        for row, concept in np.argwhere(entering).tolist():
            where = int(rows[row])
            self.concepts[concept].add(float(scores[row, concept]), keys[where], block.records[where])

    def merge(self, other: "Candidates") -> None:
        """Take in the candidates of another part of the pool."""
        for ours, theirs in [
            *zip(self.concepts, other.concepts, strict=True),
            *((self.sources[source], heap) for source, heap in other.sources.items()),
        ]:
            for entry in theirs.ranked():
                ours.add(*entry)
        self.matching = [a + b for a, b in zip(self.matching, other.matching, strict=True)]
        self.rows.update(other.rows)
        self.dropped.update(other.dropped)

    def _drop(self, source: int, reason: str, count: int) -> None:
        if count:
            self.dropped[source, reason] += count


def histogram(similarities: Sequence[float | None]) -> Counter[int]:
    """Return how many similarities are in each bin; their edges are at -1 + 2 k / BINS."""
    return Counter(int((value + 1) / 2 * BINS) for value in similarities if value is not None)


def best_share(bins: Counter[int], share: float) -> float:
    """The lowest edge of a bin above which at most `share` of the similarities lie."""
    allowed, kept = share * bins.total(), 0
    for place in sorted(bins, reverse=True):
        kept += bins[place]
        if kept > allowed:
            return (place + 1) / BINS * 2 - 1
    return -1.0
