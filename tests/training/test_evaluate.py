import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import training.measure.ranks
from service.contract.vectors import l2_normalise
from training.measure.intervals import interval
from training.measure.ranks import class_vectors, label_ranks, ranks, retrieval, top1, with_prompts, word_precision


def test_recall_on_a_case_worked_by_hand() -> None:
    media = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0.6, 0.8]], np.float32)
    links = np.array([[0, 0], [1, 1], [2, 2]])
    figures = retrieval(media, texts, links)
    # Medium 1 ties between its own text and the third: a tie counts against the model. Text 1 prefers medium 0.
    assert figures["m2t.r1"] == 66.67
    assert figures["t2m.r1"] == 66.67
    assert figures["m2t.r5"] == figures["t2m.r5"] == 100.0


@given(st.integers(0, 10_000))
def test_recall_equals_a_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    media, texts = (l2_normalise(rng.normal(size=(n, 4))) for n in (7, 12))
    owner = np.concatenate([np.arange(7), rng.integers(0, 7, 5)])
    figures = retrieval(media, texts, np.stack([owner, np.arange(12)], 1))
    order = np.argsort(-(media @ texts.T), axis=1)
    hits = [any(owner[text] == medium for text in order[medium, :5]) for medium in range(7)]
    assert figures["m2t.r5"] == round(float(np.mean(hits) * 100), 2)


def test_top1_per_class() -> None:
    classes = np.eye(3, dtype=np.float32)
    accuracy, each = top1(np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], np.float32), classes, np.array([0, 1, 1]))
    assert accuracy == 66.67
    assert each[:2].tolist() == [100.0, 50.0]
    assert np.isnan(each[2])


def test_class_vectors_are_means_of_their_own_prompts() -> None:
    prompts = l2_normalise(np.random.default_rng(0).normal(size=(6, 4)))
    expected = l2_normalise(np.stack([prompts[:2].mean(0), prompts[2:4].mean(0), prompts[4:].mean(0)]))
    assert np.allclose(class_vectors(prompts, 2), expected)


def test_ranks_in_blocks_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    media, texts = (l2_normalise(rng.normal(size=(n, 4)).astype(np.float32)) for n in (9, 20))
    links = rng.permutation(np.stack([rng.integers(0, 8, 20), np.arange(20)], 1))  # medium 8 has no text
    whole = ranks(media, texts, links)
    monkeypatch.setattr(training.measure.ranks, "_BLOCK", 50)
    for direction, (rank, owner) in ranks(media, texts, links).items():
        np.testing.assert_array_equal(rank, whole[direction][0])
        np.testing.assert_array_equal(owner, whole[direction][1])
    linked = np.zeros((9, 20), bool)
    linked[links[:, 0], links[:, 1]] = True
    scores = media @ texts.T
    expected = [((row >= row[own].max()) & ~own).sum() for row, own in zip(scores, linked, strict=True) if own.any()]
    np.testing.assert_array_equal(whole["m2t"][0], expected)
    np.testing.assert_array_equal(whole["t2m"][1], linked.argmax(0))


def test_prompts_of_a_class_stand_for_its_templates() -> None:
    classes = np.eye(2, 3, dtype=np.float32)
    prompts = np.array([[0, 0, 1], [0, 0, 1]], np.float32)
    described = with_prompts(classes, prompts, np.array([1, 1]))
    np.testing.assert_allclose(described, [[1, 0, 0], [0, 0, 1]], rtol=1e-6)


def test_a_tie_counts_against_the_model_everywhere() -> None:
    """A space in which everything is one vector finds nothing: labels, captions, words."""
    vectors, labels = np.ones((4, 1), np.float32), np.array([0, 0, 1, 1])
    assert top1(vectors, np.ones((2, 1), np.float32), labels)[0] == 0.0
    links = np.stack([np.arange(4), np.arange(4)], 1)
    figures = retrieval(vectors, vectors, links)
    assert figures["m2t.r1"] == figures["t2m.r1"] == 0.0
    assert word_precision(vectors, vectors, links) == pytest.approx(25.0)  # each comes last


def test_vectors_that_are_not_numbers_are_right_about_nothing() -> None:
    vectors, texts = np.full((8, 8), np.nan, np.float32), np.eye(8, dtype=np.float32)
    labels = np.arange(8)
    links = np.stack([labels, labels], 1)
    assert top1(vectors, texts, labels)[0] == 0.0
    assert set(label_ranks(vectors @ texts.T, labels)) == {7}
    for media, others in ((vectors, texts), (texts, vectors), (vectors, vectors)):
        figures = retrieval(media, others, links)
        assert figures["m2t.r5"] == figures["t2m.r5"] == 0.0
        assert word_precision(media, others, links) == 12.5  # the last of eight


def test_the_interval_of_balanced_accuracy_weighs_what_was_drawn() -> None:
    """One of two classes has 100 items of which 40 are right, the other 4, all right: 70 % balanced.

    With the weights of the whole set left as they are, a resample with six of the four counts them six times.
    """
    right = np.array([1.0] * 40 + [0.0] * 60 + [1.0] * 4) * 100
    classes = np.array([0] * 100 + [1] * 4)
    low, high = interval(right, classes=classes)
    # The second class is always right: half of the interval of the first one is all there is.
    alone = interval(right[:100])
    assert low == pytest.approx(50 + alone[0] / 2, abs=1.0)
    assert high == pytest.approx(50 + alone[1] / 2, abs=1.0)


def test_intervals_without_classes_are_as_they_were() -> None:
    values, groups = np.array([0.0, 100.0, 100.0, 0.0, 100.0]), np.array([0, 0, 1, 2, 2])
    weights = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), size=1000)
    sums, sizes = np.array([100.0, 100.0, 100.0]), np.array([2, 1, 2])
    expected = np.percentile((weights @ sums) / (weights @ sizes), [2.5, 97.5])
    assert interval(values, groups) == pytest.approx(expected.round(2).tolist())
