"""Linear heads without training: ridge regression and regularised CCA, from second moments that are summed once.

Ridge maps media into the principal axes of the texts. CCA maps both sides into the directions in which they correlate
most (Escaping Plato's Cave, arXiv 2503.05283, aligns in that subspace): with the regularised covariances
K = C + λ (tr C / d) I, the text directions are the leading eigenvectors of

    Σ_m w_m K_tt^-½ C_tm K_mm^-1 C_mt K_tt^-½        over the media modalities m,

which for one modality are those of CCA, and a modality's head predicts the texts' variates. Dimensions are weighted
by the correlation (Gong et al., IJCV 2014). Sources count by their weight, whatever their size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from service.contract.bundle import Modality
from training.errors import TrainingError
from training.heads.projector import Head, Linear
from training.measure.prepared import Prepared
from training.measure.validation import Data, project
from training.recipe import Recipe

Doubles = NDArray[np.float64]
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""λ, relative to the mean variance of the features."""
_CHUNK = 4096
_POWER = 1.0  # of the correlation, on each side


class ClosedFormError(TrainingError):
    """A closed form cannot give what the recipe asks for."""


@dataclass(frozen=True)
class Moments:
    """Means and centred second moments of the pairs of one modality, in the heads' standardised features."""

    weight: float
    media: Doubles
    """(d,) mean; cmm (d, d); cmt (d, e)."""
    texts: Doubles
    cmm: Doubles
    cmt: Doubles


def ridge(
    recipe: Recipe, heads: Mapping[Modality, Head], data: Data, frozen: Mapping[Modality, Head]
) -> Iterator[float]:
    """Fill the linear `heads` for one penalty after another, in place, and yield the penalty.

    With a frozen text head, media are mapped onto its unit vectors instead. Raises ClosedFormError.
    """
    mean, ctt, moments = _moments(heads, data, frozen)
    size = recipe.projector.inner
    if "text" in frozen:
        axes = np.eye(len(mean))
        mean = np.zeros_like(mean)  # the frozen text vectors stay where they are
    else:
        axes = _leading(ctt, size)[1]
        _fill(heads["text"], axes, -mean @ axes)
    solved = {modality: np.linalg.eigh(moment.cmm) for modality, moment in moments.items()}
    for penalty in PENALTIES:
        for modality, moment in moments.items():
            values, vectors = solved[modality]
            inverse = 1.0 / (np.maximum(values, 0) + penalty * max(values.mean(), 1e-12))
            weights = (vectors * inverse) @ (vectors.T @ moment.cmt) @ axes
            _fill(heads[modality], weights, (moment.texts - mean) @ axes - moment.media @ weights)
        yield penalty


def cca(recipe: Recipe, heads: Mapping[Modality, Head], data: Data, frozen: Mapping[Modality, Head]) -> Iterator[float]:
    """Computes both heads by CCA.

    Raises ClosedFormError where the text head is frozen: it has no directions left to choose.
    """
    if frozen:
        raise ClosedFormError("cca chooses the directions of both sides: it cannot align to frozen heads")
    mean, ctt, moments = _moments(heads, data, frozen)
    solved = {modality: np.linalg.eigh(moment.cmm) for modality, moment in moments.items()}
    text_values, text_vectors = np.linalg.eigh(ctt)
    for penalty in PENALTIES:
        root = (text_vectors / np.sqrt(_penalised(text_values, penalty))) @ text_vectors.T
        explained = np.zeros_like(ctt)
        predictors = {}
        for modality, moment in moments.items():
            values, vectors = solved[modality]
            predictors[modality] = (vectors / _penalised(values, penalty)) @ (vectors.T @ moment.cmt) @ root
            explained += moment.weight * (root @ moment.cmt.T @ predictors[modality])
        squared, axes = _leading(explained, recipe.projector.inner)
        correlation = np.sqrt(np.clip(squared, 1e-12, None))
        texts = root @ axes * correlation**_POWER
        _fill(heads["text"], texts, -mean @ texts)
        for modality, moment in moments.items():
            weights = predictors[modality] @ axes * correlation ** (_POWER - 1)
            _fill(heads[modality], weights, (moment.texts - mean) @ texts - moment.media @ weights)
        yield penalty


