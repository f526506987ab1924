"""Measure how one store grows: the same store at 10,000 vectors, at ten times as many, and so on.

python -m benchmarks.growth [--to 10000000] [--kind ivf_pq] [--bundle build/starter] [--work DIR]
                            [--queries 500]

The vectors are those of real captions by the bundle's text tower (Flickr8k, of 5 captions a photograph), and as many
more as are needed: a caption's vector plus noise as it was measured, the difference of two captions of one photograph
over √2, brought to length 1. Queries are captions of photographs that are held out of both. The oracle is a flat search
of all vectors.

Ingest goes through the store's own `upsert` (1,000 items of four metadata values at a time, acknowledged when they are
on disk), without HTTP. Each size is measured in a process of its own, which opens the store that the growing one left:
`start_s` until it can be searched, `memory_gb` the higher of its resident memory after the searches and the highest of
the process that filled and built. `busy_ms`: the longest of the searches that were asked, one by one, while it grew.
Prints a line per size, and as the last line a JSON object of the largest. With --work the store is kept, and a later
run goes on from the size that is there.
"""

import argparse
import asyncio
import csv
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.commands import finish, parser_of
from benchmarks.real import root
from benchmarks.store import recall
from service.contract.bundle import read_bundle
from service.contract.vectors import Vectors, l2_normalise
from service.engine.handling import handling
from service.engine.inputs import Text
from service.engine.towers import Tower
from service.settings import Settings
from service.store import DEFAULT_COLLECTION, Entry, Filter, SqliteStore, VectorSearch, parse
from service.store.kinds import IndexRequest, Kind

COUNT = 10
KEYS = ("vectors", "recall10", "p99_ms", "memory_gb", "start_s", "ingest_per_s")
KINDS = {"": 1, "half": 2, "hundredth": 100, "ten_thousandth": 10_000}
"""Filters by name: one of so many vectors passes. The first is none."""
_CHUNK, _BATCH, _WRITERS = 10_000, 1_000, 2
_SIZES = (10_000, 100_000, 1_000_000, 3_000_000, 10_000_000)

Real = dict[str, NDArray[np.float32]]


def captions(bundle: Path, work: Path) -> Real:
    """Vectors of captions (N, D) of stored and of held-out photographs, and the differences of captions of one."""
    kept = work / "captions.npz"
    if not kept.exists():
        with (root() / "flickr8k/captions.csv").open(newline="", encoding="utf-8") as file:
            rows = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
        read = read_bundle(bundle)
        how, tower = handling(read, "text", Settings()), Tower(read, "text", "cpu", 1)
        prepared = [how.prepare(Text(caption)) for _, caption in rows]
        vectors = np.empty((len(rows), read.manifest.dimensions), np.float32)
        order = np.argsort([tokens.size for tokens in prepared], kind="stable")
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            vectors[places] = tower.run(how.collate([prepared[place].value for place in places]))
        names = np.array([name for name, _ in rows])
        held_out = np.isin(names, np.random.default_rng(0).permutation(np.unique(names))[:800])
        stored, of = vectors[~held_out], names[~held_out]
        same = of[1:] == of[:-1]
        work.mkdir(parents=True, exist_ok=True)
        np.savez(kept, stored=stored, queries=vectors[held_out], noise=(stored[1:] - stored[:-1])[same] / np.sqrt(2))
    return dict(np.load(kept, allow_pickle=False))


def chunks(real: Real, first: int, last: int) -> Iterator[tuple[int, Vectors]]:
    """Vectors by number, from `first`, which is a multiple of the chunk's size; each is the same in every run."""
    stored, noise = real["stored"], real["noise"]
    for start in range(first, last, _CHUNK):
        rng = np.random.default_rng(start + 1)
        numbers = np.arange(start, min(start + _CHUNK, last))
        vectors = stored[numbers % len(stored)]
        if numbers[-1] >= len(stored):
            more = numbers >= len(stored)
            vectors[more] += noise[rng.integers(0, len(noise), int(more.sum()))]
        yield start, l2_normalise(vectors)


def metadata(number: int) -> dict[str, Any]:
    return {name: number % modulus for name, modulus in KINDS.items() if name} | {"title": f"photo {number}"}


