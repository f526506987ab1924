"""Encoder modules of sounds, one per kind of front end, take rows of `Sound`s → one vector per row (P, d).

Every row's vector is its own, whatever else is in the batch: what pads a row enters no average, no attention and no
normalisation.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class AudioEncoder(nn.Module):
    """AST and convolutions: patches (P, 1, frames, mels) → their pooled vectors."""

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.layers = model, list(layers)
        self.classifier: nn.Module | None = None
        self.convolutional = not hasattr(model.config, "num_hidden_layers")

    def forward(self, patches: Tensor) -> Tensor:
        output = self.model(
            patches if self.convolutional else patches[:, 0], **({"output_hidden_states": True} if self.layers else {})
        )
        states = [output.hidden_states[layer] for layer in self.layers]
        # AST's own pooling, for every layer: its two class tokens.
        lower = [state.mean((2, 3)) if self.convolutional else (state[:, 0] + state[:, 1]) / 2 for state in states]
        pooled = output.pooler_output.flatten(1)
        return torch.cat([*lower, pooled, *([] if self.classifier is None else [self.classifier(pooled)])], -1)


class ClapEncoder(nn.Module):
    """CLAP's HTSAT: patches (P, 1 or 4, frames, mels) → its pooled vectors, through its projection if it has one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        hearing: Any = getattr(model, "audio_model", model)
        self.model: Any = hearing.audio_encoder
        self.projection: Any = getattr(model, "audio_projection", None)
        if self.model.enable_fusion:
            self.model.patch_embed = _Fusion(self.model.patch_embed)
            self.model.enable_fusion = False  # the flags of its own are drawn at random where every sound is short

    def forward(self, patches: Tensor) -> Tensor:
        pooled = self.model(input_features=patches).pooler_output
        return pooled if self.projection is None else self.projection(pooled)


class _Fusion(nn.Module):
    """CLAP's fusion of a whole sound with three of its windows, without branching on the data.

    Only a sound of more than one window is fused. The four channels of any other are the same, and tell it.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed: Any = embed

    def forward(self, mels: Tensor, _: Any = None) -> Tensor:
        longer = (mels[:, 0] - mels[:, 1]).abs().amax((1, 2)) > 1e-3
        whole = self.embed.proj(mels[:, :1])
        # The three windows side by side, as the three parts of one picture.
        parts = torch.cat([self.embed.mel_conv2d(mels[:, index : index + 1]) for index in (1, 2, 3)], -1)
        parts = pad(parts, (0, whole.shape[-1] - parts.shape[-1]))
        states = torch.where(longer[:, None, None, None], self.embed.fusion_model(whole, parts), whole)
        if self.embed.flatten:
            states = states.flatten(2).transpose(1, 2)
        return self.embed.norm(states)


class WhisperEncoder(nn.Module):
    """Whisper's encoder: patches (P, 1, frames, mels) with their own frames (P,) → the mean of their states."""

    def __init__(self, model: Any, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model: Any = model.get_encoder() if hasattr(model, "get_encoder") else model
        self.layers = list(layers)

    def forward(self, patches: Tensor, lengths: Tensor) -> Tensor:
        output = self.model(patches[:, 0].transpose(1, 2), **({"output_hidden_states": True} if self.layers else {}))
        states = torch.cat([*(output.hidden_states[layer] for layer in self.layers), output.last_hidden_state], -1)
        return _mean(states, (lengths + 1) // 2)  # its second convolution halves the frames


class WaveformEncoder(nn.Module):
    """wav2vec 2.0, HuBERT, WavLM: samples (P, longest) with their own counts (P,) → the mean of their states.

    Padding is told to attention. A group normalisation over time, which base models have and which padding would
    change, is taken over a row's own frames.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # Its masked_spec_embed is for training; its convolutions, projection and encoder are what runs.
        self.model: Any = nn.ModuleDict(
            {"convolutions": model.feature_extractor, "projection": model.feature_projection, "encoder": model.encoder}
        )
        self.geometry = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))

    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        x = waveforms[:, None]
        for layer, (kernel, stride) in zip(self.model["convolutions"].conv_layers, self.geometry, strict=True):
            lengths = (lengths - kernel) // stride + 1
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):
                x = layer.activation(_normalised(layer.conv(x), lengths, norm))
            else:
                x = layer(x)
        projected = self.model["projection"](x.transpose(1, 2))
        states = projected[0] if isinstance(projected, tuple) else projected
        inside = torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]
        with warnings.catch_warnings():
            # WavLM gives torch a mask of another type than its position biases.
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask", UserWarning)
            states = self.model["encoder"](states, attention_mask=inside).last_hidden_state
        return _mean(states, lengths)


def samples_of_a_frame(geometry: Sequence[tuple[int, int]]) -> int:
    """The fewest samples from which convolutions of these (kernel, stride) make one frame."""
    samples = 1
    for kernel, stride in reversed(geometry):
        samples = (samples - 1) * stride + kernel
    return samples


def _mean(states: Tensor, lengths: Tensor) -> Tensor:
    """Mean of states (P, T, d) over each row's first `lengths` (P,)."""
    inside = torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]
    weights = inside.to(states.dtype) / lengths[:, None].to(states.dtype)
    return (weights[:, None] @ states)[:, 0]


def _normalised(x: Tensor, lengths: Tensor, norm: nn.GroupNorm) -> Tensor:
    """A group norm with a group per channel of x (P, channels, T), over each row's first `lengths` (P,) alone."""
    inside = (torch.arange(x.shape[2], device=x.device)[None] < lengths[:, None])[:, None].to(x.dtype)
    count = lengths[:, None, None].to(x.dtype)
    mean = (x * inside).sum(2, keepdim=True) / count
    variance = ((x - mean) ** 2 * inside).sum(2, keepdim=True) / count
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight[:, None] + norm.bias[:, None]
