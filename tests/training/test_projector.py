import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, normalize

from training.heads.projector import Head, ResidualMLP, Standardise, TokenProjector
from training.recipe import ProjectorSpec

SPEC = ProjectorSpec(kind="token", dimensions=8, hidden=16, dropout=0.1)


def test_the_token_projector_has_the_papers_layers() -> None:
    torch.manual_seed(0)
    projector = TokenProjector(6, SPEC).eval()
    x = torch.randn(3, 5, 6)
    normed = layer_norm(x, (6,), projector.norm.weight, projector.norm.bias)
    expected = projector.linear(normed) + projector.down(gelu(projector.up(normed)))
    assert torch.allclose(projector(x), expected, atol=1e-6)
    assert [type(m) for m in projector.children()] == [nn.LayerNorm, nn.Dropout, nn.Linear, nn.Linear, nn.Linear]


def test_the_papers_size() -> None:
    """DINOv2-L with all-roberta-large-v1 at D = 1024: 11.5 M parameters in all (arXiv 2409.19425)."""
    spec = ProjectorSpec(kind="token", dimensions=1024)
    count = sum(p.numel() for m in ("image", "text") for p in Head(m, 1024, spec).parameters())  # type: ignore[arg-type]
    assert abs(count / 1e6 - 11.5) < 0.1


def test_image_head_adds_the_projected_cls() -> None:
    torch.manual_seed(0)
    head = Head("image", 6, SPEC).eval()
    cls, tokens = torch.randn(2, 6), torch.randn(2, 5, 6)
    weights = torch.full((2, 5), 0.2)
    expected = normalize(head.local(tokens).mean(1) + head.whole(cls), dim=-1)
    assert torch.allclose(head(cls, tokens, weights), expected, atol=1e-6)


def test_text_head_leaves_padding_out() -> None:
    torch.manual_seed(0)
    head = Head("text", 6, SPEC).eval()
    tokens = torch.randn(1, 3, 6)
    padded = torch.cat([tokens, torch.randn(1, 4, 6)], 1)
    third = torch.tensor([[1 / 3] * 3])
    alone = head(tokens[:, 0], tokens, third)
    assert torch.allclose(head(tokens[:, 0], padded, torch.cat([third, torch.zeros(1, 4)], 1)), alone, atol=1e-6)
    mean = head.local(tokens).mean(1)
    projected = head.project(mean)
    expected = normalize(head.norm(projected + head.refine(gelu(projected))), dim=-1)
    assert torch.allclose(alone, expected, atol=1e-6)


def test_packed_tokens_equal_padded_tokens() -> None:
    torch.manual_seed(0)
    head = Head("audio", 6, SPEC).eval()
    first, second = torch.randn(2, 6), torch.randn(3, 6)
    padded = torch.stack([torch.cat([first, torch.zeros(1, 6)]), second])
    weights = torch.tensor([[1 / 2, 1 / 2, 0], [1 / 3] * 3])
    packed = torch.tensor([[1 / 2, 1 / 2, 0, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]])
    pooled = torch.randn(2, 6)
    assert torch.allclose(head(pooled, padded, weights), head(pooled, torch.cat([first, second]), packed), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_pooled_heads_give_unit_vectors(kind: str) -> None:
    head = Head("image", 6, ProjectorSpec.model_validate({"kind": kind, "dimensions": 8, "hidden": 4})).eval()
    assert torch.allclose(head(torch.randn(5, 6)).norm(dim=-1), torch.ones(5), atol=1e-6)


def test_a_residual_mlp_without_its_branch_is_the_linear_map() -> None:
    mlp = ResidualMLP(6, SPEC).eval()
    nn.init.zeros_(mlp.down.weight)
    nn.init.zeros_(mlp.down.bias)
    x = torch.randn(4, 6)
    assert torch.allclose(mlp(x), mlp.skip(x))


def test_the_power_keeps_signs_and_acts_on_media_only() -> None:
    spec = ProjectorSpec(kind="mlp", dimensions=8, hidden=4, power=0.5, dropout=0.4, text_dropout=0.1)
    image, text = Head("image", 3, spec).pooled, Head("text", 3, spec).pooled
    x = torch.tensor([[4.0, -9.0, 0.0]])
    assert torch.allclose(image.standardise(x), torch.tensor([[2.0, -3.0, 0.0]]))
    assert torch.equal(text.standardise(x), x)
    assert (image.dropout.p, text.dropout.p) == (0.4, 0.1)


def test_standardise_gives_mean_0_and_deviation_1_and_survives_a_constant() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(3, 5, (200, 4)).astype(np.float32))
    x[:, 3] = 7.0
    standardise = Standardise(4)
    standardise.fit(x)
    y = standardise(x)
    assert torch.allclose(y.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(y[:, :3].std(0), torch.ones(3), atol=1e-4)
    assert torch.equal(y[:, 3], torch.zeros(200))


@pytest.mark.parametrize("kind", ["ridge", "cca"])
def test_closed_forms_are_linear_heads(kind: str) -> None:
    head = Head("image", 6, ProjectorSpec(kind=kind, dimensions=8))  # type: ignore[arg-type]
    assert head.kind == "linear"
    assert not head.needs_tokens
