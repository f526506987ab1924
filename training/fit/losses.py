"""Losses of projectors are pure functions: contrasts of unit vectors of pairs, and regularisers of a batch."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize
from torch.utils.checkpoint import checkpoint

from training.distributed import ALONE, Ranks
from training.recipe import MAX_TEMPERATURE, MIN_TEMPERATURE, ObjectiveSpec

Repeats = Literal["mask", "positive"]
_ROWS = 1024
"""Bound of the (rows, rows) matrix of `uniformity`, whatever the batch is."""


def contrast(
    spec: ObjectiveSpec,
    media: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    keys: tuple[Tensor, ...],
    ranks: Ranks = ALONE,
    more: tuple[Tensor, tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """This process's share of the loss of all pairs: unit vectors (n, D) of both sides, keys (n,) for `same_pairs`.
    Media are told from `more` texts too: unit vectors (m, D) and their keys (m,).

    Over all processes the shares, and their gradients, add up to those of one process with every pair (n the same
    everywhere). With `spec.chunk` only (chunk, B) logits exist at a time, in the backward pass too: each block is
    computed again there (gradient checkpointing, arXiv 1604.06174), at about twice the arithmetic.
    """
    if spec.negatives == "own" and ranks.count > 1:  # each process's pairs alone: the mean over the processes
        return contrast(spec, media, texts, log_scale, keys, more=more) / ranks.count
    if spec.kind == "info_nce" and spec.repeated == "mask" and spec.chunk is None and ranks.count == 1 and more is None:
        return info_nce(media, texts, log_scale, same_pairs(*keys))
    all_media, all_texts = ranks.gather(media), ranks.gather(texts)
    all_keys = tuple(ranks.gather_constant(key) for key in keys)
    total, first = len(all_media), ranks.index * len(media)
    size = spec.chunk or len(media)
    loss = torch.zeros((), device=media.device)
    seen, seen_keys = all_texts, all_keys
    if more is not None:
        seen = torch.cat([all_texts, more[0]])
        seen_keys = tuple(torch.cat(key) for key in zip(all_keys, more[1], strict=True))
    for queries, others, other_keys in ((media, seen, seen_keys), (texts, all_media, all_keys)):
        for start in range(0, len(queries), size):
            rows = slice(start, min(start + size, len(queries)))
            diagonal = torch.arange(first + rows.start, first + rows.stop, device=media.device)
            block = partial(_block, spec, diagonal=diagonal, keys=tuple(key[rows] for key in keys), all_keys=other_keys)
            inputs = (queries[rows], others, log_scale)
            if spec.chunk is None:
                loss = loss + block(*inputs)
            else:
                loss = loss + checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return loss / total if spec.kind == "sdm" else loss / (2 * total)


def nested(vectors: Tensor, dimensions: int) -> Tensor:
    """Unit vectors (B, D) cut to their first `dimensions` numbers and normalised (Matryoshka, arXiv 2205.13147)."""
    return vectors if dimensions == vectors.shape[1] else normalize(vectors[:, :dimensions], dim=-1)


def _block(
    spec: ObjectiveSpec,
    queries: Tensor,
    others: Tensor,
    log_scale: Tensor,
    *,
    diagonal: Tensor,
    keys: tuple[Tensor, ...],
    all_keys: tuple[Tensor, ...],
) -> Tensor:
    logits = log_scale.float().exp() * (queries.float() @ others.float().T)
    same = agreeing(keys, all_keys)
    if spec.kind == "info_nce":
        return info_nce_rows(logits, diagonal, same, spec.repeated)
    return similarity_distribution_rows(logits, diagonal, same)


def info_nce(media: Tensor, texts: Tensor, log_scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) of unit vectors (B, D) against (B, D): a scalar.

    `log_scale` is log(1 / temperature). `same` (B, B) marks pairs i ≠ j that share media, text or label: false
    negatives, left out of the softmax. Logits are float32 whatever the vectors are.
    """
    logits = log_scale.float().exp() * (media.float() @ texts.float().T)
    if same is not None:
        off_diagonal = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(same & off_diagonal, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def info_nce_rows(logits: Tensor, diagonal: Tensor, same: Tensor, repeats: Repeats) -> Tensor:
    """Sum over rows of one direction of InfoNCE; logits and same (n, B), diagonal (n,) each row's own column.

    `mask` leaves the other columns that are the same out. `positive` spreads the target evenly over them (SupCon's
    outer form, arXiv 2004.11362), which is the same loss when every row has one positive.
    """
    if repeats == "mask":
        return cross_entropy(logits.masked_fill(_others(same, diagonal), float("-inf")), diagonal, reduction="sum")
    return -(_targets(same, diagonal) * log_softmax(logits, dim=1)).sum()


def similarity_distribution_rows(logits: Tensor, diagonal: Tensor, same: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(logits) ‖ evenly spread positives) (SDM of IRRA, arXiv 2303.12501)."""
    log_p = log_softmax(logits, dim=1)
    return (log_p.exp() * (log_p - torch.log(_targets(same, diagonal) + 1e-8))).sum()


def same_pairs(*keys: Tensor) -> Tensor:
    """(B, B) bool: whether pairs i and j agree in any of the keys (B,); a negative key agrees with nothing."""
    return agreeing(keys, keys)


def agreeing(rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> Tensor:
    """(n, B) bool: whether a row's pair agrees with a column's in any of the keys, (n,) and (B,)."""
    same = torch.zeros(len(rows[0]), len(columns[0]), dtype=torch.bool, device=rows[0].device)
    for row, column in zip(rows, columns, strict=True):
        same |= (row[:, None] == column[None, :]) & (row >= 0)[:, None]
    return same


@torch.no_grad()
def clamp_log_scale(log_scale: Tensor) -> None:
    """Keep the temperature within [0.001, 0.5], in place. After the step, so that the gradient is never cut."""
    log_scale.clamp_(-torch.log(torch.tensor(MAX_TEMPERATURE)).item(), -torch.log(torch.tensor(MIN_TEMPERATURE)).item())


def _own(same: Tensor, diagonal: Tensor) -> Tensor:
    return torch.zeros_like(same).scatter_(1, diagonal[:, None], True)


def _others(same: Tensor, diagonal: Tensor) -> Tensor:
    return same & ~_own(same, diagonal)


def _targets(same: Tensor, diagonal: Tensor) -> Tensor:
    """(n, B): 1 / positives on each of a row's positives, else 0; one-hot where the row's own is the only one."""
    positive = (same | _own(same, diagonal)).float()
    return positive / positive.sum(1, keepdim=True)


def noise_robust(features: Tensor, vectors: Tensor) -> Tensor:
    """The three terms of NMTune (arXiv 2309.17002) for vectors (B, D) of frozen features (B, d), B > 1.

    Consistency with the features, decorrelation of the dimensions (VICReg's covariance term), and a small share of
    the largest singular value. NMTune compares vectors with features directly, which needs D = d; here the cosine
    matrices of the two are compared, so that any d and D will do.
    """
    features, vectors = features.float(), vectors.float()
    unit, projected = normalize(features - features.mean(0), dim=-1), normalize(vectors - vectors.mean(0), dim=-1)
    consistency = (unit @ unit.T - projected @ projected.T).square().mean()
    centred = vectors - vectors.mean(0)
    # Unit vectors have variances near 1 / D: scaled to 1, the terms weigh alike at any D.
    covariance = centred.T @ centred * (vectors.shape[1] / (len(vectors) - 1))
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    singular = torch.linalg.svdvals(vectors)
    return consistency + off_diagonal / vectors.shape[1] ** 2 + singular[0] / singular.sum()


def alignment(media: Tensor, texts: Tensor) -> Tensor:
    """Mean squared distance of the two unit vectors (B, D) of a pair (Wang & Isola, arXiv 2005.10242)."""
    return (media.float() - texts.float()).square().sum(1).mean()


def uniformity(vectors: Tensor) -> Tensor:
    """log mean exp(-2 |x - y|²) over pairs i ≠ j of unit vectors (B, D), B > 1 (arXiv 2005.10242); lower is wider.

    The sum with `alignment` is what closes the gap between modalities (arXiv 2405.18570).
    """
    vectors = vectors[:_ROWS].float()
    similarity = vectors @ vectors.T
    off_diagonal = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    exponents = (4 * similarity - 4)[off_diagonal]
    return torch.logsumexp(exponents, 0) - torch.log(torch.tensor(float(len(exponents)), device=vectors.device))
