"""Small convolutional students that are trained from scratch to give a frozen teacher's features.

Plain 3 × 3 residual convolutions (He et al., 2016) at low resolution: on a CPU they train and run faster than
depthwise ones of the same cost. The last layer has the teacher's shape, a 1 × 1 convolution, ReLU and an average over
positions, so that the student's features can be sparse and non-negative where the teacher's are.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.contract.images import ImagePreprocessing
from service.contract.windows import LogMelWindows


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 3)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


class Learner(nn.Module, ABC):
    """What is trained to give a teacher's features, whose mean and deviation (d,) it keeps."""

    mean: Tensor
    deviation: Tensor

    @abstractmethod
    def standardised(self, x: Tensor) -> Tensor:
        """(B, d): features less their mean, over their deviation."""


class Student(Learner):
    """(B, channels, H, W) → features (B, d) in the teacher's space.

    `stem` and `widths` are channel counts, each stem layer and each stage but the first halving the resolution;
    `depths` counts the residual blocks of each stage. `mean` and `deviation` (d,) are the teacher's over the training
    views; the network works in standardised features, where every dimension weighs the same.
    """

    def __init__(
        self, channels: int, stem: list[int], widths: list[int], depths: list[int], mean: Tensor, deviation: Tensor
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for stem_width in stem:
            layers.append(_convolution(width, stem_width, 3, stride=2))
            width = stem_width
        for stage, (stage_width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage or stage_width != width:
                layers.append(_convolution(width, stage_width, 3, stride=2 if stage else 1))
                width = stage_width
            layers.extend(_Residual(width) for _ in range(depth))
        layers.append(_convolution(width, len(mean), 1))
        self.trunk = nn.Sequential(*layers)
        # The mean of a rectified standard normal: the untrained student starts at the teacher's mean feature.
        self.shift = nn.Parameter(torch.full((len(mean),), -0.4))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())

    def standardised(self, x: Tensor) -> Tensor:
        return self.trunk(x).mean(dim=(2, 3)).float() + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return self.standardised(x) * self.deviation + self.mean


def distillation_loss(student: Learner, predicted: Tensor, target: Tensor, cosine_weight: float) -> Tensor:
    """Mean squared error of standardised features plus weighted (1 - cosine) of the raw features; both (B, d).

    `predicted` is standardised, `target` is the teacher's raw feature.
    """
    error = (predicted - (target - student.mean) / student.deviation).square().mean()
    raw = predicted * student.deviation + student.mean
    return error + cosine_weight * (1 - nn.functional.cosine_similarity(raw, target)).mean()


def student_inputs(stored: NDArray[Any], spec: ImagePreprocessing | LogMelWindows) -> Tensor:
    """Stored views → the student's float32 input, as the contract's preprocessing gives it."""
    if isinstance(spec, LogMelWindows):
        return torch.from_numpy(stored.astype(np.float32))[:, None]
    pixels = torch.from_numpy(np.array(stored)).permute(0, 3, 1, 2).float() / 255.0
    return (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
