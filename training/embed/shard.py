"""One shard: rows → the bundle's towers → a Parquet file, written whole or not at all."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.contract.bundle import OUTPUT, Manifest, Modality, read_bundle
from service.contract.vectors import l2_normalise
from training.embed.plan import EmbedError, Row, Task, read_rows
from training.features import FeatureError, feeds, preparer
from training.files import whole
from training.graphs import session
from training.heads.bundled import as_encoder
from training.pairs import SUFFIXES

_CALLS: dict[str, int] = {"image": 8, "text": 32}
"""Items in one call; a sound is a call of its own."""


def schema(manifest: Manifest) -> Any:
    """Returns the schema of the Parquet files; it is what `python -m service load` reads.

    Raises EmbedError where pyarrow is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise EmbedError("Parquet needs pyarrow: pip install 'isthmus[parquet]'") from None
    columns = [
        ("id", pa.string()),
        ("modality", pa.string()),
        ("vector", pa.list_(pa.float32(), manifest.dimensions)),
        ("metadata", pa.string()),
        ("text", pa.string()),
        ("space", pa.dictionary(pa.int32(), pa.string())),
    ]
    return pa.schema(columns, {"isthmus.space": manifest.space, "isthmus.dimensions": str(manifest.dimensions)})


class Shards:
    """A bundle's towers, each opened when a row needs it."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = read_bundle(bundle)
        self._towers: dict[Modality, tuple[onnxruntime.InferenceSession, Callable[[Any], Any]]] = {}

    def embed(self, task: Task) -> tuple[str, int, int]:
        """The file's name, how many items it holds, and how many could not be embedded."""
        import pyarrow as pa
        import pyarrow.parquet

        rows, manifest = read_rows(task.rows), self._bundle.manifest
        vectors, failures = self._vectors(rows)
        kept = [(row, vectors[place]) for place, row in enumerate(rows) if place in vectors]
        stacked = np.stack([vector for _, vector in kept]) if kept else np.empty((0, manifest.dimensions), np.float32)
        columns = [
            pa.array([row.id for row, _ in kept], pa.string()),
            pa.array([self._modality(row) for row, _ in kept], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(stacked.reshape(-1)), manifest.dimensions),
            pa.array([json.dumps(row.metadata, ensure_ascii=False) for row, _ in kept], pa.string()),
            pa.array([row.text for row, _ in kept], pa.string()),
            pa.array([manifest.space] * len(kept), pa.string()).dictionary_encode(),
        ]
        if failures:
            task.failures.parent.mkdir(exist_ok=True)
            task.failures.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in failures))
        with whole(task.target) as partial:
            pyarrow.parquet.write_table(pa.Table.from_arrays(columns, schema=schema(manifest)), partial)
        return task.target.name, len(kept), len(failures)

    def _vectors(self, rows: Sequence[Row]) -> tuple[dict[int, NDArray[np.float32]], list[dict[str, str]]]:
        vectors: dict[int, NDArray[np.float32]] = {}
        failures: list[dict[str, str]] = []
        waiting: dict[Modality, list[tuple[int, Any]]] = {}
        for place, row in enumerate(rows):
            modality = self._modality(row)
            try:
                prepared = self._tower(modality)[1](row.text or "" if row.file is None else Path(row.file))
            except FeatureError as error:
                failures.append({"id": row.id, "error": str(error)})
                continue
            waiting.setdefault(modality, []).append((place, prepared))
            if len(waiting[modality]) == _CALLS.get(modality, 1):
                self._call(modality, waiting.pop(modality), vectors)
        for modality, left in waiting.items():
            self._call(modality, left, vectors)
        failures += [
            {"id": rows[place].id, "error": "the model gave it no direction"}
            for place in sorted(place for place, vector in vectors.items() if not vector.any())
        ]
        return {place: vector for place, vector in vectors.items() if vector.any()}, failures

    def _call(
        self, modality: Modality, items: Sequence[tuple[int, Any]], vectors: dict[int, NDArray[np.float32]]
    ) -> None:
        graph, _ = self._tower(modality)
        spec = self._bundle.manifest.towers[modality].preprocessing
        (made,) = graph.run([OUTPUT], feeds(spec, [prepared for _, prepared in items]))
        for (place, _), vector in zip(items, made, strict=True):
            finite = np.isfinite(vector).all() and np.any(vector)
            vectors[place] = l2_normalise(vector) if finite else np.zeros_like(vector)

    def _tower(self, modality: Modality) -> tuple[onnxruntime.InferenceSession, Callable[[Any], Any]]:
        if modality not in self._towers:
            if modality not in self._bundle.manifest.towers:
                raise FeatureError(f"the bundle has no {modality} tower")
            threads = 1 if os.environ.get("OMP_NUM_THREADS") == "1" else 0
            graph = session(self._bundle.tower_path(modality), threads, gpu=True)
            self._towers[modality] = graph, preparer(as_encoder(self._bundle, modality), "passage")
        return self._towers[modality]

    def _modality(self, row: Row) -> Modality:
        if row.file is None:
            return "text"
        suffix, towers = Path(row.file).suffix.lower(), self._bundle.manifest.towers
        if suffix in SUFFIXES["array"]:  # of the only tower that takes arrays
            arrays = [name for name in towers if towers[name].preprocessing.kind == "array"]
            return arrays[0] if len(arrays) == 1 else "array"
        return "audio" if suffix in SUFFIXES["audio"] else "image"
