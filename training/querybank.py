"""Hubs made rarer inside the space: what querybank normalisation does to similarities, done to the vectors.

A text that is near to everything, a hub, is found by many media that it does not describe. Querybank normalisation
(Bogolin et al., CVPR 2022, arXiv 2112.12777) takes from the similarity of a medium x and a text t how much a bank of
other media likes that text, here in its logarithmic form: s(x, t) = x·t - λ b(t) with b(t) = τ log mean_q exp(q·t / τ).
That is an inner product of longer vectors: media get a constant κ in a number of their own modality, texts -λ b(t) / κ
there, and one more number fills every text up to the same length (so Bachrach et al., RecSys 2014, turn products
into cosines). So cosine search, labelling and every client have the correction without knowing of it, and what one text
finds keeps its order.

The last RESERVED numbers of a vector are these. `training.hubness` fills the banks from media and chooses λ.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from service.contract.bundle import Modality
from training.recipe import RESERVED

MEDIA: tuple[Modality, ...] = ("image", "audio")


class MediaReserve(nn.Module):
    """Unit vectors (B, D - RESERVED) of media → unit vectors (B, D)."""

    place: Tensor
    reach: Tensor
    """κ; 0 is no correction."""

    def __init__(self, modality: Modality) -> None:
        super().__init__()
        place = torch.zeros(RESERVED)
        place[MEDIA.index(modality)] = 1.0
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("reach", torch.zeros(()))

    def forward(self, vectors: Tensor) -> Tensor:
        reserved = (self.reach * self.place).expand(vectors.shape[0], -1)
        return normalize(torch.cat([vectors, reserved], -1), dim=-1)


class TextReserve(nn.Module):
    """Unit vectors (B, D - RESERVED) of texts → unit vectors (B, D)."""

    reach: Tensor
    """κ, and the length of a text's reserved numbers."""
    slope: Tensor
    """λ / κ."""
    temperature: Tensor
    """τ."""
    centre: Tensor
    """(media,): the mean of b(t), which is taken off so that reserved numbers stay small."""

    def __init__(self, width: int, rows: Mapping[Modality, int]) -> None:
        super().__init__()
        for modality in MEDIA:
            self.register_buffer(f"bank_{modality}", torch.zeros(rows.get(modality, 0), width))
        for name in ("reach", "slope"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("centre", torch.zeros(len(MEDIA)))

    def bank(self, modality: Modality) -> Tensor:
        """(rows, D - RESERVED) unit vectors of media."""
        bank: Tensor = getattr(self, f"bank_{modality}")
        return bank

    def liked(self, vectors: Tensor, modality: Modality) -> Tensor:
        """b(t) of unit vectors (B, D - RESERVED): (B, 1)."""
        scores = vectors @ self.bank(modality).T / self.temperature
        return self.temperature * (scores.logsumexp(-1, keepdim=True) - math.log(len(self.bank(modality))))

    def forward(self, vectors: Tensor) -> Tensor:
        most = self.reach / math.sqrt(len(MEDIA))
        reserved = [
            torch.clamp(self.slope * (self.centre[index] - self.liked(vectors, modality)), -most, most)
            if len(self.bank(modality))
            else torch.zeros_like(vectors[:, :1])
            for index, modality in enumerate(MEDIA)
        ]
        rest = self.reach.square() - torch.stack([each.square() for each in reserved]).sum(0)
        return normalize(torch.cat([vectors, *reserved, rest.clamp_min(0.0).sqrt()], -1), dim=-1)
