"""Regularisers of a batch of projected vectors; pure functions, each a scalar that is added to the contrast."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_ROWS = 1024
"""Bound of the (rows, rows) matrix of `uniformity`, whatever the batch is."""


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
