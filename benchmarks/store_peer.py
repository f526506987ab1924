"""LanceDB on the vectors of `benchmarks.store`. A script of its own environment: it imports nothing of ours.

python store_peer.py VECTORS.npy QUERIES.npy FOLDER

Builds its HNSW index, where FOLDER has none yet, over scalar codes (IVF_HNSW_SQ, as it is by default but for one
partition), and asks the queries one by one, at several efforts; the found vectors' numbers come with the answer.
Prints one JSON object:
{"version", "built_s", "curve": [[ef, refine factor, p50 ms, p99 ms, found (Q, 10)]]}.
"""

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow

COUNT = 10
BATCH = 50_000
EFFORTS = ((16, 1), (32, 1), (64, 1), (128, 1), (64, 4), (128, 4), (256, 4))  # never less than it refines


def batches(vectors: Any) -> Iterator[Any]:
    for start in range(0, len(vectors), BATCH):
        part = np.ascontiguousarray(vectors[start : start + BATCH])
        numbers = pyarrow.array(np.arange(start, start + len(part)))
        flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(part.reshape(-1)), part.shape[1])
        yield pyarrow.record_batch({"number": numbers, "vector": flat})


def main(vectors_path: str, queries_path: str, folder: str) -> None:
    vectors = np.load(vectors_path, mmap_mode="r", allow_pickle=False)
    queries = np.load(queries_path, allow_pickle=False)
    built = Path(folder) / "built_s.json"  # of an index that is there already
    if not built.exists():
        built.write_text(json.dumps(build(vectors, folder)))
    table: Any = lancedb.connect(folder).open_table("vectors")
    curve = []
    for ef, refine in EFFORTS:
        results, taken = [], []
        for query in queries:
            started = time.perf_counter()
            asked = table.search(query).distance_type("dot").select(["number", "_distance"]).limit(COUNT).ef(ef)
            rows = (asked if refine == 1 else asked.refine_factor(refine)).to_arrow()
            taken.append(time.perf_counter() - started)
            results.append(rows["number"].to_pylist())
        p50, p99 = (1_000 * float(np.quantile(taken, at)) for at in (0.5, 0.99))
        curve.append([ef, refine, p50, p99, results])
    print(json.dumps({"version": version("lancedb"), "built_s": json.loads(built.read_text()), "curve": curve}))


def build(vectors: Any, folder: str) -> float:
    """Seconds that the index took."""
    fields = [("number", pyarrow.int64()), ("vector", pyarrow.list_(pyarrow.float32(), vectors.shape[1]))]
    reader = pyarrow.RecordBatchReader.from_batches(pyarrow.schema(fields), batches(vectors))
    table = lancedb.connect(folder).create_table("vectors", reader, mode="overwrite")
    started = time.perf_counter()
    table.create_index(metric="dot", index_type="IVF_HNSW_SQ", num_partitions=1)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(*sys.argv[1:])
