"""A tower's graph in a smaller precision: int8 weights and activations, or fp16; the projector stays fp32.

Whether a graph that is made here may ship is for `training.bundle.precision` to measure.

int8 is ONNX Runtime's own static quantisation (QDQ): weights per output channel, activations with one scale per tensor,
from real inputs that were seen before, so that a vector does not depend on what else is in its batch. Quantised are, of
a convolutional encoder, the convolutions and what lies between them, but for the first three, whose few channels carry
all that follows.
Of a transformer its matrix products with weights, after their inputs' outlying channels are moved into the weights
(SmoothQuant, arXiv 2211.10438): without that a MiniLM loses as much as it does here to all else together (docs/LOG.md,
2026-11-24).

Weights have seven of the eight bits: processors without VNNI (AVX2 alone) add two products of eight bits in sixteen,
and saturate. Vectors would depend on the machine: on one that the gates had not seen, pictures' had a cosine of 0.78.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from service.contract.tokens import TextPreprocessing
from training.errors import TrainingError
from training.features import collate
from training.graphs import HEAD, join_earlier_rows, session, whole_weights, without_earlier_rows

_SMOOTHING = 0.7  # SmoothQuant's α; MiniLM's lowest cosine is best there of 0.3 to 1.0
_SEVEN_BITS = True
_CONVOLUTIONAL = ["Conv", "Relu", "Clip", "Add"]
_EXACT = 3  # convolutions in a row: 3 % of EfficientNet-Lite2's work, and most of its loss (docs/LOG.md, 2026-11-30)
_TINY = 1e-5

Batch = Mapping[str, NDArray[Any]]


class QuantiseError(TrainingError):
    """A graph cannot be quantised: the message says what it lacks."""


def batches(graph: Path, preprocessing: Any, prepared: Sequence[Any]) -> list[Batch]:
    """Inputs of a graph to calibrate it on: texts one by one, for padding is no activation to make room for."""
    names = [value.name for value in onnx.load(graph, load_external_data=False).graph.input]
    size = 1 if isinstance(preprocessing, TextPreprocessing) else 8
    parts = [prepared[start : start + size] for start in range(0, len(prepared), size)]
    return [dict(zip(names, collate(preprocessing, part), strict=False)) for part in parts]


def static(source: Path, target: Path, calibration: Sequence[Batch]) -> None:
    """int8 with scales from `calibration`. Raises QuantiseError where there is nothing to quantise or calibrate on."""
    if not calibration:
        raise QuantiseError(f"{source.name}: static int8 needs real inputs to calibrate on")
    model, width = _of_all_inputs(source)
    products, convolutions = _products(model), [node for node in _chain(model) if node.op_type == "Conv"]
    if not products and not convolutions:
        raise QuantiseError(
            f"{source.name} has no matrix product with weights outside its projector, and no convolution after its "
            f"first {_EXACT}: serve it in fp32"
        )
    with tempfile.TemporaryDirectory() as name, _quiet():
        ready = Path(name) / "ready.onnx"
        if len(products) > len(convolutions):
            onnx.save(smoothed(model, calibration), ready)
            kinds, nodes = ["MatMul"], [node.name for node in products]
            # A product that nothing quantised reads gives its sums as they are.
            extra: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": kinds}
        else:
            # Shapes are inferred, and batch normalisation folded, before ranges are measured.
            onnx.save(model, Path(name) / "model.onnx")
            quant_pre_process(Path(name) / "model.onnx", ready, skip_symbolic_shape=True)
            kinds, extra = _CONVOLUTIONAL, {}
            nodes = [node.name for node in _chain(onnx.load(ready))]
        quantize_static(
            ready,
            target,
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=kinds,
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=_SEVEN_BITS,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options=extra,
        )
    _tidy(target, width)


def half(source: Path, target: Path) -> None:
    """fp16 inside, with the inputs, the outputs and the projector in fp32."""
    model, width = _of_all_inputs(source)
    head = [node.name for node in model.graph.node if node.name.startswith(HEAD)]
    with _quiet():
        converted = convert_float_to_float16(
            onnx.shape_inference.infer_shapes(model),
            keep_io_types=True,
            node_block_list=head,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, "LpNormalization"],
        )
    onnx.save(converted, target)
    _tidy(target, width)


def smoothed(model: ModelProto, calibration: Sequence[Batch]) -> ModelProto:
    """Computes the same function, with each product's inputs x divided and its weights multiplied by a scale per
    channel.

    scale = max|x|^α / max|w|^(1 - α): channels of large activations become smaller, and their weights larger, so that
    one scale per tensor fits the activations (SmoothQuant, arXiv 2211.10438, equation 4).
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in _products(model):
        readers.setdefault(node.input[0], []).append(node)
    scales = {}
    for name, largest in _largest(model, list(readers), calibration).items():
        tables = [numpy_helper.to_array(weights[node.input[1]]) for node in readers[name]]
        of_weights = np.maximum(np.max([np.abs(table).max(axis=1) for table in tables], axis=0), _TINY)
        scales[name] = (np.maximum(largest, _TINY) ** _SMOOTHING / of_weights ** (1 - _SMOOTHING)).astype(np.float32)
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    done: set[str] = set()
    products = {node.name for nodes in readers.values() for node in nodes}
    for node in model.graph.node:
        if node.name in products:
            name = node.input[0]
            if name not in done:
                done.add(name)
                result.graph.initializer.append(numpy_helper.from_array(1 / scales[name], f"{name}/smoothing"))
                result.graph.node.append(
                    helper.make_node("Mul", [name, f"{name}/smoothing"], [f"{name}/smooth"], f"smooth/{name}")
                )
            table = numpy_helper.to_array(weights[node.input[1]]) * scales[name][:, None]
            # Under a name of its own: other nodes may read the same weights.
            result.graph.initializer.append(numpy_helper.from_array(table, f"{node.name}/smoothed"))
            changed = NodeProto()
            changed.CopyFrom(node)
            changed.input[0], changed.input[1] = f"{name}/smooth", f"{node.name}/smoothed"
            node = changed
        result.graph.node.append(node)
    read = {name for node in result.graph.node for name in node.input}
    kept = [tensor for tensor in result.graph.initializer if tensor.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


def _largest(model: ModelProto, names: Sequence[str], calibration: Sequence[Batch]) -> dict[str, NDArray[np.float32]]:
    """The largest magnitude that each channel of some tensors takes."""
    watched = ModelProto()
    watched.CopyFrom(model)
    there = {output.name for output in model.graph.output}
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in there)
    running = session(watched.SerializeToString())
    result: dict[str, NDArray[np.float32]] = {}
    for batch in calibration:
        for name, values in zip(names, running.run(list(names), dict(batch)), strict=True):
            largest = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0)
            result[name] = np.maximum(result[name], largest) if name in result else largest
    return result


