"""Augmented views of pictures: cached ones and new ones, in training and after a stop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import MakeRecipe
from training import pipeline
from training.encode import augment
from training.encode.augment import View, augmented
from training.encoders import load_encoder
from training.features import preparer, runner
from training.fit.sampling import Batches
from training.measure.validation import Data
from training.recipe import RecipeError


def picture(size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_view_is_that_of_its_seed_and_its_picture() -> None:
    def view(seed: int, data: bytes = b"a") -> np.ndarray:
        return np.asarray(augmented(picture(), (32, 24), data, seed))

    assert view(1).shape == (24, 32, 3)
    assert np.array_equal(view(1), view(1))
    assert not np.array_equal(view(1), view(2)) and not np.array_equal(view(1), view(1, b"b"))


@pytest.mark.parametrize("size", [(60, 40), (400, 10), (10, 400), (1, 1)])
def test_a_crop_lies_inside_and_keeps_its_shape(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([augment._crop(size, rng) for _ in range(200)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (boxes >= -1e-9).all() and (boxes[:, 2:] <= np.array(size) + 1e-9).all()
    assert (np.abs(np.log(sides[:, 0] / sides[:, 1])) <= np.log(4 / 3) + 1e-9).all()
    if size == (60, 40):
        areas = sides.prod(1) / (size[0] * size[1])
        assert areas.min() >= 0.2 and areas.max() > 0.8 and areas.std() > 0.1


@pytest.mark.parametrize("operation", range(10))
def test_an_operation_changes_a_picture_and_not_its_size(operation: int) -> None:
    whole = picture((64, 64)).point(lambda value: 40 + value // 2)
    changed = augment._RANDAUGMENT[operation](whole, -1.0)
    assert changed.size == whole.size and changed.mode == "RGB"
    assert np.array_equal(changed, whole) == (operation == 0)


def prepared(make_recipe: MakeRecipe, cache: Path, views: int | str, kind: str) -> tuple[Data, Batches]:
    image = {"folder": "dinov2", "views": views}
    recipe = make_recipe(
        encoders={"image": image, "text": {"folder": "bert"}},
        pairs={"pictures": make_recipe().pairs["pictures"].model_dump(mode="json", exclude_defaults=True)},
        projector={"kind": kind, "dimensions": 8},
        train={"batch_size": 16, "steps": 100},
    )
    frozen = pipeline.encoders(recipe, cache)
    data = pipeline.features(recipe, frozen, pipeline.pairs(recipe, cache), cache)
    return data, Batches(recipe, [data["pictures"]["train"]])


@pytest.mark.parametrize("kind", ["mlp", "token"])
@pytest.mark.parametrize("views", [3, "online"])
def test_training_draws_views(make_recipe: MakeRecipe, tmp_path: Path, views: int | str, kind: str) -> None:
    data, batches = prepared(make_recipe, tmp_path, views, kind)
    train, rng = data["pictures"]["train"], np.random.default_rng(0)
    encoder = load_encoder(
        make_recipe(encoders={"image": {"folder": "dinov2"}, "text": {"folder": "bert"}}, pairs={}), "image"
    )
    prepare, run = preparer(encoder), runner(encoder, kind == "token")
    drawn: dict[int, set[bytes]] = {}
    for step in range(40 if views == 3 else 4):
        (part,) = batches.draw(step, rng)
        for row, vector in zip(part.keys[0].tolist(), part.media["pooled"], strict=True):
            drawn.setdefault(row, set()).add(vector.numpy().tobytes())
        assert ("tokens" in part.media) == (kind == "token")
    assert {len(several) for several in drawn.values()} == {3 if views == 3 else 4}
    medium = train.pairs.media[0]
    plain = train.media.take(np.array([0]), kind == "token")
    expected = run([prepare(medium)])
    assert all(np.allclose(plain[name], expected[name], atol=4e-3) for name in expected)
    if views == 3:
        own = {np.frombuffer(one, np.float32).astype(np.float16).tobytes() for one in drawn[0]}
        known = {run([prepare(View(medium, seed))])["pooled"].astype(np.float16).tobytes() for seed in range(3)}
        assert kind == "token" or own <= known
        assert train.media.views is not None and len(train.media.views) == 3 * len(train.media)
    else:
        seen = train.media.take(np.array([0]), kind == "token", 5)
        assert np.allclose(seen["pooled"], run([prepare(View(medium, 5))])["pooled"], atol=1e-5)
        assert train.media.tokens is None
    validation = data["pictures"]["validation"].media
    assert validation.views is None and validation.online is None and (validation.tokens is None) == (kind == "mlp")


def test_an_online_run_goes_on_as_it_would_have(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    _, batches = prepared(make_recipe, tmp_path, "online", "mlp")
    rng = np.random.default_rng(0)
    batches.draw(0, rng)
    state, places = rng.bit_generator.state, batches.state
    (first,) = batches.draw(1, rng)
    rng.bit_generator.state = state
    batches.restore(places)
    (again,) = batches.draw(1, rng)
    assert torch.equal(first.media["pooled"], again.media["pooled"])


def test_views_are_for_images(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"encoders.text: views are for images"):
        make_recipe(encoders={"image": {"folder": "dinov2"}, "text": {"folder": "bert", "views": 2}}, pairs={})
