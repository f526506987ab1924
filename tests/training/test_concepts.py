"""Scores of an encoder's own classifier stand beside its features, are a branch of its head, and soft captions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MobileNetV1ForImageClassification, MobileNetV2ForImageClassification

from tests.matrix import matrix
from tests.training import tiny
from tests.training.conftest import MakeRecipe
from training import pipeline
from training.encoders import load_encoder
from training.features import cached_features, preparer
from training.fit.ladder import train
from training.heads.concepts import name_vectors, named, soft_caption_loss
from training.heads.projector import ConceptBranch
from training.heads.trained import Trained, load_projectors, save_projectors, set_rise
from training.measure.validation import Data, project, validate
from training.pairs import PairError, read_pairs
from training.preprocessors import EncoderError
from training.recipe import Recipe, RecipeError


def fitted(recipe: Recipe, folder: Path) -> tuple[pipeline.Encoders, Data, Trained]:
    """A recipe's encoders, the features of its pairs, and heads that learned from them; the cache is in `folder`."""
    frozen, _, data = pipeline.prepare(recipe, folder / "cache")
    return frozen, data, train(recipe, data, folder, names=named(recipe, frozen, folder / "cache"))


def test_scores_are_the_classifiers_own_and_the_last_of_the_features(
    concept_root: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(**tiny.concept_values(concept_root))
    image, audio = load_encoder(recipe, "image"), load_encoder(recipe, "audio")
    assert image.concepts == ("red", "green", "blue")
    assert image.source == "first+second"
    pixels = torch.from_numpy(preparer(image)(concept_root / "pictures/0.png"))[None]
    expected, features = [], []
    for folder in ("first", "second"):
        model = MobileNetV2ForImageClassification.from_pretrained(concept_root / folder).eval()
        with torch.inference_mode():
            expected.append(model(pixels).logits.softmax(-1)[0, 1:])
            features.append(model.mobilenet_v2(pixels).pooler_output[0])
    assert image.module is not None
    with torch.inference_mode():
        whole, local = image.module(pixels)
    torch.testing.assert_close(whole[0, -3:], (expected[0] + expected[1]) / 2)
    torch.testing.assert_close(whole[0, :-3], torch.cat(features))
    assert image.width == whole.shape[1]
    assert local.shape == (1, 1, image.width)
    patches = torch.from_numpy(preparer(audio)(concept_root / "sounds/0.wav").rows)
    hearing = MobileNetV1ForImageClassification.from_pretrained(concept_root / "hearing").eval()
    assert audio.module is not None
    with torch.inference_mode():
        torch.testing.assert_close(audio.module(patches)[:, -2:], hearing(patches).logits.sigmoid() ** 8)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"folder": "other", "concepts": True}, "no classifier that reads the pooled features alone"),
        ({"folder": "mobilenet", "concepts": True}, "lacks weights"),
    ],
)
def test_a_classifier_that_is_not_there_is_refused(
    concept_root: Path, make_recipe: MakeRecipe, image: dict[str, Any], said: str
) -> None:
    recipe = make_recipe(
        **tiny.concept_values(concept_root)
        | {"encoders": tiny.concept_values(concept_root)["encoders"] | {"image": image}}
    )
    with pytest.raises(EncoderError, match=said):
        load_encoder(recipe, "image")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"projector": {"kind": "token"}}, "not for token heads"),
        ({"projector": {"kind": "ridge"}}, "not for ridge heads"),
        ({"templates": {"audio": ["{}"]}}, "templates.image"),
    ],
)
def test_what_cannot_have_concepts_says_so(
    concept_root: Path, make_recipe: MakeRecipe, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        make_recipe(**tiny.concept_values(concept_root) | changes)
    without = tiny.concept_values(concept_root)
    del without["encoders"]["audio"]["concepts"]
    with pytest.raises(RecipeError, match=r"pairs.tones asks for concepts"):
        make_recipe(**without)


def test_the_branch_is_a_weighted_sum_of_centred_names() -> None:
    branch = ConceptBranch(3, 2, root=0.25)
    branch.place(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    got = branch(torch.tensor([[16.0, 0.0, 1.0], [0.0, 81.0, 0.0]]))
    names = np.array([[1, -1 / 3], [0, 2 / 3], [-1, -1 / 3]])
    expected = np.array([2 * names[0] + 1 * names[2], 3 * names[1]])
    expected *= 0.5 / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(got.detach(), expected, atol=1e-6)


def test_the_branch_is_longer_where_the_classifier_is_sure() -> None:
    scores = torch.tensor([[0.8, 0.2, 0.0], [0.4, 0.3, 0.3], [0.0, 0.0, 0.0]])
    branch = ConceptBranch(3, 2, root=1.0, rise=0.6)
    branch.place(torch.eye(3)[:, :2])
    lengths = branch(scores).norm(dim=1).detach()
    np.testing.assert_allclose(lengths, [0.5 + 0.6 * 0.8, 0.5 + 0.6 * 0.4, 0.0], atol=1e-6)


def test_validation_says_how_much_of_what_the_classifier_is_sure_of_its_bare_name_finds(
    concept_root: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, cache = make_recipe(**tiny.concept_values(concept_root)), tmp_path / "cache"
    frozen, _, data = pipeline.prepare(recipe, cache)
    names = named(recipe, frozen, cache)
    trained = pipeline.fit(recipe, frozen, data, cache, tmp_path)
    held = data["pictures"]["validation"].media
    scores = np.asarray(held.pooled[:, -names["image"].count :])
    sure = scores.max(1) / scores.sum(1) >= 0.3
    nearest = (project(trained.heads["image"], held) @ project(trained.heads["text"], names["image"].bare).T).argmax(1)
    figures = validate(recipe, trained.heads, data, names)
    assert sure.any()
    assert figures["image_names"] == pytest.approx((nearest == scores.argmax(1))[sure].mean() * 100)
    assert "audio_names" not in figures, "no sound is held out"
    assert "image_names" in trained.history[-1]
    assert "image_names" not in validate(recipe, trained.heads, data)
    monkeypatch.setattr("training.measure.validation._SURE", 2.0)
    assert "image_names" not in validate(recipe, trained.heads, data, names), "it is sure of nothing"


def test_heads_keep_the_rise_that_they_were_measured_with(
    concept_root: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    values = tiny.concept_values(concept_root)
    recipe = make_recipe(**values)
    _, data, trained = fitted(recipe, tmp_path)
    held, path = data["pictures"]["validation"].media, tmp_path / "projectors.safetensors"
    changed = recipe.model_copy(update={"projector": recipe.projector.model_copy(update={"rise": 0.5})})
    expected = project(trained.heads["image"], held)
    save_projectors(path, trained)
    np.testing.assert_allclose(project(load_projectors(path, changed).heads["image"], held), expected, atol=1e-6)
    set_rise(trained.heads, 0.5)
    assert np.abs(project(trained.heads["image"], held) - expected).max() > 1e-3
    save_projectors(path, trained)
    assert load_projectors(path, recipe).heads["image"].branch.rise == 0.5  # type: ignore[union-attr]


def test_soft_captions_are_cross_entropy_against_normalised_scores() -> None:
    rng = np.random.default_rng(0)
    media, names = (torch.tensor(rng.normal(size=(n, 4)), requires_grad=True) for n in (5, 3))
    scores = torch.tensor(rng.random((5, 3)))
    scores[0] = 0.0
    log_scale = torch.tensor(1.5, requires_grad=True)
    loss = soft_caption_loss(media, names, log_scale, scores)
    logits = np.exp(1.5) * media.detach().numpy().astype(np.float32) @ names.detach().numpy().astype(np.float32).T
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = scores.numpy() / np.maximum(scores.numpy().sum(1, keepdims=True), 1e-12)
    assert loss.item() == pytest.approx(-(target * logs).sum(1).mean(), rel=1e-5)
    loss.backward()
    assert media.grad is not None
    assert names.grad is not None
    assert log_scale.grad is not None
    assert not media.grad[0].any(), "a medium of which nothing is said must not move"
    assert media.grad[1:].abs().sum() > 0
    assert names.grad.abs().sum() > 0
    assert log_scale.grad.abs() > 0


def test_labels_that_training_must_not_see_change_nothing_of_it(
    concept_root: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    table = (concept_root / "sounds.csv").read_text()
    weights = []
    for name in ("sounds.csv", "shuffled.csv"):
        if name == "shuffled.csv":
            head, *rows = table.strip().split("\n")
            labels = [row.split(",")[1] for row in rows]
            turned = labels[1:] + labels[:1]
            lines = [
                ",".join([row.split(",")[0], turned[i] if row.split(",")[2] != "2" else labels[i], row.split(",")[2]])
                for i, row in enumerate(rows)
            ]
            (concept_root / name).write_text("\n".join([head, *lines]) + "\n")
        recipe = make_recipe(**tiny.concept_values(concept_root, table=name))
        _, data, trained = fitted(recipe, tmp_path / name)
        assert data["tones"]["train"].pairs.labels is None
        assert data["tones"]["train"].pairs.texts == []
        weights.append({f"{m}.{k}": v for m, head in trained.heads.items() for k, v in head.state_dict().items()})
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_names_ship_in_float32_where_heads_run_in_bf16(
    concept_root: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    values = tiny.recipe_values(concept_root)["train"] | {"precision": "bf16"}
    recipe = make_recipe(**tiny.concept_values(concept_root), train=values)
    frozen, _, trained = fitted(recipe, tmp_path)
    names = named(recipe, frozen, tmp_path / "cache")
    vectors = name_vectors(trained.heads["text"], names["audio"], 0)
    branch = trained.heads["audio"].branch
    assert branch is not None
    torch.testing.assert_close(branch.names, vectors - vectors.mean(0))
    with torch.autocast("cpu", torch.bfloat16):
        rough = name_vectors(trained.heads["text"], names["audio"], 0)
    assert not torch.equal(rough, vectors)
    torch.testing.assert_close(rough, vectors, atol=0.02, rtol=0)  # float32 too


@pytest.mark.full
def test_a_run_with_concepts_ends_in_a_checked_bundle(
    concept_root: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(**tiny.concept_values(concept_root, prompts={"low tone": ["a very low tone"]}))
    cache = tmp_path / "cache"
    frozen, _, data = pipeline.prepare(recipe, cache)
    trained = pipeline.fit(recipe, frozen, data, cache, tmp_path)
    branch = trained.heads["audio"].branch
    assert branch is not None
    vectors = trained.heads["text"](torch.from_numpy(named(recipe, frozen, cache)["audio"].prompts[0].pooled[:]))
    torch.testing.assert_close(branch.names, vectors - vectors.mean(0))
    figures = pipeline.evaluate(recipe, frozen, data, trained, cache, tmp_path)
    assert figures["tones.zero_shot.top1"] == figures["tones.top1"]
    assert figures["tones.seen"] is False
    assert figures["tones.concept_informed"] is True
    bundle = pipeline.export(recipe, frozen, trained, figures, tmp_path / "bundle")
    assert all(bundle.manifest.evaluation[f"parity.{m}"] >= 0.9999 for m in ("image", "audio", "text"))
    again = load_projectors(tmp_path / "projectors.safetensors", recipe)
    kept = trained.heads["image"].state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in again.heads["image"].state_dict().items())


@pytest.mark.full
def test_withheld_classes_are_tested_among_all(concept_root: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(**tiny.concept_values(concept_root, supervision="pairs", unseen=["high_tone"]))
    split = read_pairs(recipe, "tones")
    assert split["train"].labels is not None
    assert "high tone" not in {split["train"].classes[label] for label in split["train"].labels}
    assert "high tone" in split["train"].classes
    figures = pipeline.evaluate(recipe, *fitted(recipe, tmp_path), tmp_path / "cache", tmp_path)
    assert figures["tones.seen"] is False
    assert 0.0 <= figures["tones.unseen.top1"] <= 100.0


def test_a_prompt_for_no_class_is_refused_before_training(concept_root: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**tiny.concept_values(concept_root, prompts={"purple": ["x"]}))
    with pytest.raises(PairError, match="purple is none of its classes"):
        read_pairs(recipe, "tones")


@pytest.mark.full
@pytest.mark.parametrize("modality", matrix(["image", "audio"], "audio"))
def test_a_long_list_goes_through_onnx_runtime_to_the_same_features(
    concept_root: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modality: Any
) -> None:
    encoder = load_encoder(make_recipe(**tiny.concept_values(concept_root)), modality)
    items = sorted(concept_root.glob({"image": "pictures/*", "audio": "sounds/*"}[modality]))
    plain = cached_features(encoder, items, tmp_path / "plain").pooled
    monkeypatch.setattr("training.features._MANY", 1)
    compiled = cached_features(encoder, items, tmp_path / "compiled").pooled
    np.testing.assert_allclose(compiled, plain, rtol=1e-3, atol=1e-4)
