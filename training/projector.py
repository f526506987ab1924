"""Projectors: the small trained modules between frozen features and the shared space."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from service.contract.bundle import Modality
from training.recipe import ProjectorSpec


class Standardise(nn.Module):
    """(y - mean) / std per feature of y = sign(x) |x|^power, with statistics of the training features; (…, d) → (…, d).

    The signed power is the normalisation of Perronnin et al. (ECCV 2010) for features that come in bursts.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        features = self._compressed(features)
        self.mean.copy_(features.mean(0))
        # A feature that never varies says nothing: dividing by its tiny deviation would only amplify noise.
        self.scale.copy_(1.0 / features.std(0).clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return (self._compressed(x) - self.mean) * self.scale

    def _compressed(self, x: Tensor) -> Tensor:
        return x if self.power == 1.0 else x.sign() * x.abs() ** self.power


class Linear(nn.Module):
    """One affine map, the mandatory baseline (LiMBeR, arXiv 2209.15162); (B, d) → (B, D)."""

    def __init__(self, width: int, spec: ProjectorSpec) -> None:
        super().__init__()
        self.standardise = Standardise(width, spec.power)
        self.dropout = nn.Dropout(spec.dropout)
        self.linear = nn.Linear(width, spec.dimensions)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.dropout(self.standardise(x)))
        return out


class ResidualMLP(nn.Module):
    """Linear(x) + Linear(GELU(Linear(x))) on standardised features; (B, d) → (B, D)."""

    def __init__(self, width: int, spec: ProjectorSpec) -> None:
        super().__init__()
        self.standardise = Standardise(width, spec.power)
        self.dropout = nn.Dropout(spec.dropout)
        self.skip = nn.Linear(width, spec.dimensions)
        self.up = nn.Linear(width, spec.hidden)
        self.down = nn.Linear(spec.hidden, spec.dimensions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.standardise(x))
        out: Tensor = self.skip(x) + self.down(self.dropout(gelu(self.up(x))))
        return out


class TokenProjector(nn.Module):
    """LayerNorm → Dropout → [Linear + (Linear → GELU → Linear)] on each token; (…, d) → (…, D).

    Source: arXiv 2409.19425 (Freeze-Align), section 3.
    """

    def __init__(self, width: int, spec: ProjectorSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(spec.dropout)
        self.linear = nn.Linear(width, spec.dimensions)
        self.up = nn.Linear(width, spec.dimensions)
        self.down = nn.Linear(spec.dimensions, spec.dimensions)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        out: Tensor = self.linear(x) + self.down(gelu(self.up(x)))
        return out


class Head(nn.Module):
    """A projector of one modality and the L2 normalisation after it: frozen features → unit vectors (B, D).

    Pooled kinds (`linear`, `mlp`) take `pooled` (B, d). The `token` kind takes local vectors with averaging weights:
    `tokens` (B, N, d) with `weights` (B, N), or packed `tokens` (ΣN, d) with `weights` (B, ΣN). Images add the
    projected CLS; texts pass their mean through a second projection (arXiv 2409.19425):
    p = Linear; LayerNorm(p + Dropout(Linear(GELU(p)))).
    """

    def __init__(self, modality: Modality, width: int, spec: ProjectorSpec) -> None:
        super().__init__()
        if modality == "text":
            dropout = spec.dropout if spec.text_dropout is None else spec.text_dropout
            spec = spec.model_copy(update={"dropout": dropout, "power": 1.0})
        self.kind: Literal["linear", "mlp", "token"] = spec.kind
        self.modality = modality
        if spec.kind == "token":
            self.local = TokenProjector(width, spec)
            if modality == "image":
                self.whole = TokenProjector(width, spec)
            if modality == "text":
                self.project = nn.Linear(spec.dimensions, spec.dimensions)
                self.refine = nn.Linear(spec.dimensions, spec.dimensions)
                self.dropout = nn.Dropout(spec.dropout)
                self.norm = nn.LayerNorm(spec.dimensions)
        else:
            self.pooled = Linear(width, spec) if spec.kind == "linear" else ResidualMLP(width, spec)

    def forward(self, pooled: Tensor, tokens: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if self.kind != "token":
            return normalize(self.pooled(pooled), dim=-1)
        assert tokens is not None and weights is not None
        local = self.local(tokens)
        mean = weights @ local if local.dim() == 2 else (weights[:, None] @ local)[:, 0]
        if self.modality == "image":
            mean = mean + self.whole(pooled)
        if self.modality == "text":
            projected = self.project(mean)
            mean = self.norm(projected + self.dropout(self.refine(gelu(projected))))
        return normalize(mean, dim=-1)