async def _searching(store: SqliteStore, queries: Vectors, longest: list[float]) -> None:
    """Ask one query after the other, until it is cancelled."""
    for number in itertools.count():
        started = time.perf_counter()
        await store.search(VectorSearch(DEFAULT_COLLECTION, queries[[number % len(queries)]], COUNT))
        longest[0] = max(longest[0], time.perf_counter() - started)
        await asyncio.sleep(0.2)


async def grow(store: SqliteStore, real: Real, first: int, last: int) -> dict[str, float]:
    """Store vectors and wait until they are indexed, and search meanwhile."""
    longest = [0.0]
    asking = asyncio.create_task(_searching(store, real["queries"], longest))
    places = asyncio.Semaphore(_WRITERS)

    async def put(start: int, vectors: Vectors) -> None:
        async with places:
            numbers = range(start, start + len(vectors))
            items = zip(numbers, vectors, strict=True)
            await store.upsert(
                [Entry(DEFAULT_COLLECTION, f"item {n}", "text", metadata(n), vector) for n, vector in items]
            )

    spent = cpu = 0.0
    for start, vectors in chunks(real, first, last):
        started, cpu_started = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for place in range(0, len(vectors), _BATCH):
                group.create_task(put(start + place, vectors[place : place + _BATCH]))
        spent, cpu = spent + time.perf_counter() - started, cpu + time.process_time() - cpu_started
        if (start + len(vectors)) % 100_000 == 0:
            rate = (start + len(vectors) - first) / spent
            print(f"  {start + len(vectors):,} stored, {rate:,.0f} a second, {_peak_gb():.2f} GB", flush=True)
    stored = time.perf_counter()
    while not await store.indexed(60):
        print(f"  building, {_peak_gb():.2f} GB", flush=True)
    built_s = time.perf_counter() - stored
    asking.cancel()
    await asyncio.wait([asking])
    return {
        "ingest_per_s": round((last - first) / spent, 1),
        "ingest_cpu_us": round(1e6 * cpu / (last - first), 1),
        "built_s": round(built_s, 1),
        "busy_ms": round(1e3 * longest[0], 1),
        "filling_gb": round(_peak_gb(), 3),
    }


def truth(real: Real, count: int, queries: Vectors) -> dict[str, NDArray[np.int64]]:
    """The numbers of the nearest of all vectors and of those that pass each filter (Q, COUNT), -1 for none."""
    best = {
        name: (np.full((len(queries), COUNT), -2, np.float32), np.full((len(queries), COUNT), -1)) for name in KINDS
    }
    for start, vectors in chunks(real, 0, count):
        scores, numbers = queries @ vectors.T, np.arange(start, start + len(vectors))
        for name, (own_scores, rows) in best.items():
            passing = numbers % KINDS[name] == (7 if name else 0) % KINDS[name]
            some = np.concatenate([own_scores, scores[:, passing]], axis=1)
            places = np.argpartition(-some, COUNT - 1, axis=1)[:, :COUNT]
            given = np.concatenate(
                [rows, np.broadcast_to(numbers[passing], (len(queries), int(passing.sum())))], axis=1
            )
            best[name] = (np.take_along_axis(some, places, 1), np.take_along_axis(given, places, 1))
    return {name: numbers for name, (_, numbers) in best.items()}


async def measure(bundle: Path, folder: Path, real: Real, count: int, queries: Vectors) -> dict[str, Any]:
    """Open the store that is there, and search it."""
    started = time.perf_counter()
    store = SqliteStore.open(folder, read_bundle(bundle).manifest)
    figures: dict[str, Any] = {"vectors": count, "start_s": round(time.perf_counter() - started, 2)}
    await store.indexed(3_600)
    right = truth(real, count, queries)
    [part] = await store.parts(DEFAULT_COLLECTION)
    figures |= {"kind": part.kind, "indexed": part.indexed}

    async def ask(query: Vectors, filter: Filter | None) -> list[int]:
        [hits] = await store.search(VectorSearch(DEFAULT_COLLECTION, query[None], COUNT, filter=filter))
        return [int(hit.item.id.removeprefix("item ")) for hit in hits]

    for name, modulus in KINDS.items():
        filter = parse({name: 7 % modulus}) if name else None
        for query in queries[:20]:
            await ask(query, filter)
        results, taken, cpu = [], [], time.process_time()
        for query in queries:
            started = time.perf_counter()
            results.append(await ask(query, filter))
            taken.append(time.perf_counter() - started)
        prefix = f"{name}." if name else ""
        figures |= {
            f"{prefix}recall10": round(recall(results, right[name]), 4),
            f"{prefix}p50_ms": round(1e3 * float(np.median(taken)), 2),
            f"{prefix}p99_ms": round(1e3 * float(np.quantile(taken, 0.99)), 2),
            f"{prefix}cpu_ms": round(1e3 * (time.process_time() - cpu) / len(queries), 2),
        }
    figures["searching_gb"] = round(_resident_gb(), 3)
    figures |= await _deleted(store, real, count, queries)
    await store.close()
    return figures


