import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError

from service.contract.abstention import SCORES, Detector, auroc, fit, scores

whole_numbers = arrays.arrays(np.float64, st.integers(1, 20), elements=st.integers(-3, 3).map(float))


@given(whole_numbers, whole_numbers)
def test_auroc_counts_pairs(positive, negative):
    above = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert auroc(positive, negative) == pytest.approx(above, abs=1e-12)


def test_scores_written_out():
    similarities, temperature = np.array([[0.1, 0.5, 0.3], [0.2, 0.2, 0.2]]), 0.1
    found = dict(zip(SCORES, scores(similarities, temperature)[0], strict=True))
    exponentials = np.exp(similarities[0] / temperature)
    assert found["max_similarity"] == 0.5 and found["margin"] == pytest.approx(0.2)
    assert found["max_softmax"] == pytest.approx(exponentials[1] / exponentials.sum())
    assert found["energy"] == pytest.approx(temperature * np.log(exponentials.sum()))
    assert found["spread"] == pytest.approx(0.2 / np.std([0.1, 0.5, 0.3]))
    assert scores(np.array([[0.4]]), 0.1).tolist() == [[0.4, 1.0, 0.4, 0.0, 0.0]]


@given(st.permutations(range(6)), st.integers(0, 99))
def test_the_order_of_the_labels_changes_no_score(order, seed):
    similarities = np.random.default_rng(seed).uniform(-1, 1, (4, 6))
    np.testing.assert_allclose(scores(similarities, 0.05), scores(similarities[:, order], 0.05), rtol=1e-9)


def groups(rng, centre, count):
    return [rng.normal(centre, 1.0, (2, len(SCORES))) for _ in range(count)]


def test_a_detector_tells_apart_what_it_was_not_fitted_on():
    rng = np.random.default_rng(0)
    detector = fit(groups(rng, 1.0, 40), groups(rng, -1.0, 10))
    on, off = np.concatenate(groups(rng, 1.0, 200)), np.concatenate(groups(rng, -1.0, 200))
    right = auroc(detector.probability(on), detector.probability(off))
    assert right > 0.97 and detector.auroc == pytest.approx(right, abs=0.03)
    # Both kinds weigh the same, however many there were: the cut lies in the middle.
    assert np.mean(detector.probability(on) > 0.5) == pytest.approx(np.mean(detector.probability(off) < 0.5), abs=0.05)
    assert Detector.model_validate_json(detector.model_dump_json()) == detector


def test_no_score_counts_against_what_is_on_topic():
    """A few inputs by whose accident a score is higher off topic: it counts for nothing, not the other way round."""
    rng = np.random.default_rng(3)
    on, off = groups(rng, 0.5, 6), groups(rng, 0.0, 6)
    for group in off:
        group[:, 1] += 2.0
    detector = fit(on, off)
    assert min(detector.weights) == 0 == detector.weights[1] and max(detector.weights) > 0


def test_nothing_to_tell_is_measured_as_chance():
    rng = np.random.default_rng(1)
    assert fit(groups(rng, 0, 150), groups(rng, 0, 150)).auroc == pytest.approx(0.5, abs=0.1)


def test_constant_scores_and_kinds_that_never_meet_are_fitted_too():
    flat = [np.zeros((1, len(SCORES)))] * 3
    assert fit(flat, flat).auroc == 0.5
    apart = fit([np.full((1, len(SCORES)), 9.0)] * 3, flat)
    assert (
        apart.auroc == 1 and apart.probability(flat[0])[0] < 0.5 < apart.probability(np.full((1, len(SCORES)), 9.0))[0]
    )
    with pytest.raises(ValueError, match="two inputs of each kind"):
        fit(flat, flat[:1])


@pytest.mark.parametrize("change", [{"weights": (1.0,)}, {"scale": (0.0,) * len(SCORES)}, {"auroc": 2.0}])
def test_a_damaged_detector_is_refused(change):
    five = (1.0,) * len(SCORES)
    Detector(centre=five, scale=five, weights=five, bias=0.0, auroc=0.9)
    with pytest.raises(ValidationError):
        Detector(**({"centre": five, "scale": five, "weights": five, "bias": 0.0, "auroc": 0.9} | change))
