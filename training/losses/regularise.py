"""Regularisers of a batch of projected vectors; pure functions, each a scalar that is added to the contrast."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, softmax

_ROWS = 512  # bounds the (rows, rows) matrices of `structure`, whatever the batch is


def structure(features: Tensor, vectors: Tensor, *, temperature: float = 0.1, levels: int = 1) -> Tensor:
    """How far the neighbourhoods of vectors (B, D) are from those of the frozen features (B, d) that they came from.

    STRUCTURE (arXiv 2506.16895): the Jensen–Shannon divergence between the two softmax similarity graphs, with the
    graphs' l-step walks at level l, weighted 1 / l and averaged over levels. Cosines of centred unit vectors. On the
    first 512 rows.
    """
    before, after = (_graph(x[:_ROWS].float(), temperature) for x in (features, vectors))
    loss = torch.zeros((), device=vectors.device)
    p, q = before, after
    for level in range(1, levels + 1):
        middle = (p + q) / 2
        divergence = (_kl(p, middle) + _kl(q, middle)) / 2
        loss = loss + divergence.clamp_min(0.0) / level
        p, q = p @ before, q @ after
    return loss / levels


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
    vectors = vectors[: 2 * _ROWS].float()
    similarity = vectors @ vectors.T
    off_diagonal = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    exponents = (4 * similarity - 4)[off_diagonal]
    return torch.logsumexp(exponents, 0) - torch.log(torch.tensor(float(len(exponents)), device=vectors.device))


def fusemix(features: Tensor, order: Tensor, share: float) -> Tensor:
    """share · x + (1 - share) · x[order] of features (B, d): both sides of a pair alike (arXiv 2312.10144)."""
    return share * features + (1 - share) * features[order]


def _graph(x: Tensor, temperature: float) -> Tensor:
    unit = normalize(x, dim=-1)
    centred = unit - unit.mean(0)
    return softmax(centred @ centred.T / temperature, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.clamp_min(1e-12).log() - q.clamp_min(1e-12).log())).sum(1).mean()
