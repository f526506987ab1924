"""Hubs made rarer inside the space: what querybank normalisation does to similarities, done to the vectors.

A text that is near to everything, a hub, is found by many media that it does not describe, and so is a medium by many
texts. Querybank normalisation (Bogolin et al., CVPR 2022, arXiv 2112.12777) takes from the similarity of a medium x and
a text t how much a bank of other media likes that text, and here also how much a bank of other texts likes that medium,
in its logarithmic form: s(x, t) = x·t - λ b(t) - μ c(x), with b(t) = τ log mean_q exp(q·t / τ) and c(x) likewise. That
is an inner product of longer vectors: media get a constant κ in a number of their own modality, where texts get
-λ b(t) / κ; texts get a constant ν in a number of theirs, where media get -μ c(x) / ν; and one more number on each side
fills every vector up to the same length (so Bachrach et al., RecSys 2014, turn products into cosines). So cosine
search, labelling and every client have the correction without knowing of it. What one text finds is put in another
order by c alone, what one medium finds by b alone.

The last RESERVED numbers of a vector are these: images', sounds', texts', what fills texts, what fills media.
`training.fit.hubs` fills the banks from what is trained on and chooses λ and μ.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from service.contract.bundle import Modality

MEDIA: tuple[Modality, ...] = ("image", "audio")


class _Reserve(nn.Module):
    """Holds what both sides have: banks of the other side, and how strongly what they like is taken off."""

    reach: Tensor
    """The constant in the number of one's own kind: κ of media, ν of texts. 0 is no correction."""
    other: Tensor
    """The constant of the other side, which is also the length of the numbers that correct this side's hubs."""
    slope: Tensor
    """The strength, λ of texts and μ of media, over `other`."""
    temperature: Tensor
    """τ."""
    centre: Tensor
    """(banks,): the mean of what each bank likes, which is taken off so that reserved numbers stay small."""

    def __init__(self, width: int, rows: Mapping[Modality, int]) -> None:
        super().__init__()
        self.banks = tuple(rows)
        for modality in self.banks:
            self.register_buffer(f"bank_{modality}", torch.zeros(rows[modality], width))
        for name in ("reach", "other", "slope"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("centre", torch.zeros(len(self.banks)))

    def bank(self, modality: Modality) -> Tensor:
        """(rows, D - RESERVED) unit vectors of the other side."""
        bank: Tensor = getattr(self, f"bank_{modality}")
        return bank

    def liked(self, vectors: Tensor, modality: Modality) -> Tensor:
        """Return how much a bank likes unit vectors (B, D - RESERVED): (B, 1)."""
        scores = vectors @ self.bank(modality).T / self.temperature
        return self.temperature * (scores.logsumexp(-1, keepdim=True) - math.log(len(self.bank(modality))))

    def corrections(self, vectors: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns for each bank the number (B, 1) that takes off what it likes, and the number that fills the vector
        up.
        """
        most = self.other / math.sqrt(len(self.banks))
        numbers = [
            torch.clamp(self.slope * (self.centre[index] - self.liked(vectors, modality)), -most, most)
            if len(self.bank(modality))
            else torch.zeros_like(vectors[:, :1])
            for index, modality in enumerate(self.banks)
        ]
        rest = self.other.square() - torch.stack([number.square() for number in numbers]).sum(0)
        return numbers, rest.clamp_min(0.0).sqrt()


class MediaReserve(_Reserve):
    """Unit vectors (B, D - RESERVED) of media → unit vectors (B, D)."""

    place: Tensor

    def __init__(self, modality: Modality, width: int, rows: Mapping[Modality, int]) -> None:
        super().__init__(width, {"text": rows.get("text", 0)})
        place = torch.zeros(len(MEDIA))
        if modality in MEDIA:  # of another, the texts have no bank
            place[MEDIA.index(modality)] = 1.0
        self.register_buffer("place", place, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        reach = (self.reach * self.place).expand(vectors.shape[0], -1)
        (number,), filler = self.corrections(vectors)
        return normalize(torch.cat([vectors, reach, number, torch.zeros_like(number), filler], -1), dim=-1)


class TextReserve(_Reserve):
    """Unit vectors (B, D - RESERVED) of texts → unit vectors (B, D)."""

    def __init__(self, width: int, rows: Mapping[Modality, int]) -> None:
        super().__init__(width, {modality: rows.get(modality, 0) for modality in MEDIA})

    def forward(self, vectors: Tensor) -> Tensor:
        numbers, filler = self.corrections(vectors)
        reach = self.reach.expand(vectors.shape[0], 1)
        return normalize(torch.cat([vectors, *numbers, reach, filler, torch.zeros_like(reach)], -1), dim=-1)
