"""The frozen teacher of a student: the maps at the ends of its stages, and its logits."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from service.contract.images import ImagePreprocessing
from service.contract.windows import LogMelWindows
from training.distill.graph import DistillError
from training.distill.recipe import DistillRecipe
from training.distill.student import sound_stages
from training.encode import mobilenet_sounds
from training.encode.mobilenet_sounds import MobileNetSounds
from training.graphs import onnx_bytes
from training.preprocessors import LOCAL


def weights_hash(folder: Path) -> str:
    """sha256 of the weight files (*.safetensors) of a transformers folder, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DistillError(f"the teacher's folder {folder} has no *.safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _ImageMaps(nn.Module):
    """The teacher's maps at the stages' ends, and its logits."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.model, self.layers = model, list(layers)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        output = self.model.base_model(pixels, output_hidden_states=True)
        maps = [output.hidden_states[layer] for layer in self.layers] + [output.last_hidden_state]
        return (*maps, self.model.classifier(output.pooler_output.flatten(1)))


class _SoundMaps(nn.Module):
    """Pools and keeps the maps of rows of sound (B, 1, frames, mels)."""

    def __init__(self, network: MobileNetSounds, ends: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(sound_stages(network, ends))
        self.classifier = network.classifier

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        maps, below = [], rows.transpose(2, 3)
        for stage in self.stages:
            below = stage(below)
            maps.append(below)
        return (*maps, self.classifier(below.mean((2, 3))))


class Teacher:
    """The frozen teacher as an ONNX Runtime session: inputs (B, …) as the student's → its maps and logits."""

    def __init__(self, recipe: DistillRecipe) -> None:
        folder = recipe.data.root / recipe.teacher.folder
        spec, count = recipe.preprocessing(), len(recipe.student.cuts)
        maps: nn.Module
        if isinstance(spec, ImagePreprocessing):
            model: Any = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, **LOCAL).eval()
            names = model.config.id2label
            self.kept = [index for index in sorted(names) if names[index] != "background"]
            self.labels = [names[index] for index in self.kept]
            self.classes = len(names)
            maps, example = _ImageMaps(model, recipe.student.cuts), torch.zeros(2, 3, spec.height, spec.width)
        else:
            assert isinstance(spec, LogMelWindows)
            network, self.labels = mobilenet_sounds.load(folder)
            self.classes, self.kept = len(self.labels), list(range(len(self.labels)))
            maps, example = _SoundMaps(network, recipe.student.cuts), torch.zeros(2, 1, spec.frames, spec.n_mels)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = recipe.train.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        outputs = [f"map_{index}" for index in range(count + 1)] + ["logits"]
        program = onnx_bytes(maps.eval(), example, "inputs", outputs)
        self._session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: NDArray[np.float32]) -> list[Tensor]:
        return [torch.from_numpy(array) for array in self._session.run(None, {"inputs": inputs})]

    def pooled(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, d): the means of its maps over positions, side by side."""
        *maps, _ = self(inputs)
        return np.concatenate([each.mean((2, 3)).numpy() for each in maps], 1)
