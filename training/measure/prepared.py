"""Pairs with the frozen features of both sides, and their features as tensors."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.features import Features
from training.pairs import Pairs

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """The pairs of one source and split with the frozen features of both sides."""

    pairs: Pairs
    media: Features
    texts: Features

    @property
    def identity(self) -> str:
        """Hash of the pairs, their features and what is made of them."""
        pairs = self.pairs
        digest = hashlib.sha256(f"{pairs.modality}:{pairs.weight}:{pairs.supervision}:{pairs.words}".encode())
        digest.update(f"{self.media.identity}:{self.texts.identity}:{pairs.classes}".encode())
        digest.update(np.ascontiguousarray(pairs.links).data)
        if pairs.labels is not None:
            digest.update(np.ascontiguousarray(pairs.labels).data)
        return digest.hexdigest()


def tensors(features: Features, rows: Rows, tokens: bool, seed: int | None = None) -> dict[str, Tensor]:
    """The arguments of Head.forward for some rows; local vectors only where they are asked for."""
    return {name: torch.from_numpy(array) for name, array in features.take(rows, tokens, seed).items()}
