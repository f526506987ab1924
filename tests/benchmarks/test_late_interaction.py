import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from benchmarks.family.late_interaction import maxsim, transport
from service.contract.vectors import l2_normalise

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def tokens(rng, count):
    return l2_normalise(rng.standard_normal((count, 6)))


def cheapest(query, item):
    """The exact optimum of the transport, as a linear programme."""
    rows, columns = len(query), len(item)
    place = np.eye(rows * columns).reshape(rows, columns, -1)
    constraints = np.concatenate([place.sum(1), place.sum(0)])
    shares = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    cost = 1 - (query @ item.T).astype(np.float64)
    return 1 - linprog(cost.ravel(), A_eq=constraints, b_eq=shares).fun


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), shapes)
def test_maxsim_is_the_mean_of_the_best_matches(seed, count, lengths):
    rng = np.random.default_rng(seed)
    query, items = tokens(rng, count), [tokens(rng, length) for length in lengths]
    wanted = [np.mean([max(float(one.astype(float) @ other) for other in item) for one in query]) for item in items]
    np.testing.assert_allclose(maxsim(query, items), wanted, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), shapes)
def test_transport_is_near_the_optimum(seed, count, lengths):
    rng = np.random.default_rng(seed)
    query, items = tokens(rng, count), [tokens(rng, length) for length in lengths]
    found, optimum = transport(query, items), [cheapest(query, item) for item in items]
    # Over 400 seeds the plan after 50 steps was 0.003 away at most, on either side: its margins are not yet exact.
    np.testing.assert_allclose(found, optimum, atol=0.01)


@given(st.integers(0, 10_000))
def test_one_token_on_each_side_is_cosine_similarity(seed):
    rng = np.random.default_rng(seed)
    query, items = tokens(rng, 1), [tokens(rng, 1) for _ in range(3)]
    for compare in (maxsim, transport):
        np.testing.assert_allclose(compare(query, items), [float(query[0] @ item[0]) for item in items], atol=1e-6)


@pytest.mark.parametrize("compare", [maxsim, transport])
def test_an_item_is_judged_alone_whatever_else_is_reranked(compare):
    rng = np.random.default_rng(0)
    query, items = tokens(rng, 4), [tokens(rng, length) for length in (3, 9, 1)]
    np.testing.assert_allclose(compare(query, items), [compare(query, [item])[0] for item in items], rtol=0, atol=1e-6)
