"""ONNX Runtime sessions: arrays in, (B, dimensions) float32 out; and which provider was actually obtained."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.contract.bundle import (
    MODALITIES,
    OUTPUT,
    TOKEN_MASK,
    TOKENS,
    Accelerator,
    Bundle,
    Modality,
    Precision,
)
from service.contract.bundle import Tower as Described

Device = Literal["auto", "cpu", "cuda"]
Wanted = Precision | Literal["auto"]
"""auto: what the bundle's manifest says is the device's default."""
Arrays = Mapping[str, NDArray[Any]]

CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"


class TowerError(RuntimeError):
    """A tower cannot be opened. The message is for the operator."""


class Tower:
    """One modality's encoder and projector, as a session. `run` may be called from several threads at once."""

    def __init__(
        self, bundle: Bundle, modality: Modality, device: Device, threads: int, precision: Wanted = "auto"
    ) -> None:
        self.modality = modality
        self.dimensions = bundle.manifest.dimensions
        described = bundle.manifest.towers[modality]
        for accelerator in accelerators(device, onnxruntime.get_available_providers()):
            self.precision = chosen(described, modality, accelerator, precision)
            self._session = _session(bundle.tower_path(modality, self.precision), accelerator, threads)
            self.provider: str = self._session.get_providers()[0]
            if accelerator == "cpu" or self.provider == _CUDA:
                break
        if device == "cuda" and self.provider != _CUDA:
            raise TowerError(f"ISTHMUS_DEVICE is 'cuda', but the {modality} tower got {self.provider}")
        graph_inputs = {each.name for each in self._session.get_inputs()}
        wanted = bundle.manifest.towers[modality].preprocessing.inputs
        if graph_inputs != set(wanted):
            raise TowerError(f"the {modality} tower takes {sorted(graph_inputs)}, not {list(wanted)}")
        has_tokens = bundle.manifest.towers[modality].tokens
        if has_tokens and not {TOKENS, TOKEN_MASK} <= {each.name for each in self._session.get_outputs()}:
            raise TowerError(f"the {modality} tower gives no {TOKENS} and {TOKEN_MASK}, which its manifest promises")
        # What only the token vectors need is not computed where they are not asked for.
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = has_tokens

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """The graph's inputs by name → float32 (B, dimensions). Raises whatever ONNX Runtime raises."""
        (vectors,) = self._session.run([OUTPUT], dict(arrays), self._options)
        return np.asarray(vectors, dtype=np.float32)

    def run_tokens(self, arrays: Arrays) -> list[NDArray[np.float32]]:
        """The graph's inputs by name → each item's own tokens, float32 (N, dimensions). May run beside `run`."""
        tokens, mask = self._session.run([TOKENS, TOKEN_MASK], dict(arrays), self._options)
        packed = tokens.ndim == 2
        return [np.asarray((tokens if packed else tokens[row])[own > 0], np.float32) for row, own in enumerate(mask)]


def open_towers(
    bundle: Bundle,
    device: Device,
    threads: int,
    modalities: Collection[Modality] = MODALITIES,
    precision: Wanted = "auto",
) -> dict[Modality, Tower]:
    """One tower for each of the bundle's modalities that are among `modalities`. Raises TowerError."""
    wanted = [modality for modality in bundle.manifest.towers if modality in modalities]
    if not wanted:
        raise TowerError(f"{bundle.path} has no tower for any of: {', '.join(modalities)} (ISTHMUS_MODALITIES)")
    return {modality: Tower(bundle, modality, device, threads, precision) for modality in wanted}


def accelerators(device: Device, available: Collection[str]) -> tuple[Accelerator, ...]:
    """What to try, best first, where ONNX Runtime has these providers. Raises TowerError."""
    if device == "cuda" and _CUDA not in available:
        raise TowerError("ISTHMUS_DEVICE is 'cuda', but this ONNX Runtime has no CUDA: install onnxruntime-gpu")
    if device == "cuda":
        return ("cuda",)
    return ("cuda", "cpu") if device == "auto" and _CUDA in available else ("cpu",)


def chosen(tower: Described, modality: Modality, accelerator: Accelerator, wanted: Wanted) -> Precision:
    """The precision to serve. Raises TowerError where the bundle does not have the one that is named."""
    if wanted == "auto":
        return tower.default(accelerator)
    if wanted not in tower.precisions:
        there = ", ".join(tower.precisions)
        raise TowerError(
            f"ISTHMUS_PRECISION is {wanted!r}, and the bundle's {modality} tower comes in {there} only: name another, "
            "or 'auto' for each tower's default, or export the bundle with it (export.precisions in the recipe)"
        )
    return wanted


def _session(path: Path, accelerator: Accelerator, threads: int) -> onnxruntime.InferenceSession:
    providers = [CPU]
    if accelerator == "cuda":
        # Finds the CUDA libraries that come as Python packages; without them the provider is silently not obtained.
        onnxruntime.preload_dlls()
        providers = [_CUDA, CPU]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Three sessions share the cores: threads that spin while they wait take them from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        raise TowerError(f"{path} cannot be opened: {error}") from error
