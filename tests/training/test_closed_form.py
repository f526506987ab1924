from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from training.features import Features
from training.fit.alignment import FitError, new_heads
from training.fit.closed_form import PENALTIES, ClosedFormError, cca, ridge
from training.fit.ladder import train
from training.heads.projector import Head
from training.measure.prepared import Prepared
from training.measure.validation import project
from training.pairs import Pairs
from training.recipe import Recipe

N, D, E = 400, 7, 5


def recipe(kind: str, dimensions: int, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "synthetic",
            "encoders": {"image": {"hub": "a/b"}, "text": {"hub": "a/b"}},
            "pairs": {"x": {"modality": "image", "table": "t.csv", "folder": ".", "text": "text"}},
            "projector": {"kind": kind, "dimensions": dimensions, "dropout": 0.0},
            "train": {"steps": 60, "batch_size": 64, "warmup_steps": 5, "validate_every": 20, **train},
        }
    )


def prepared(media: np.ndarray, texts: np.ndarray) -> Prepared:
    rows = np.arange(len(media))
    paths = [Path(str(row)) for row in rows]
    pairs = Pairs("x", "image", paths, [str(row) for row in rows], np.stack([rows, rows], 1), None, [], 1.0)
    return Prepared(pairs, Features(media.astype(np.float32)), Features(texts.astype(np.float32)))


def splits(media: np.ndarray, texts: np.ndarray, held: int = 100) -> dict[str, Any]:
    ends = {"train": slice(0, -held), "validation": slice(-held, None), "test": slice(0, 0)}
    return {"x": {split: prepared(media[rows], texts[rows]) for split, rows in ends.items()}}


