"""The store at size: ingest over HTTP, start, recall, latency, filters, memory, and a peer on the same vectors.

python -m benchmarks.store [--vectors 1000000] [--queries 1000] [--bundle build/starter] [--work DIR] [--no-peer]

Writes clustered vectors through `POST /items`, waits until the graph is built, stops the server, and measures the store
that it left in a process of its own. `hnsw.over_bare_faiss` is the median of a search over that of FAISS alone, which
has read the same index from the same file; `…_in_place` over FAISS on the very memory that the store searches, whose
pages it chose (service/store/huge_pages.py); `…_busy` as the first, with every core at work. `search_over_bare` is the
median of a search by a text over HTTP, over that of the text tower and FAISS alone. With --work the store is
kept there, and used again when it is whole.

The peer is LanceDB, embedded in a process as this store is, in a virtual environment of its own under build/bench, made
from PyPI (lancedb.txt): the same vectors and queries, one at a time. `peer.recall10` is the best recall it has no later
than this store answers with its own settings, `peer.p50_ratio` this store's median over its own at the first of its
efforts with that recall or, if none has it, at its best. Prints tables and, as its last line, one JSON object.
"""

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import httpx2
import numpy as np
import orjson
import uvicorn
from numpy.typing import NDArray

from benchmarks.clustered import QUERIES, Clustered
from benchmarks.commands import finish, parser_of
from benchmarks.inputs import Inputs
from benchmarks.servers import environment
from examples.demo import serving
from service.contract.bundle import read_bundle
from service.contract.vectors import Vectors
from service.engine.handling import handling
from service.engine.inputs import Text
from service.engine.towers import Tower
from service.settings import Settings
from service.store import Effort, Filter, SqliteStore, VectorSearch, parse
from service.store.kinds import IndexSnapshot, ef_search

COUNT = 10
FILTERS: dict[str, dict[str, Any]] = {
    "1": {"hundredth": 7},
    "10": {"tenth": "part 3"},
    "50": {"even": True},
    "topics": {"topic": {"$lt": 20}},
}
"""The filters, by per cent of the vectors that pass; the last follows the clusters, so that most queries have none
of it near."""
_BATCH = 256
_CLIENTS = 2
_ROUNDS = 5


def ingest(client: httpx2.Client, clustered: Clustered, count: int) -> float:
    """Vectors stored per second, as acknowledged, in batches, by several clients."""

    def post(items: list[dict[str, Any]]) -> None:
        body = orjson.dumps({"items": items})
        client.post("/items", content=body, headers={"content-type": "application/json"}).raise_for_status()

    spent = 0.0
    with ThreadPoolExecutor(_CLIENTS) as pool:
        for first, vectors, metadata in clustered.chunks(0, count):
            items = [
                {
                    "id": f"item {first + place}",
                    "vector": base64.b64encode(vector.tobytes()).decode(),
                    "modality": "image",
                    "metadata": row,
                }
                for place, (vector, row) in enumerate(zip(vectors, metadata, strict=True))
            ]
            started = time.perf_counter()
            list(pool.map(post, [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]))
            spent += time.perf_counter() - started
    return count / spent


def wait_until_indexed(client: httpx2.Client, count: int) -> float:
    started = time.perf_counter()
    while True:
        [part] = client.get("/collections/default").raise_for_status().json()["parts"]
        if not part["building"] and part["indexed"] > 0.9 * count:
            return time.perf_counter() - started
        time.sleep(1)


def fill(bundle: Path, work: Path, clustered: Clustered, count: int) -> dict[str, float]:
    with serving(bundle, work) as client:
        client.timeout = httpx2.Timeout(600)
        rate = ingest(client, clustered, count)
        print(f"stored {count:,} vectors, {rate:,.0f} per second; building …", flush=True)
        return {"ingest_per_s": round(rate, 1), "built_s": round(wait_until_indexed(client, count), 1)}


