from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.conftest import MakeRecipe
from training import steps
from training.pairs import Split, read_pairs
from training.recipe import Recipe
from training.train import Prepared, Sampler, Trained, load_projectors, project, save_projectors, train


def prepared(recipe: Recipe, cache: Path) -> tuple[steps.Encoders, dict[str, dict[Split, Prepared]]]:
    frozen = steps.encoders(recipe)
    return frozen, steps.features(recipe, frozen, steps.pairs(recipe), cache)


def same_weights(first: Trained, second: Trained) -> bool:
    return all(
        torch.equal(value, second.heads[modality].state_dict()[key])
        for modality, head in first.heads.items()
        for key, value in head.state_dict().items()
    )


@pytest.mark.parametrize("kind", ["linear", "mlp", "token"])
def test_each_kind_learns_what_the_random_encoders_leave_to_learn(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str
) -> None:
    recipe = make_recipe(
        projector={"kind": kind, "dimensions": 16, "hidden": 32, "dropout": 0.0},
        train={"steps": 150, "batch_size": 8, "warmup_steps": 10, "validate_every": 25, "learning_rate": 0.003},
    )
    frozen, data = prepared(recipe, tmp_path / "cache")
    trained = train(recipe, data, tmp_path / "work")
    figures = steps.evaluate(recipe, frozen, data, trained, tmp_path / "cache", tmp_path / "work")
    # Four colours, two pictures and two captions of each: by chance a picture finds one of its captions in 25 %.
    assert figures["pictures.i2t.r1"] >= 50.0
    assert figures["tones.top1"] >= 80.0
    assert figures["tones.seen"] is True
    assert (tmp_path / "work/report.html").read_text().count("<svg") == 2


def test_all_three_modalities_share_one_text_projector(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    _, data = prepared(recipe, tmp_path / "cache")
    trained = train(recipe, data, tmp_path / "work")
    assert set(trained.heads) == {"image", "audio", "text"}
    assert set(trained.means) == {"image", "audio", "text"}
    for name in ("pictures", "tones"):  # the same head serves both sources' texts
        texts = data[name]["test"].texts
        assert project(trained.heads["text"], texts).shape == (len(texts), 16)
    assert 0.001 <= trained.temperature <= 0.5


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(projector={"kind": "mlp", "dimensions": 16, "hidden": 32, "dropout": 0.2})
    _, data = prepared(recipe, tmp_path / "cache")
    whole = train(recipe, data, tmp_path / "whole")

    draws = iter(range(25))
    real = Sampler.draw

    def interrupted(sampler: Sampler, rng: np.random.Generator) -> np.ndarray:
        if next(draws, None) is None:
            raise KeyboardInterrupt
        return real(sampler, rng)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data, tmp_path / "cut")
    resumed = train(recipe, data, tmp_path / "cut")
    assert same_weights(whole, resumed)
    assert whole.history == resumed.history
    assert whole.temperature == resumed.temperature


def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    _, data = prepared(recipe, tmp_path / "cache")
    train(recipe, data, tmp_path / "work")
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 5})})
    assert same_weights(train(other, data, tmp_path / "work"), train(other, data, tmp_path / "fresh"))


def test_training_stops_early_and_keeps_the_best(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    values = {"steps": 400, "batch_size": 8, "validate_every": 2, "patience": 3, "warmup_steps": 2}
    recipe = make_recipe(train=values)
    _, data = prepared(recipe, tmp_path / "cache")
    history = train(recipe, data, tmp_path / "work").history
    scores = [entry["score"] for entry in history]
    assert len(history) < 200
    assert int(np.argmax(scores)) == len(scores) - 1 - 3


def test_projectors_survive_their_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    _, data = prepared(recipe, tmp_path / "cache")
    trained = train(recipe, data, tmp_path / "work")
    save_projectors(tmp_path / "p.safetensors", trained)
    loaded = load_projectors(tmp_path / "p.safetensors", recipe)
    assert same_weights(trained, loaded)
    assert loaded.temperature == trained.temperature
    assert loaded.means == trained.means
    other = recipe.model_copy(update={"projector": recipe.projector.model_copy(update={"dimensions": 8})})
    with pytest.raises(ValueError, match="does not fit the recipe"):
        load_projectors(tmp_path / "p.safetensors", other)


def test_a_batch_holds_each_medium_once(make_recipe: MakeRecipe) -> None:
    pairs = read_pairs(make_recipe(), "pictures")["train"]
    links = Sampler(pairs, 12).draw(np.random.default_rng(0))
    assert len(set(links[:, 0].tolist())) == 12
    known = {tuple(link) for link in pairs.links.tolist()}
    assert {tuple(link) for link in links.tolist()} <= known
