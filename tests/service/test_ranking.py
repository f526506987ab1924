import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.retrieval.ranking import distinct, diverse, fuse

seeds = st.integers(0, 10_000)


def unit(seed, rows, dimensions=4):
    return l2_normalise(np.random.default_rng(seed).standard_normal((rows, dimensions)))


def test_fusion_is_the_weighted_sum_of_reciprocal_ranks():
    fused = fuse([["a", "b", "c"], ["c", "d"]], [0.75, 0.25])
    assert fused == pytest.approx(
        {"a": 0.75 / 61, "b": 0.75 / 62, "c": 0.75 / 63 + 0.25 / 61, "d": 0.25 / 62}, rel=1e-12
    )
    assert fuse([[], []], [1, 1]) == {}


@given(seeds, st.integers(1, 30), st.floats(0.2, 1))
def test_what_is_left_has_no_two_that_are_near_and_what_is_gone_is_near_a_better_one(seed, rows, similarity):
    vectors = unit(seed, rows, 3)
    vectors[rows // 2] = vectors[0]  # a repetition, whatever the seed
    kept = distinct(vectors, similarity)
    assert kept == sorted(kept) and kept[0] == 0
    alike = vectors @ vectors.T
    for place in range(rows):
        nearest = max((alike[place, other] for other in kept if other < place), default=-1)
        assert (place in kept) == (nearest < similarity - 1e-6)
    assert rows < 2 or rows // 2 not in kept


@given(seeds, st.integers(1, 20), st.floats(0, 1), st.integers(1, 25))
def test_diversity_takes_what_the_formula_says(seed, rows, trade, count):
    vectors = unit(seed, rows)
    relevance = vectors @ unit(seed + 1, 1)[0]
    chosen = diverse(relevance, vectors, trade, count)
    assert len(chosen) == len(set(chosen)) == min(rows, count)
    assert chosen[0] == int(np.argmax(relevance))
    for place in range(1, len(chosen)):
        taken = chosen[:place]
        gains = {
            each: trade * relevance[each] - (1 - trade) * max(float(vectors[each] @ vectors[other]) for other in taken)
            for each in range(rows)
            if each not in taken
        }
        assert gains[chosen[place]] == pytest.approx(max(gains.values()), abs=1e-6)


@given(seeds, st.integers(1, 20))
def test_diversity_with_relevance_alone_is_the_order_of_relevance(seed, rows):
    vectors = unit(seed, rows)
    relevance = vectors @ unit(seed + 1, 1)[0]
    assert diverse(relevance, vectors, 1.0, rows) == np.argsort(-relevance, kind="stable").tolist()
