"""Choose how strongly hubs are corrected for, and fill the banks of `training.heads.querybank` from what is trained on.

The banks are media without their texts or labels, and texts without their media. First the strength for hubs among the
texts is chosen, then the one for hubs among the media, each as the best on validation.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.bundle import Modality
from training.features import Features
from training.heads.concepts import Named
from training.heads.projector import Head
from training.heads.querybank import MEDIA, MediaReserve, TextReserve
from training.heads.trained import Trained
from training.measure.validation import Data, calibrate, means, overall, project, validate
from training.recipe import Recipe

STRENGTHS = (0.0, 0.25, 0.5)
"""Stronger ones raise texts that no medium likes: a label without sense, or of a picture, then beats a sound's own."""
_SOME = 5000  # texts and media that say how far b(t) and c(x) vary
_MARGIN = 1.25  # by which texts to come may vary more


def with_querybank(
    recipe: Recipe,
    trained: Trained,
    data: Data,
    names: Mapping[Modality, Named],
    strengths: tuple[float, float] | None = None,
    captions: Sequence[Features] = (),
) -> Trained:
    """The heads with banks and the strengths of correction that are best on validation, temperature and means anew.

    `strengths` are those for hubs among the texts and among the media. Without a validation split there is nothing to
    choose by, and they are 0, unless they are given. The bank of texts holds those of the train splits, `captions`,
    and the bare names of what encoders can name, without which media suffer that are found by a word alone.
    """
    heads, spreads = trained.heads, _fill(recipe, trained, data, names, captions)
    chosen, scores = (0.0, 0.0), dict[tuple[float, float], float]()
    for of_texts in (True, False):
        tried = [(value, 0.0) for value in STRENGTHS]
        if not of_texts:
            tried = [(chosen[0], value) for value in STRENGTHS]
        for both in tried if strengths is None else [(0.0, 0.0), strengths]:
            if both in scores:
                continue
            _set(heads, both, spreads)
            figures = validate(recipe, heads, data, names)
            scores[both] = overall(figures)
            columns = "".join(f"  {name} {value:.2f}" for name, value in figures.items())
            print(f"hubs corrected by {both[0]:g}, {both[1]:g}{scores[both]:10.2f}{columns}", file=sys.stderr)
        chosen = max(scores, key=lambda both: scores[both]) if strengths is None else strengths
    longer = _set(heads, chosen, spreads)
    # Reserved numbers make every cosine smaller by one factor, and so does the temperature that fits them.
    temperature = calibrate(recipe, heads, data, trained.temperature / longer)
    ladder = {
        "querybank.strength": chosen[0],
        "querybank.media_strength": chosen[1],
        "querybank.gain": round(scores[chosen] - scores[0.0, 0.0], 3),
    }
    return replace(trained, temperature=temperature, means=means(heads, data), ladder=trained.ladder | ladder)


def _fill(
    recipe: Recipe, trained: Trained, data: Data, names: Mapping[Modality, Named], captions: Sequence[Features]
) -> dict[str, float]:
    """Give the heads banks, drawn from what is trained on; how far b(t) and c(x) vary, by side."""
    heads, rng = trained.heads, np.random.default_rng(recipe.train.seed)
    width, rows = recipe.projector.inner, recipe.projector.querybank
    sources: dict[Modality, list[Features]] = {
        modality: parts for modality in MEDIA if modality in heads and (parts := _media(modality, data))
    }
    learned = [splits["train"].texts for splits in data.values() if splits["train"].pairs.weight]
    texts = [*learned, *captions, *(named.bare for named in names.values())]
    if parts := [features for features in texts if len(features)]:
        sources["text"] = parts
    banks, some = (
        {m: torch.from_numpy(_drawn(heads[m], parts, count, rng)[:, :width]) for m, parts in sources.items()}
        for count in (rows, _SOME)
    )
    sizes = {modality: len(bank) for modality, bank in banks.items()}
    spreads = dict.fromkeys(("text", "media"), 0.0)
    for modality, head in heads.items():
        reserve = TextReserve(width, sizes) if modality == "text" else MediaReserve(modality, width, sizes)
        head.reserve = reserve.eval().requires_grad_(False)
        reserve.temperature.fill_(trained.temperature)
        side = "text" if modality == "text" else "media"
        for index, other in enumerate(reserve.banks):
            if other in banks:
                reserve.bank(other).copy_(banks[other])
                liked = reserve.liked(some[modality], other) if modality in some else torch.zeros(1)
                reserve.centre[index] = liked.mean()
                spreads[side] = max(spreads[side], float((liked - liked.mean()).abs().max()))
    return spreads


def uncorrected(trained: Trained) -> Trained:
    """The heads without the correction of hubs, at the temperature that they had before it."""
    reserve = trained.heads["text"].reserve
    if reserve is None:
        return trained
    for head in trained.heads.values():
        head.reserve = None
    ladder = {key: value for key, value in trained.ladder.items() if not key.startswith("querybank.")}
    return replace(trained, temperature=float(reserve.temperature), ladder=ladder)


def _set(heads: Mapping[Modality, Head], strengths: tuple[float, float], spreads: Mapping[str, float]) -> float:
    """Set the strengths on all sides. Returns the factor by which the square of every vector's length grew.

    The constants are chosen so that the numbers of both sides that meet have one length.
    """
    strength, media_strength = strengths
    kappa = float(np.sqrt(np.sqrt(len(MEDIA)) * strength * spreads["text"] * _MARGIN))
    nu = float(np.sqrt(media_strength * spreads["media"] * _MARGIN))
    for modality, head in heads.items():
        reserve = head.reserve
        assert isinstance(reserve, MediaReserve | TextReserve)
        text = modality == "text"
        reach, other, taken = (nu, kappa, strength) if text else (kappa, nu, media_strength)
        reserve.reach.fill_(reach)
        reserve.other.fill_(other)
        reserve.slope.fill_(taken / other if other else 0.0)
    return 1 + kappa**2 + nu**2


def _media(modality: Modality, data: Data) -> list[Features]:
    """Features of what is trained on; media whose texts are read twice, as captions and as words, count once."""
    return [
        splits["train"].media
        for splits in data.values()
        if splits["train"].pairs.modality == modality
        and len(splits["train"].pairs.media)
        and splits["train"].pairs.weight
        and not splits["train"].pairs.words
    ]


def _drawn(head: Head, parts: list[Features], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Unit vectors of `count` rows, as many of each part as of the others as far as they have them."""
    counts = [min(len(part), -(-count // len(parts))) for part in parts]
    chosen = [rng.choice(len(part), n, replace=False) for part, n in zip(parts, counts, strict=True)]
    return np.concatenate([project(head, part, rows) for part, rows in zip(parts, chosen, strict=True)])
