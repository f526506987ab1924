import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from service.contract.bundle import Bundle, Manifest, Projector, read_bundle, space_id
from service.contract.licences import commercial_use
from service.settings import Settings
from tests.conftest import serving
from tests.training import spaces, tiny
from training.encoders import weights_sha256
from training.errors import TrainingError
from training.heads.bundled import BundledError, text_head
from training.heads.projector import Head
from training.heads.trained import Trained, save_projectors
from training.recipe import ProjectorSpec


def test_the_older_towers_are_the_same_bytes_and_give_the_same_vectors(
    picture_space: Bundle, both_spaces: Bundle, tiny_root: Path, tmp_path: Path
) -> None:
    old, new = picture_space.manifest, both_spaces.manifest
    assert set(new.towers) == {*old.towers, "audio"}
    for modality, tower in old.towers.items():
        assert new.towers[modality] == tower
        assert picture_space.tower_path(modality).read_bytes() == both_spaces.tower_path(modality).read_bytes()
    files, _ = spaces.pictures(tiny_root)
    for modality, items in (("image", files), ("text", ["a picture of red", "the sound of blue", "something"])):
        before = spaces.vectors(picture_space, modality, items, tmp_path / "before")
        after = spaces.vectors(both_spaces, modality, items, tmp_path / "after")
        assert np.array_equal(before, after)
    heads = load_file(picture_space.path / "projectors.safetensors")
    kept = load_file(both_spaces.path / "projectors.safetensors")
    assert all(kept[name].equal(tensor) for name, tensor in heads.items())
    assert {name.split(".")[0] for name in kept} == {"image", "text", "audio"}


def test_the_new_space_admits_the_older_one(picture_space: Bundle, both_spaces: Bundle) -> None:
    old, new = picture_space.manifest, both_spaces.manifest
    assert new.space == space_id(old.dimensions, new.towers) != old.space
    assert new.admits == (old.space,)
    assert new.accepts(old.space) and not old.accepts(new.space)
    assert new.temperature == old.temperature and new.means["image"] == old.means["image"]
    assert old.evaluation.items() <= new.evaluation.items()
    assert {"tones.top1", "parity.audio", "audio.head.won"} <= set(new.evaluation)
    assert set(new.templates) == {"image", "audio"}
    assert old.space in (both_spaces.path / "MODEL_CARD.md").read_text()
    assert [each.of for each in new.licences[:1]] == ["pictures"] and new.licences[-1].of == "tones"
    assert commercial_use(new.parts) is False and [each.of for each in new.terms] == ["image", "audio"]
    assert "because of pictures (CC-BY-NC-4.0)" in (both_spaces.path / "MODEL_CARD.md").read_text().split("\n---\n")[0]


def test_a_store_filled_before_goes_on_and_takes_sounds(
    picture_space: Bundle, both_spaces: Bundle, tiny_root: Path, tmp_path: Path
) -> None:
    settings = {"store": tmp_path / "store", "device": "cpu", "threads": 1}
    images, _ = spaces.pictures(tiny_root)
    with serving(Settings(bundle=picture_space.path, **settings)) as client:  # type: ignore[arg-type]
        _index(client, images)
        before = _search(client, "a picture of red", ["image"])
    with serving(Settings(bundle=both_spaces.path, **settings)) as client:  # type: ignore[arg-type]
        assert _search(client, "a picture of red", ["image"]) == before
        clips, called = spaces.sounds(tiny_root)
        _index(client, clips)
        found = _search(client, "the sound of blue", ["audio"])
        assert called[[path.name for path in clips].index(found[0][0])] == "blue"
        assert _search(client, "a picture of red", ["image"]) == before


def test_modalities_that_never_met_find_each_other(both_spaces: Bundle, tiny_root: Path, tmp_path: Path) -> None:
    score, chance = spaces.sound_to_image(both_spaces, tiny_root, tmp_path)
    assert score > 2 * chance


