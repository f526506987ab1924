import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.retrieval.adapters import own_similarities, shifted, shifts


def unit(rng, rows, dimensions=6):
    return l2_normalise(rng.standard_normal((rows, dimensions)))


@given(st.integers(0, 9999), st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_labels_without_examples_stay_where_they_are_and_the_shifts_cancel(seed, owners):
    rng = np.random.default_rng(seed)
    labels, examples, owners = unit(rng, 8), unit(rng, len(owners)), np.array(owners)
    shift = shifts(examples, owners, 8)
    np.testing.assert_allclose(shift.sum(0), 0, atol=1e-5)
    moved = shifted(labels, shift)
    for label in range(8):
        if label in owners:
            assert abs(np.linalg.norm(moved[label]) - 1) < 1e-5
        else:
            assert (moved[label] == labels[label]).all()
    np.testing.assert_allclose(labels, unit(np.random.default_rng(seed), 8))  # not changed in place


@given(st.integers(0, 9999))
def test_what_all_examples_share_moves_nothing(seed):
    rng = np.random.default_rng(seed)
    examples = rng.standard_normal((9, 6)).astype(np.float32)
    owners = np.array([0, 0, 1, 1, 1, 3, 3, 3, 3])
    gap = rng.standard_normal(6).astype(np.float32)
    np.testing.assert_allclose(shifts(examples + gap, owners, 5), shifts(examples, owners, 5), atol=1e-5)


def test_examples_bring_inputs_like_them_nearer():
    rng = np.random.default_rng(0)
    centres, labels = unit(rng, 4, 32), unit(rng, 4, 32)  # the words say nothing about the inputs
    draw = lambda count: (  # noqa: E731
        l2_normalise(centres.repeat(count, 0) + 0.1 * rng.standard_normal((4 * count, 32))),
        np.arange(4).repeat(count),
    )
    examples, owners = draw(5)
    queries, truth = draw(50)
    moved = shifted(labels, shifts(examples, owners, 4))
    assert (
        ((queries @ moved.T).argmax(1) == truth).mean() > 0.95 > 0.8 > ((queries @ labels.T).argmax(1) == truth).mean()
    )


@pytest.mark.parametrize("counts", [(3, 1, 0, 2), (1, 1, 1, 1)])
def test_an_example_is_judged_without_itself(counts):
    rng = np.random.default_rng(1)
    labels, owners = unit(rng, 4), np.repeat(np.arange(4), counts)
    examples = unit(rng, len(owners))
    found = np.concatenate(list(own_similarities(examples, owners, labels)))
    moved = shifted(labels, shifts(examples, owners, 4))
    middle = np.mean([examples[owners == label].mean(0) for label in set(owners.tolist())], axis=0)
    for place, owner in enumerate(owners):
        others = [each for each in range(len(owners)) if owners[each] == owner and each != place]
        own = labels[owner]
        if others:
            own = l2_normalise(own + (examples[others].mean(0) - middle))
        for label in range(4):
            wanted = examples[place] @ (own if label == owner else moved[label])
            assert found[place, label] == pytest.approx(float(wanted), abs=1e-5)
