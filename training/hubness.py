"""Choose how strongly hubs are corrected for, and fill the banks of `training.querybank` from the training media.

The bank is media alone, without their texts or labels. The strength is the one that is best on validation.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.bundle import Modality
from training.projector import Head
from training.querybank import MEDIA, MediaReserve, TextReserve
from training.recipe import Recipe
from training.trained import Trained
from training.validation import Data, calibrate, means, project, validate

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_TEXTS = 5000  # that say how far b(t) varies
_MARGIN = 1.25  # by which texts to come may vary more


def with_querybank(recipe: Recipe, trained: Trained, data: Data, strength: float | None = None) -> Trained:
    """The heads with banks and the strength of correction that is best on validation, temperature and means anew.

    Without a validation split there is nothing to choose by, and the strength is 0, unless it is given.
    """
    heads, rng = trained.heads, np.random.default_rng(recipe.train.seed)
    width = recipe.projector.inner
    banks = {
        modality: torch.from_numpy(_drawn(parts, recipe.projector.querybank, rng)[:, :width])
        for modality in MEDIA
        if modality in heads and (parts := _media(heads[modality], modality, data))
    }
    reserve = TextReserve(width, {modality: len(bank) for modality, bank in banks.items()})
    for modality, bank in banks.items():
        reserve.bank(modality).copy_(bank)
    reserve.temperature.fill_(trained.temperature)
    heads["text"].reserve = reserve.eval().requires_grad_(False)
    texts = [
        project(heads["text"], splits["train"].texts) for splits in data.values() if len(splits["train"].pairs.texts)
    ]
    some = torch.from_numpy(_drawn(texts, _TEXTS, rng)[:, :width])
    spread = 0.0
    for modality in banks:
        liked = reserve.liked(some, modality)
        reserve.centre[MEDIA.index(modality)] = liked.mean()
        spread = max(spread, float((liked - liked.mean()).abs().max()))
    scores: dict[float, float] = {}
    for tried in STRENGTHS if strength is None else (0.0, strength):
        _set(heads, tried, spread)
        figures = validate(recipe, heads, data)
        scores[tried] = float(np.mean(list(figures.values()))) if figures else 0.0
        columns = "".join(f"  {name} {value:.2f}" for name, value in figures.items())
        print(f"hubs corrected by {tried:<6g}{scores[tried]:8.2f}{columns}", file=sys.stderr)
    best = max(scores, key=lambda tried: scores[tried]) if strength is None else strength
    reach = _set(heads, best, spread)
    # Reserved numbers make every cosine smaller by one factor, and so does the temperature that fits them.
    temperature = calibrate(recipe, heads, data, trained.temperature / (1 + reach**2))
    ladder = {"querybank.strength": best, "querybank.gain": round(scores[best] - scores[0.0], 3)}
    return replace(trained, temperature=temperature, means=means(heads, data), ladder=trained.ladder | ladder)


def _set(heads: Mapping[Modality, Head], strength: float, spread: float) -> float:
    """Set λ on both sides; κ is chosen so that media and texts have reserved numbers of one length. Returns κ."""
    reach = float(np.sqrt(np.sqrt(len(MEDIA)) * strength * spread * _MARGIN))
    for modality, head in heads.items():
        reserve = head.reserve
        assert isinstance(reserve, MediaReserve | TextReserve)
        banked = not isinstance(reserve, MediaReserve) or len(_bank(heads, modality))
        reserve.reach.fill_(reach if banked else 0.0)
        if isinstance(reserve, TextReserve):
            reserve.slope.fill_(strength / reach if reach else 0.0)
    return reach


def _bank(heads: Mapping[Modality, Head], modality: Modality) -> torch.Tensor:
    reserve = heads["text"].reserve
    assert isinstance(reserve, TextReserve)
    return reserve.bank(modality)


def _media(head: Head, modality: Modality, data: Data) -> list[NDArray[np.float32]]:
    return [
        project(head, splits["train"].media)
        for splits in data.values()
        if splits["train"].pairs.modality == modality and len(splits["train"].pairs.media)
    ]


def _drawn(parts: list[NDArray[np.float32]], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """`count` rows, as many of each part as of the others as far as they have them."""
    each = [min(len(part), -(-count // len(parts))) for part in parts]
    return np.concatenate([part[rng.choice(len(part), n, replace=False)] for part, n in zip(parts, each, strict=True)])
