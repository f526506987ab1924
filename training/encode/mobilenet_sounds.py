"""MobileNetV3 over log-mel spectra, as EfficientAT trains it on AudioSet (Schmid et al., 2023, arXiv 2211.04772).

The definition is our own; its parameters have the names of the published files, so that these load into it.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from service.contract.windows import LogMelWindows
from training.preprocessors import EncoderError, read_json

MODEL_TYPE = "efficientat"
_NAMED = re.compile(r"EfficientAT MobileNetV3 width (\d+(?:\.\d+)?)")
_HIDDEN = 512
"""Numbers between the two layers of the head that scores classes."""
WINDOW_S = 5
"""Seconds of sound that the network hears at once; it pools over time, so that any length would do."""


class Block(NamedTuple):
    """One inverted residual: kernel size, channels inside and out, squeeze-and-excitation, hard swish, stride."""

    kernel: int
    inside: int
    outside: int
    squeeze: bool
    swish: bool
    stride: int


def eights(value: float) -> int:
    """The multiple of 8 next to the value, never less than nine tenths of it (MobileNet's rule for widths)."""
    near = max(8, int(value + 4) // 8 * 8)
    return near if near >= 0.9 * value else near + 8


_LARGE = [
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
]
"""MobileNetV3-Large at width 1 (Howard et al., 2019, table 1)."""


def blocks_of(width: float) -> list[Block]:
    """The blocks at a width multiplier."""
    return [Block(k, eights(e * width), eights(o * width), s, h, r) for k, e, o, s, h, r in _LARGE]


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: nn.Module | None) -> Any:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
    ]
    return nn.Sequential(*layers, *([] if act is None else [act]))


class _Gate(nn.Module):
    """(B, C, H, W) → each channel times a weight between 0 and 1, made of all channels' means."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, inside), nn.Linear(inside, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))
        return x * weights[:, :, None, None]


class _Gates(nn.Module):
    """The one gate, at the depth at which EfficientAT's files keep it beside gates over time and frequency."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList([_Gate(channels, inside)])

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.conc_se_layers[0](x)
        return gated


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, spec: Block) -> None:
        super().__init__()
        act = nn.Hardswish if spec.swish else nn.ReLU
        layers = []
        if spec.inside != inputs:
            layers.append(_convolution(inputs, spec.inside, 1, 1, 1, act()))
        layers.append(_convolution(spec.inside, spec.inside, spec.kernel, spec.stride, spec.inside, act()))
        if spec.squeeze:
            layers.append(_Gates(spec.inside, eights(spec.inside / 4)))
        layers.append(_convolution(spec.inside, spec.outside, 1, 1, 1, None))
        self.block = nn.Sequential(*layers)
        self.residual = spec.stride == 1 and inputs == spec.outside

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.block(x)
        return x + made if self.residual else made


class MobileNetSounds(nn.Module):
    """Log-mel spectra (B, 1, mels, frames) → pooled features (B, d), pooled maps of chosen blocks, class scores.

    `classifier` reads pooled features and gives the logits of its classes.
    """

    def __init__(self, blocks: Sequence[Block], stem: int, classes: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(1, stem, 3, 2, 1, nn.Hardswish())]
        channels = stem
        for spec in blocks:
            layers.append(_InvertedResidual(channels, spec))
            channels = spec.outside
        self.width = 6 * channels
        layers.append(_convolution(channels, self.width, 1, 1, 1, nn.Hardswish()))
        self.features = nn.Sequential(*layers)
        # The places of the published head: pooling and flattening before the first, dropout before the second.
        self.classifier = nn.Sequential(
            nn.Identity(),
            nn.Identity(),
            nn.Linear(self.width, hidden),
            nn.Hardswish(),
            nn.Identity(),
            nn.Linear(hidden, classes),
        )

    @classmethod
    def of_width(cls, width: float, classes: int) -> "MobileNetSounds":
        """The network of a width multiplier, with random weights."""
        return cls(blocks_of(width), eights(16 * width), classes, _HIDDEN)

    def forward(self, mels: Tensor) -> Tensor:
        pooled: Tensor = self.features(mels).mean((2, 3))
        return pooled


