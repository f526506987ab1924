import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.bundle import OUTPUT, Bundle, read_bundle
from service.contract.vectors import l2_normalise
from tests import tiny_bundle
from tests.training import spaces, tiny
from training.bundle.bind.graphs import append, mix
from training.bundle.bind.maps import Map, fit, procrustes
from training.bundle.bind.routing import best, mixed
from training.heads.bundled import BundledError, text_head

TEXTS = [f"{start} {word}" for start in ("a picture of", "the sound of", "a", "very plain") for word in tiny.WORDS]


def units(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    return l2_normalise(rng.standard_normal((rows, width)).astype(np.float32))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(2, 12), scale=st.floats(0.2, 5.0))
def test_procrustes_finds_a_rotation_a_scale_and_a_shift(seed: int, width: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((width, width)))
    x = rng.standard_normal((10 * width, width)).astype(np.float32)
    y = (scale * x @ rotation + rng.standard_normal(width)).astype(np.float32)
    found = procrustes(x, y)
    np.testing.assert_allclose(found.weight, scale * rotation, atol=1e-3 * scale)
    np.testing.assert_allclose(x @ found.weight + found.bias, y, atol=1e-3 * scale)


@pytest.mark.parametrize(("a", "b"), [(6, 10), (10, 6)])
def test_procrustes_between_lengths_keeps_angles_where_it_can(a: int, b: int) -> None:
    rng = np.random.default_rng(0)
    found = procrustes(units(rng, 80, a), units(rng, 80, b))
    square = found.weight @ found.weight.T if a <= b else found.weight.T @ found.weight
    np.testing.assert_allclose(square / square[0, 0], np.eye(min(a, b)), atol=1e-4)


def test_a_fit_is_judged_on_texts_that_it_did_not_see() -> None:
    rng = np.random.default_rng(0)
    x = units(rng, 100, 64)
    same, other = fit(x, x[:, ::-1].copy()), fit(x, units(rng, 100, 64))
    assert (same.cosine, same.recall) == (pytest.approx(1, abs=1e-3), 100.0)
    assert other.cosine < 0.3 and other.recall < 50


