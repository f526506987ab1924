import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.training.select import oracle
from tests.training.select.test_measures import drawn
from training.measure.select.candidates import SelectError
from training.measure.select.sides import Side, each
from training.measure.select.streaming import MEASURES, Sizes, accuracy, compare


def side(name: str, features: NDArray[np.float32]) -> Side:
    return Side(name, (features,), each(len(features)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(12, 40), st.integers(1, 6), st.integers(3, 50))
def test_every_measure_equals_brute_force_over_whole_kernels(seed: int, rows: int, k: int, block: int) -> None:
    x, y = drawn(seed, rows, 6, 5)
    sizes = Sizes(neighbours=k, batch=rows, block=block)
    (one,) = compare([side("x", x)], [side("y", y)], sizes)
    wide = x.astype(float), y.astype(float)
    assert one.cka == pytest.approx(oracle.cka(*(v @ v.T for v in wide)), abs=1e-6)
    assert one.rbf_cka == pytest.approx(oracle.cka(*(oracle.rbf(v, 0.8) for v in wide)), abs=1e-4)
    assert one.mutual_knn == pytest.approx(oracle.mutual_knn(*wide, k))
    both = oracle.left_out(*wide, k), oracle.left_out(*wide[::-1], k)
    assert one.loo_knn == pytest.approx(np.mean(both), abs=2.1 / rows**2)  # one near tie may go either way


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(12, 40), st.integers(1, 6), st.integers(3, 50))
def test_a_vote_equals_brute_force(seed: int, rows: int, k: int, block: int) -> None:
    (x,) = drawn(seed, rows, 4)
    labels = np.random.default_rng(seed).integers(0, 3, rows)
    expected = np.mean(np.array(oracle.votes(x.astype(float), labels, k)) == labels)
    assert accuracy(side("x", x), labels, Sizes(neighbours=k, block=block)) == pytest.approx(expected)


def test_memory_maps_and_block_sizes_give_the_figures_of_memory(tmp_path: Path) -> None:
    x, y = drawn(0, 300, 40, 30)
    mapped = []
    for name, values in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", values)
        mapped.append(side(name, np.load(tmp_path / f"{name}.npy", mmap_mode="r")))
    (whole,) = compare([side("x", x)], [side("y", y)], Sizes(block=300, batch=300))
    for block in (7, 64, 299):
        (streamed,) = compare([mapped[0]], [mapped[1]], Sizes(block=block, batch=300))
        for measure in MEASURES:
            assert getattr(streamed, measure) == pytest.approx(getattr(whole, measure), abs=1e-6), measure


def test_the_same_features_are_one_and_independent_ones_are_chance() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 400, 64)).astype(np.float32)
    same, other = compare([side("x", x)], [side("x", x), side("y", y)], Sizes(batch=200))
    assert [same.cka, same.rbf_cka, same.mutual_knn] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert same.loo_knn > 0.7
    assert [other.cka, other.rbf_cka] == pytest.approx([0.0, 0.0], abs=0.02)
    assert other.mutual_knn == pytest.approx(10 / 399, abs=0.015)
    assert other.loo_knn == pytest.approx(0.5, abs=0.05)


def test_batches_of_rbf_kernels_estimate_that_of_all_rows() -> None:
    x, y = drawn(0, 1200, 8, 8)
    (whole,) = compare([side("x", x)], [side("y", y)], Sizes(batch=1200))
    (batches,) = compare([side("x", x)], [side("y", y)], Sizes(batch=100))
    assert batches.rbf_cka == pytest.approx(whole.rbf_cka, abs=0.02)
    assert batches.rbf_cka != whole.rbf_cka


def test_fewer_queries_estimate_the_same_over_all_neighbours() -> None:
    x, y = drawn(0, 1000, 8, 8)
    (whole,) = compare([side("x", x)], [side("y", y)], Sizes(queries=1000))
    (some,) = compare([side("x", x)], [side("y", y)], Sizes(queries=300))
    assert some.mutual_knn == pytest.approx(whole.mutual_knn, abs=0.02)
    assert some.loo_knn == pytest.approx(whole.loo_knn, abs=0.03)


def test_pairs_of_several_sides_are_those_of_two() -> None:
    a, b, c, d = drawn(5, 50, 4, 5, 6, 7)
    together = compare([side("a", a), side("b", b)], [side("c", c), side("d", d)])
    assert [(one.media, one.text) for one in together] == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    (alone,) = compare([side("b", b)], [side("c", c)])
    for measure in MEASURES:
        assert getattr(together[2], measure) == pytest.approx(getattr(alone, measure), abs=1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(0.0, "bad gives"), (np.nan, "bad hold NaN"), (None, "rows are too few")],
)
def test_what_cannot_be_compared_is_named(spoil: float | None, message: str) -> None:
    x, y = drawn(0, 30, 4, 4)
    if spoil is None:
        x, y = x[:11], y[:11]
    else:
        x = np.full_like(x, spoil)
    with pytest.raises(SelectError, match=message):
        compare([side("bad", x)], [side("good", y)])


def test_a_text_without_a_known_word_has_no_direction_and_stops_nothing() -> None:
    x, y = drawn(0, 30, 4, 4)
    y[3] = 0
    (one,) = compare([side("x", x)], [side("y", y)])
    assert all(np.isfinite(getattr(one, measure)) for measure in MEASURES)


def test_what_is_held_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Peak of what numpy allocates, beside the features on disk."""
    peaks = []
    for rows in (10_000, 40_000):
        mapped = []
        for name in ("x", "y"):
            stored = np.lib.format.open_memmap(tmp_path / f"{name}{rows}.npy", "w+", np.float32, (rows, 64))
            stored[:] = np.random.default_rng(rows).normal(size=(rows, 64))
            mapped.append(side(name, stored))
        tracemalloc.start()
        compare([mapped[0]], [mapped[1]], Sizes(queries=100, block=512, batch=256))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3 * 8 * 30_000  # the order in which rows are drawn, and no features
