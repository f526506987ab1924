from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.matrix import matrix
from tests.training.conftest import MakeRecipe
from training import pipeline
from training.distributed import Ranks
from training.features import Features
from training.fit.alignment import FitError
from training.fit.ladder import _linear, train
from training.fit.sampling import Batches, Sampler, epoch_steps, steps_of
from training.heads.trained import Trained, load_projectors, save_projectors
from training.measure.prepared import Prepared
from training.measure.validation import overall, project
from training.pairs import Split, read_pairs
from training.recipe import ObjectiveSpec, Recipe, TrainSpec


def same_weights(first: Trained, second: Trained) -> bool:
    return all(
        torch.equal(value, second.heads[modality].state_dict()[key])
        for modality, head in first.heads.items()
        for key, value in head.state_dict().items()
    )


@pytest.mark.parametrize("kind", matrix(["ridge", "cca", "linear", "mlp", "token"], "ridge", "token"))
def test_each_kind_learns_what_the_random_encoders_leave_to_learn(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str
) -> None:
    recipe = make_recipe(
        projector={"kind": kind, "dimensions": 16, "hidden": 32, "dropout": 0.0},
        train={
            "steps": 150,
            "batch_size": 8,
            "warmup_steps": 10,
            "validate_every": 25,
            "learning_rate": 0.003,
            "baseline": False,
        },
    )
    frozen, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    trained = train(recipe, data, tmp_path / "work")
    figures = pipeline.evaluate(recipe, frozen, data, trained, tmp_path / "cache", tmp_path / "work")
    # Four colours, two pictures and two captions of each: by chance a picture finds one of its captions in 25 %.
    assert figures["pictures.i2t.r1"] >= 50.0
    assert figures["tones.top1"] >= 80.0
    assert figures["tones.seen"] is True
    assert figures["head.won"] == kind
    page = (tmp_path / "work/report.html").read_text()
    for part in ("Validation while training", "Recall at every k", "Confusion matrix", "Worst classes"):
        assert part in page


def test_all_three_modalities_share_one_text_projector(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    trained = train(recipe, data, tmp_path / "work")
    assert set(trained.heads) == {"image", "audio", "text"}
    assert set(trained.means) == {"image", "audio", "text"}
    for name in ("pictures", "tones"):  # the same head serves both sources' texts
        texts = data[name]["test"].texts
        assert project(trained.heads["text"], texts).shape == (len(texts), 16)
    assert 0.001 <= trained.temperature <= 0.5


SDM = {"steps": 12, "batch_size": 8, "warmup_steps": 2, "validate_every": 4, "objective": {"kind": "sdm"}}


@pytest.mark.parametrize(
    ("changes", "draws"),
    [
        ({"projector": {"kind": "mlp", "dimensions": 16, "hidden": 32, "dropout": 0.2}}, 25),
        ({"train": SDM}, 18),  # the baseline's 12 steps, and half of the recipe's own
    ],
)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], draws: int
) -> None:
    recipe = make_recipe(**changes)
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    whole = train(recipe, data, tmp_path / "whole")
    left, real = iter(range(draws)), Sampler.draw

    def interrupted(sampler: Sampler, rng: np.random.Generator) -> np.ndarray:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(sampler, rng)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data, tmp_path / "cut")
    resumed = train(recipe, data, tmp_path / "cut")
    assert same_weights(whole, resumed)
    assert (whole.history, whole.ladder) == (resumed.history, resumed.ladder)
    assert whole.temperature == resumed.temperature


def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    train(recipe, data, tmp_path / "work")
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 5})})
    assert same_weights(train(other, data, tmp_path / "work"), train(other, data, tmp_path / "fresh"))


def test_a_finished_checkpoint_does_not_survive_a_change_of_data(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 20, "batch_size": 8, "validate_every": 10, "baseline": False})
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    first = train(recipe, data, tmp_path / "work")
    assert same_weights(train(recipe, data, tmp_path / "work"), first)

    def changed(side: str) -> dict[str, dict[Split, Prepared]]:
        part = data["pictures"]["train"]
        if side == "links":
            links = part.pairs.links.copy()
            links[:, 1] = np.roll(links[:, 1], 2)
            part = replace(part, pairs=replace(part.pairs, links=links))
        else:  # of another encoder, say
            part = replace(part, media=Features(np.array(part.media.pooled) * 2))
        return data | {"pictures": data["pictures"] | {"train": part}}

    for side in ("links", "features"):
        other = changed(side)
        again, fresh = train(recipe, other, tmp_path / "work"), train(recipe, other, tmp_path / side)
        assert same_weights(again, fresh), side
        assert not same_weights(again, first), side


