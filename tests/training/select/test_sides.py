from pathlib import Path

import numpy as np
import pytest

from training.measure.select.sides import Groups, Side, each, grouped, sampled
from training.pairs import Pairs


def pairs(links: list[tuple[int, int]], labels: list[int] | None = None) -> Pairs:
    media, texts = (max(link[side] for link in links) + 1 for side in (0, 1))
    held = None if labels is None else np.array(labels)
    paths, captions = [Path(str(i)) for i in range(media)], [str(i) for i in range(texts)]
    return Pairs("x", "image", paths, captions, np.array(links), held, ["a", "b"], 1.0)


def test_a_row_is_the_mean_of_its_items() -> None:
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    side = Side("x", (features,), Groups(np.array([0, 2, 4, 5]), np.array([0, 1, 3, 4])))
    assert len(side) == 3
    assert side.rows(np.array([1, 0])).tolist() == [[6.0, 7.0], [0.0, 1.0]]
    assert side.rows(np.array([2])).tolist() == [[10.0, 11.0]]


def test_parts_are_put_side_by_side() -> None:
    features = np.arange(12, dtype=np.float32).reshape(2, 6)
    side = Side("x", (features[:, :2], features[:, 4:]), each(2))
    assert side.rows(np.array([1])).tolist() == [[6.0, 7.0, 10.0, 11.0]]
    assert np.linalg.norm(side.directions(np.arange(2)), axis=1) == pytest.approx([1, 1])


def test_captions_are_averaged_by_medium() -> None:
    media, texts = grouped(pairs([(1, 3), (0, 0), (0, 1), (1, 2), (2, 2)]))
    assert (media.items.tolist(), media.starts.tolist()) == ([0, 1, 2], [0, 1, 2, 3])
    assert (texts.items.tolist(), texts.starts.tolist()) == ([0, 1, 2, 3, 2], [0, 2, 4, 5])


def test_labelled_media_are_averaged_by_class() -> None:
    media, texts = grouped(pairs([(0, 0), (0, 1), (1, 2), (1, 3), (2, 0), (2, 1)], labels=[1, 0, 1]))
    assert (media.items.tolist(), media.starts.tolist()) == ([1, 0, 2], [0, 1, 3])
    assert (texts.items.tolist(), texts.starts.tolist()) == ([2, 3, 0, 1], [0, 2, 4])


def test_a_sample_keeps_the_texts_of_its_media() -> None:
    whole = pairs([(index // 2, index) for index in range(40)])
    part = sampled(whole, 7, seed=0)
    assert (len(part.media), len(part.texts), len(part.links)) == (7, 14, 14)
    for medium, text in part.links:
        assert int(part.texts[text]) // 2 == int(part.media[medium].name)
    assert sampled(whole, 7, seed=0).media == part.media != sampled(whole, 7, seed=1).media
    assert sampled(whole, None, 0) is sampled(whole, 99, 0) is whole
