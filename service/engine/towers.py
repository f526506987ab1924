"""ONNX Runtime sessions: arrays in, (B, dimensions) float32 out; and which provider was actually obtained."""

import itertools
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.contract.bundle import (
    EARLIER_ROWS,
    MODALITIES,
    OUTPUT,
    ROWS,
    Bundle,
    Modality,
)
from service.contract.endpoint import EndpointPreprocessing
from service.contract.graphs import external_files
from service.contract.sounds import AudioPreprocessing
from service.contract.vectors import l2_normalise
from service.engine.openvino import OpenVinoSession
from service.engine.profile import Choice
from service.engine.providers import (
    CPU,
    TENSORRT,
    Device,
    PrecisionChoice,
    Request,
    ServedPrecision,
    TowerError,
    accelerators,
    chosen,
    requests,
    satisfied,
)
from service.settings import Gpus

__all__ = ["CPU", "Arrays", "Device", "PrecisionChoice", "Tower", "TowerError", "open_towers"]

Arrays = dict[str, NDArray[Any]]
AUDIO_CALL_S = 60.0
"""Seconds of sound in one call of an audio tower, as the tower hears it. A longer sound is a call of its own, of which
so much is encoded at once on the CPU: memory goes by this, not by the sound's length."""


class Tower:
    """A session with one modality's encoder and projector. Several threads may call `run` at once.

    On the CPU no more than `call_seconds` of sound are encoded at once, so that a call's memory does not grow with a
    sound's length: what the encoder makes of its rows is kept, and the head reads all of them. The vector is the same.
    """

    def __init__(
        self,
        bundle: Bundle,
        modality: Modality,
        device: Device,
        threads: int,
        precision: PrecisionChoice = "auto",
        gpus: Gpus = Gpus(),
        call_seconds: float = AUDIO_CALL_S,
        choice: Choice | None = None,
    ) -> None:
        """Open the tower. With a `choice` it runs so, whatever the other arguments say.

        Raises TowerError, and BundleError where a file is not what the manifest says.
        """
        self.modality, self.choice = modality, choice
        described = bundle.manifest.towers[modality]
        self.precision: ServedPrecision
        if choice is not None:
            self.precision, device = choice.precision, "cpu"
            self._sessions = [_chosen(bundle, modality, choice)]
        for accelerator in accelerators(device, onnxruntime.get_available_providers()) if choice is None else ():
            self.precision = chosen(described, modality, accelerator, precision)
            devices = gpus.devices if accelerator == "cuda" else (0,)
            requests_by_device = [requests(accelerator, device, gpu, engines=gpus.engines) for gpu in devices]
            self._sessions = _sessions(bundle, bundle.tower_path(modality, self.precision), requests_by_device, threads)
            if all(session.get_providers()[0] != CPU for session in self._sessions):
                break
        self._session = self._sessions[0]
        self.provider = satisfied(device, modality, self._session.get_providers())
        self._turns = itertools.cycle(self._sessions)  # next() of a cycle is atomic
        graph_inputs = {node.name for node in self._session.get_inputs()}
        expected = described.preprocessing.inputs
        if graph_inputs != set(expected):
            raise TowerError(f"the {modality} tower takes {sorted(graph_inputs)}, not {list(expected)}")
        self._spec, self._call_seconds = described.preprocessing, call_seconds
        self._in_pieces = (
            isinstance(self._spec, AudioPreprocessing)
            and self.provider == CPU
            and EARLIER_ROWS in {node.name for node in self._session.get_overridable_initializers()}
        )
        # Outputs that nobody asked for are not computed: where rows are asked for, no head.
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = self._in_pieces

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """Run the graph on its inputs by name; return float32 (B, dimensions), each row at length 1 where it can be.

        Raises whatever ONNX Runtime raises.
        """
        inputs = self._bounded(arrays) if self._in_pieces else arrays
        [output] = next(self._turns).run([OUTPUT], inputs, self._options)
        vectors = np.array(output, np.float32)
        directed = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
        vectors[directed] = l2_normalise(vectors[directed])
        return vectors

    def _bounded(self, arrays: Arrays) -> Arrays:
        """Return a bounded call's arrays: the last rows, and what is computed here, in pieces, of the rows before
        them."""
        inputs = dict(arrays)
        assert isinstance(self._spec, AudioPreprocessing)
        *per_row, weights = self._spec.inputs
        count = inputs[weights].shape[1]
        size = self._spec.rows_in(self._call_seconds, inputs[per_row[0]])
        earlier = []
        for start in range(0, count - size, size):
            piece = {name: inputs[name][start : start + size] for name in per_row}
            piece[weights] = inputs[weights][:, start : start + size]
            earlier += self._session.run([ROWS], piece, self._options)
        if earlier:
            inputs |= {name: inputs[name][len(earlier) * size :] for name in per_row}
            inputs[EARLIER_ROWS] = np.concatenate(earlier)
        return inputs


