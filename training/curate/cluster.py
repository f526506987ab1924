"""The two passes over a pool on Ray Data: a file is a task, and the work folder is one that every machine sees.

What a block becomes and what the heaps hold follows from the rows alone, so that the outcome is that of one process.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.curate.blocks import Preparation
from training.curate.candidates import Candidates
from training.curate.pool import Offer, Part, prepared
from training.curate.recipe import CurateError

_GATHERED = 64
"""Blocks whose candidates one task gathers."""


class Cluster:
    """Workers of a Ray cluster: that of an address, or one of this machine's own for as long as this lives."""

    def __init__(self, address: str, workers: int) -> None:
        """Joins the cluster. Raises CurateError where Ray is not installed or the address does not answer."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.data
        except ImportError:
            raise CurateError("--ray needs Ray: pip install 'isthmus[ray]'") from None
        self._ray, self._workers = ray, workers
        local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, **local)
        except (ConnectionError, ValueError) as error:
            raise CurateError(f"--ray {address}: {error}") from None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def prepare(self, preparation: Preparation, parts: Sequence[Part]) -> list[Path]:
        items = [{"part": place, "source": name, "file": str(path)} for place, (name, path) in enumerate(parts)]
        rows = self.mapped(items, _Prepare, preparation)
        return [Path(row["block"]) for row in sorted(rows, key=lambda row: (row["part"], row["place"]))]

    def gather(self, offer: Offer, files: Sequence[Path]) -> Candidates:
        groups = [list(map(str, files[start : start + _GATHERED])) for start in range(0, len(files), _GATHERED)]
        candidates = offer.empty()
        for row in self.mapped([{"blocks": "\n".join(group)} for group in groups], _Gather, offer):
            candidates.merge(row["candidates"])
        return candidates

    def mapped(self, items: list[dict[str, Any]], function: type, argument: Any) -> Iterator[dict[str, Any]]:
        data = self._ray.data
        dataset = data.from_items(items, override_num_blocks=max(1, len(items)))
        pool = data.ActorPoolStrategy(size=min(self._workers, max(1, len(items))))
        mapped = dataset.map_batches(function, fn_constructor_args=[argument], batch_size=1, compute=pool)
        try:
            yield from mapped.iter_rows()
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            while cause is not None and not isinstance(cause, CurateError):
                cause = cause.__cause__ or getattr(cause, "cause", None)
            raise CurateError(str(cause)) if cause else error from None


class _Prepare:
    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        (part,), (name,), (file,) = batch["part"], batch["source"], batch["file"]
        for place, (block, _) in enumerate(prepared(self._preparation, [(str(name), Path(str(file)))])):
            yield {"part": [part], "place": [place], "block": [str(block)]}


class _Gather:
    def __init__(self, offer: Offer) -> None:
        self._offer = offer

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"candidates": [self._offer.gather(map(Path, str(blocks).split("\n"))) for blocks in batch["blocks"]]}