async def _deleted(store: SqliteStore, real: Real, count: int, queries: Vectors) -> dict[str, float]:
    """Delete every twentieth item of a hundredth and write them again: the longest search and write meanwhile."""
    longest, writes = [0.0], [0.0]
    asking = asyncio.create_task(_searching(store, queries, longest))
    for start, vectors in chunks(real, 0, max(_CHUNK, count // 100 // _CHUNK * _CHUNK)):
        numbers = range(start, start + len(vectors), 20)
        for write in (
            store.delete(DEFAULT_COLLECTION, [f"item {n}" for n in numbers]),
            store.upsert(
                [Entry(DEFAULT_COLLECTION, f"item {n}", "text", metadata(n), vectors[n - start]) for n in numbers]
            ),
        ):
            started = time.perf_counter()
            await write
            writes[0] = max(writes[0], time.perf_counter() - started)
    asking.cancel()
    await asyncio.wait([asking])
    return {"deleting_search_ms": round(1e3 * longest[0], 1), "deleting_write_ms": round(1e3 * writes[0], 1)}


def _resident_gb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


async def filled(bundle: Path, folder: Path, real: Real, kind: Kind, first: int, last: int) -> dict[str, float]:
    store = SqliteStore.open(folder, read_bundle(bundle).manifest)
    await store.create_collection(DEFAULT_COLLECTION, IndexRequest(kind))
    figures = await grow(store, real, first, last)
    await store.close()
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("growth", __doc__)
    parser.add_argument("--to", type=int, default=10_000_000, help="the largest size")
    parser.add_argument("--kind", default="ivf_pq", choices=["auto", "hnsw", "ivf_pq"])
    parser.add_argument("--work", type=Path, help="keep the store there, and go on from what it holds")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--part", choices=["fill", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--between", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        real = captions(options.bundle, options.work)
        first, last = options.between
        queries = real["queries"][np.random.default_rng(0).permutation(len(real["queries"]))[: options.queries]]
        part = (
            filled(options.bundle, options.work / "store", real, options.kind, first, last)
            if options.part == "fill"
            else measure(options.bundle, options.work / "store", real, last, queries)
        )
        print(json.dumps(asyncio.run(part)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        captions(options.bundle, work)
        done = work / "growth.json"
        rows: list[dict[str, Any]] = json.loads(done.read_text()) if done.exists() else []
        for size in (size for size in (*_SIZES, options.to) if size <= options.to):
            if rows and size <= rows[-1]["vectors"]:
                continue
            row: dict[str, Any] = {}
            for name in ("fill", "measure"):
                between = ["--between", str(rows[-1]["vectors"] if rows else 0), str(size)]
                command = [sys.executable, "-m", "benchmarks.growth", "--part", name, "--kind", options.kind, *between]
                command += ["--bundle", str(options.bundle), "--work", str(work), "--queries", str(options.queries)]
                row |= _run(command)
            disk = sum(file.stat().st_size for file in (work / "store").rglob("*") if file.is_file())
            row |= {"disk_gb": round(disk / 1e9, 3), "memory_gb": max(row["filling_gb"], row["searching_gb"])}
            rows.append(row)
            done.write_text(json.dumps(rows))
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    print(json.dumps({name: rows[-1][name] for name in KEYS}))
    return 0


def _run(command: list[str]) -> dict[str, Any]:
    """The last line that a command prints, as JSON; the others are shown."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = "{}"
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
            last = line
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    figures: dict[str, Any] = json.loads(last)
    return figures


if __name__ == "__main__":
    finish(main)
