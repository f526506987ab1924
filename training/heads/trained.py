"""Trained heads, and their file projectors.safetensors."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from service.contract.abstention import Detector
from service.contract.bundle import MODALITIES, Modality
from service.contract.licences import Licence, combined
from training.errors import TrainingError
from training.heads.projector import Head
from training.recipe import Recipe

_LARGE = 1_024
"""Numbers from which a tensor may be kept in 16 bits; smaller ones are scales and statistics, and save little."""


@dataclass(frozen=True)
class Trained:
    heads: dict[Modality, Head]
    temperature: float
    means: dict[Modality, list[float]]
    """Mean unit vector of each modality over the training pairs."""
    history: list[dict[str, float]]
    """Every validation of the head that the recipe asks for."""
    ladder: dict[str, Any] = field(default_factory=dict)
    """`head.won` and the validation score of each kind of head that was tried."""
    init: str = ""
    """Hash of the weights that training started from; heads of one init can be merged."""
    abstention: dict[Modality, Detector] = field(default_factory=dict)
    """Which inputs are of none of the labels, by modality."""
    licences: tuple[Licence, ...] = ()
    """The licences of what the heads learned from, as far as it was stated when they did; a recipe may state more."""
    encoders: Mapping[Modality, str] = field(default_factory=dict)
    """Hash of the encoder whose features each head learned from; empty where an earlier version trained it."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """`step_s`, seconds of a step, and `host_share`, how much of them it waited for its batch."""


def round_heads(trained: Trained) -> None:
    """Round large weights, in place, to what 16 bits hold: what is saved in half the room is then the same."""
    for head in trained.heads.values():
        for tensor in head.state_dict().values():
            if _large(tensor):
                tensor.copy_(tensor.half())


def _large(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.numel() > _LARGE


def save_projectors(path: Path, trained: Trained, half: bool = False) -> None:
    """projectors.safetensors: every tensor under `<modality>.`; what else Trained holds in its metadata.

    With `half`, large tensors are kept in float16.
    """
    tensors = {
        f"{modality}.{key}": value.contiguous()
        for modality, head in trained.heads.items()
        for key, value in head.state_dict().items()
    }
    metadata = {
        "temperature": repr(trained.temperature),
        "means": json.dumps(trained.means),
        "kinds": json.dumps({modality: head.kind for modality, head in trained.heads.items()}),
        "ladder": json.dumps(trained.ladder),
        "abstention": json.dumps(
            {modality: detector.model_dump() for modality, detector in trained.abstention.items()}
        ),
        "init": trained.init,
        "encoders": json.dumps(dict(trained.encoders)),
        "licences": licences_json(trained.licences),
        "rise": repr(rise_of(trained.heads)),
    }
    kept = {key: value.half() if half and _large(value) else value for key, value in tensors.items()}
    save_file(kept, path, metadata)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a projectors.safetensors. Raises TrainingError."""
    if path.is_dir():
        raise TrainingError(f"{path} is a folder: name the projectors.safetensors in it")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from None


def load_projectors(path: Path, recipe: Recipe) -> Trained:
    """Rebuild what `save_projectors` wrote, for a recipe. Raises TrainingError where the two do not fit.

    A linear head fits every recipe of its dimensions: it is what ships where the recipe's own did not beat it.
    """
    tensors, metadata = read_file(path)
    kinds = json.loads(metadata.get("kinds", "{}"))
    heads: dict[Modality, Head] = {}
    for modality in dict.fromkeys((*MODALITIES, *kinds)):
        state = {k.removeprefix(f"{modality}."): v for k, v in tensors.items() if k.startswith(f"{modality}.")}
        if not state:
            continue
        first = state.get("local.norm.weight", state.get("pooled.standardise.mean"))
        if first is None:
            raise TrainingError(f"{path} holds no {modality} projector of a known kind")
        spec = recipe.projector
        if kinds.get(modality) == "linear":
            spec = spec.model_copy(update={"kind": "linear"})
        concepts = len(state.get("branch.names", ()))
        head = Head(modality, len(first) + concepts, spec, concepts, bank_sizes(state))
        try:
            head.load_state_dict(state)
        except RuntimeError as error:
            raise TrainingError(f"{path} does not fit the recipe's projector: {error}") from None
        heads[modality] = head.eval().requires_grad_(False)
    if not heads:
        raise TrainingError(f"{path} holds no projectors")
    set_rise(heads, float(metadata.get("rise", "0")))  # what they were measured with, whatever the recipe has now
    ladder, init = json.loads(metadata.get("ladder", "{}")), metadata.get("init", "")
    learned = json.loads(metadata.get("abstention", "{}"))
    detectors = {modality: Detector.model_validate(detector) for modality, detector in learned.items()}
    licences = tuple(map(Licence.model_validate, json.loads(metadata.get("licences", "[]"))))
    means, encoders = json.loads(metadata["means"]), json.loads(metadata.get("encoders", "{}"))
    return Trained(heads, float(metadata["temperature"]), means, [], ladder, init, detectors, licences, encoders)


def rise_of(heads: Mapping[Modality, Head]) -> float:
    """Returns how much longer the image head's branch of concepts is where the classifier is sure; 0 without one."""
    branch = heads["image"].branch if "image" in heads else None
    return branch.rise if branch is not None else 0.0


def set_rise(heads: Mapping[Modality, Head], rise: float) -> None:
    if "image" in heads and heads["image"].branch is not None:
        heads["image"].branch.rise = rise


def licences_json(licences: Iterable[Licence]) -> str:
    """Returns the licences as the metadata of projectors.safetensors has them."""
    return json.dumps([licence.model_dump() for licence in licences])


def licences_of(recipe: Recipe) -> tuple[Licence, ...]:
    """Returns the licences of what training by a recipe learns from: the recipe's, and those of the heads that it
    goes on from.
    """
    if recipe.train.start is None:
        return recipe.licences
    return combined(recipe.licences, load_projectors(recipe.path(recipe.train.start), recipe).licences)


def bank_sizes(state: Mapping[str, torch.Tensor]) -> dict[Modality, int]:
    """Rows of each bank of a head's tensors (training.heads.querybank)."""
    return {m: len(state[f"reserve.bank_{m}"]) for m in MODALITIES if f"reserve.bank_{m}" in state}


def init_hash(state: dict[str, torch.Tensor]) -> str:
    """Hash of the parameters that training starts from, without the statistics of the features."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if ".standardise." not in name:
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
