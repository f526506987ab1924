"""The two passes over a pool: prepare every block, then offer every block to the concepts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from training.curate.blocks import Preparation, read_block
from training.curate.candidates import Candidates, Heap, best_share, histogram
from training.curate.encoding import Floats
from training.curate.recipe import CurateError, CurateSpec
from training.curate.rows import blocks, read_rows

SPARE = 2
"""Candidates kept for each row of a source chosen by similarity: repetitions among them are refused later."""

Part = tuple[str, Path]
"""A source's name and one of its files."""


@dataclass(frozen=True)
class Offer:
    """Holds what a pool's rows are offered to."""

    prototypes: Floats
    """(C, d), unit length."""
    least: float
    top: int
    heaps: dict[int, int]
    """The size of the heap of each source that is chosen by similarity."""
    similar: dict[int, float]
    """The similarity below which the pairs of each source are dropped."""

    def empty(self) -> Candidates:
        return Candidates(
            [Heap(self.top) for _ in range(len(self.prototypes))],
            {source: Heap(size) for source, size in self.heaps.items()},
        )

    def gather(self, files: Iterable[Path]) -> Candidates:
        """The candidates of some blocks."""
        candidates = self.empty()
        for file in files:
            block = read_block(file)
            candidates.add(block, self.prototypes, self.least, self.similar.get(block.source, -1.0))
        return candidates


class Workers(Protocol):
    """Says who does the two passes: this process, or those of a Ray cluster."""

    def prepare(self, preparation: Preparation, parts: Sequence[Part]) -> list[Path]: ...

    def gather(self, offer: Offer, files: Sequence[Path]) -> Candidates: ...


class ThisProcess:
    """One block after another."""

    def prepare(self, preparation: Preparation, parts: Sequence[Part]) -> list[Path]:
        files = []
        size = sum(path.stat().st_size for _, path in parts)
        with tqdm(total=size, desc="pool", unit="B", unit_scale=True) as progress:
            for file, read in prepared(preparation, parts):
                files.append(file)
                progress.update(read - progress.n)
        return files

    def gather(self, offer: Offer, files: Sequence[Path]) -> Candidates:
        return offer.gather(tqdm(files, desc="concepts", unit="block"))


def prepared(preparation: Preparation, parts: Sequence[Part]) -> Iterator[tuple[Path, int]]:
    """The file of each block of some parts in turn, and the bytes read so far."""
    size, before = preparation.curation.spec.block, 0
    for name, path in parts:
        try:
            source = preparation.curation.spec.pool[name]
            # Rows are closed before the stream that they read, also when an interruption leaves them half-way.
            with path.open("rb") as stream, closing(read_rows(stream, path, name, source)) as rows:
                for block in blocks(rows, size):
                    yield preparation(name, block), before + stream.tell()
        except OSError as error:
            raise CurateError(f"pool.{name}: {path} cannot be read: {error.strerror}") from None
        before += path.stat().st_size


def thresholds(spec: CurateSpec, files: Sequence[Path]) -> dict[int, float]:
    """The similarity that each filtered source asks for; of a `best` share, the one that leaves so many."""
    filters = {place: source.similarity for place, source in enumerate(spec.pool.values()) if source.similarity}
    result = {place: one.least for place, one in filters.items() if one.least is not None}
    shares = {place: one.best for place, one in filters.items() if one.best is not None}
    bins: dict[int, Counter[int]] = {place: Counter() for place in shares}
    for file in files if shares else ():
        block = read_block(file)
        if block.source in bins:
            bins[block.source] += histogram([record.similarity for record in block.records])
    return result | {place: best_share(bins[place], share) for place, share in shares.items()}


def offer(spec: CurateSpec, prototypes: Floats, files: Sequence[Path]) -> Offer:
    """Return what the blocks `files` are to be offered to."""
    heaps = {
        place: SPARE * (source.cap or 0) for place, source in enumerate(spec.pool.values()) if source.by == "similarity"
    }
    least, top = (spec.concepts.least, spec.concepts.top) if spec.concepts else (1.0, 1)
    return Offer(prototypes, least, top, heaps, thresholds(spec, files))
