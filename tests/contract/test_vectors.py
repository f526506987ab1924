"""Unit length and truncation, for whatever numbers come."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from service.contract.vectors import l2_normalise, truncate

Doubles = NDArray[np.float64]
matrices = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.floats(allow_nan=False, allow_infinity=False),
)


@given(matrices)
def test_every_row_has_length_one_and_its_direction(vectors: Doubles) -> None:
    assume((vectors != 0).any(axis=1).all())
    unit = l2_normalise(vectors)
    assert unit.dtype == np.float32 and unit.shape == vectors.shape
    np.testing.assert_allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1, atol=1e-6)
    largest = np.abs(vectors).argmax(axis=1)
    rows = np.arange(len(vectors))
    assert np.array_equal(np.sign(unit[rows, largest]), np.sign(vectors[rows, largest]))
    # The second time changes nothing but the last digit.
    np.testing.assert_allclose(l2_normalise(unit), unit, atol=1e-7)


@given(matrices, st.floats(1e-3, 1e3))
def test_scale_does_not_matter(vectors: Doubles, scale: float) -> None:
    assume((np.abs(vectors) < 1e300).all() and (np.abs(vectors).max(axis=1) > 1e-300).all())
    np.testing.assert_allclose(l2_normalise(scale * vectors), l2_normalise(vectors), atol=1e-6)


@given(matrices, st.data())
def test_truncation_keeps_the_first_and_renormalises(vectors: Doubles, data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, vectors.shape[1]))
    assume((np.abs(vectors).max(axis=1) < 1e30).all())
    unit_rows = (np.abs(vectors[:, :dimensions]) > 1e-3 * np.abs(vectors).max(axis=1, keepdims=True)).any(axis=1)
    assume(unit_rows.all() and (vectors != 0).any(axis=1).all())
    unit = l2_normalise(vectors)
    cut = truncate(unit, dimensions)
    assert cut.shape == (len(vectors), dimensions) and cut.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(cut.astype(np.float64), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut, l2_normalise(vectors[:, :dimensions]), atol=1e-4)


@given(matrices)
def test_truncation_to_the_full_length_changes_nothing(vectors: Doubles) -> None:
    assume((vectors != 0).any(axis=1).all())
    unit = l2_normalise(vectors)
    assert np.array_equal(truncate(unit, unit.shape[1]), unit)


def test_a_known_vector() -> None:
    np.testing.assert_allclose(l2_normalise(np.array([3.0, -4.0])), [0.6, -0.8], atol=1e-7)
    np.testing.assert_allclose(truncate(np.array([2.0, -1.0, 2.0]) / 3, 2), np.array([2, -1]) / 5**0.5, atol=1e-7)


@pytest.mark.parametrize("value", [1e-320, 1e-38, 1.0, 1e19, 1e38, 1e308])
def test_extreme_lengths(value: float) -> None:
    np.testing.assert_allclose(l2_normalise(np.full((2, 4), value)), np.full((2, 4), 0.5), atol=1e-7)


def test_float32_does_not_overflow_on_the_way() -> None:
    np.testing.assert_allclose(l2_normalise(np.full(4, 3e38, np.float32)), np.full(4, 0.5), atol=1e-7)


@pytest.mark.parametrize("row", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [-np.inf, np.inf], [1.0, np.nan], []])
def test_a_row_without_direction_raises(row: list[float]) -> None:
    with pytest.raises(ValueError, match="no direction"):
        l2_normalise(np.array(row, np.float32))
    with pytest.raises(ValueError, match="no direction"):
        l2_normalise(np.array([row, np.ones(len(row))], np.float32))


def test_no_rows_are_no_error() -> None:
    assert l2_normalise(np.zeros((0, 5), np.float32)).shape == (0, 5)


@pytest.mark.parametrize("dimensions", [0, -1, 4])
def test_impossible_dimensions_are_named(dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 3, not {dimensions}"):
        truncate(np.ones(3, np.float32), dimensions)


def test_the_input_is_left_alone() -> None:
    vectors = np.array([[3.0, 4.0]])
    l2_normalise(vectors)
    truncate(vectors, 1)
    assert vectors.tolist() == [[3.0, 4.0]]
