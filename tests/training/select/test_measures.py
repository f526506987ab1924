import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.training.select import oracle
from training.measure.select.measures import Moments, median_distance, nearer, overlap, rbf_kernel, u_centred, vote

Floats = NDArray[np.float32]


def drawn(seed: int, rows: int, *widths: int) -> list[Floats]:
    """Features of the same rows that share a part, off the origin."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(rows, 3))
    return [
        (shared @ rng.normal(size=(3, d)) + rng.normal(size=(rows, d)) + 5 * rng.normal(size=d)).astype(np.float32)
        for d in widths
    ]


def linear_cka(x: Floats, y: Floats, block: int | None = None) -> float:
    """It is computed from moments, as streaming does."""

    def hsic(a: Floats, b: Floats) -> float:
        moments = Moments((a[0].astype(float), b[0].astype(float)))
        for start in range(0, len(a), block or len(a)):
            moments.add(a[start : start + (block or len(a))], b[start : start + (block or len(a))])
        return moments.hsic()

    return hsic(x, y) / float(np.sqrt(hsic(x, x) * hsic(y, y)))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(6, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 50))
def test_linear_cka_in_blocks_is_that_of_whole_kernels(seed: int, rows: int, d: int, e: int, block: int) -> None:
    x, y = drawn(seed, rows, d, e)
    kernels = [side.astype(float) @ side.astype(float).T for side in (x, y)]
    own = [oracle.hsic(kernel, kernel) for kernel in kernels]
    moments = Moments((x[:2].mean(0, dtype=float), y[:2].mean(0, dtype=float)))
    for start in range(0, rows, block):
        moments.add(x[start : start + block], y[start : start + block])
    # Relative to what it is divided by: for few rows the estimate itself may be anything near zero.
    assert moments.hsic() / np.sqrt(own[0] * own[1]) == pytest.approx(oracle.cka(*kernels), abs=1e-8)


def test_the_origin_that_moments_start_from_does_not_matter() -> None:
    x, y = drawn(1, 50, 8, 6)
    values = []
    for origin in (0.0, 5.0, 100.0):
        moments = Moments((np.full(8, origin), np.full(6, -origin)))
        moments.add(x, y)
        values.append(moments.hsic())
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_linear_cka_keeps_rotation_and_isotropic_scale(seed: int, scale: float) -> None:
    x, y = drawn(seed, 60, 7, 5)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, 7)))[0]
    turned = (scale * x @ rotation).astype(np.float32)
    assert linear_cka(turned, y) == pytest.approx(linear_cka(x, y), abs=1e-5)
    assert linear_cka(x, turned) == pytest.approx(1.0, abs=1e-5)


def test_linear_cka_does_not_keep_any_invertible_map() -> None:
    x, y = drawn(0, 200, 7, 5)
    stretched = x @ np.diag([30.0, 1, 1, 1, 1, 1, 1]).astype(np.float32)
    assert abs(linear_cka(stretched, y) - linear_cka(x, y)) > 0.05
    assert linear_cka(x, stretched) < 0.9


def test_independent_features_score_nothing_where_the_plain_estimator_does() -> None:
    rng = np.random.default_rng(0)
    pairs = [rng.normal(size=(2, 60, 200)).astype(np.float32) for _ in range(50)]
    debiased = [linear_cka(x, y) for x, y in pairs]
    plain = [oracle.biased_cka(x.astype(float), y.astype(float)) for x, y in pairs]
    assert np.mean(plain) > 0.7
    # Four standard errors of the mean of these very draws.
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / np.sqrt(len(debiased)) < 0.02


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(5, 30))
def test_u_centred_kernels_multiply_to_the_unbiased_hsic(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (raw @ raw.T for raw in rng.normal(size=(2, n, 4)).astype(np.float32))
    product = float((u_centred(first) * u_centred(second)).sum(dtype=np.float64)) / (n * (n - 3))
    expected = oracle.hsic(first.astype(float), second.astype(float))
    size = np.sqrt(oracle.hsic(*[first.astype(float)] * 2) * oracle.hsic(*[second.astype(float)] * 2))
    assert product == pytest.approx(expected, abs=1e-5 * size)
    assert np.abs(u_centred(first).sum(0)).max() < 1e-4 * np.abs(first).max() * n


def test_a_radial_kernel_is_of_distances() -> None:
    x = drawn(3, 20, 4)[0]
    width = 0.8 * median_distance(x)
    assert rbf_kernel(x, width) == pytest.approx(oracle.rbf(x.astype(float), 0.8), abs=1e-5)


def test_the_best_of_several_blocks_are_those_of_all() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)
    best = np.zeros((5, 0), np.float32), np.zeros((5, 0), np.int64)
    for start in range(0, 30, 7):
        rows = np.arange(start, min(start + 7, 30))
        best = nearer(scores[:, rows], rows, best, 4)
    expected = np.sort(np.argsort(-scores, axis=1)[:, :4], axis=1)
    assert np.array_equal(np.sort(best[1], axis=1), expected)


def test_overlap_counts_neighbours_in_any_order() -> None:
    assert overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 5]])) == 0.75


def test_the_nearest_label_wins_where_as_many_vote() -> None:
    assert vote(np.array([[7, 5, 5, 7], [5, 7, 7, 1], [2, 3, 4, 1]])).tolist() == [7, 7, 2]