class MobileNetSoundsModel(nn.Module):
    """The network as an encoder: rows (B, 1, frames, mels) → last_hidden_state, pooler_output (B, d), and, where they
    are asked for, hidden_states: the maps behind the stem and behind each block."""

    def __init__(self, network: MobileNetSounds, labels: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(model_type=MODEL_TYPE, id2label=dict(enumerate(labels)))

    @property
    def classifier(self) -> nn.Module:
        return self.network.classifier

    def forward(self, rows: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        states = [rows.transpose(2, 3)]
        for block in self.network.features:
            states.append(block(states[-1]))
        return SimpleNamespace(
            last_hidden_state=states[-1],
            pooler_output=states[-1].mean((2, 3)),
            hidden_states=tuple(states[1:-1]) if output_hidden_states else None,
        )


def is_folder(folder: Path) -> bool:
    """Return whether the folder's config.json says that it holds an EfficientAT MobileNetV3."""
    return _NAMED.search(read_json(folder, "config.json").get("arch", "")) is not None


def load(folder: Path) -> tuple[MobileNetSounds, list[str]]:
    """The network of an EfficientAT folder and the names of its classes.

    The folder holds config.json, labels.csv, and the weights as model.onnx (float32, batch norms folded in), which is
    read where it is there, or as model.safetensors. Raises EncoderError for what is not such a folder.
    """
    named = _NAMED.search(read_json(folder, "config.json").get("arch", ""))
    if named is None:
        raise EncoderError(f"{folder}: config.json names no EfficientAT MobileNetV3 by its width")
    width = float(named.group(1))
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as stream:
        labels = [row["display_name"] for row in csv.DictReader(stream)]
    network = MobileNetSounds.of_width(width, len(labels))
    try:
        if (folder / "model.onnx").is_file():
            _take_folded(network, folder / "model.onnx")
        else:
            weights = load_file(folder / "model.safetensors")
            network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise EncoderError(f"{folder}: its weights are no EfficientAT network's of width {width}: {error}") from None
    return network.eval(), labels


def _take_folded(network: MobileNetSounds, graph: Path) -> None:
    """Take the weights of a graph in the order of its operations; a batch norm keeps nothing but the bias."""
    model = onnx.load(str(graph))
    values = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer}
    given = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    modules = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    layers = [module for module in modules if not isinstance(module, nn.BatchNorm2d)]
    norms = iter(module for module in modules if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        for node, layer in zip(given, layers, strict=True):
            layer.weight.copy_(values[node.input[1]])
            bias = values[node.input[2]]
            if isinstance(layer, nn.Linear):
                layer.bias.copy_(bias)
                continue
            norm = next(norms)
            assert norm.running_var is not None
            norm.running_var.fill_(1 - norm.eps)  # it divides by √(variance + eps)
            norm.bias.copy_(bias)


def front_end(folder: Path) -> LogMelWindows:
    """The front end that an EfficientAT folder's config.json states, over windows of WINDOW_S. Raises EncoderError."""
    stated = read_json(folder, "config.json")
    expected = {"center": True, "pad_mode": "reflect", "power": 2, "log": "ln(mel+1e-5)", "normalise": "(x+4.5)/5"}
    wrong = [name for name, value in expected.items() if stated.get(name) != value]
    band = re.match(r"kaldi get_mel_banks fmin (\d+) fmax (\d+)", stated.get("mel", ""))
    if wrong or band is None:
        raise EncoderError(f"{folder}: config.json: {(wrong or ['mel'])[0]}: another front end than EfficientAT's")
    rate, hop = stated["sample_rate"], stated["hop_length"]
    samples = WINDOW_S * rate
    return LogMelWindows(
        sampling_rate=rate,
        samples=samples,
        frames=samples // hop,
        window_length=stated["win_length"],
        hop_length=hop,
        fft_length=stated["n_fft"],
        window="hann_symmetric",
        preemphasis=-stated["preemphasis"][0],
        preemphasis_of="sound",
        n_mels=stated["n_mels"],
        f_min=float(band.group(1)),
        f_max=float(band.group(2)),
        mel_scale="kaldi",
        mel_norm="none",
        logarithm="ln",
        floor=1e-5,
        floor_by="sum",
        dynamic_range=None,
        mean=-4.5,
        std=5.0,
        short="repeat",
        lengths=False,
    )
