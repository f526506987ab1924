"""Execution providers that a tower asks ONNX Runtime for, and their options, computed from what it reports.

ONNX Runtime gives another provider than the one asked for without raising, so what was obtained is looked at too.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from service.contract.bundle import Accelerator, Modality, Precision, Tower

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
PrecisionChoice = Precision | Literal["auto"]
"""Precision to open; auto: the one that the bundle's manifest names for the device."""
ServedPrecision = Precision | Literal["bf16"]
"""bf16: the fp32 graph, with arithmetic in bfloat16 where the runtime has it."""
Request = tuple[str, dict[str, str]]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINO"
ON_CPU = (CPU, OPENVINO)
_NEEDED = {"cuda": CUDA, "tensorrt": TENSORRT}


class TowerError(RuntimeError):
    """A tower cannot be opened. The message is for the operator."""


def accelerators(device: Device, available: Collection[str]) -> tuple[Accelerator, ...]:
    """Return the accelerators to try, best first, of those that ONNX Runtime has. Raises TowerError."""
    provider = _NEEDED.get(device)
    if provider is not None:
        if provider not in available:
            raise TowerError(
                f"ISTHMUS_DEVICE is {device!r}, but this ONNX Runtime has no {provider}: install onnxruntime-gpu"
            )
        return ("cuda",)
    return ("cuda", "cpu") if device == "auto" and CUDA in available else ("cpu",)


def requests(accelerator: Accelerator, device: Device, gpu: int = 0, *, engines: Path | None = None) -> list[Request]:
    """Return providers with options, best first; TensorRT keeps its engines in the folder `engines`."""
    if accelerator == "cpu":
        return [(CPU, {})]
    candidates: list[Request] = []
    if device == "tensorrt":
        options = {"device_id": str(gpu), "trt_fp16_enable": "0"}  # the bundle's own precision, which passed its gates
        if engines is not None:
            cache = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(engines)}
            options |= cache | {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(engines)}
        candidates.append((TENSORRT, options))
    options = {
        "device_id": str(gpu),
        # Allocate memory as requested, without doubling: several towers and FAISS share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
        # Heuristics at the first call of a shape. An exhaustive search would be repeated for every batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return [*candidates, (CUDA, options), (CPU, {})]


def satisfied(device: Device, modality: Modality, obtained: Sequence[str]) -> str:
    """Return the provider that a session works with. Raises TowerError if another was insisted on."""
    provider = _NEEDED.get(device)
    if provider is not None and obtained[0] != provider:
        raise TowerError(f"ISTHMUS_DEVICE is {device!r}, but the {modality} tower got {obtained[0]}")
    return obtained[0]


def chosen(tower: Tower, modality: Modality, accelerator: Accelerator, choice: PrecisionChoice) -> Precision:
    """Return the precision to serve. Raises TowerError where the bundle does not have the one that is named."""
    if choice == "auto":
        return tower.default(accelerator)
    if choice not in tower.precisions:
        precisions = ", ".join(tower.precisions)
        raise TowerError(
            f"ISTHMUS_PRECISION is {choice!r}, and the bundle's {modality} tower comes in {precisions} only: name "
            "another, or 'auto' for each tower's default, or export the bundle with it (export.precisions in the "
            "recipe)"
        )
    return choice
