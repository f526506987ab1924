"""Read what an encoder that was trained with labels can name: its own classifier's scores, and pairs made of them.

A classifier's scores, carried into the text space by the vectors of its class names, describe media that no caption
describes (ConSE, arXiv 1312.5650). Here they are both a branch of the head, so that classes of which training has no
media keep their place, and soft captions of unlabelled media. The text head gives the names' vectors, so that both
stay in the space while it is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from service.contract.bundle import Modality
from training.encoders import FrozenEncoder
from training.features import Features, cached_features
from training.heads.projector import Head
from training.recipe import Recipe


@dataclass(frozen=True)
class Named:
    """The class names of one encoder's classifier, as the frozen text encoder reads them."""

    count: int
    prompts: tuple[Features, ...]
    """One per template, (C, d) each. The head's branch uses the first, pairs use all in turn."""
    bare: Features
    """(C, d): the first word or words of each name alone, as somebody types them into a search."""


def named(recipe: Recipe, encoders: Mapping[Modality, FrozenEncoder], cache: Path) -> dict[Modality, Named]:
    """The names of every encoder whose recipe entry says `concepts: true`."""
    result: dict[Modality, Named] = {}
    for modality, encoder in encoders.items():
        if encoder.concepts:
            prompts = tuple(
                cached_features(
                    encoders["text"],
                    [template.format(name.lower()) for name in encoder.concepts],
                    cache,
                    what=f"{modality} concepts",
                )
                for template in recipe.templates[modality]
            )
            first = [name.split(",")[0].lower() for name in encoder.concepts]
            bare = cached_features(encoders["text"], first, cache, what=f"{modality} concepts")
            result[modality] = Named(len(encoder.concepts), prompts, bare)
    return result


def place(heads: Mapping[Modality, Head], names: Mapping[Modality, Named]) -> None:
    """Give the heads' branches the names' vectors as the text head sees them now, with its gradient."""
    for modality, vocabulary in names.items():
        if modality in heads and heads[modality].branch is not None:
            vectors = name_vectors(heads["text"], vocabulary, 0)
            branch = heads[modality].branch
            branch.place(vectors[:, : branch.names.shape[1]])  # type: ignore[union-attr]


def name_vectors(text: Head, vocabulary: Named, template: int) -> Tensor:
    """Unit vectors (C, D) of the names in one template, in float32 under autocast too."""
    features = vocabulary.prompts[template % len(vocabulary.prompts)]
    return text(torch.from_numpy(np.asarray(features.pooled)).to(text.device)).float()


def soft_caption_loss(media: Tensor, names: Tensor, log_scale: Tensor, scores: Tensor) -> Tensor:
    """Cross-entropy of media (B, D) over names (C, D) against the classifier's scores (B, C), normalised: a scalar.

    A row without a score says nothing, and counts for nothing.
    """
    total = scores.sum(1, keepdim=True)
    target = scores / total.clamp_min(1e-12)
    logits = log_scale.float().exp() * (media.float() @ names.float().T)
    return -(target * log_softmax(logits, dim=-1)).sum(1).mean()
