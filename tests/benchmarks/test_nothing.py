"""The verdicts that benchmarks.nothing counts, on vectors whose answer is known; and what it takes of the data sets."""

import numpy as np

from benchmarks import nothing
from service.contract.vectors import l2_normalise

DIMENSIONS = 64


def drawn(count, seed):
    return l2_normalise(np.random.default_rng(seed).normal(size=(count, DIMENSIONS)))


def test_what_is_there_is_told_from_what_is_not():
    pictures, recordings, background = drawn(300, 1), drawn(100, 2), drawn(64, 3)
    there = l2_normalise(pictures[:40] + 0.5 * drawn(40, 4))
    assert not nothing.verdicts(there, [pictures], background).any()
    assert not nothing.verdicts(there, [pictures, recordings], background).any()
    assert nothing.verdicts(there, [recordings], background).mean() > 0.7
    assert nothing.verdicts(drawn(200, 5), [pictures], background).mean() > 0.7


def test_rates_are_those_of_wrong_verdicts():
    words, kinds = len(nothing.PRESENT.split()), 20
    pictures, recordings, background = drawn(words, 1), drawn(5 * kinds, 2), drawn(64, 3)
    heard = np.repeat([f"kind {n}" for n in range(kinds)], 5)
    recordings = l2_normalise(recordings + 3 * np.repeat(drawn(kinds, 6), 5, axis=0))
    order = np.argsort(np.unique(heard, return_index=True)[1])
    queries = nothing.Queries(pictures, drawn(50, 7), drawn(kinds, 6)[np.argsort(order)])
    shown = np.repeat(np.eye(words, dtype=bool), 2, axis=1)
    held = nothing.Material(
        np.repeat(pictures, 2, axis=0), recordings, heard, shown, [queries], drawn(50, 8), background
    )
    photographs = nothing.rates(held, 2 * words, 0)
    assert photographs["present"] == 0 and photographs["absent"] < 40 and photographs["meaningless"] < 40
    both = nothing.rates(held, 2 * words, 25)
    assert both["present"] < 10
    wrong = nothing.rates(
        nothing.Material(held.pictures, recordings, heard, shown, [queries], pictures, background), 2 * words, 0
    )
    assert wrong["meaningless"] == 100, "each of them is there"


def test_no_test_media_are_taken(data_root):
    data = data_root / "data"
    photographs, sounds, classes = nothing.media(data)
    assert len(photographs) == len(set(photographs)) == 3_000 and len(sounds) == len(set(sounds)) == len(classes) == 800
    tests = set((data / "flickr8k/split_test.txt").read_text().split())
    assert not {name.removeprefix("flickr8k/images/") for name in photographs} & tests
    assert all((data / name).is_file() for name in [*photographs, *sounds])
