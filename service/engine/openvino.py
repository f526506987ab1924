"""OpenVINO runs some towers faster than ONNX Runtime, and in bfloat16 where the processor has it."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from queue import LifoQueue
from typing import Any, NamedTuple

from numpy.typing import NDArray

from service.engine.providers import OPENVINO, TowerError


class Node(NamedTuple):
    name: str


class OpenVinoSession:
    """Runs a compiled graph by the methods of onnxruntime.InferenceSession that a tower uses. Any number of threads may
    call `run`; `lanes` calls run at once, on `threads` threads each."""

    def __init__(self, graph: bytes, threads: int, lanes: int, precision: str) -> None:
        """Compile an ONNX graph that keeps its weights in itself. `precision` is bf16 for arithmetic in bfloat16.

        Raises RuntimeError where OpenVINO cannot.
        """
        options = {
            "INFERENCE_NUM_THREADS": threads * lanes,
            "NUM_STREAMS": lanes,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        self._model = _core().compile_model(_core().read_model(graph), "CPU", options)
        self._requests: LifoQueue[Any] = LifoQueue()  # the last one's memory is still in the processor's cache
        for _ in range(lanes):
            self._requests.put(self._model.create_infer_request())

    def run(self, names: Sequence[str], arrays: Mapping[str, NDArray[Any]], options: object = None) -> list[Any]:
        """Run the graph on its inputs by name; return copies of the named outputs."""
        request = self._requests.get()
        try:
            request.infer(dict(arrays), share_inputs=True)
            return [request.get_tensor(name).data.copy() for name in names]
        finally:
            self._requests.put(request)

    def get_providers(self) -> list[str]:
        return [OPENVINO]

    def get_inputs(self) -> list[Node]:
        return [Node(port.any_name) for port in self._model.inputs]

    def get_outputs(self) -> list[Node]:
        return [Node(port.any_name) for port in self._model.outputs]

    def get_overridable_initializers(self) -> list[Node]:
        """Return nothing: OpenVINO takes an input that may be left out for a constant."""
        return []


def installed() -> str | None:
    """Return the version of OpenVINO, or None."""
    return version("openvino") if importlib.util.find_spec("openvino") else None


def has_bf16() -> bool:
    """Return whether this processor multiplies in bfloat16. Imports OpenVINO, which is installed."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def _core() -> Any:
    try:
        import openvino
    except ImportError:
        raise TowerError("OpenVINO is not installed: pip install 'isthmus[openvino]'") from None
    return openvino.Core()