def truth(clustered: Clustered, count: int, queries: Vectors) -> dict[str, NDArray[np.int64]]:
    """The numbers of the nearest of all, and of those that pass each filter, by looking at every vector."""
    filters: dict[str, dict[str, Any]] = {"": {}, **FILTERS}
    heaps: dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}
    for first, vectors, metadata in clustered.chunks(0, count):
        scores = queries @ vectors.T
        for name, conditions in filters.items():
            passing = np.array([_passes(conditions, row) for row in metadata])
            passing_scores = np.where(passing, scores, -2.0)
            best = np.argpartition(-passing_scores, COUNT, axis=1)[:, :COUNT]
            held_scores, so_far = heaps.get(
                name, (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
            )
            merged = np.concatenate([held_scores, np.take_along_axis(passing_scores, best, 1)], axis=1)
            numbers = np.concatenate([so_far, best + first], axis=1)
            order = np.argsort(-merged, axis=1)[:, :COUNT]
            heaps[name] = (np.take_along_axis(merged, order, 1), np.take_along_axis(numbers, order, 1))
    return {name: numbers for name, (_, numbers) in heaps.items()}


def _passes(conditions: dict[str, Any], metadata: dict[str, Any]) -> bool:
    return all(
        metadata[name] < value["$lt"] if isinstance(value, dict) else metadata[name] == value
        for name, value in conditions.items()
    )


def recall(results: Sequence[Sequence[int]], right: NDArray[np.int64]) -> float:
    return float(
        np.mean(
            [len(set(result) & set(best.tolist())) / len(best) for result, best in zip(results, right, strict=True)]
        )
    )


def peer(work: Path, clustered: Clustered, count: int, queries: Vectors, right: NDArray[np.int64]) -> dict[str, Any]:
    """Measures a peer: its curve, [effort, recall, p50 in ms], and what it is."""
    vectors = np.lib.format.open_memmap(work / "vectors.npy", "w+", np.float32, (count, clustered.dimensions))
    for first, chunk, _ in clustered.chunks(0, count):
        vectors[first : first + len(chunk)] = chunk
    vectors.flush()
    np.save(work / "queries.npy", queries)
    here = Path(__file__).parent
    command = [environment(Path("build/bench/lancedb"), here / "lancedb.txt"), here / "store_peer.py"]
    paths = [work / "vectors.npy", work / "queries.npy", work / f"lancedb-{count}"]
    print("LanceDB …", flush=True)
    output = subprocess.run([*command, *paths], check=True, stdout=subprocess.PIPE, text=True).stdout
    (work / "vectors.npy").unlink()
    said = json.loads(output.splitlines()[-1])
    curve = [
        [f"{ef}, refined {refine}" if refine > 1 else str(ef), round(recall(recalled, right), 4), round(p50, 3)]
        for ef, refine, p50, _, recalled in said["curve"]
    ]
    return {"name": f"LanceDB {said['version']}, IVF_HNSW_SQ", "built_s": round(said["built_s"], 1), "curve": curve}


def compared(curve: list[list[Any]], own_recall: float, own_p50: float) -> dict[str, float | None]:
    """See the module. Null where it has answered nothing by then."""
    in_time = [recalled for _, recalled, p50 in curve if p50 <= own_p50]
    as_good = [p50 for _, recalled, p50 in curve if recalled >= own_recall]
    best = max(curve, key=lambda point: point[1])
    return {
        "peer.recall10": max(in_time, default=None),
        "peer.p50_ratio": round(own_p50 / (min(as_good) if as_good else best[2]), 3),
    }


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def measure(bundle: Path, work: Path, queries: Vectors, right: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
    """Measures the store that is there; it is run in a process that does nothing else."""
    before = resident_bytes()
    manifest = read_bundle(bundle).manifest
    started = time.perf_counter()
    store = SqliteStore.open(work, manifest)
    figures: dict[str, Any] = {"start_s": round(time.perf_counter() - started, 2)}
    await store.indexed(3_600)
    [part] = await store.parts("default")
    figures["hnsw.indexed"] = part.indexed
    index = next(iter(store._indexes[1].views().values())).built
    assert index is not None
    graph = index.index.hnsw
    needed = part.count * 4 * manifest.dimensions + 4 * graph.neighbors.size() + 8 * graph.offsets.size()
    for query in queries[:50]:
        await store.search(VectorSearch("default", query[None], COUNT))
    figures["memory_ratio"] = round((resident_bytes() - before) / needed, 3)
    figures["memory_mb"] = round(resident_bytes() / 2**20)

    async def ask(query: Vectors, filter: Filter | None = None, effort: Effort | None = None) -> list[int]:
        hits = (await store.search(VectorSearch("default", query[None], COUNT, filter=filter, effort=effort)))[0]
        return [int(hit.item.id.removeprefix("item ")) for hit in hits]

    [file] = (work / "snapshot").glob("*.faiss")
    results, against = await against_faiss(file, index, ask, queries)
    figures |= {"hnsw.recall10": round(recall(results, right[""]), 4), **against}
    for name, raw in FILTERS.items():
        filter = parse(raw)
        results, taken = await _timed(lambda query: ask(query, filter), queries)  # noqa: B023
        figures[f"filtered.{name}.recall10"] = round(recall(results, right[name]), 4)
        figures[f"filtered.{name}.p50_ms"] = round(1e3 * float(np.median(taken)), 3)
        figures[f"filtered.{name}.p99_ms"] = round(1e3 * float(np.quantile(taken, 0.99)), 3)
    figures["curve"] = []
    for effort in (16, 32, 64, 128, 256):
        results, taken = await _timed(lambda query: ask(query, None, Effort(ef_search=effort)), queries)  # noqa: B023
        figures["curve"].append([effort, round(recall(results, right[""]), 4), round(1e3 * float(np.median(taken)), 3)])
    await store.close()
    return figures


async def against_faiss(
    file: Path, snapshot: IndexSnapshot, ask: Callable[[Vectors], Awaitable[list[int]]], queries: Vectors
) -> tuple[list[list[int]], dict[str, float]]:
    """Return what the store found, and how long it took and FAISS did (see the module)."""
    faiss.omp_set_num_threads(1)
    parameters = faiss.SearchParametersHNSW(efSearch=ef_search(Effort(), COUNT, 1.0, snapshot.count))
    alone = faiss.read_index(str(file))

    def bare(query: Vectors, index: Any = alone) -> float:
        started = time.perf_counter()
        index.search(query[None], COUNT, params=parameters)
        return time.perf_counter() - started

    results: list[list[int]] = []
    by_store, by_faiss, in_place = [], [], []
    for number, query in enumerate(queries):
        # In turns, so that what else the machine does falls on all alike. The store and FAISS on its memory have other
        # queries: the second would find in the cache what the first has read.
        by_faiss.append(bare(query))
        started = time.perf_counter()
        results.append(await ask(query))
        by_store.append(time.perf_counter() - started)
        in_place.append(bare(queries[(number + len(queries) // 2) % len(queries)], snapshot.index))
    p50 = float(np.median(by_store))
    return results, {
        "hnsw.p50_ms": round(1e3 * p50, 3),
        "hnsw.p99_ms": round(1e3 * float(np.quantile(by_store, 0.99)), 3),
        "hnsw.bare_p50_ms": round(1e3 * float(np.median(by_faiss)), 3),
        "hnsw.bare_p99_ms": round(1e3 * float(np.quantile(by_faiss, 0.99)), 3),
        "hnsw.over_bare_faiss": round(p50 / float(np.median(by_faiss)), 3),
        "hnsw.over_bare_faiss_in_place": round(p50 / float(np.median(in_place)), 3),
        "hnsw.over_bare_faiss_busy": await _busy(bare, ask, queries),
    }


def over_bare(bundle: Path, store: Path, count: int) -> dict[str, float]:
    """The median of POST /search by a text, one after the other, over that of the tower and FAISS alone, in turns."""
    read = read_bundle(bundle)
    how, tower = handling(read, "text", Settings()), Tower(read, "text", "cpu", len(os.sched_getaffinity(0)))
    [file] = (store / "snapshot").glob("*.faiss")
    index = faiss.read_index(str(file))
    faiss.omp_set_num_threads(1)
    parameters = faiss.SearchParametersHNSW(efSearch=ef_search(Effort(), COUNT, 1.0, index.ntotal))
    texts = Inputs()
    served, bare = [], []
    with serving(bundle, store) as client:
        for number in range(count + 10):
            started = time.perf_counter()
            client.post("/search", json={"query": texts.text(), "top_k": COUNT}).raise_for_status()
            between = time.perf_counter()
            vector = tower.run(how.collate([how.prepare(Text(texts.text())).value]))
            index.search(vector, COUNT, params=parameters)
            if number >= 10:  # the first of a kind take longer
                served.append(between - started)
                bare.append(time.perf_counter() - between)
    return {
        "search.p50_ms": round(1e3 * float(np.median(served)), 3),
        "search_over_bare": round(float(np.median(served) / np.median(bare)), 3),
    }


async def _busy(bare: Callable[[Vectors], Any], served: Callable[[Vectors], Awaitable[Any]], queries: Vectors) -> float:
    """Seconds for all queries over FAISS's own, with every core at work: a thread for each, twice as many callers."""
    cores = os.cpu_count() or 1
    places = asyncio.Semaphore(2 * cores)

    async def asked(query: Vectors) -> None:
        async with places:
            await served(query)

    ratios = []
    with ThreadPoolExecutor(cores, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            await asyncio.to_thread(lambda: list(pool.map(bare, queries)))
            between = time.perf_counter()
            await asyncio.gather(*(asked(query) for query in queries))
            ratios.append((time.perf_counter() - between) / (between - started))
    return round(float(np.median(ratios)), 3)


async def _timed(
    ask: Callable[[Vectors], Awaitable[list[int]]], queries: Vectors
) -> tuple[list[list[int]], list[float]]:
    results, taken = [], []
    for query in queries:
        started = time.perf_counter()
        results.append(await ask(query))
        taken.append(time.perf_counter() - started)
    return results, taken


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("store", __doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--work", type=Path, help="keep the store there")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    clustered = Clustered(read_bundle(options.bundle).manifest.dimensions)
    if options.measure:
        right = dict(np.load(options.work / "truth.npz", allow_pickle=False))
        queries = right.pop("queries")
        right = {name.removeprefix("for "): numbers for name, numbers in right.items()}
        # On the event loop that the server has.
        with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
            print(json.dumps(runner.run(measure(options.bundle, options.work / "store", queries, right))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        return run(options, clustered, work)


def run(options: argparse.Namespace, clustered: Clustered, work: Path) -> int:
    filled, said = work / "filled.json", {"vectors": options.vectors, "dimensions": clustered.dimensions}
    figures: dict[str, Any]
    if filled.exists() and (earlier := json.loads(filled.read_text()))["vectors"] == options.vectors:
        figures = earlier
    else:
        work.mkdir(parents=True, exist_ok=True)
        figures = said | fill(options.bundle, work / "store", clustered, options.vectors)
        filled.write_text(json.dumps(figures))
    queries = clustered.vectors(QUERIES, options.queries)
    right = truth(clustered, options.vectors, queries)
    np.savez(work / "truth.npz", queries=queries, **{f"for {name}": numbers for name, numbers in right.items()})  # type: ignore[arg-type]
    command = [
        sys.executable,
        "-m",
        "benchmarks.store",
        "--measure",
        "--work",
        str(work),
        "--bundle",
        str(options.bundle),
    ]
    figures |= json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )
    figures |= over_bare(options.bundle, work / "store", min(200, options.queries))
    curve = figures.pop("curve")
    figures |= {"peer.name": None, "peer.recall10": None, "peer.p50_ratio": None}
    theirs: list[list[Any]] = []
    if not options.no_peer:
        measured = peer(work, clustered, options.vectors, queries, right[""])
        theirs = measured["curve"]
        figures |= {"peer.name": measured["name"], "peer.built_s": measured["built_s"]}
        figures |= compared(theirs, figures["hnsw.recall10"], figures["hnsw.p50_ms"])
    print(f"{'figure':28}{'value':>32}")
    for name, value in figures.items():
        print(f"{name:28}{value!s:>32}")
    for title, rows in (("this store, efSearch", curve), ("LanceDB, ef", theirs)):
        if rows:
            print(f"\n{title:24}{'recall@10':>12}{'p50 ms':>10}")
        for effort, recalled, taken in rows:
            print(f"{effort!s:24}{recalled:>12}{taken:>10}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    finish(main)
