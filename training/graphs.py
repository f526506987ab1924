"""Torch modules as ONNX programs, and sessions that run them beside other work."""

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from service.contract.bundle import EARLIER_ROWS, ROWS

HEAD = "head/"
"""How the names of a projector's nodes begin, in every graph that `training.bundle.export` writes."""
_LARGE = 1_024  # numbers
_OPSET = 20


def to_onnx(
    module: nn.Module, arrays: Sequence[NDArray[Any]], inputs: Sequence[str], outputs: Sequence[str], shapes: Any
) -> ModelProto:
    """A module as a graph, traced on example arrays; `shapes` says what of each input is dynamic."""
    # The exporter warns of its own deprecations, and that torchvision, which is not used, is absent.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(array) for array in arrays),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(shapes),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def onnx_bytes(model: nn.Module, example: Tensor, input_name: str, output_names: str | Sequence[str]) -> bytes:
    """One self-contained ONNX program with a dynamic first dimension."""
    outputs = [output_names] if isinstance(output_names, str) else output_names
    written = to_onnx(model, [example.numpy()], [input_name], outputs, [{0: torch.export.Dim("batch")}])
    for node in written.graph.node:
        del node.metadata_props[:]  # where in whose folders the exporter found it
    whole: bytes = written.SerializeToString()
    return whole


def half_stored(program: bytes) -> bytes:
    """Returns the graph with its larger weights kept in float16, and cast where they are used: half the file.

    What is only looked up, as the vectors of tokens are, is cast once it has been: such a table is half as large in
    memory too, where ONNX Runtime casts all other weights as it opens the graph.
    """
    model = onnx.load_from_string(program)
    nodes = list(model.graph.node)
    for tensor in list(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or _size(tensor) <= _LARGE:
            continue
        name = f"{tensor.name}/half"
        users = [node for node in nodes if tensor.name in node.input]
        if all(user.op_type == "Gather" and tensor.name not in user.input[1:] for user in users):
            for user in users:
                user.input[0], rows = name, user.output[0]
                user.output[0] = f"{rows}/half"
                nodes.insert(nodes.index(user) + 1, _to_whole(user.output[0], rows))
        else:
            nodes.insert(0, _to_whole(name, tensor.name))
        model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name))
        model.graph.initializer.remove(tensor)
    for node in nodes:
        del node.metadata_props[:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    whole: bytes = model.SerializeToString()
    return whole


def _to_whole(half: str, whole: str) -> NodeProto:
    return helper.make_node("Cast", [half], [whole], to=TensorProto.FLOAT)


def whole_weights(model: ModelProto) -> ModelProto:
    """Undo half_stored: weights that are cast from float16 become float32 weights, as quantisation looks for them."""
    halves = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.input[0] in halves:
            half = halves[node.input[0]]
            array = numpy_helper.to_array(half).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
            model.graph.initializer.remove(half)
            model.graph.node.remove(node)
    return model


def with_earlier_rows(model: ModelProto, features: str, width: int) -> None:
    """The encoder's features of rows become the output ROWS, and its head reads those of earlier rows before them.

    The input EARLIER_ROWS is an initialiser of no rows, so that it may be left out.
    """
    graph = model.graph
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == features:
                    names[index] = ROWS
    graph.output.append(helper.make_tensor_value_info(ROWS, TensorProto.FLOAT, ["length", width]))
    join_earlier_rows(model, width)


def without_earlier_rows(model: ModelProto) -> int | None:
    """Takes away the input that may be left out, for what cannot deal with such, and returns the features' width.

    None where there is none. ROWS stays an output. `join_earlier_rows` undoes it.
    """
    graph = model.graph
    given = next((value for value in graph.input if value.name == EARLIER_ROWS), None)
    if given is None:
        return None
    concat = next(node for node in graph.node if EARLIER_ROWS in node.input)
    _read_instead(model, {concat.output[0]}, ROWS)
    graph.node.remove(concat)
    graph.input.remove(given)
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == EARLIER_ROWS))
    return int(given.type.tensor_type.shape.dim[1].dim_value)


def join_earlier_rows(model: ModelProto, width: int) -> None:
    """Joins a graph with the output ROWS again: what reads it reads the input EARLIER_ROWS first."""
    graph, joined = model.graph, f"{HEAD}rows"
    place, last = next((index, node) for index, node in enumerate(graph.node) if ROWS in node.output)
    # A graph in half precision casts its features once for the output, and again for who reads them.
    same = {ROWS}
    if last.op_type == "Cast":
        same |= {n.output[0] for n in graph.node if n.op_type == "Cast" and n.input == last.input and _to_float(n)}
    _read_instead(model, same, joined)
    concat = helper.make_node("Concat", [EARLIER_ROWS, ROWS], [joined], f"{joined}/concat", axis=0)
    graph.node.insert(place + 1, concat)
    graph.input.append(helper.make_tensor_value_info(EARLIER_ROWS, TensorProto.FLOAT, ["earlier", width]))
    graph.initializer.append(numpy_helper.from_array(np.zeros((0, width), np.float32), EARLIER_ROWS))


def _read_instead(model: ModelProto, names: set[str], other: str) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = other


def _to_float(cast: NodeProto) -> bool:
    return any(attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in cast.attribute)


def _size(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def session(program: Path | bytes, threads: int = 0, gpu: bool = False) -> onnxruntime.InferenceSession:
    """Opens a graph on the CPU, or with `gpu` on a GPU where there is one; 0: as many threads as there are cores.

    Threads sleep while they wait: beside another job, spinning takes its cores for nothing.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # it warns of inputs that may be left out
    cuda = ["CUDAExecutionProvider"] if gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else []
    return onnxruntime.InferenceSession(program, options, providers=[*cuda, "CPUExecutionProvider"])
