"""Where a search's time goes, and what filters cost: what decisions/0012 is made of.

python -m benchmarks.store --vectors 1000000 --work FOLDER
python -m benchmarks.store_costs FOLDER [--bundle build/starter] [--queries 200]

On the store that the first command keeps. Of a search: medians of FAISS alone, of the index around it, of both in a
reader's thread, of ten items made of their records, and of the whole. Of filters, random ones by the share that passes:
an exact scan of those that do, and the graph at several efSearch, with its recall against the scan. One thread. Prints
two tables and, as its last line, one JSON object.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import uvicorn

from service.contract.bundle import read_bundle
from service.contract.vectors import Vectors
from service.store import Effort, SqliteStore, VectorSearch
from service.store.index import Found, View
from service.store.kinds import Mask, ef_search
from service.store.rows import SlotReader, item_of_record

COUNT = 10
_SHARES = (0.003, 0.01, 0.03, 0.1, 0.5)
_EFFORTS = (1, 2, 4, 8, 16)
"""Times the efSearch of a search without a filter."""
_SCANNED = 30
"""Queries that are scanned for: a scan may take a tenth of a second."""


async def parts_of_a_search(store: SqliteStore, view: View, queries: Vectors) -> dict[str, float]:
    """Medians in milliseconds."""
    built = view.built
    assert built is not None
    index = store._indexes[1]
    faiss.omp_set_num_threads(1)
    parameters = faiss.SearchParametersHNSW(efSearch=ef_search(Effort(), COUNT, 1.0, built.count))

    def bare(query: Vectors) -> Any:
        return built.index.search(query[None], COUNT, params=parameters)

    async def found(query: Vectors) -> list[Found]:
        def read(connection: Any) -> list[Found]:
            [hits] = index.search(query[None], COUNT, SlotReader(connection, 1, len(query)))
            return hits

        return await store._read(read)

    hits = [await found(query) for query in queries]
    ways: dict[str, Callable[[int], Awaitable[Any]]] = {
        "hop to a thread": lambda _: store._read(lambda _: None),
        "FAISS, in a thread": lambda number: store._read(lambda _: bare(queries[number])),
        "index, in a thread": lambda number: found(queries[number]),
        "items, in a thread": lambda number: store._read(
            lambda _: [item_of_record("default", each.modality, each.record) for each in hits[number]]
        ),
        "whole": lambda number: store.search(VectorSearch("default", queries[number][None], COUNT)),
    }
    taken: dict[str, list[float]] = {"FAISS": [], **{name: [] for name in ways}}
    for number, query in enumerate(queries):  # in turns, so that what else the machine does falls on all alike
        started = time.perf_counter()
        bare(query)
        taken["FAISS"].append(time.perf_counter() - started)
        for name, way in ways.items():
            started = time.perf_counter()
            await way(number)
            taken[name].append(time.perf_counter() - started)
    return {name: round(1e3 * statistics.median(each), 4) for name, each in taken.items()}


def cost_of_a_filter(view: View, queries: Vectors, share: float) -> dict[str, Any]:
    """Milliseconds of a scan; and (efSearch, milliseconds, recall@10) of the graph."""
    built = view.built
    assert built is not None
    faiss.omp_set_num_threads(1)
    allowed: Mask = np.zeros(built.count, np.bool_)
    allowed[np.random.default_rng(0).choice(built.count, max(COUNT, int(share * built.count)), replace=False)] = True
    right, scanned = _timed(lambda query: built.scan(query, COUNT, allowed)[1], queries[:_SCANNED])
    bits = np.packbits(allowed, bitorder="little")
    graph = []
    for times in _EFFORTS:
        effort = times * ef_search(Effort(), COUNT, 1.0, built.count)
        parameters = faiss.SearchParametersHNSW(sel=faiss.IDSelectorBitmap(bits), efSearch=effort)
        found, taken = _timed(lambda query: built.index.search(query, COUNT, params=parameters)[1], queries[:_SCANNED])  # noqa: B023
        recall = np.mean([len(set(own) & set(best)) / COUNT for own, best in zip(found, right, strict=True)])
        graph.append((effort, taken, round(float(recall), 3)))
    return {"share": share, "scan_ms": scanned, "graph": graph}


def _timed(search: Callable[[Vectors], Any], queries: Vectors) -> tuple[list[list[int]], float]:
    found, taken = [], []
    for query in queries:
        started = time.perf_counter()
        found.append(search(query[None])[0].tolist())
        taken.append(time.perf_counter() - started)
    return found, round(1e3 * statistics.median(taken), 3)


async def measure(bundle: Path, folder: Path, count: int) -> dict[str, Any]:
    store = SqliteStore.open(folder / "store", read_bundle(bundle).manifest)
    try:
        await store.indexed(3_600)
        queries = np.load(folder / "truth.npz", allow_pickle=False)["queries"][:count]
        [view] = store._indexes[1].views().values()
        parts = await parts_of_a_search(store, view, queries)
        filters = [cost_of_a_filter(view, queries, share) for share in _SHARES]
    finally:
        await store.close()
    return {"vectors": view.count, "search_ms": parts, "filters": filters}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store_costs", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that benchmarks.store kept with --work")
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args(arguments)
    if not (options.folder / "truth.npz").exists():
        parser.error(f"{options.folder} holds nothing that `python -m benchmarks.store --work` kept")
    # On the event loop that the server has.
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        figures = runner.run(measure(options.bundle, options.folder, options.queries))
    print(f"{'of a search':24}{'p50 ms':>10}")
    for name, taken in figures["search_ms"].items():
        print(f"{name:24}{taken:>10}")
    print(f"\n{'share that passes':20}{'scan ms':>10}   efSearch: ms, recall@10")
    for row in figures["filters"]:
        graph = "   ".join(f"{effort}: {taken}, {recall}" for effort, taken, recall in row["graph"])
        print(f"{row['share']:<20}{row['scan_ms']:>10}   {graph}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
