"""Kinds of index: how each is built, searched, and when it is taken. decisions/0011 says why, with the figures.

flat    exact, every vector is looked at
hnsw    a graph (Malkov & Yashunin, 2016) over float32 vectors, or over float16 or int8 codes
ivf_pq  inverted lists of product codes (Jégou et al., 2011) after a learned rotation (OPQ, Ge et al., 2013)

What holds codes instead of float32 vectors only nominates: the score of every result is that of the stored vector.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors

Kind = Literal["flat", "hnsw", "ivf_pq"]
Precision = Literal["float32", "float16", "int8"]
Keys = NDArray[np.int64]
Mask = NDArray[np.bool_]

PRECISIONS: dict[Kind, tuple[Precision, ...]] = {
    "flat": ("float32",),
    "hnsw": ("float32", "float16", "int8"),
    "ivf_pq": (),
}
"""The precisions that may be chosen for a kind, its default first; none where the codes are the kind's own."""
REPLACED: dict[str, Kind] = {"ivf_flat": "hnsw", "sq": "hnsw", "ivf_opq": "ivf_pq", "binary": "ivf_pq"}
"""Kinds that stores of earlier versions have, and the nearest of those that there are: for codes the one whose codes
take as many bytes."""

_M = 16
"""Neighbours of a node of the graph; twice as many on its lowest level."""
_EF_CONSTRUCTION = 100
_EF_SEARCH = 128
_EF_ENOUGH, _EF_GROWTH = 100_000, 0.3
"""Vectors from which on it grows with their number, and the power: 256 at a million."""
_AROUND = 64
"""Rows near a query that are looked at to see how a filter meets them."""
_MET = 0.2
"""A search looks at some twenty times as many nodes as it keeps in sight: of a filter that lets through this share of
those near the query it meets as many as it needs, and of one that lets through less it keeps more in sight."""
_MET_LEAST = 0.05
"""Share below which it misses too many, however many it keeps in sight."""
_NPROBE_SHARE, _NPROBE_LEAST = 1 / 96, 32
"""Of the lists, that a search looks into unless it says otherwise; of few lists, eight miss 7 % of the ten nearest of
100,000 vectors, and 32 1.4 %. Of ten million vectors a ninety-sixth misses 2.9 % with 160 candidates, and a
forty-third 2.0 % in a third more time (docs/LOG.md)."""
_PER_CENTROID = 40
_MOST_LISTS = 4_096
"""Lists beyond which finding a vector's list costs more than shorter lists save."""
_ROTATION_ROUNDS, _CODEBOOK_ROUNDS, _ROTATED = 5, 10, 16_384
"""Rounds in which the rotation before product codes and the codebooks are learned, and vectors for the rotation: with
FAISS's own 50, 25 and 65,536 they take a quarter of an hour, and find no more (docs/LOG.md)."""
_NOMINATED: dict[Precision | None, int] = {"float16": 2, "int8": 4, None: 16}
"""Candidates per result that are scored again by their stored vectors; None: of product codes, of ten million of which
10 per result miss 4.2 % of the ten nearest, and 16 2.9 % in a tenth more time."""
_ADDED = 1_024
"""Vectors added between two looks at whether to stop."""
_GPU_MOST = 2_048
"""Results that FAISS gives from a GPU."""


@dataclass(frozen=True)
class IndexRequest:
    """Names the index that a collection asks for. `auto` goes by size, part by part."""

    kind: Kind | Literal["auto"] = "auto"
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.kind == "auto":
            if self.precision is not None:
                raise ValueError("precision is chosen with a kind of index, not with auto")
        elif self.precision is not None and self.precision not in PRECISIONS[self.kind]:
            precisions = " or ".join(PRECISIONS[self.kind])
            raise ValueError(f"an index of kind {self.kind} has {precisions or 'codes of its own, and no'} precision")

    @classmethod
    def stored(cls, kind: str, precision: Precision | None) -> "IndexRequest":
        """Return what a store has written down; a kind that there is no more is the nearest of those that there are."""
        if kind == "sq" and precision is None:
            precision = "int8"  # which was its default, and is not the graph's
        return cls(cast("Kind", REPLACED.get(kind, kind)), precision)


@dataclass(frozen=True)
class IndexSpec:
    kind: Kind
    precision: Precision | None

    @property
    def exact_scores(self) -> bool:
        return self.precision == "float32"


