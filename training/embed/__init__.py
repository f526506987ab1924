"""Embed huge sets offline, in this machine's processes or on a Ray cluster, into Parquet that `python -m service load`
takes in.

--data is a folder of images and sounds (an item's id is its path in there), or a .csv, .tsv or .jsonl table whose rows
have a `file` or a `text`, and perhaps an `id`; other columns become metadata. Work is cut into shards:
a shard that is written is not done again, so that the same command goes on where it was interrupted.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from service.contract.bundle import read_bundle
from training.curate.cluster import Cluster
from training.embed.plan import EmbedError, Task, plan, tasks
from training.embed.shard import Shards, schema

__all__ = ["EmbedError", "add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="whose towers embed")
    parser.add_argument("--data", type=Path, action="append", required=True, help="a folder or a table; repeatable")
    parser.add_argument("--root", type=Path, help="where a table's files lie (default: the table's folder)")
    parser.add_argument("--out", type=Path, help="folder of the Parquet files (default: build/embedded/BUNDLE)")
    parser.add_argument("--shard", type=int, default=2_000, help="items of a file (default: 2000)")
    parser.add_argument("--workers", type=int, default=1, help="processes, or Ray's workers (default: 1)")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on Ray: a cluster that sees these folders, or one of this machine's own (pip install 'isthmus[ray]')",
    )


def main(options: argparse.Namespace) -> dict[str, Any]:
    if options.shard < 1 or options.workers < 1:
        raise EmbedError("--shard and --workers are 1 or more")
    bundle = read_bundle(options.bundle)
    schema(bundle.manifest)  # says so where pyarrow is not installed
    out: Path = options.out or Path("build/embedded") / bundle.manifest.name
    plan(out, bundle.manifest, options.data, options.root, options.shard)
    every = tasks(out)
    waiting = [task for task in every if not task.target.exists()]
    began, done, failed = time.monotonic(), len(every) - len(waiting), 0
    if done:
        print(f"{done} of {len(every)} shards were there", file=sys.stderr)
    for name, embedded, bad in _run(options, waiting):
        done, failed = done + 1, failed + bad
        print(
            f"{done}/{len(every)}  {name}  {embedded} items"
            + (f", {bad} could not be embedded" if bad else "")
            + f"  {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    import pyarrow.parquet

    items = sum(pyarrow.parquet.read_metadata(task.target).num_rows for task in every)
    failures = sum(len(task.failures.read_text().splitlines()) for task in every if task.failures.exists())
    return {"out": str(out), "space": bundle.manifest.space, "shards": len(every), "items": items, "failed": failures}


def _run(options: argparse.Namespace, waiting: Sequence[Task]) -> Iterator[tuple[str, int, int]]:
    """Shards as they are done: name, items, and how many of them could not be embedded."""
    if not waiting:
        return
    if options.ray:
        with Cluster(options.ray, options.workers) as cluster:
            items = [{"task": json.dumps(task.described())} for task in waiting]
            for row in cluster.mapped(items, OnRay, str(options.bundle.absolute())):
                yield str(row["name"]), int(row["items"]), int(row["failed"])
    elif options.workers == 1:
        yield from map(Shards(options.bundle).embed, waiting)
    else:
        # Spawned: ONNX Runtime's threads do not outlive a fork.
        context = multiprocessing.get_context("spawn")
        with context.Pool(options.workers, _begin, (options.bundle,)) as pool:
            yield from pool.imap_unordered(_embed, waiting)


class OnRay:
    """An actor of Ray Data: the towers are opened once, and each row names a shard."""

    def __init__(self, bundle: str) -> None:
        self._shards = Shards(Path(bundle))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self._shards.embed(Task.of(json.loads(str(task)))) for task in batch["task"]]
        names, items, failed = zip(*done, strict=True)
        return {"name": list(names), "items": list(items), "failed": list(failed)}


_own: Shards | None = None
"""The shard writer of a worker process."""


def _begin(bundle: Path) -> None:
    global _own
    _own = Shards(bundle)


def _embed(task: Task) -> tuple[str, int, int]:
    assert _own is not None
    return _own.embed(task)