def _chain(model: ModelProto) -> list[NodeProto]:
    """The encoder's convolutions but the first three in a row, what lies between them, and the sums of two branches.

    A shift of the features is no such sum.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    before: dict[str, int] = {}
    chain = []
    for node in model.graph.node:
        count = max((before.get(name, 0) for name in node.input), default=0) + (node.op_type == "Conv")
        before.update(dict.fromkeys(node.output, count))
        shift = node.op_type == "Add" and constants.intersection(node.input)
        if count > _EXACT and node.op_type in _CONVOLUTIONAL and not shift and not node.name.startswith(HEAD):
            chain.append(node)
    return chain


def _products(model: ModelProto) -> list[NodeProto]:
    """The encoder's products with a matrix of weights on the right."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and not node.name.startswith(HEAD) and node.input[1] in matrices
    ]


def _of_all_inputs(path: Path) -> tuple[ModelProto, int | None]:
    """A graph without the input that may be left out, which quantisers take for a constant; and what `_tidy` needs."""
    model = whole_weights(onnx.load(path))
    return model, without_earlier_rows(model)


def _tidy(path: Path, width: int | None) -> None:
    """Leaves a graph as `training.bundle.export` does: one file, no shapes but those of inputs and outputs."""
    model = onnx.load(path)
    if width is not None:
        join_earlier_rows(model, width)
    model.graph.ClearField("value_info")
    model.doc_string = ""
    onnx.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises on the root logger, and means what is done here already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Reader(CalibrationDataReader):
    def __init__(self, calibration: Sequence[Batch]) -> None:
        self._left = iter(calibration)

    def get_next(self) -> Any:
        batch = next(self._left, None)
        return None if batch is None else dict(batch)