@pytest.fixture
def noisy() -> tuple[np.ndarray, np.ndarray]:
    """Media (400, 7) and texts (400, 5) of three shared factors and noise of their own."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(N, 3))
    media = shared @ rng.normal(size=(3, D)) + 0.3 * rng.normal(size=(N, D)) + 2.0
    return media, shared @ rng.normal(size=(3, E)) + 0.3 * rng.normal(size=(N, E)) - 1.0


def standardised(x: np.ndarray) -> np.ndarray:
    return np.asarray((x - x.mean(0)) / x.std(0, ddof=1))


def test_ridge_is_the_normal_equations_with_a_penalty(noisy: tuple[np.ndarray, np.ndarray]) -> None:
    media, texts = noisy
    spec, data = recipe("ridge", E), {"x": {"train": prepared(media, texts)}}
    heads = new_heads(spec, data, {}, spec.projector)  # type: ignore[arg-type]
    x, y = standardised(media), standardised(texts)
    covariance, cross = x.T @ x / N, x.T @ y / N
    for penalty in ridge(spec, heads, data, {}):  # type: ignore[arg-type]
        weights = np.linalg.solve(covariance + penalty * np.trace(covariance) / D * np.eye(D), cross)
        predicted, truth = x @ weights, y
        # Cosines between predictions and texts are those of the plain formula, whatever axes the head chose.
        ours = project(heads["image"], Features(media.astype(np.float32)))
        theirs = project(heads["text"], Features(texts.astype(np.float32)))
        expected = (predicted / np.linalg.norm(predicted, axis=1, keepdims=True)) @ (
            truth / np.linalg.norm(truth, axis=1, keepdims=True)
        ).T
        assert np.allclose(ours @ theirs.T, expected, atol=1e-4), penalty


def test_cca_finds_the_canonical_correlations(noisy: tuple[np.ndarray, np.ndarray]) -> None:
    media, texts = noisy
    spec, data = recipe("cca", 3), {"x": {"train": prepared(media, texts)}}
    heads = new_heads(spec, data, {}, spec.projector)  # type: ignore[arg-type]
    x, y = standardised(media), standardised(texts)
    penalty = next(iter(cca(spec, heads, data, {})))  # type: ignore[arg-type]
    cxx, cyy, cxy = x.T @ x / N, y.T @ y / N, x.T @ y / N
    kxx = cxx + penalty * np.trace(cxx) / D * np.eye(D)
    kyy = cyy + penalty * np.trace(cyy) / E * np.eye(E)
    squared = eigh(cxy.T @ np.linalg.solve(kxx, cxy), kyy, eigvals_only=True)[::-1][:3]
    with torch.no_grad():
        both = [
            heads[m].pooled(torch.from_numpy(v.astype(np.float32))).double().numpy()  # type: ignore[operator]
            for m, v in (("image", media), ("text", texts))
        ]
    correlations = [np.corrcoef(both[0][:, i], both[1][:, i])[0, 1] for i in range(3)]
    assert np.allclose(correlations, np.sqrt(squared), atol=5e-3)
    assert np.allclose(np.corrcoef(both[1].T) - np.eye(3), 0, atol=5e-3)  # text variates are uncorrelated


def test_two_modalities_share_one_text_head(noisy: tuple[np.ndarray, np.ndarray]) -> None:
    media, texts = noisy
    sounds = prepared(media[:200] * 1.5, texts[:200])
    sounds = replace(sounds, pairs=replace(sounds.pairs, name="y", modality="audio"))
    data = {"x": {"train": prepared(media[200:], texts[200:])}, "y": {"train": sounds}}
    spec = recipe("cca", 3)
    for fill in (ridge, cca):
        heads = new_heads(spec, data, {}, spec.projector)  # type: ignore[arg-type]
        assert len(list(fill(spec, heads, data, {}))) == len(PENALTIES)  # type: ignore[arg-type]
        for modality, split in (("image", "x"), ("audio", "y")):
            held = data[split]["train"]
            similar = project(heads[modality], held.media) @ project(heads["text"], held.texts).T  # type: ignore[index]
            assert (similar.argmax(1) == np.arange(200)).mean() > 0.05  # 0.005 by chance


def test_ridge_maps_onto_a_frozen_text_head(noisy: tuple[np.ndarray, np.ndarray]) -> None:
    media, texts = noisy
    spec, data = recipe("ridge", 4), splits(media, texts)
    torch.manual_seed(0)
    frozen = Head("text", E, spec.projector).eval().requires_grad_(False)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    trained = train(spec, data, Path("unused"), {"text": frozen})
    assert trained.heads["text"] is frozen
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    # The three shared factors fix three of the head's five inputs: most of a vector can be told from the media.
    similar = (
        project(trained.heads["image"], data["x"]["validation"].media)
        @ project(frozen, data["x"]["validation"].texts).T
    )
    assert np.diag(similar).mean() > 0.7
    with pytest.raises(ClosedFormError, match="frozen"):
        next(iter(cca(spec, dict(trained.heads), data, {"text": frozen})))


def test_a_linear_truth_is_not_beaten_by_a_network(
    noisy: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media, texts = noisy
    data = splits(media, texts)
    trained = train(recipe("mlp", 5, learning_rate=1e-4), data, tmp_path)
    assert trained.ladder["head.won"] != "mlp"
    assert {head.kind for head in trained.heads.values()} == {"linear"}
    assert trained.ladder[f"head.{trained.ladder['head.won']}"] >= trained.ladder["head.mlp"]
    table = capsys.readouterr().err
    assert [line.split()[0] for line in table.splitlines() if "best" in line or "." in line][-5:] == [
        "head", "ridge", "cca", "linear", "mlp",
    ]  # fmt: skip
    assert table.count("← ships") == 1


def test_a_network_ships_where_only_it_can_see_the_pairs(tmp_path: Path) -> None:
    """Texts are the magnitudes of the media: no linear map of the media says anything about them."""
    rng = np.random.default_rng(1)
    media = rng.normal(size=(1200, 4))
    data = splits(media, np.abs(media), held=200)
    trained = train(recipe("mlp", 4, learning_rate=0.02, steps=200, validate_every=50), data, tmp_path)
    assert trained.ladder["head.won"] == "mlp"
    assert {head.kind for head in trained.heads.values()} == {"mlp"}
    assert trained.ladder["head.mlp"] > trained.ladder["head.linear"] + 5


def test_without_a_baseline_the_head_ships_unopposed(noisy: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    trained = train(recipe("mlp", 5, baseline=False), splits(*noisy), tmp_path)
    assert set(trained.ladder) == {"head.won", "head.mlp"}
    assert not (tmp_path / "linear").exists()


def test_without_a_validation_split_the_last_weights_are_kept(
    noisy: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    data = splits(*noisy)
    data["x"]["validation"] = prepared(np.zeros((0, D)), np.zeros((0, E)))
    trained = train(recipe("linear", 5), data, tmp_path)
    torch.manual_seed(0)
    fresh = new_heads(recipe("linear", 5), data, {}, recipe("linear", 5).projector)
    assert not torch.equal(fresh["text"].pooled.linear.weight, trained.heads["text"].pooled.linear.weight)  # type: ignore[union-attr]
    assert train(recipe("ridge", 5), data, tmp_path / "r").heads["text"].kind == "linear"


def test_a_closed_form_has_no_more_dimensions_than_the_texts(
    noisy: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(FitError, match="dimensions is 6, and cca fills no more than the 5"):
        train(recipe("cca", 6), splits(*noisy), tmp_path)