def _moments(
    heads: Mapping[Modality, Head], data: Data, frozen: Mapping[Modality, Head]
) -> tuple[Doubles, Doubles, dict[Modality, Moments]]:
    """Mean and covariance of the texts over all sources, and the moments of each modality that learns."""
    learning: dict[Modality, list[Prepared]] = {}
    for splits in data.values():
        # A set that is only evaluated has no pairs to fit.
        if splits["train"].pairs.modality not in frozen and len(splits["train"].pairs.links):
            learning.setdefault(splits["train"].pairs.modality, []).append(splits["train"])
    if not learning:
        raise ClosedFormError("every media head is frozen: nothing is left to fit")
    everything = sum(source.pairs.weight for sources in learning.values() for source in sources)
    mean, square = np.zeros(1), np.zeros(1)
    moments = {}
    for modality, sources in learning.items():
        raw = [np.zeros(1) for _ in range(5)]
        share = sum(source.pairs.weight for source in sources)
        for source in sources:
            values = _raw(source, heads[modality], heads["text"], "text" in frozen)
            raw = [total + source.pairs.weight / share * value for total, value in zip(raw, values, strict=True)]
        media, texts, mm, tt, mt = raw
        weight = share / everything
        mean, square = mean + weight * texts, square + weight * tt
        cmm, cmt = mm - np.outer(media, media), mt - np.outer(media, texts)
        moments[modality] = Moments(weight, media, texts, cmm, cmt)
    return mean, square - np.outer(mean, mean), moments


@torch.inference_mode()
def _raw(source: Prepared, media: Head, text: Head, frozen_text: bool) -> list[Doubles]:
    """E[m], E[t], E[m mᵀ], E[t tᵀ], E[m tᵀ] over a source's links, some thousand rows of each side at a time."""
    links, count = source.pairs.links, len(source.pairs.links)
    width, inner = source.media.pooled.shape[1], media.pooled.linear.out_features  # type: ignore[union-attr]

    def of_texts(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if frozen_text:
            return project(text, source.texts, rows)[:, :inner]
        return _standardised(text, source.texts.pooled[rows])

    shape = (len(source.media), len(source.texts))
    linked = csr_array((np.ones(count, np.float32), (links[:, 0], links[:, 1])), shape=shape)
    often = np.bincount(links[:, 0], minlength=shape[0]).astype(np.float32)
    text_often = np.bincount(links[:, 1], minlength=shape[1]).astype(np.float32)
    text_width = of_texts(np.arange(1)).shape[1]
    mean, mm = np.zeros(width), np.zeros((width, width))
    text_mean, tt = np.zeros(text_width), np.zeros((text_width, text_width))
    mt = np.zeros((width, text_width))
    for start in range(0, shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        block = _standardised(media, source.media.pooled[rows])
        mean += often[rows] @ block
        mm += block.T @ (often[rows, None] * block)
        links_of = linked[rows]
        columns, places = np.unique(links_of.indices, return_inverse=True)
        if len(columns):
            links_of = csr_array(
                (links_of.data, places.reshape(-1), links_of.indptr), shape=(links_of.shape[0], len(columns))
            )
            mt += block.T @ (links_of @ of_texts(columns))
    for start in range(0, shape[1], _CHUNK):
        rows = slice(start, start + _CHUNK)
        texts = of_texts(np.arange(start, min(start + _CHUNK, shape[1])))
        text_mean += text_often[rows] @ texts
        tt += texts.T @ (text_often[rows, None] * texts)
    return [value / count for value in (mean, text_mean, mm, tt, mt)]


def _standardised(head: Head, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
    assert isinstance(head.pooled, Linear)
    return head.pooled.standardise(torch.from_numpy(np.array(pooled, np.float32))).numpy()


@torch.no_grad()
def _fill(head: Head, weights: Doubles, bias: Doubles) -> None:
    """Put weights (d, k) into a linear head; its dimensions past k stay zero."""
    assert isinstance(head.pooled, Linear)
    linear = head.pooled.linear
    linear.weight.zero_()
    linear.bias.zero_()
    linear.weight[: weights.shape[1]] = torch.from_numpy(weights.T.astype(np.float32))
    linear.bias[: weights.shape[1]] = torch.from_numpy(bias.astype(np.float32))


def _leading(symmetric: Doubles, count: int) -> tuple[Doubles, Doubles]:
    values, vectors = np.linalg.eigh(symmetric)
    order = np.argsort(values)[::-1][:count]
    return values[order], vectors[:, order]


def _penalised(values: Doubles, penalty: float) -> Doubles:
    return np.maximum(values, 0) + penalty * max(float(values.mean()), 1e-12)
