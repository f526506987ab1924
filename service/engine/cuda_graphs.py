"""A session on a GPU whose calls of one shape are recorded once and replayed (CUDA graphs): no launch costs.

Only for inputs whose rows all have one shape, images: batches are filled up with zeros to a power of two, and each of
those sizes has buffers on the device and a recording of its own. Sizes above the largest are run without one.
"""

import threading
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.contract.bundle import OUTPUT
from service.engine.providers import bucket

LARGEST = 32
"""Rows of the largest recording: each keeps its buffers permanently."""
_UNRECORDED = "-1"


class Recorded:
    """Runs recorded CUDA graphs, one call at a time. `device` is ONNX Runtime's name: "cuda", or "cpu", where it
    only binds."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str, gpu: int, dimensions: int) -> None:
        self._session, self._device, self._gpu, self._dimensions = session, device, gpu, dimensions
        self._name = session.get_inputs()[0].name
        self._sizes: dict[int, tuple[Any, Any, Any]] = {}
        self._lock = threading.Lock()

    def run(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the graph: rows (B, …) → vectors (B, dimensions)."""
        size = bucket(len(rows), LARGEST)
        with self._lock:
            if size is None:
                options = self._options(_UNRECORDED)
                return np.asarray(self._session.run([OUTPUT], {self._name: rows}, options)[0], np.float32)
            given, made, binding = self._buffers(size, rows.shape[1:])
            filled = np.zeros((size, *rows.shape[1:]), np.float32)
            filled[: len(rows)] = rows
            given.update_inplace(filled)
            self._session.run_with_iobinding(binding, self._options(str(size)))
            return np.array(made.numpy()[: len(rows)])

    def _buffers(self, size: int, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
        if size not in self._sizes:
            value = onnxruntime.OrtValue.ortvalue_from_numpy
            given = value(np.zeros((size, *shape), np.float32), self._device, self._gpu)
            made = value(np.zeros((size, self._dimensions), np.float32), self._device, self._gpu)
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(self._name, given)
            binding.bind_ortvalue_output(OUTPUT, made)
            self._sizes[size] = given, made, binding
        return self._sizes[size]

    def _options(self, graph: str) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        if self._device != "cpu":
            options.add_run_config_entry("gpu_graph_id", graph)
        return options