@dataclass(frozen=True)
class Rules:
    """Says when an index is built and built anew. Tests use smaller numbers."""

    flat_up_to: int = 20_000
    """Vectors of a part that `auto` searches one by one."""
    trained_from: int = 10_000
    """Vectors that lists and codes are trained from at least; a part with fewer is flat whatever is asked for."""
    graph_from: int = 1_000
    rest_at_least: int = 10_000
    rest_share: float = 0.1
    rest_at_most: int = 20_000
    """The index takes in what is not in it yet, once that is both the first many and the share of it, or the last many:
    a search looks at each of them, 3 ms for 20,000 of 384 dimensions."""
    waiting_at_most: int = 100_000
    """Vectors of a part in no index yet, which are in memory, beyond which writes wait until some are taken in."""
    dead_share: float = 0.25
    """Share of deleted vectors beyond which an index, or vectors without one, are built anew without them."""
    step: int = 50_000
    """An index takes in at most as much as it holds, or this much, before it is switched to: what a step has done is
    searched sooner, and outlives a restart."""
    outgrown: int = 16
    """Times its size at its training, beyond which lists and codes are trained anew."""
    memory: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    """Bytes. Where a float32 graph would take more than half of it, `auto` takes int8, and then product codes."""

    def rest_least(self, indexed: int) -> int:
        """Return how many vectors in no index there are from which on an index that holds so many takes them in."""
        return int(min(max(self.rest_at_least, self.rest_share * indexed), self.rest_at_most))

    def choose(self, request: IndexRequest, count: int, dimensions: int, present: Kind | None = None) -> IndexSpec:
        """Return the index of a part of `count` vectors that is served by an index of kind `present` now."""
        if request.kind == "auto":
            # An index that is there stays until the part is half as large, so that none is built back and forth.
            flat = self.flat_up_to / 2 if present not in (None, "flat") else self.flat_up_to
            if count <= flat:
                return IndexSpec("flat", "float32")
            graph = 4 * 2 * _M
            if count * (4 * dimensions + graph) <= self.memory / 2:
                return IndexSpec("hnsw", "float32")
            return (
                IndexSpec("hnsw", "int8")
                if count * (dimensions + graph) <= self.memory / 2
                else IndexSpec("ivf_pq", None)
            )
        least = self.graph_from if request.kind == "hnsw" else self.trained_from
        if count < (least / 2 if present == request.kind else least):
            return IndexSpec("flat", "float32")
        precisions = PRECISIONS[request.kind]
        return IndexSpec(request.kind, request.precision or (precisions[0] if precisions else None))


@dataclass(frozen=True)
class Effort:
    """Says how hard one search tries; it travels with the call. None leaves it to the kind of index."""

    ef_search: int | None = None
    nprobe: int | None = None
    rescore: int | None = None
    """Candidates that are scored again by their stored vectors, of an index that holds codes."""
    exact: bool = False


