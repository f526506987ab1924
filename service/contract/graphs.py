"""The protobuf of an ONNX graph says where its weights are, inside and outside its file, without loading it.

A graph may name files for its large tensors (external data), and a runtime opens what it names. The names stand in
tensors, and tensors stand in graphs, functions and the attributes of nodes, which hold graphs again (onnx.proto3).
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Message → field number → the message that the field holds. What is not here holds no tensors.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_KEY, _VALUE = 1, 2  # of an Entry
_DIMS, _TYPE, _RAW = 1, 2, 9  # of a Tensor
_DEEPEST = 100
"""As deep as protobuf itself reads messages in messages."""


class NotAGraph(ValueError):
    """Raised where a file is no protobuf."""


def external_files(path: Path) -> set[str]:
    """Return the names of files, as written, that the graph's tensors are kept in. Raises NotAGraph, OSError."""
    if not path.stat().st_size:
        raise NotAGraph("it is empty")
    names: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        messages = [("Model", 0, len(data), 0)]
        while messages:
            message, start, end, depth = messages.pop()
            if depth > _DEEPEST:
                raise NotAGraph("it is nested too deeply")
            if message == "Entry":
                names |= _location(data, start, end)
                continue
            inside = _FIELDS[message]
            for number, begin, stop in _parts(data, start, end):
                if number in inside:
                    messages.append((inside[number], begin, stop, depth + 1))
    return names


@dataclass(frozen=True)
class Weights:
    """Says where in a graph's file the values of a tensor stand."""

    start: int
    end: int
    type: int
    """TensorProto.DataType: 1 is float32, 10 float16."""
    dims: tuple[int, ...]


def weights(data: bytes) -> list[Weights]:
    """Return the initializers of a graph whose values stand in the file as raw bytes, in their order in the file.
    Raises NotAGraph."""
    tensors = []
    for number, begin, stop in _parts(data, 0, len(data)):
        graph = _parts(data, begin, stop) if number == 7 else ()
        for _, start, end in (part for part in graph if part[0] == 5):
            dims: list[int] = []
            kind, raw = 0, None
            for field, wire, first, last in _fields(data, start, end):
                if field == _DIMS and wire == 0:
                    dims.append(first)
                elif field == _DIMS:
                    while first < last:
                        size, first = _varint(data, first, last)
                        dims.append(size)
                elif field == _TYPE:
                    kind = first
                elif field == _RAW:
                    raw = first, last
            if raw is not None:
                tensors.append(Weights(*raw, kind, tuple(dims)))
    return sorted(tensors, key=lambda tensor: tensor.start)


def _location(data: mmap.mmap, start: int, end: int) -> set[str]:
    """Return the values of the key `location`: both where it is there twice, since readers differ in which they
    take."""
    parts = [(number, data[begin:stop]) for number, begin, stop in _parts(data, start, end)]
    if (_KEY, b"location") not in parts:
        return set()
    return {value.decode("utf-8", "replace") for number, value in parts if number == _VALUE}


def _parts(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of a message that are strings or messages: number, start, end. Raises NotAGraph."""
    return ((number, first, last) for number, kind, first, last in _fields(data, start, end) if kind == 2)


def _fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the fields of a message: number, kind, and start and end; of an integer (kind 0) its value and its end.
    Raises NotAGraph."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at, end)
            yield number, kind, value, at
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            size, at = _varint(data, at, end)
            if size > end - at:
                raise NotAGraph("it ends too early")
            yield number, kind, at, at + size
            at += size
        else:
            raise NotAGraph("it is no protobuf")
    if at > end:
        raise NotAGraph("it ends too early")


def _varint(data: mmap.mmap | bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise NotAGraph("it is no protobuf")
