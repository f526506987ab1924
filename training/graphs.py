"""Torch modules as ONNX programs, and sessions that run them beside other work."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

_LARGE = 1_024  # numbers


def onnx_bytes(model: nn.Module, example: Tensor, input_name: str, output_names: str | Sequence[str]) -> bytes:
    """One self-contained ONNX program with a dynamic first dimension."""
    program = torch.onnx.export(
        model,
        (example,),
        input_names=[input_name],
        output_names=[output_names] if isinstance(output_names, str) else list(output_names),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    stream = io.BytesIO()
    program.save(stream, external_data=False)  # type: ignore[arg-type]
    written = onnx.load_from_string(stream.getvalue())
    for node in written.graph.node:
        del node.metadata_props[:]  # where in whose folders the exporter found it
    whole: bytes = written.SerializeToString()
    return whole


def half_stored(program: bytes) -> bytes:
    """The same graph with its larger weights kept in float16, and cast where they are used: half the file."""
    model = onnx.load_from_string(program)
    large = [each for each in model.graph.initializer if each.data_type == TensorProto.FLOAT and _size(each) > _LARGE]
    casts = []
    for tensor in large:
        name = f"{tensor.name}/half"
        casts.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
        model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name))
        model.graph.initializer.remove(tensor)
    nodes = list(model.graph.node)
    for node in nodes:
        del node.metadata_props[:]
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    whole: bytes = model.SerializeToString()
    return whole


def whole_weights(model: ModelProto) -> ModelProto:
    """Undo half_stored: weights that are cast from float16 become float32 weights, as quantisation looks for them."""
    held = {each.name: each for each in model.graph.initializer if each.data_type == TensorProto.FLOAT16}
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.input[0] in held:
            half = held[node.input[0]]
            array = numpy_helper.to_array(half).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
            model.graph.initializer.remove(half)
            model.graph.node.remove(node)
    return model


def _size(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def session(program: Path | bytes) -> onnxruntime.InferenceSession:
    """On the CPU, with threads that sleep while they wait: beside another job, spinning takes its cores for nothing."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
