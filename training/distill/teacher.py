"""The frozen teacher of a student: the maps at the ends of its stages, and its logits."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.distill.graph import DistillError
from training.distill.recipe import DistillRecipe
from training.distill.student import stages_of
from training.encode import mobilenet_sounds
from training.encode.mobilenet_sounds import MobileNetSounds
from training.graphs import onnx_bytes, session


def weights_hash(folder: Path) -> str:
    """sha256 of the weight files (*.safetensors) of a folder, in the order of their names. Raises DistillError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DistillError(f"the teacher's folder {folder} has no *.safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _Maps(nn.Module):
    """Rows of sound (B, 1, frames, mels) → the maps at the ends of the stages, and the logits."""

    def __init__(self, network: MobileNetSounds, ends: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages_of(network, ends))
        self.classifier = network.classifier

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        maps, below = [], rows.transpose(2, 3)
        for stage in self.stages:
            below = stage(below)
            maps.append(below)
        return (*maps, self.classifier(below.mean((2, 3))))


class Teacher:
    """The frozen teacher as an ONNX Runtime session: rows (B, 1, frames, mels) → its maps and logits."""

    def __init__(self, recipe: DistillRecipe) -> None:
        spec, ends = recipe.preprocessing(), recipe.student.ends
        network, self.labels = mobilenet_sounds.load(recipe.data.root / recipe.teacher.folder)
        example = torch.zeros(2, 1, spec.frames, spec.n_mels)
        outputs = [*(f"map_{index}" for index in range(len(ends) + 1)), "logits"]
        program = onnx_bytes(_Maps(network, ends).eval(), example, "inputs", outputs)
        self._session = session(program, recipe.train.threads)

    def __call__(self, inputs: NDArray[np.float32]) -> list[Tensor]:
        return [torch.from_numpy(array) for array in self._session.run(None, {"inputs": inputs})]

    def pooled(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, d): the means of its maps over positions, side by side."""
        *maps, _ = self(inputs)
        return np.concatenate([map_.mean((2, 3)).numpy() for map_ in maps], 1)