def test_training_stops_early_and_keeps_the_best(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    values = {"steps": 400, "batch_size": 8, "validate_every": 2, "patience": 3, "warmup_steps": 2}
    recipe = make_recipe(train=values)
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    history = train(recipe, data, tmp_path / "work").history
    scores = [entry["score"] for entry in history]
    assert len(history) < 200
    # Three validations without a gain, and then the rate falls to zero over no fewer steps than one validation's.
    gains = [max(scores[:at], default=-1.0) < score for at, score in enumerate(scores)]
    stopped = next(at for at in range(3, len(gains)) if not any(gains[at - 2 : at + 1]))
    assert history[-1]["step"] - history[stopped]["step"] == max(2, history[stopped]["step"] // 10)


def test_projectors_survive_their_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
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


@pytest.mark.parametrize("batch", [5, 8, 16])
def test_every_medium_is_drawn_before_any_is_drawn_again(make_recipe: MakeRecipe, batch: int) -> None:
    pairs = read_pairs(make_recipe(), "pictures")["train"]
    media, rng = len(pairs.media), np.random.default_rng(0)
    sampler = Sampler(pairs, batch)
    for _ in range(3):
        drawn = [sampler.draw(rng)[:, 0] for _ in range(-(-media // batch))]
        assert len(set(np.concatenate(drawn).tolist())) == media
        assert len(set(np.concatenate(drawn)[:media].tolist())) == media
        assert all(len(set(rows.tolist())) == min(batch, media) for rows in drawn)


def test_batch_size_is_that_of_each_process(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"batch_size": 4})
    sources = [Prepared(read_pairs(recipe, "pictures")["train"], *fake_features(recipe, "pictures"))]
    parts = [
        Batches(recipe, sources, Ranks(index, 2)).draw(0, np.random.default_rng(0))[0].keys[0] for index in range(2)
    ]
    assert [len(part) for part in parts] == [4, 4]
    assert not set(parts[0].tolist()) & set(parts[1].tolist())


def test_sources_of_different_scales_count_alike() -> None:
    base = {"captions": 10.0, "labels": 80.0}
    assert overall({}) == 0.0
    # A tenth more of either is as much of a gain; a plain mean asks for 8 points of one and 1 of the other.
    assert overall(base | {"captions": 11.0}) == pytest.approx(overall(base | {"labels": 88.0}))
    assert overall(base | {"captions": 0.0}) > 0


def test_epochs_say_how_long_a_run_is(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"batch_size": 5, "epochs": 3})
    sources = [Prepared(read_pairs(recipe, name)["train"], *fake_features(recipe, name)) for name in recipe.pairs]
    media = sum(len(source.pairs.media) for source in sources)
    assert steps_of(recipe, sources) == 3 * -(-media // 5)
    assert steps_of(recipe, sources, Ranks(0, 2)) == 3 * -(-media // 10)
    two = make_recipe(train={"batch_size": 5, "epochs": 3, "objective": {"captions": 2}})
    assert steps_of(two, sources) == 3 * -(-media // 2)  # two media of two captions each
    assert steps_of(two, sources, Ranks(0, 2)) == 3 * -(-media // 5)
    assert steps_of(_linear(recipe), sources) == recipe.train.baseline_steps


def test_an_epoch_of_several_captions_draws_every_medium() -> None:
    links = np.stack([np.repeat(np.arange(100), 5), np.arange(500)], 1)
    pairs: Any = SimpleNamespace(links=links, media=range(100), weight=1.0)
    recipe: Any = SimpleNamespace(train=TrainSpec(batch_size=21, objective=ObjectiveSpec(captions=5)))
    steps = epoch_steps(recipe, [SimpleNamespace(pairs=pairs)])  # type: ignore[list-item]
    sampler, rng = Sampler(pairs, 21, 5), np.random.default_rng(0)
    assert {medium for _ in range(steps) for medium in sampler.draw(rng)[:, 0]} == set(range(100))


OPTIONS: dict[str, dict[str, Any]] = {
    "positives": {"objective": {"repeats": "positive"}},
    "sdm, two captions": {"objective": {"kind": "sdm", "captions": 2}},
    "blocks": {"objective": {"chunk": 3}},
    "mixed batches": {"objective": {"mixed": True}, "batch_size": 16},
    "regularised": {"regularise": {"noise_robust": 0.1, "alignment": 0.1, "uniformity": 0.1}},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("name", matrix(OPTIONS, "positives", "mixed batches"))
def test_every_option_learns(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    options = OPTIONS[name]
    values = {"steps": 120, "batch_size": 8, "warmup_steps": 10, "validate_every": 40, "learning_rate": 0.003}
    recipe = make_recipe(
        projector={"kind": "mlp", "dimensions": 16, "hidden": 32, "dropout": 0.0, "matryoshka": [4, 8]},
        train={**values, "baseline": False, **options},
    )
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    trained = train(recipe, data, tmp_path / "work")
    assert max(entry["score"] for entry in trained.history) >= 65.0  # untrained: about 30


def test_a_source_ends_where_the_recipe_says(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"steps": 40, "batch_size": 8, "until": {"tones": 0.5}})
    sources = [Prepared(read_pairs(recipe, name)["train"], *fake_features(recipe, name)) for name in recipe.pairs]
    batches, rng = Batches(recipe, sources), np.random.default_rng(0)
    drawn = [batches.draw(step, rng)[0].source for step in range(40)]
    assert set(drawn[:20]) == {0, 1}
    assert set(drawn[20:]) == {0}


def test_a_mixed_batch_holds_every_source_and_mistakes_none(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"batch_size": 8, "objective": {"mixed": True}})
    sources = [Prepared(read_pairs(recipe, name)["train"], *fake_features(recipe, name)) for name in recipe.pairs]
    parts = Batches(recipe, sources).draw(0, np.random.default_rng(0))
    assert [part.source for part in parts] == [0, 1]
    for first, second in zip(parts[0].keys, parts[1].keys, strict=True):
        shared = set(first.tolist()) & set(second.tolist())
        assert shared <= {-1}


def test_other_texts_come_with_their_keys(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"batch_size": 8, "objective": {"other_texts": 5}})
    source = Prepared(read_pairs(recipe, "pictures")["train"], *fake_features(recipe, "pictures"))
    [part] = Batches(recipe, [source]).draw(0, np.random.default_rng(0))
    assert len(part.texts["pooled"]) == len(part.keys[0]) == 8
    drawn = torch.stack(part.other_keys[:2], dim=1).tolist()
    assert len(part.others["pooled"]) == len(drawn) == 5
    assert all(link in source.pairs.links.tolist() for link in drawn)
    assert torch.equal(part.others["pooled"], torch.from_numpy(source.texts.pooled[part.other_keys[1].numpy()]))


def test_several_captions_of_a_medium_are_different_ones(make_recipe: MakeRecipe) -> None:
    pairs = read_pairs(make_recipe(), "pictures")["train"]  # two captions of each picture
    rng = np.random.default_rng(0)
    for asked, expected in ((1, 1), (2, 2), (3, 2)):
        links = Sampler(pairs, 12, asked).draw(rng)
        media, counts = np.unique(links[:, 0], return_counts=True)
        assert len(media) == 12 // asked
        assert set(counts.tolist()) == {expected}
        assert len({tuple(link) for link in links.tolist()}) == len(links)
        assert {tuple(link) for link in links.tolist()} <= {tuple(link) for link in pairs.links.tolist()}


@pytest.mark.parametrize("querybank", [0, 4])
def test_training_goes_on_from_a_file(make_recipe: MakeRecipe, tmp_path: Path, querybank: int) -> None:
    """Banks for the correction of hubs are not gone on from: they are of the heads as they were."""
    projector = {"kind": "mlp", "dimensions": 16, "hidden": 8, "querybank": querybank}
    train_spec = {"steps": 20, "batch_size": 8, "validate_every": 10, "baseline": False}
    recipe = make_recipe(train=train_spec, projector=projector)
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    first = train(recipe, data, tmp_path / "first")
    save_projectors(tmp_path / "p.safetensors", first)
    still = {"steps": 1, "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-12, "baseline": False}
    again = make_recipe(train={**still, "start": str(tmp_path / "p.safetensors")}, projector=projector)
    second = train(again, data, tmp_path / "second")
    for modality, head in first.heads.items():
        for key, value in head.state_dict().items():
            if not key.startswith("reserve."):
                assert torch.allclose(value, second.heads[modality].state_dict()[key], atol=1e-6)
    assert second.init != first.init
    with pytest.raises(FitError, match=r"train\.start: .*absent.* is not there"):
        train(make_recipe(train={**still, "start": str(tmp_path / "absent")}), data, tmp_path / "third")
    other = make_recipe(
        train={**still, "start": str(tmp_path / "p.safetensors")}, projector={"kind": "mlp", "dimensions": 8}
    )
    with pytest.raises(FitError, match="does not fit"):
        train(other, data, tmp_path / "fourth")


def test_tensorboard_shows_the_validations(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = {"steps": 20, "batch_size": 8, "validate_every": 10, "baseline": False, "tensorboard": True}
    recipe = make_recipe(train=values)
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    history = train(recipe, data, tmp_path / "work").history
    events = accumulator.EventAccumulator(str(tmp_path / "work/tensorboard")).Reload()
    shown = [(event.step, round(event.value, 3)) for event in events.Scalars("mlp/score")]
    assert shown == [(entry["step"], entry["score"]) for entry in history]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"device": "cuda", "baseline": False})
    _, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    with pytest.raises(FitError, match=r"train\.device is cuda"):
        train(recipe, data, tmp_path / "work")


def fake_features(recipe: Recipe, name: str) -> tuple[Features, Features]:
    pairs = read_pairs(recipe, name)["train"]
    return tuple(Features(np.zeros((len(side), 3), np.float32)) for side in (pairs.media, pairs.texts))  # type: ignore[return-value]
