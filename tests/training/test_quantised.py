from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.contract.bundle import read_bundle, space_id
from tests.training.conftest import MakeRecipe
from tests.training.test_export import random_heads
from training import pipeline
from training.features import cached_features
from training.pairs import read_pairs
from training.recipe import RecipeError


@pytest.mark.full
def test_heads_learn_from_the_int8_encoders_that_are_served(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    plain = make_recipe()
    sources: dict[str, Any] = {
        modality: {**source.model_dump(mode="json", exclude_defaults=True), "precision": "int8"}
        for modality, source in plain.encoders.items()
    }
    recipe = make_recipe(encoders=sources, export={"calibration": 8})
    cache = tmp_path / "cache"
    frozen = pipeline.encoders(recipe, cache)
    made = {path.name: path.stat().st_mtime_ns for path in cache.glob("int8-*.onnx")}
    assert len(made) == 3
    again = pipeline.encoders(recipe, cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("int8-*.onnx")} == made
    whole = pipeline.encoders(plain, cache)
    for modality, encoder in frozen.items():
        assert encoder.precision == "int8"
        assert encoder.weights_sha256 == again[modality].weights_sha256 != whole[modality].weights_sha256
        pairs = read_pairs(recipe, "tones" if modality == "audio" else "pictures")["train"]
        items: Any = pairs.texts if modality == "text" else pairs.media
        small, large = (cached_features(each, items, cache).pooled[:] for each in (encoder, whole[modality]))
        assert not np.array_equal(small, large)
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.95
    bundle = pipeline.export(recipe, frozen, random_heads(recipe), {}, tmp_path / "bundle")
    manifest = read_bundle(bundle.path).manifest
    assert all(tower.precision == "int8" and not tower.variants for tower in manifest.towers.values())
    assert all(manifest.evaluation[f"parity.{modality}"] >= 0.9999 for modality in manifest.towers)
    other = {
        m: tower.model_copy(
            update={"encoder": tower.encoder.model_copy(update={"weights_sha256": whole[m].weights_sha256})}
        )
        for m, tower in manifest.towers.items()
    }
    assert manifest.space != space_id(manifest.dimensions, other)


def test_texts_keep_their_length_of_one_in_int8(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    encoders = {"image": {"folder": "mobilenet"}, "text": {"folder": "bert", "normalise": True, "precision": "int8"}}
    pairs = {"pictures": make_recipe().model_dump(mode="json", exclude_defaults=True)["pairs"]["pictures"]}
    recipe = make_recipe(encoders=encoders, pairs=pairs)
    texts = ["a picture of red", "the sound of something very plain"]
    small = cached_features(pipeline.encoders(recipe, tmp_path)["text"], texts, tmp_path).pooled
    assert np.allclose(np.linalg.norm(np.asarray(small, np.float32), axis=1), 1, atol=1e-3)
    given = encoders | {"text": {"folder": "bert", "normalise": False, "precision": "int8"}}
    plain = make_recipe(encoders=given, pairs=pairs)
    other = cached_features(pipeline.encoders(plain, tmp_path)["text"], texts, tmp_path).pooled
    assert (np.linalg.norm(np.asarray(other, np.float32), axis=1) > 1.5).all()


def test_token_heads_need_tokens_that_an_int8_encoder_does_not_give(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"encoders\.image: an int8 encoder gives pooled features only"):
        make_recipe(
            encoders={"image": {"folder": "dinov2", "precision": "int8"}, "text": {"folder": "bert"}},
            pairs={},
            projector={"kind": "token", "dimensions": 16},
        )
