"""A tower's graph becomes a file that is small enough to be downloaded; the page of `isthmus publish` unpacks it.

Weights are stored as integers times a step per row, and gzip codes the upper bits of the integers by how often each
occurs (uniform quantisation with entropy coding). How far the rounding of each matrix moves the tower's vectors is
measured on samples. For a given sum of squared errors the file is smallest where a matrix of n weights adds a share in
proportion to n (reverse water-filling), so a matrix that matters little has few bits. The graph itself and the
arithmetic stay as they are.

The file is gzip of: the header's length (4 bytes, little-endian), the header (JSON), the graph without the packed
weights, and for each tensor its steps (float32, one a row), upper bits (int8) and lower bits (a stream, the lowest bit
first).
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnxruntime
import orjson
from numpy.typing import NDArray

from service.contract.bundle import OUTPUT, Bundle, Modality
from service.contract.graphs import Weights, external_files, weights
from service.contract.vectors import l2_normalise
from service.engine.providers import CPU, TowerError
from service.engine.towers import Arrays, session_options

_TYPES: Final = {1: "<f4", 10: "<f2"}
_ERRORS = (0.0028, 0.0007, 0.0)
"""Lengths by which packing may move a unit vector, tried until the vectors are near enough; 0 packs nothing."""
_LEAST_COSINE = 0.9999
"""Between the vectors of the packed and of the whole graph."""
_TRIAL, _COARSEST, _FINEST = 256, 16, 2_048
"""Steps in the root mean square of a row: where errors are measured, and at least and at most in the file."""
_FEW = 8
"""Number of samples by which the error of each tensor is measured."""
_FEWEST, _NARROWEST = 4_096, 64
"""Weights of a tensor, and of a row, below which packing saves next to nothing."""
_LARGEST_UPPER = 127.49


def packed_tower(bundle: Bundle, modality: Modality, samples: Sequence[Arrays]) -> tuple[bytes, float]:
    """Return a tower's file for the page, and the lowest cosine of its vectors of the samples to the tower's own.

    Raises BundleError, and TowerError for a graph whose weights are in other files.
    """
    tower = bundle.manifest.towers[modality]
    with bundle.checked(tower.file) as path:
        if external_files(path):
            raise TowerError(f"{bundle.path / tower.file} keeps its weights in other files: export it with all in one")
        graph = path.read_bytes()
    originals = _vectors(graph, samples)
    tensors = _packable(graph)
    _, rounded = pack(graph, {tensor.start: _TRIAL for tensor in tensors})
    moved = []
    for tensor in tensors:
        changed_graph = graph[: tensor.start] + rounded[tensor.start : tensor.end] + graph[tensor.end :]
        differences = _vectors(changed_graph, samples[:_FEW]) - originals[:_FEW]
        moved.append(math.sqrt(np.square(differences).sum(axis=1).mean()))
    counts = [math.prod(tensor.dims) for tensor in tensors]
    for error in _ERRORS:
        shares = [error * math.sqrt(count / sum(counts)) for count in counts]
        ratios = {
            tensor.start: min(max(_TRIAL * distance / share, _COARSEST), _FINEST)
            for tensor, distance, share in zip(tensors, moved, shares, strict=True)
            if share
        }
        packed, rebuilt = pack(graph, ratios)
        cosine = float((originals * _vectors(rebuilt, samples)).sum(axis=1).min())
        if cosine >= _LEAST_COSINE:
            break
    return packed, cosine


def pack(graph: bytes, ratios: Mapping[int, float]) -> tuple[bytes, bytes]:
    """Return a graph's packed file, and the graph that it unpacks to, which is as long as the original.

    `ratios`: for each tensor to be packed, by where it starts, the steps in the root mean square of a row.
    """
    rebuilt, tensors, bodies, graph_parts, after = bytearray(graph), [], [], [], 0
    for tensor in (tensor for tensor in _packable(graph) if tensor.start in ratios):
        type, rows, ratio = np.dtype(_TYPES[tensor.type]), tensor.dims[0], ratios[tensor.start]
        values = np.frombuffer(graph[tensor.start : tensor.end], type).astype(np.float32).reshape(rows, -1)
        low = max(0, int(math.log2(ratio)) - 3)
        steps = np.maximum(
            np.sqrt(np.square(values).mean(axis=1)) / ratio, np.abs(values).max(axis=1) / (_LARGEST_UPPER * 2**low)
        )
        steps[steps == 0] = 1
        codes = np.rint(values / steps[:, None]).astype(np.int32)
        rebuilt[tensor.start : tensor.end] = (codes.astype(np.float32) * steps[:, None]).astype(type).tobytes()
        bits = (codes.reshape(-1, 1) >> np.arange(low) & 1).astype(np.uint8)
        bodies += [steps.tobytes(), (codes >> low).astype(np.int8).tobytes()]
        bodies.append(np.packbits(bits, bitorder="little").tobytes())
        tensors.append({"at": tensor.start, "rows": rows, "count": codes.size, "low": low, "half": type.itemsize == 2})
        graph_parts.append(graph[after : tensor.start])
        after = tensor.end
    header = orjson.dumps({"size": len(graph), "tensors": tensors})
    squeezing = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    parts = [len(header).to_bytes(4, "little"), header, *graph_parts, graph[after:], *bodies]
    return b"".join([*map(squeezing.compress, parts), squeezing.flush()]), bytes(rebuilt)


def _packable(graph: bytes) -> list[Weights]:
    """Return the tensors of a graph that are worth packing, and are numbers."""
    return [
        tensor
        for tensor in weights(graph)
        if tensor.type in _TYPES
        and math.prod(tensor.dims) >= _FEWEST
        and math.prod(tensor.dims[1:]) >= _NARROWEST
        and np.isfinite(np.frombuffer(graph[tensor.start : tensor.end], _TYPES[tensor.type])).all()
    ]


def _vectors(graph: bytes, samples: Sequence[Arrays]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(graph, session_options(0), providers=[CPU])
    return l2_normalise(np.concatenate([session.run([OUTPUT], sample)[0] for sample in samples]))
