from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.training.conftest import MakeRecipe
from training import steps
from training.bundled import text_head
from training.projector import Head
from training.querybank import MediaReserve, TextReserve
from training.recipe import ProjectorSpec
from training.train import load_projectors, project


def unit(rng: np.random.Generator, rows: int, width: int = 6) -> torch.Tensor:
    return normalize(torch.from_numpy(rng.normal(size=(rows, width)).astype(np.float32)), dim=-1)


def reserves(bank: torch.Tensor, reach: float, strength: float) -> tuple[MediaReserve, TextReserve]:
    media, texts = MediaReserve("image"), TextReserve(bank.shape[1], {"image": len(bank)})
    media.reach.fill_(reach)
    texts.reach.fill_(reach)
    texts.slope.fill_(strength / reach)
    texts.temperature.fill_(0.1)
    texts.bank("image").copy_(bank)
    return media, texts


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), strength=st.floats(0.1, 1.0))
def test_cosines_are_similarities_less_what_the_bank_likes(seed: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    bank, x, t = unit(rng, 30), unit(rng, 4), unit(rng, 9)
    media, texts = reserves(bank, 3.0, strength)
    liked = 0.1 * torch.log(torch.exp(t @ bank.T / 0.1).mean(1))
    expected = (x @ t.T - strength * liked) / (1 + 3.0**2)
    assert torch.allclose(media(x) @ texts(t).T, expected, atol=1e-5)
    for vectors in (media(x), texts(t)):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6)


def test_what_one_text_finds_keeps_its_order_and_hubs_lose() -> None:
    rng = np.random.default_rng(0)
    bank, x, t = unit(rng, 200), unit(rng, 50), unit(rng, 40)
    hub = normalize(bank.mean(0, keepdim=True) + 0.05 * unit(rng, 1), dim=-1)
    x = normalize(x + hub, dim=-1)  # media that lie towards the hub
    bank = normalize(bank + hub, dim=-1)
    t = torch.cat([hub, t])
    media, texts = reserves(bank, 3.0, 1.0)
    before, after = x @ t.T, media(x) @ texts(t).T
    assert torch.equal(before.argsort(0), after.argsort(0))
    assert 3 * (after.argmax(1) == 0).sum() < (before.argmax(1) == 0).sum()


def test_reserved_numbers_never_outgrow_their_length() -> None:
    rng = np.random.default_rng(1)
    _, texts = reserves(unit(rng, 30), 0.1, 1.0)  # b(t) varies by more than 0.1
    vectors = texts(unit(rng, 50))
    assert torch.isfinite(vectors).all()
    assert torch.allclose(vectors[:, -3:].norm(dim=1), torch.full((50,), 0.1 / np.sqrt(1.01)), atol=1e-6)


def test_without_a_bank_nothing_is_corrected() -> None:
    spec = ProjectorSpec(kind="linear", dimensions=16, querybank=10)
    head = Head("text", 8, spec).eval()
    vectors = head(torch.randn(5, 8))
    assert vectors.shape == (5, 16)
    assert (vectors[:, -3:] == 0).all()


def test_training_fills_the_banks_chooses_and_keeps_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(projector={"kind": "linear", "dimensions": 16, "querybank": 8}, train={"steps": 30})
    frozen = steps.encoders(recipe)
    data = steps.features(recipe, frozen, steps.pairs(recipe), tmp_path / "cache")
    steps.fit(recipe, frozen, data, tmp_path / "cache", tmp_path)
    trained = load_projectors(tmp_path / "projectors.safetensors", recipe)
    reserve = trained.heads["text"].reserve
    assert isinstance(reserve, TextReserve)
    assert {modality: len(reserve.bank(modality)) for modality in ("image", "audio")} == {"image": 8, "audio": 6}  # type: ignore[arg-type]
    assert trained.ladder["querybank.gain"] >= 0
    assert trained.ladder["querybank.strength"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    vectors = project(trained.heads["image"], data["pictures"]["train"].media)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert trained.means["image"] == pytest.approx(vectors.mean(0), abs=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.75])
def test_graphs_and_bundles_have_the_correction(
    make_recipe: MakeRecipe, tmp_path: Path, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.hubness.STRENGTHS", (0.0, strength))
    monkeypatch.setattr(
        "training.hubness.validate", lambda recipe, heads, data: {"x": float(heads["text"].reserve.slope)}
    )
    recipe = make_recipe(projector={"kind": "linear", "dimensions": 16, "querybank": 8}, train={"steps": 10})
    frozen = steps.encoders(recipe)
    data = steps.features(recipe, frozen, steps.pairs(recipe), tmp_path / "cache")
    trained = steps.fit(recipe, frozen, data, tmp_path / "cache", tmp_path)
    bundle = steps.export(recipe, frozen, trained, {}, tmp_path / "bundle")
    assert all(bundle.manifest.evaluation[f"parity.{m}"] >= 0.9999 for m in ("image", "audio", "text"))
    texts = data["pictures"]["train"].texts
    assert np.array_equal(project(text_head(bundle), texts), project(trained.heads["text"], texts))
    assert (project(trained.heads["text"], texts)[:, -3:].any()) == (strength > 0)


def test_lengths_that_are_cut_have_no_reserve() -> None:
    with pytest.raises(ValueError, match="querybank reserves the last 3 dimensions"):
        ProjectorSpec(kind="linear", dimensions=16, querybank=8, matryoshka=(8,))
