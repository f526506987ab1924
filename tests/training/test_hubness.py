from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.training import tiny
from tests.training.conftest import MakeRecipe
from training import pipeline
from training.__main__ import main
from training.fit.hubs import STRENGTHS
from training.heads.bundled import text_head
from training.heads.projector import Head
from training.heads.querybank import MediaReserve, TextReserve
from training.heads.trained import load_projectors
from training.measure.validation import project
from training.recipe import RESERVED, ProjectorSpec, load_recipe


def unit(rng: np.random.Generator, rows: int, width: int = 6) -> torch.Tensor:
    return normalize(torch.from_numpy(rng.normal(size=(rows, width)).astype(np.float32)), dim=-1)


def reserves(
    media_bank: torch.Tensor, text_bank: torch.Tensor, kappa: float, nu: float, strength: float, media_strength: float
) -> tuple[MediaReserve, TextReserve]:
    """Both sides of a space with these banks, constants and strengths, at temperature 0.1."""
    width = media_bank.shape[1]
    media = MediaReserve("image", width, {"text": len(text_bank)})
    texts = TextReserve(width, {"image": len(media_bank)})
    for side, own, other, taken in ((media, kappa, nu, media_strength), (texts, nu, kappa, strength)):
        side.reach.fill_(own)
        side.other.fill_(other)
        side.slope.fill_(taken / other)
        side.temperature.fill_(0.1)
    media.bank("text").copy_(text_bank)
    texts.bank("image").copy_(media_bank)
    return media, texts


def liked(vectors: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return 0.1 * torch.log(torch.exp(vectors @ bank.T / 0.1).mean(1))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), strength=st.floats(0.1, 1.0), media_strength=st.floats(0.1, 1.0))
def test_cosines_are_similarities_less_what_the_banks_like(seed: int, strength: float, media_strength: float) -> None:
    rng = np.random.default_rng(seed)
    media_bank, text_bank, x, t = unit(rng, 30), unit(rng, 20), unit(rng, 4), unit(rng, 9)
    media, texts = reserves(media_bank, text_bank, 3.0, 2.5, strength, media_strength)
    corrections = strength * liked(t, media_bank)[None] + media_strength * liked(x, text_bank)[:, None]
    expected = (x @ t.T - corrections) / (1 + 3.0**2 + 2.5**2)
    assert torch.allclose(media(x) @ texts(t).T, expected, atol=1e-5)
    for vectors in (media(x), texts(t)):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6)


def test_hubs_of_both_sides_lose() -> None:
    rng = np.random.default_rng(0)
    bank, x, t = unit(rng, 200), unit(rng, 50), unit(rng, 40)
    hub = normalize(bank.mean(0, keepdim=True) + 0.05 * unit(rng, 1), dim=-1)
    x = normalize(x + hub, dim=-1)  # media that lie towards the hub
    bank = normalize(bank + hub, dim=-1)
    t = torch.cat([hub, t])
    media, texts = reserves(bank, t, 3.0, 3.0, 1.0, 1.0)
    before, after = x @ t.T, media(x) @ texts(t).T
    assert 3 * (after.argmax(1) == 0).sum() < (before.argmax(1) == 0).sum()
    counts = [torch.bincount(scores.argmax(0), minlength=len(x)).max() for scores in (before, after)]
    assert counts[1] < counts[0]  # the medium that most texts find is found by fewer


def test_one_side_alone_leaves_the_order_of_the_other() -> None:
    rng = np.random.default_rng(3)
    bank, x, t = unit(rng, 100), unit(rng, 30), unit(rng, 20)
    media, texts = reserves(bank, unit(rng, 10), 3.0, 1e-3, 1.0, 0.0)
    assert torch.equal((x @ t.T).argsort(0), (media(x) @ texts(t).T).argsort(0))


def test_reserved_numbers_never_outgrow_their_length() -> None:
    rng = np.random.default_rng(1)
    media, texts = reserves(unit(rng, 30), unit(rng, 30), 0.1, 0.2, 1.0, 1.0)  # b(t) and c(x) vary by more than that
    length = np.sqrt(0.01 + 0.04)
    for vectors in (media(unit(rng, 50)), texts(unit(rng, 50))):
        assert torch.isfinite(vectors).all()
        reserved = vectors[:, -RESERVED:].norm(dim=1)
        assert torch.allclose(reserved, torch.full((50,), length / np.sqrt(1 + length**2)).float(), atol=1e-6)


