import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.measure.emergent import average_precision, chance_precision, shown
from training.measure.intervals import interval
from training.pairs import Pairs


def pairs(labels: list[int] | None, texts: list[str], links: list[tuple[int, int]]) -> Pairs:
    return Pairs(
        name="p",
        modality="image",
        media=[],
        texts=texts,
        links=np.array(links, np.int64).reshape(-1, 2),
        labels=None if labels is None else np.array(labels),
        classes=["wild cat", "watch"],
        weight=1.0,
    )


def test_a_class_or_a_word_of_a_caption_shows_a_thing() -> None:
    words = {"cat": ["Wild cat", "cat"], "clock": ["watch"]}
    labelled = shown(pairs([0, 1, 0], [], []), words)
    np.testing.assert_array_equal(labelled["cat"], [True, False, True])
    np.testing.assert_array_equal(labelled["clock"], [False, True, False])
    captioned = pairs(None, ["A cat sleeps", "a catalogue", "they watch a Cat."], [(0, 0), (0, 1), (1, 1), (2, 2)])
    captioned.media.extend([None, None, None])  # type: ignore[list-item]
    np.testing.assert_array_equal(shown(captioned, words)["cat"], [True, False, True])
    np.testing.assert_array_equal(shown(captioned, words)["clock"], [False, False, True])


def test_average_precision_golden_and_ties_count_against() -> None:
    similarity = np.array([[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5]], np.float32)
    relevant = np.array([[True, False, True, False], [False, True, False, False]])
    np.testing.assert_allclose(average_precision(similarity, relevant), [(1 + 2 / 3) / 2, 1 / 4])


@given(total=st.integers(1, 40), data=st.data())
def test_chance_is_the_mean_over_random_rankings(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(1, total))
    expected = chance_precision(np.array([right]), total)[0]
    # E[AP] = mean over ranks k of P(relevant at k) · E[precision at k | relevant at k], summed and divided by r.
    others = (right - 1) / (total - 1) if total > 1 else 0.0
    by_rank = [(1 + (k - 1) * others) / k / total for k in range(1, total + 1)]
    assert expected == pytest.approx(sum(by_rank))


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = interval((rng.random(150) < 0.3) * 100.0, seed=seed)
        covered += low <= 30.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_what_is_drawn_together_widens_the_interval() -> None:
    rng = np.random.default_rng(1)
    values = np.repeat(rng.random(40) * 100, 5)
    alone, together = interval(values), interval(values, np.repeat(np.arange(40), 5))
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])
    assert interval(np.full(7, 3.0)) == [3.0, 3.0]
    with pytest.raises(ValueError, match="no values"):
        interval(np.zeros(0))