def open_towers(
    bundle: Bundle,
    device: Device,
    threads: int,
    modalities: Collection[Modality] = (),
    precision: PrecisionChoice = "auto",
    gpus: Gpus = Gpus(),
    choices: Mapping[Modality, Choice] = MappingProxyType({}),
    endpoint: Callable[[], Tower] | None = None,
) -> dict[Modality, Tower]:
    """Open the towers of those of the bundle's modalities that are in `modalities`, or of all where that is empty;
    `endpoint` opens one whose texts an API embeds. Raises TowerError, SettingsError."""
    chosen = [modality for modality in bundle.manifest.towers if not modalities or modality in modalities]
    if unknown := sorted({*modalities} - {*MODALITIES, *chosen}):
        raise TowerError(f"{bundle.path} has no tower called {unknown[0]} (ISTHMUS_MODALITIES)")
    if not chosen:
        raise TowerError(f"{bundle.path} has no tower for any of: {', '.join(modalities)} (ISTHMUS_MODALITIES)")
    towers: dict[Modality, Tower] = {}
    for modality in chosen:
        if isinstance(bundle.manifest.towers[modality].preprocessing, EndpointPreprocessing):
            if endpoint is None:
                raise TowerError(f"{bundle.path}: an API embeds its texts, and none is asked here")
            towers[modality] = endpoint()
        else:
            towers[modality] = Tower(bundle, modality, device, threads, precision, gpus, choice=choices.get(modality))
    return towers


@cache
def _share_arena() -> None:
    """Have the sessions of this process take the memory of their calls from one arena, not from one each."""
    where = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg(0, -1, -1, -1))


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return ONNX Runtime's defaults, with threads that do not spin and an arena that sessions share."""
    _share_arena()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    # A plan of memory for each shape that was met would keep a block for each, of which few are met again.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    # Three sessions share the cores: threads that spin while they wait take them from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _chosen(bundle: Bundle, modality: Modality, choice: Choice) -> Any:
    """Return the session of a choice. Raises BundleError, TowerError."""
    precision = bundle.manifest.towers[modality].precision if choice.precision == "bf16" else choice.precision
    file = bundle.tower_path(modality, precision)
    if choice.runtime == "onnxruntime":
        [session] = _sessions(bundle, file, [[(CPU, {})]], choice.threads)
        return session
    with bundle.checked(file.name) as path:
        try:
            return OpenVinoSession(path.read_bytes(), choice.threads, choice.lanes, choice.precision)
        except RuntimeError as error:
            raise TowerError(f"{file} cannot be opened by OpenVINO: {error}") from error


def _sessions(
    bundle: Bundle, file: Path, requests_by_device: Sequence[list[Request]], threads: int
) -> list[onnxruntime.InferenceSession]:
    """Return a session for each of `asked`, of the bytes whose checksums were checked. Raises BundleError,
    TowerError."""
    if any(providers[0][0] != CPU for providers in requests_by_device):
        # Finds the CUDA libraries that come as Python packages; without them the provider is silently not obtained.
        onnxruntime.preload_dlls()
    with ExitStack() as stack:
        path = stack.enter_context(bundle.checked(file.name))
        beside = {name: _mapped(stack.enter_context(bundle.checked(name))) for name in sorted(external_files(path))}
        sessions = []
        for providers in requests_by_device:
            options = session_options(threads)
            if beside:
                sizes = list(map(len, beside.values()))
                options.add_external_initializers_from_files_in_memory(list(beside), list(beside.values()), sizes)
            # TensorRT names its stored engines after the graph's file, and the copy has another name each time.
            graph = path.read_bytes() if providers[0][0] == TENSORRT else path
            try:
                sessions.append(onnxruntime.InferenceSession(graph, options, providers=providers))
            except Exception as error:
                message = str(error).replace(str(path), str(file))
                raise TowerError(f"{file} cannot be opened: {message}") from error
        return sessions


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
