from pathlib import Path

import numpy as np
import pytest

from service.contract.abstention import SCORES, Detector
from service.contract.vectors import l2_normalise
from tests.training.test_closed_form import recipe, splits
from training.fit.abstention import by_class, halves, learn
from training.fit.alignment import new_heads
from training.fit.closed_form import cca
from training.heads.trained import Trained, load_projectors, save_projectors


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_every_class_is_in_as_often_as_out(classes: int) -> None:
    each = list(halves(classes))
    for one, other in zip(each[::2], each[1::2], strict=True):
        assert sorted([*one, *other]) == list(range(classes))


def test_media_are_scored_with_and_without_their_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 1, 2, 2, 2, 4])  # no media of class 3
    media, classes = (l2_normalise(rng.standard_normal((count, 6))) for count in (7, 5))
    found = list(by_class(media, labels, classes, 0.1))
    assert len(found) == 4
    for (inside, outside), count in zip(found, (2, 1, 3, 1), strict=True):
        assert len(inside) == len(outside) == 4 * count and inside.shape[1] == len(SCORES)
    assert all((inside[:, 1] <= 1).all() for inside, _ in found)


def test_one_class_alone_teaches_nothing() -> None:
    one = l2_normalise(np.ones((1, 6)))
    assert list(by_class(one, np.array([0]), one, 0.1)) == []


@pytest.mark.parametrize("shuffled", [False, True])
def test_captions_teach_what_is_off_topic_unless_they_say_nothing(shuffled: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(600, 6))
    media = shared @ rng.normal(size=(6, 12)) + 0.1 * rng.normal(size=(600, 12))
    texts = (rng.permutation(shared) if shuffled else shared) @ rng.normal(size=(6, 9))
    spec, data = recipe("cca", 6), splits(media, texts)
    heads = new_heads(spec, data, {}, spec.projector)
    for _ in cca(spec, heads, data, {}):
        break
    for head in heads.values():
        head.eval().requires_grad_(False)
    learned = learn(spec, heads, data, 0.05)
    assert set(learned) == {"image"}
    if shuffled:
        assert abs(learned["image"].auroc - 0.5) < 0.1
    else:
        assert learned["image"].auroc > 0.75
    trained = Trained(heads, 0.05, {}, [], abstention=learned)
    save_projectors(tmp_path / "projectors.safetensors", trained)
    assert load_projectors(tmp_path / "projectors.safetensors", spec).abstention == learned
    assert isinstance(learned["image"], Detector)