@dataclass(frozen=True)
class IndexSnapshot:
    """Holds an index over rows 0 … count - 1 of a part. It never changes once it is searched."""

    spec: IndexSpec
    index: Any
    trained: int
    """Vectors that it held when it was trained."""
    on_gpu: Any = None
    """A copy on the GPU, for searches that leave nothing out."""

    @property
    def count(self) -> int:
        return int(self.index.ntotal)

    def nominate(
        self, queries: Vectors, count: int, allowed: Mask | None, share: float, effort: Effort
    ) -> tuple[NDArray[np.float32], Keys]:
        """Return scores and row numbers (Q, ≤ count) of the nearest rows allowed, best first, -1 where there are none.

        `share` is how many of those that are near are allowed.
        """
        if allowed is None and self.on_gpu is not None and count <= _GPU_MOST:
            result: tuple[NDArray[np.float32], Keys] = self.on_gpu.search(queries, count, self._nprobe(effort, 1.0))
            return result
        # The bits stay alive as long as the selector that points to them.
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        parameters = self._parameters(self.index, selector, count, share, effort)
        scores, rows = self.index.search(queries, count, params=parameters)
        return scores, rows

    def shares_around(self, queries: Vectors, allowed: Mask) -> NDArray[np.float64]:
        """Return how many of the rows near each query are allowed, of a graph (Q,). A filter may follow meanings."""
        near = min(_AROUND, self.count)
        _, rows = self.index.search(queries, near, params=faiss.SearchParametersHNSW(efSearch=near))
        passing: NDArray[np.float64] = np.where(rows < 0, False, allowed[rows]).sum(axis=1) + 0.5
        return passing / (near + 1)

    def scan(self, queries: Vectors, count: int, allowed: Mask | None) -> tuple[NDArray[np.float32], Keys]:
        """Do the same having looked at every row that is allowed; of an index that holds codes, at their codes."""
        index = faiss.downcast_index(self.index)
        if isinstance(index, faiss.IndexHNSW):
            index = faiss.downcast_index(index.storage)
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        parameters = self._parameters(index, selector, count, 1.0, Effort(nprobe=2**31))
        scores, rows = index.search(queries, count, params=parameters)
        return scores, rows

    def _parameters(self, index: Any, selector: Any, count: int, share: float, effort: Effort) -> Any:
        index = faiss.downcast_index(index)
        selection = {} if selector is None else {"sel": selector}
        match index:
            case faiss.IndexPreTransform():
                inner = self._parameters(index.index, selector, count, share, effort)
                return faiss.SearchParametersPreTransform(index_params=inner)
            case faiss.IndexHNSW():
                ef = ef_search(effort, count, share, self.count)
                return faiss.SearchParametersHNSW(**selection, efSearch=ef) if selection else _without_filter(ef)
            case faiss.IndexIVF():
                return faiss.SearchParametersIVF(**selection, nprobe=self._nprobe(effort, share))
            case _:
                return faiss.SearchParameters(**selection)

    def _nprobe(self, effort: Effort, share: float) -> int:
        """Return how many lists to look into: more of them where a filter leaves less in each."""
        index = _inverted(self.index)
        if index is None:
            return 0
        lists = effort.nprobe or max(_NPROBE_LEAST, round(index.nlist * _NPROBE_SHARE))
        return int(min(index.nlist, np.ceil(lists / max(share, 1e-9))))

    def nominees(self, count: int, effort: Effort) -> int:
        """Return how many candidates to ask for, so that `count` of them are right."""
        if self.spec.exact_scores:
            return count
        return max(count, effort.rescore or max(64, count * _NOMINATED[self.spec.precision]))


@functools.lru_cache(maxsize=64)
def _without_filter(ef_search: int) -> Any:
    """Return parameters that searches share: to make them takes a tenth of a small search."""
    return faiss.SearchParametersHNSW(efSearch=ef_search)


def ef_search(effort: Effort, count: int, share: float, total: int) -> int:
    """Return how many nodes a search keeps in sight; more where a filter lets through only a small `share`."""
    grown = _EF_SEARCH * max(1.0, total / _EF_ENOUGH) ** _EF_GROWTH
    ef = max(effort.ef_search or int(grown), count)
    return int(np.ceil(ef * max(1.0, _MET / max(share, _MET_LEAST))))


def graph_rather_than_scan(selected: int, total: int, effort: Effort, count: int, around: float) -> bool:
    """Return whether the graph finds the nearest of the rows allowed, and sooner than looking at each of them.

    `around` is the share of the rows near a query that are allowed. The measured rule of decisions/0012.
    """
    share = min(selected / max(total, 1), around)
    if share < _MET_LEAST:
        return False
    return ef_search(effort, count, share, total) * _GRAPH_US < total * _SKIP_US + selected * _LOOK_US


# Microseconds on the machine of decisions/0012; only their ratios matter.
_GRAPH_US = 4.0
_SKIP_US = 0.0013
_LOOK_US = 0.25


def build(
    spec: IndexSpec,
    dimensions: int,
    count: int,
    sample: Callable[[int], Vectors],
    batches: Iterator[Vectors],
    stopped: Callable[[], bool],
) -> IndexSnapshot | None:
    """Return an index over `count` vectors that come in batches (n, D); None when stopped.

    `sample(n)` gives at most n of them, drawn at random.
    """
    # Threads cost more than they bring where there is little to do.
    faiss.omp_set_num_threads(os.cpu_count() if count > _ADDED else 1)
    index = _empty(spec, dimensions, count)
    if not index.is_trained:
        index.train(sample(_training_size(index, count)))
    return IndexSnapshot(spec, index, count) if _add(index, batches, stopped) else None


def extend(
    built: IndexSnapshot, batches: Iterator[Vectors], stopped: Callable[[], bool], *, copy: bool = True
) -> IndexSnapshot | None:
    """Return a copy of an index, which may be searched meanwhile, that holds the batches too; None when stopped. An
    index that nobody searches need not be copied."""
    inverted = _inverted(built.index)
    # Earlier versions had lists of other kinds, and codes without a rotation.
    if not copy or not isinstance(inverted, faiss.IndexIVFPQ) or inverted is built.index:
        index = faiss.clone_index(built.index) if copy else built.index
        return IndexSnapshot(built.spec, index, built.trained) if _add(index, batches, stopped) else None
    index = _without_lists(built.index, inverted)
    if not _add(index, batches, stopped):
        return None
    added = _inverted(index)
    added.replace_invlists(_joined(inverted.invlists, added.invlists), True)
    return IndexSnapshot(built.spec, index, built.trained)


