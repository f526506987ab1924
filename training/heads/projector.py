"""Projectors: the small trained modules between frozen features and the shared space."""

from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from service.contract.bundle import Modality, ProjectorKind
from training.heads.querybank import MediaReserve, TextReserve
from training.recipe import ProjectorSpec

_LEAST_DEVIATION = 1e-3
"""Standard deviation below which a feature counts as one that does not vary."""


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

    def fit(self, features: Tensor | Iterable[Tensor]) -> None:
        """Take the statistics of features (N, d), or of blocks of them, which are never held together."""
        count, origin = 0, torch.zeros(1)
        total = squares = torch.zeros(1, dtype=torch.float64)
        for block in [features] if isinstance(features, Tensor) else features:
            values = self._compressed(block.float()).double()
            origin = origin if count else values.mean(0)  # near the mean, so that the squares lose no digits
            count, values = count + len(values), values - origin
            total, squares = total + values.sum(0), squares + values.square().sum(0)
        variance = (squares - total.square() / count) / max(1, count - 1)
        self.mean.copy_(origin + total / count)
        # A feature that never varies says nothing: dividing by its tiny deviation would only amplify noise.
        self.scale.copy_(1.0 / variance.clamp_min(0).sqrt().clamp_min(_LEAST_DEVIATION))

    @property
    def constant(self) -> bool:
        """Return whether no feature varied in what was fitted."""
        return bool((self.scale >= 1.0 / _LEAST_DEVIATION).all())

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


_POOLED = {"linear": Linear, "mlp": ResidualMLP}
_LAST = ("linear", "skip", "skip.2", "down", "out")
"""Ends of the names of the layers of media whose sum is a vector of the space."""


class ConceptBranch(nn.Module):
    """Scores (B, C) of what the encoder's own classifier names → vectors (B, D): their names, weighted.

    A vector's length beside the unit vector of the other branch is `gain`, and `rise` times the share of the highest
    score more: what the classifier is sure of is found by its name, and what it only guesses stays with the captions.

    The names' vectors are centred on their mean, without which every name is near every other. `root` undoes the power
    of a sound's scores (training.encoders.Classifier).
    """

    names: Tensor

    def __init__(self, concepts: int, dimensions: int, root: float, rise: float = 0.0) -> None:
        super().__init__()
        self.root, self.rise = root, rise
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("names", torch.zeros(concepts, dimensions))

    def place(self, vectors: Tensor) -> None:
        """Take the names' vectors (C, D) as they are now."""
        self.names = vectors - vectors.mean(0)

    def certainty(self, scores: Tensor) -> Tensor:
        """The share of the highest of the scores (B, C): (B,), from 1 / C to 1."""
        weights = scores**self.root
        return weights.amax(-1) / weights.sum(-1).clamp_min(1e-6)

    def forward(self, scores: Tensor) -> Tensor:
        length = self.gain + self.rise * self.certainty(scores)[:, None] if self.rise else self.gain
        return length * normalize(scores**self.root @ self.names, dim=-1)


class Head(nn.Module):
    """A projector of one modality and the L2 normalisation after it: frozen features → unit vectors (B, D).

    Pooled kinds (`linear`, which `ridge` and `cca` fill in; `mlp`) take `pooled` (B, d). `token` takes local vectors
    with averaging weights, too: `tokens` (B, N, d) with `weights` (B, N), or packed `tokens` (ΣN, d) with `weights`
    (B, ΣN). It adds an image's projected CLS, and passes a text's mean through a second projection (arXiv 2409.19425):
    p = Linear; LayerNorm(p + Dropout(Linear(GELU(p)))).
    With `concepts`, the last so many numbers of `pooled` are the scores that ConceptBranch reads. With
    `spec.querybank`, the last dimensions are those that heads.querybank reserves; `banks` are its banks' sizes.
    """

    def __init__(
        self,
        modality: Modality,
        width: int,
        spec: ProjectorSpec,
        concepts: int = 0,
        banks: Mapping[Modality, int] | None = None,
    ) -> None:
        super().__init__()
        width -= concepts
        self.reserve: MediaReserve | TextReserve | None = None
        if spec.querybank:
            rows = banks or {}
            self.reserve = (
                TextReserve(spec.inner, rows) if modality == "text" else MediaReserve(modality, spec.inner, rows)
            )
            spec = spec.model_copy(update={"dimensions": spec.inner, "querybank": 0})
        self.width = width
        self.branch: ConceptBranch | None = None
        if concepts:
            root, rise = (0.25, 0.0) if modality == "audio" else (1.0, spec.rise)
            self.branch = ConceptBranch(concepts, spec.dimensions, root, rise)
        if modality == "text":
            dropout = spec.dropout if spec.text_dropout is None else spec.text_dropout
            spec = spec.model_copy(update={"dropout": dropout, "power": 1.0})
        self.kind: ProjectorKind = "linear" if spec.kind == "ridge" or spec.kind == "cca" else spec.kind
        self.modality = modality
        self.local: nn.Module
        if self.kind == "token":
            self.local = TokenProjector(width, spec)
            if modality == "image":
                self.whole = TokenProjector(width, spec)
            if modality == "text":
                self.project = nn.Linear(spec.dimensions, spec.dimensions)
                self.refine = nn.Linear(spec.dimensions, spec.dimensions)
                self.dropout = nn.Dropout(spec.dropout)
                self.norm = nn.LayerNorm(spec.dimensions)
        else:
            self.pooled = _POOLED[self.kind](width, spec)

    @property
    def needs_tokens(self) -> bool:
        return self.kind == "token"

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(chain(self.parameters(), self.buffers())).device

    @torch.no_grad()
    def leave_out(self, direction: Tensor) -> None:
        """Take a direction (D,) of the space out of what the last layers give, in place."""
        unit = normalize(direction, dim=0)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(_LAST):
                layer.weight.sub_(torch.outer(unit, unit @ layer.weight))
                layer.bias.sub_(unit * (unit @ layer.bias))

    def forward(self, pooled: Tensor, tokens: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        vectors = self._projected(pooled, tokens, weights)
        return vectors if self.reserve is None else self.reserve(vectors)

    def _projected(self, pooled: Tensor, tokens: Tensor | None, weights: Tensor | None) -> Tensor:
        if self.branch is not None:
            features, scores = pooled[:, : self.width], pooled[:, self.width :]
            vector = normalize(self.pooled(features), dim=-1) + self.branch(scores)
            return normalize(vector, dim=-1)
        if not self.needs_tokens:
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


class NoHead(Head):
    """No projector: the encoder's own vectors (B, d), brought to length 1."""

    common: Tensor | None = None
    """A direction (d,) that most of the vectors share, if heads that learn to agree with them are to have nothing of
    it: in some spaces it is most of a vector, and in media it would only be noise."""

    def __init__(self, modality: Modality, width: int) -> None:
        nn.Module.__init__(self)
        self.modality, self.width, self.kind = modality, width, "none"
        self.reserve, self.branch = None, None
        self.pooled = nn.Identity()
        self.register_buffer("here", torch.zeros(()), persistent=False)