@pytest.mark.parametrize("kind", ["linear", "mlp", "token"])
def test_a_text_head_is_rebuilt_from_the_bundle_alone(picture_space: Bundle, tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    saved = Head("text", 24, ProjectorSpec(kind=kind, dimensions=16, hidden=20, power=0.5)).eval()
    save_projectors(tmp_path / "projectors.safetensors", Trained({"text": saved}, 0.07, {}, []))
    described = Projector(kind=kind, features=24, weights_sha256=weights_sha256(saved))
    head = text_head(Bundle(tmp_path, _with_projector(picture_space, described)))
    pooled, tokens, weights = torch.randn(3, 24), torch.randn(3, 5, 24), torch.full((3, 5), 0.2)
    assert head(pooled, tokens, weights).equal(saved(pooled, tokens, weights))
    assert not any(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.full
def test_a_text_head_that_reads_tokens_can_be_aligned_to(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"train": spaces.TRAIN | {"steps": 2, "validate_every": 2, "baseline": False}}
    token = {"projector": spaces.PROJECTOR | {"kind": "token"}}
    bundle = spaces.built(tiny_root, tmp_path, "image", **short, **token)
    recipe = spaces.recipe(tiny_root, tmp_path, "audio", **short)
    common = ["--work", tmp_path / "w", "--cache", tmp_path / "cache", "--out", tmp_path / "extended"]
    assert spaces.run("add-modality", bundle.path, recipe, *common) == 2
    assert "projector.kind must be token" in capsys.readouterr().err
    kind = ["--set", "projector.kind=token", "--set", "train.baseline=true"]
    assert spaces.run("add-modality", bundle.path, recipe, *common, *kind) == 0
    assert read_bundle(tmp_path / "extended").manifest.towers["audio"].projector.kind == "token"


@pytest.mark.full
@pytest.mark.parametrize("supervision", ["concepts", "pairs"])
def test_a_tower_with_concepts_is_placed_among_the_texts_that_are_there(
    picture_space: Bundle, concept_root: Path, tmp_path: Path, supervision: str
) -> None:
    values = tiny.concept_values(concept_root, supervision=supervision)
    # Of the whole recipe only the sounds are new: its own pictures and their encoder play no part.
    recipe = spaces.recipe(concept_root, tmp_path, "image", "audio", **values)
    common = ["--work", tmp_path / "w", "--cache", tmp_path / "cache", "--out", tmp_path / "extended"]
    assert spaces.run("add-modality", picture_space.path, recipe, *common, "--set", "train.steps=4") == 0
    bundle = read_bundle(tmp_path / "extended")
    names = load_file(bundle.path / "projectors.safetensors")["audio.branch.names"]
    texts = [spaces.TEMPLATES["audio"][0].format(name) for name in ("low", "high")]
    expected = spaces.vectors(picture_space, "text", texts, tmp_path / "cache")
    np.testing.assert_allclose(names.numpy(), expected - expected.mean(0), atol=1e-3)  # of float16 features


@pytest.mark.full
def test_the_work_of_one_space_is_not_that_of_another(
    picture_space: Bundle, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = spaces.recipe(tiny_root, tmp_path, "audio")
    short = ["--cache", tmp_path / "cache", "--set", "train.steps=2", "--set", "train.validate_every=1"]
    assert spaces.run("add-modality", picture_space.path, recipe, *short, "--out", tmp_path / "out") == 0
    assert (tmp_path / f"build/work/audio/{picture_space.manifest.space}/checkpoint.pt").is_file()


def test_what_does_not_fit_is_said(
    picture_space: Bundle, both_spaces: Bundle, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(bundle: Bundle, recipe: Path, *changes: str) -> str:
        sets = [part for change in changes for part in ("--set", change)]
        common = ["--work", tmp_path / "w", "--cache", tmp_path / "c", "--out", tmp_path / "out"]
        assert spaces.run("add-modality", bundle.path, recipe, *common, *sets) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    recipe = spaces.recipe(tiny_root, tmp_path, "audio")
    assert "adds nothing" in refused(both_spaces, recipe)
    assert "--set projector.dimensions=16" in refused(picture_space, recipe, "projector.dimensions=8")
    assert "weights are not those of bert" in refused(picture_space, recipe, "encoders.text={folder: roberta}")
    shorter = "encoders.text={folder: bert, preprocessing: {max_length: 4}}"
    assert "preprocessing is not that" in refused(picture_space, recipe, shorter)
    assert "no pairs of audio" in refused(picture_space, recipe, "pairs={}")


def test_a_damaged_or_foreign_projector_is_refused(picture_space: Bundle, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        text_head(Bundle(tmp_path, picture_space.manifest))
    described = picture_space.manifest.towers["text"].projector
    other = _with_projector(picture_space, described.model_copy(update={"weights_sha256": "0" * 64}))
    with pytest.raises(BundledError, match="not the one of the text tower"):
        text_head(Bundle(picture_space.path, other))
    wider = _with_projector(picture_space, described.model_copy(update={"features": 99}))
    with pytest.raises(BundledError, match="no linear text projector"):
        text_head(Bundle(picture_space.path, wider))


def _with_projector(bundle: Bundle, projector: Projector) -> Manifest:
    towers = dict(bundle.manifest.towers)
    towers["text"] = towers["text"].model_copy(update={"projector": projector})
    return bundle.manifest.model_copy(update={"towers": towers})


def _index(client: httpx.Client, paths: list[Path]) -> None:
    files = [("file", (path.name, path.read_bytes())) for path in paths]
    request = {"items": [{"id": path.name} for path in paths]}
    response = client.post("/items", files=files, data={"request": json.dumps(request)})
    assert response.status_code in (200, 201), response.text


def _search(client: httpx.Client, query: str, modalities: list[str]) -> list[tuple[str, float]]:
    response = client.post("/search", json={"query": query, "top_k": 20, "modalities": modalities})
    return [(hit["id"], hit["score"]) for hit in response.raise_for_status().json()["results"]]
