from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import MakeRecipe
from training.encoders import load_encoder
from training.features import cached_features
from training.measure.select.candidates import Network, SelectError
from training.measure.select.sides import Floats
from training.measure.select.towers import read
from training.recipe import Recipe

TEXTS = ["a picture of red", "very plain blue photo", "the sound of a low tone"]


def encoded(recipe: Recipe, modality: Any, cache: Path, **sources: dict[str, Any]) -> dict[str, Floats]:
    candidates = {name: Network.model_validate(source) for name, source in sources.items()}
    folder, pattern = {"image": ("pictures", "*.png"), "audio": ("sounds", "*.wav"), "text": ("", "")}[modality]
    items = TEXTS if modality == "text" else sorted(recipe.path(Path(folder)).glob(pattern))[:6]
    result = {}
    for tower in read(recipe, modality, candidates, TEXTS, cache):
        result |= {k: np.concatenate(v, 1) for k, v in tower.encode(items, cache, "").items()}
    return result


def test_layers_and_poolings_of_one_text_network_are_one_pass(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    both: dict[str, dict[str, Any]] = {
        "last": {"folder": "bert"},
        "cls": {"folder": "bert", "pooling": "cls"},
        "first": {"folder": "bert", "layer": 1},
        "words": {"folder": "bert", "layer": 0, "pooling": "both"},
    }
    features = encoded(recipe, "text", tmp_path / "cache", **both)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    encoder = load_encoder(recipe, "text")
    alone = np.asarray(cached_features(encoder, TEXTS, tmp_path / "alone").pooled)
    assert features["last"] == pytest.approx(alone, rel=1e-3, abs=1e-3)
    model: Any = encoder.module
    for row, text in enumerate(TEXTS):
        from service.contract.tokens import TextPreprocessing, TextTokenizer

        assert encoder.tokenizer is not None and isinstance(encoder.preprocessing, TextPreprocessing)
        ids = torch.tensor([TextTokenizer(encoder.tokenizer, encoder.preprocessing).encode(text).ids])
        with torch.inference_mode():
            states = model.model(ids, torch.ones_like(ids), output_hidden_states=True).hidden_states
        assert features["cls"][row] == pytest.approx(states[-1][0, 0].numpy(), rel=1e-3, abs=1e-3)
        assert features["first"][row] == pytest.approx(states[1][0].mean(0).numpy(), rel=1e-3, abs=1e-3)
        expected = np.concatenate([states[0][0, 0].numpy(), states[0][0].mean(0).numpy()])
        assert features["words"][row] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_layers_of_a_convolution_are_means_over_their_maps(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folders = {"image": "mobilenet", "audio": "yamnet", "text": "bert"}
    recipe = make_recipe(encoders={modality: {"folder": folder} for modality, folder in folders.items()})
    sources: dict[str, Any] = {"last": {"folder": "mobilenet"}, "fifth": {"folder": "mobilenet", "layer": 5}}
    features = encoded(recipe, "image", tmp_path / "cache", **sources, second={"folder": "mobilenet", "layer": 2})
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    from training.features import collate, preparer

    encoder = load_encoder(recipe, "image")
    items = sorted(recipe.path(Path("pictures")).glob("*.png"))[:6]
    pixels = torch.from_numpy(collate(encoder.preprocessing, [preparer(encoder)(item) for item in items])[0])
    module: Any = encoder.module
    with torch.inference_mode():
        output = module.model(pixels, output_hidden_states=True)
    assert features["last"] == pytest.approx(output.pooler_output.flatten(1).numpy(), rel=1e-3, abs=1e-3)
    assert features["fifth"] == pytest.approx(output.hidden_states[5].mean((2, 3)).numpy(), rel=1e-3, abs=1e-3)
    assert features["second"] == pytest.approx(output.hidden_states[2].mean((2, 3)).numpy(), rel=1e-3, abs=1e-3)


def test_a_vision_transformer_is_read_by_cls_and_mean(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    sources: dict[str, Any] = {
        "own": {"folder": "dinov2"},
        "mean": {"folder": "dinov2", "pooling": "mean"},
        "early": {"folder": "dinov2", "pooling": "mean", "layer": 1},
    }
    features = encoded(recipe, "image", tmp_path / "cache", **sources)
    for name in ("own", "mean"):
        (alone,) = encoded(recipe, "image", tmp_path / "alone", **{name: sources[name]}).values()
        assert features[name] == pytest.approx(alone, rel=1e-3, abs=1e-3)
    assert features["early"].shape == features["mean"].shape
    assert np.abs(features["early"] - features["mean"]).max() > 0.1


def test_an_encoder_read_as_it_is_shares_the_recipes_cache(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    cached_features(load_encoder(recipe, "text"), TEXTS, tmp_path / "cache")
    before = set((tmp_path / "cache").iterdir())
    encoded(recipe, "text", tmp_path / "cache", plain={"folder": "bert"})
    assert set((tmp_path / "cache").iterdir()) == before


@pytest.mark.parametrize(("modality", "folder"), [("image", "mobilenet"), ("audio", "yamnet"), ("text", "bert")])
def test_controls_are_random_by_their_seed_alone(
    make_recipe: MakeRecipe, tmp_path: Path, modality: str, folder: str
) -> None:
    recipe = make_recipe()
    sources: dict[str, dict[str, Any]] = {
        "real": {"folder": folder},
        "first": {"folder": folder, "random": True},
        "second": {"folder": folder, "random": True, "seed": 1},
    }
    state = torch.get_rng_state()
    features = encoded(recipe, modality, tmp_path / "a", **sources)
    again = encoded(recipe, modality, tmp_path / "b", **sources)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(features[name], again[name]) for name in sources)
    real, first, second = (features[name] for name in sources)
    assert real.shape == first.shape
    for values in (first, second):
        assert np.isfinite(values).all()
        assert values.std(0).max() > 1e-3 * np.abs(values).max() > 0
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - real).max() > 1e-3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"folder": "mobilenet", "layer": 99}, r"candidates\.image bad: .*no hidden state 99"),
        ({"folder": "mobilenet", "pooling": "cls", "layer": 1}, r"bad: cls pooling needs a CLS state"),
        ({"folder": "absent"}, r"candidates\.image bad: .*absent"),
    ],
)
def test_what_cannot_be_read_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    with pytest.raises(SelectError, match=message):
        encoded(make_recipe(), "image", tmp_path, bad=source)