def test_graphs_compute_what_numpy_does(tmp_path: Path) -> None:
    first, second = (tiny_bundle.build(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    rng = np.random.default_rng(0)
    through = Map(*(rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16,))))
    append(first.tower_path("image"), through, tmp_path / "image.onnx")
    pixels = {"pixels": rng.standard_normal((3, 3, 32, 32)).astype(np.float32)}
    np.testing.assert_allclose(
        output(tmp_path / "image.onnx", pixels), through(output(first.tower_path("image"), pixels)), atol=1e-5
    )
    mix(second.tower_path("text"), first.tower_path("text"), through, 0.25, tmp_path / "text.onnx")
    ids = {"input_ids": np.array([[2, 6, 0], [3, 4, 5]]), "attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    theirs, ours = (output(bundle.tower_path("text"), ids) for bundle in (first, second))
    np.testing.assert_allclose(output(tmp_path / "text.onnx", ids), mixed(ours, through(theirs), 0.25), atol=1e-5)


def test_tensors_that_both_graphs_hold_are_kept_once(tmp_path: Path) -> None:
    bundle = tiny_bundle.build(tmp_path / "bundle")
    through = Map(np.eye(16, dtype=np.float32), np.zeros(16, np.float32))
    mix(bundle.tower_path("text"), bundle.tower_path("text"), through, 0.5, tmp_path / "text.onnx")
    tables = [
        t for t in onnx.load(tmp_path / "text.onnx").graph.initializer if list(t.dims) == [len(tiny_bundle.PIECES), 16]
    ]
    assert len(tables) == 1
    ids = {"input_ids": np.array([[2, 6]]), "attention_mask": np.array([[1, 1]])}
    alone = output(bundle.tower_path("text"), ids)
    np.testing.assert_allclose(output(tmp_path / "text.onnx", ids), alone, atol=1e-6)


def test_the_best_weight_counts_each_source_by_its_own_best() -> None:
    table = {0.0: {"a": 20.0, "b": 50.0}, 0.5: {"a": 19.0, "b": 80.0}, 1.0: {"a": 2.0, "b": 90.0}}
    assert best(table) == 0.5
    assert best({0.0: {"a": 10.0}, 0.5: {"a": 10.0}}) == 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bound")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


def bind(first: Bundle, second: Bundle, folder: Path, name: str, *options: object) -> Bundle:
    common = ["--texts", folder / "texts.txt", "--cache", folder / "cache", "--out", folder / name]
    assert spaces.run("bind", first.path, second.path, *common, "--name", name, *options) == 0
    return read_bundle(folder / name)


@pytest.mark.full
def test_sounds_find_pictures_and_the_second_space_stays(
    sound_space: Bundle, picture_space: Bundle, tiny_root: Path, folder: Path
) -> None:
    bound = bind(sound_space, picture_space, folder, "bound")
    score, chance = spaces.sound_to_image(bound, tiny_root, folder / "cache")
    assert score > 2 * chance
    old, new = picture_space.manifest, bound.manifest
    assert new.admits == (old.space,) and new.space not in (old.space, sound_space.manifest.space)
    for modality, tower in old.towers.items():
        assert new.towers[modality] == tower
        assert picture_space.tower_path(modality).read_bytes() == bound.tower_path(modality).read_bytes()
    audio, own = new.towers["audio"], sound_space.manifest.towers["audio"]
    assert audio.projector.kind == "bound" and audio.encoder == own.encoder
    assert audio.projector.weights_sha256 != own.projector.weights_sha256
    assert new.evaluation["parity.audio"] >= 0.9999
    assert {"pictures", "tones"} <= {each.of for each in new.licences}
    assert [each.of for each in new.terms] == ["image", "audio"]
    assert "because of pictures (CC-BY-NC-4.0)" in (bound.path / "MODEL_CARD.md").read_text().split("\n---")[0]
    assert weights_equal(text_head(bound), text_head(picture_space))


@pytest.mark.full
def test_with_a_weight_a_text_is_of_both_spaces(
    sound_space: Bundle, picture_space: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = bind(sound_space, picture_space, folder, "weighted", "--weight", 0.5)
    texts = ["a picture of red", "the sound of blue"]
    mine, theirs, joint = (
        spaces.vectors(bundle, "text", texts, folder / "cache") for bundle in (picture_space, sound_space, bound)
    )
    source, target = (spaces.vectors(b, "text", TEXTS, folder / "cache") for b in (sound_space, picture_space))
    through = fit(source, target).map
    np.testing.assert_allclose(joint, mixed(mine, through(theirs), 0.5), atol=1e-4)
    assert bound.manifest.admits == () and not bound.manifest.accepts(picture_space.manifest.space)
    image = picture_space.manifest.towers["image"]
    assert bound.manifest.towers["image"] == image
    with pytest.raises(BundledError, match="mixes two spaces"):
        text_head(bound)


@pytest.mark.full
def test_a_weight_is_learned_on_validation(
    sound_space: Bundle, picture_space: Bundle, tiny_root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = spaces.recipe(tiny_root, folder, "image", "audio")
    capsys.readouterr()
    bind(sound_space, picture_space, folder, "learned", "--recipe", recipe)
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    rows = {float(line.split()[0]): line for line in captured.err.splitlines() if line[:3] in ("0.0", "0.5", "1.0")}
    assert set(rows) == {0.0, 0.5, 1.0}
    assert 0 <= result["bind.weight"] <= 1
    assert {"bind.validation.pictures", "bind.validation.tones"} <= set(result)


@pytest.mark.full
def test_what_cannot_be_bound_is_said(
    sound_space: Bundle,
    picture_space: Bundle,
    tiny_root: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(first: Path, second: Path, *options: object, texts: Path = folder / "texts.txt") -> str:
        common = ["--texts", texts, "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
        assert spaces.run("bind", first, second, *common, *options) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    sounds, pictures = sound_space.path, picture_space.path
    other = tiny_bundle.build(tmp_path / "other").path
    assert "has no modality that" in refused(pictures, other)
    assert "read different tokens" in refused(other, pictures, "--weight", 0.5)
    (tmp_path / "few.txt").write_text("one\n\none\ntwo\n")
    assert "has 2 different texts" in refused(sounds, pictures, texts=tmp_path / "few.txt")
    assert "cannot be read" in refused(sounds, pictures, texts=tmp_path / "none.txt")
    recipe = spaces.recipe(tiny_root, tmp_path, "image")
    assert "no validation split of audio" in refused(sounds, pictures, "--recipe", recipe)


def output(graph: Path, inputs: dict[str, Any]) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT], inputs)[0])


def weights_equal(one: Any, other: Any) -> bool:
    return all(value.equal(other.state_dict()[name]) for name, value in one.state_dict().items())