def _without_lists(index: Any, inverted: Any) -> Any:
    """Return an index of the same rotation, lists and codes that holds none, whose next vector has the next number."""
    quantizer = faiss.clone_index(inverted.quantizer)
    sizes = inverted.d, inverted.nlist, inverted.pq.M, inverted.pq.nbits
    empty = faiss.IndexIVFPQ(quantizer, *sizes, inverted.metric_type)
    empty.pq, empty.by_residual, empty.ntotal = inverted.pq, inverted.by_residual, inverted.ntotal
    empty.is_trained = True
    return faiss.IndexPreTransform(faiss.Cloner().clone_VectorTransform(index.chain.at(0)), empty)


def _joined(first: Any, second: Any) -> Any:
    """Return inverted lists that hold what both hold, each as long as it has to be: a copy that then grows takes up to
    twice as much, and leaves holes of all sizes when it goes (2.0 in place of 1.1 GB at eight million)."""
    lists = faiss.ArrayInvertedLists(first.nlist, first.code_size)
    for number in range(first.nlist):
        count, more = first.list_size(number), second.list_size(number)
        lists.resize(number, count + more)
        lists.update_entries(number, 0, count, first.get_ids(number), first.get_codes(number))
        lists.update_entries(number, count, more, second.get_ids(number), second.get_codes(number))
    lists.this.disown()
    return lists


def _add(index: Any, batches: Iterator[Vectors], stopped: Callable[[], bool]) -> bool:
    for batch in batches:
        for start in range(0, len(batch), _ADDED):
            if stopped():
                return False
            index.add(np.ascontiguousarray(batch[start : start + _ADDED], dtype=np.float32))
    return True


def _empty(spec: IndexSpec, dimensions: int, count: int) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    lists = int(max(1, min(4 * count**0.5, count / _PER_CENTROID, _MOST_LISTS)))
    codes = _code_bytes(dimensions)
    if spec.kind == "hnsw":
        suffix = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}[spec.precision or "float32"]
        index = faiss.index_factory(dimensions, f"HNSW{_M},{suffix}", metric)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        return index
    index = faiss.index_factory(dimensions, f"OPQ{codes},IVF{lists},PQ{codes}np", metric)
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation.niter, rotation.niter_pq_0, rotation.max_train_points = _ROTATION_ROUNDS, _CODEBOOK_ROUNDS, _ROTATED
    inverted = _inverted(index)
    inverted.cp.spherical, inverted.pq.cp.niter = True, _CODEBOOK_ROUNDS
    for clustering in (inverted.cp, inverted.pq.cp):
        clustering.min_points_per_centroid = 1  # FAISS prints a warning for each codebook otherwise
    return index


def _code_bytes(dimensions: int) -> int:
    """Return the bytes of a product code: one for eight dimensions, or the nearest number that divides them."""
    return max(size for size in range(1, dimensions + 1) if dimensions % size == 0 and size <= max(1, dimensions // 8))


def _training_size(index: Any, count: int) -> int:
    inverted = _inverted(index)
    lists = 0 if inverted is None else inverted.nlist
    return min(count, max(_PER_CENTROID * lists, 65_536))


def _inverted(index: Any) -> Any:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexIVF) else None


def on_gpu(built: IndexSnapshot) -> IndexSnapshot:
    """Return an index with a copy on the GPU where FAISS has one and the kind can live there; as it is otherwise."""
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if not gpus or built.spec.kind != "ivf_pq":
        return built
    return IndexSnapshot(built.spec, built.index, built.trained, _OnGpu(built.index))


class _OnGpu:
    """FAISS's GPU indexes take one search at a time."""

    def __init__(self, index: Any) -> None:
        self._resources = faiss.StandardGpuResources()
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, index)
        self._turn = threading.Lock()

    def search(self, queries: Vectors, count: int, nprobe: int) -> tuple[NDArray[np.float32], Keys]:
        with self._turn:
            scores, rows = self._index.search(queries, count, params=faiss.SearchParametersIVF(nprobe=nprobe))
        return scores, rows
