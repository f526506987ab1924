import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from training.fit.losses import alignment, noise_robust, uniformity


def random(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_robust_is_its_three_terms() -> None:
    features, vectors = random(10, 6), normalize(random(10, 4, 1), dim=-1)
    f, v = features.numpy(), vectors.numpy()
    centred = [x - x.mean(0) for x in (f, v)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in centred]
    consistency = ((unit[0] @ unit[0].T - unit[1] @ unit[1].T) ** 2).mean()
    covariance = np.cov(v.T) * 4
    off = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    singular = np.linalg.svd(v, compute_uv=False)
    expected = consistency + off / 16 + singular[0] / singular.sum()
    assert math.isclose(noise_robust(features, vectors).item(), expected, rel_tol=1e-4)


def test_noise_robust_likes_vectors_that_keep_the_features_and_use_every_dimension() -> None:
    features = normalize(random(64, 8), dim=-1)
    collapsed = normalize(torch.ones(64, 8, dtype=torch.float64) + 0.01 * features, dim=-1)
    assert noise_robust(features, features) < noise_robust(features, collapsed)


def test_golden_alignment_and_uniformity() -> None:
    media = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert alignment(media, texts).item() == pytest.approx(1.0)  # squared distances 0 and 2
    assert uniformity(media).item() == pytest.approx(-4.0)  # |x - y|² = 2
    assert uniformity(texts).item() == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["noise_robust", "alignment", "uniformity"])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_those_of_finite_differences(name: str, seed: int) -> None:
    features, raw, direction = random(9, 6, seed), random(9, 6, seed + 1), random(9, 6, seed + 2)

    def value(moved: torch.Tensor) -> torch.Tensor:
        unit = normalize(moved, dim=-1)
        if name == "alignment":
            return alignment(normalize(features, dim=-1), unit)
        if name == "uniformity":
            return uniformity(unit)
        return noise_robust(features, unit)

    leaf = raw.clone().requires_grad_()
    value(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    numeric = (value(raw + 3e-3 * direction) - value(raw - 3e-3 * direction)) / 6e-3  # sums are float32: a wide step
    assert math.isclose(float((leaf.grad * direction).sum()), numeric.item(), rel_tol=2e-2, abs_tol=2e-4)


@pytest.mark.parametrize("name", ["noise_robust", "alignment", "uniformity"])
@settings(max_examples=20)
@given(order=st.permutations(range(8)))
def test_the_order_of_the_rows_does_not_matter(name: str, order: list[int]) -> None:
    features, vectors = random(8, 6), normalize(random(8, 6, 1), dim=-1)

    def value(pick: list[int]) -> float:
        if name == "uniformity":
            return uniformity(vectors[pick]).item()
        function = {"noise_robust": noise_robust, "alignment": alignment}[name]
        return function(features[pick], vectors[pick]).item()

    assert math.isclose(value(order), value(list(range(8))), rel_tol=1e-4, abs_tol=1e-6)
