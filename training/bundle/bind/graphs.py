"""Surgery on the ONNX graphs of towers: a map appended to one, two of one input mixed into one."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from service.contract.bundle import OUTPUT, ROWS
from training.bundle.bind.maps import Map


def append(tower: Path, through: Map, target: Path) -> None:
    """Write `tower` with a map after its unit vectors."""
    model = onnx.load(tower)
    _rename_output(model, "bind/unit")
    model.graph.node.extend(_mapped(model, "bind/unit", through, OUTPUT))
    _finish(model, through.weight.shape[1], target)


def mix(native: Path, other: Path, through: Map, weight: float, target: Path) -> None:
    """Write the unit vector of (1 - weight) native(x) + weight map(other(x)); both graphs take the same inputs x.

    Tensors that both hold are kept once, so that a runtime finds an encoder that they share and computes it once.
    """
    model, second = onnx.load(native), onnx.load(other)
    opset = max(entry.version for graph in (model, second) for entry in graph.opset_import if not entry.domain)
    model, second = (onnx.version_converter.convert_version(graph, opset) for graph in (model, second))
    _rename_output(model, "bind/own")
    _rename_output(second, "unit")
    second = onnx.compose.add_prefix(second, "bind/other/", rename_inputs=False)
    model.ir_version = max(model.ir_version, second.ir_version)
    known = {_content(tensor): tensor.name for tensor in model.graph.initializer}
    same: dict[str, str] = {}
    for tensor in second.graph.initializer:
        if (first := known.get(_content(tensor))) is not None:
            same[tensor.name] = first
        else:
            model.graph.initializer.append(tensor)
    for node in second.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
    model.graph.node.extend(second.graph.node)
    nodes = _mapped(model, "bind/other/unit", through, "bind/mapped")
    for name, share in (("own", 1 - weight), ("mapped", weight)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(share).reshape(1), f"bind/share_of_{name}"))
        nodes.append(helper.make_node("Mul", [f"bind/{name}", f"bind/share_of_{name}"], [f"bind/part_of_{name}"]))
    nodes.append(helper.make_node("Add", ["bind/part_of_own", "bind/part_of_mapped"], ["bind/sum"]))
    nodes.append(helper.make_node("LpNormalization", ["bind/sum"], [OUTPUT], axis=1, p=2))
    model.graph.node.extend(nodes)
    _finish(model, through.weight.shape[1], target)


def _mapped(model: ModelProto, vectors: str, through: Map, result: str) -> list[NodeProto]:
    """Nodes from unit vectors to mapped unit vectors; their constants go into the model."""
    for name, value in (("weight", through.weight), ("bias", through.bias)):
        model.graph.initializer.append(numpy_helper.from_array(value, f"bind/{name}"))
    return [
        helper.make_node("Gemm", [vectors, "bind/weight", "bind/bias"], ["bind/projected"]),
        helper.make_node("LpNormalization", ["bind/projected"], [result], axis=1, p=2),
    ]


def _rename_output(model: ModelProto, name: str) -> None:
    for node in model.graph.node:
        for index, output in enumerate(node.output):
            if output == OUTPUT:
                node.output[index] = name
    model.graph.output[0].name = name


def _finish(model: ModelProto, dimensions: int, target: Path) -> None:
    model.graph.ClearField("value_info")
    rows = [value for value in model.graph.output if value.name == ROWS]
    model.graph.ClearField("output")
    model.graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", dimensions]))
    model.graph.output.extend(rows)
    onnx.save(model, target)
    onnx.checker.check_model(target)


def _content(tensor: TensorProto) -> bytes:
    array = numpy_helper.to_array(tensor)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).digest()