def test_without_a_bank_nothing_is_corrected() -> None:
    spec = ProjectorSpec(kind="linear", dimensions=16, querybank=10)
    head = Head("text", 8, spec).eval()
    vectors = head(torch.randn(5, 8))
    assert vectors.shape == (5, 16)
    assert (vectors[:, -RESERVED:] == 0).all()


def test_training_fills_the_banks_chooses_and_keeps_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(projector={"kind": "linear", "dimensions": 16, "querybank": 8}, train={"steps": 30})
    frozen, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    pipeline.fit(recipe, frozen, data, tmp_path / "cache", tmp_path)
    trained = load_projectors(tmp_path / "projectors.safetensors", recipe)
    reserve = trained.heads["text"].reserve
    assert isinstance(reserve, TextReserve)
    assert {modality: len(reserve.bank(modality)) for modality in ("image", "audio")} == {"image": 8, "audio": 6}  # type: ignore[arg-type]
    assert trained.ladder["querybank.gain"] >= 0
    assert trained.ladder["querybank.strength"] in STRENGTHS
    assert trained.ladder["querybank.media_strength"] in STRENGTHS
    other = trained.heads["image"].reserve
    assert isinstance(other, MediaReserve) and len(other.bank("text")) == 8
    vectors = project(trained.heads["image"], data["pictures"]["train"].media)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert trained.means["image"] == pytest.approx(vectors.mean(0), abs=1e-5)


def test_the_correction_is_fitted_anew_to_heads_that_stay_as_they_are(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny.recipe_values(tiny_root, projector={"kind": "linear", "dimensions": 16, "querybank": 8})
    path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    common = [str(path), "--cache", str(tmp_path / "cache"), "--work"]
    assert main(["train", *common, str(tmp_path / "one")]) == 0
    first = load_projectors(tmp_path / "one/projectors.safetensors", load_recipe(path))
    given = ["--projectors", str(tmp_path / "one/projectors.safetensors")]
    assert main(["hubs", *common, str(tmp_path / "two"), *given]) == 0
    again = load_projectors(tmp_path / "two/projectors.safetensors", load_recipe(path))
    assert again.ladder == first.ladder and again.temperature == pytest.approx(first.temperature)
    for modality, head in first.heads.items():
        for key, value in head.state_dict().items():
            torch.testing.assert_close(again.heads[modality].state_dict()[key], value)
    monkeypatch.setattr("training.fit.hubs.STRENGTHS", (0.0,))
    assert main(["hubs", *common, str(tmp_path / "one")]) == 0
    without = load_projectors(tmp_path / "one/projectors.safetensors", load_recipe(path))
    assert (without.ladder["querybank.strength"], without.ladder["querybank.media_strength"]) == (0.0, 0.0)
    assert torch.equal(without.heads["text"].pooled.linear.weight, first.heads["text"].pooled.linear.weight)
    capsys.readouterr()
    assert main(["hubs", *common, str(tmp_path / "one"), "--set", "projector.querybank=0"]) == 2
    assert "there is no correction of hubs to fit" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("strength", [0.0, 0.75])
def test_graphs_and_bundles_have_the_correction(
    make_recipe: MakeRecipe, tmp_path: Path, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.fit.hubs.STRENGTHS", (0.0, strength))
    monkeypatch.setattr(
        "training.fit.hubs.validate",
        lambda recipe, heads, data, names: {"x": float(heads["text"].reserve.slope + heads["image"].reserve.slope)},
    )
    recipe = make_recipe(projector={"kind": "linear", "dimensions": 16, "querybank": 8}, train={"steps": 10})
    frozen, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    trained = pipeline.fit(recipe, frozen, data, tmp_path / "cache", tmp_path)
    bundle = pipeline.export(recipe, frozen, trained, {}, tmp_path / "bundle")
    assert all(bundle.manifest.evaluation[f"parity.{m}"] >= 0.9999 for m in ("image", "audio", "text"))
    texts = data["pictures"]["train"].texts
    assert np.array_equal(project(text_head(bundle), texts), project(trained.heads["text"], texts))
    assert (project(trained.heads["text"], texts)[:, -RESERVED:].any()) == (strength > 0)


def test_lengths_that_are_cut_have_no_reserve() -> None:
    with pytest.raises(ValueError, match="querybank reserves the last 5 dimensions"):
        ProjectorSpec(kind="linear", dimensions=16, querybank=8, matryoshka=(8,))
