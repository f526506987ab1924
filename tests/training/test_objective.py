"""The contrast of a batch: values, gradients, blocks, and what holds of every kind."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from training.fit.losses import clamp_log_scale, contrast, info_nce, nested, same_pairs
from training.recipe import MAX_TEMPERATURE, MIN_TEMPERATURE, ObjectiveSpec

KINDS = [
    ObjectiveSpec(),
    ObjectiveSpec(repeats="positive"),
    ObjectiveSpec(kind="sdm"),
]
kinds = pytest.mark.parametrize("spec", KINDS, ids=lambda spec: f"{spec.kind}-{spec.repeated}")
UNIQUE = (torch.arange(12),)
SHARED = (torch.arange(12), torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8]), torch.full((12,), -1))


def leaves(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Raw media and texts (12, 5) and the log scale, all of them with gradients."""
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(12, 5, generator=generator).to(dtype) for _ in range(2)]
    return [t.requires_grad_() for t in (*raw, torch.tensor(1.7, dtype=dtype))]


def value(spec: ObjectiveSpec, inputs: list[torch.Tensor], keys: tuple[torch.Tensor, ...]) -> torch.Tensor:
    media, texts, scale = inputs
    return contrast(spec, normalize(media, dim=-1), normalize(texts, dim=-1), scale, keys)


def by_definition(spec: ObjectiveSpec, inputs: list[torch.Tensor], keys: tuple[torch.Tensor, ...]) -> float:
    """Return the loss in float64, pair by pair."""
    media, texts = (normalize(t.detach().double(), dim=-1).numpy() for t in inputs[:2])
    logits = math.exp(inputs[2].item()) * media @ texts.T
    same, n = same_pairs(*keys).numpy(), len(media)
    total = 0.0
    for scores in (logits, logits.T):
        for i in range(n):
            positives = [j for j in range(n) if j == i or (same[i, j] and spec.repeated == "positive")]
            others = [j for j in range(n) if j in positives or not same[i, j]]
            log_sum = math.log(sum(math.exp(scores[i, j]) for j in others))
            if spec.kind == "info_nce":
                total += -sum(scores[i, j] - log_sum for j in positives) / len(positives) / (2 * n)
            else:
                for j in range(n):
                    p = math.exp(scores[i, j] - log_sum)
                    q = 1 / len(positives) if j in positives else 0.0
                    total += p * (math.log(p) - math.log(q + 1e-8)) / n
    return total


@kinds
@pytest.mark.parametrize("keys", [UNIQUE, SHARED], ids=["unique", "shared"])
def test_each_contrast_is_its_definition(spec: ObjectiveSpec, keys: tuple[torch.Tensor, ...]) -> None:
    inputs = leaves()
    assert math.isclose(value(spec, inputs, keys).item(), by_definition(spec, inputs, keys), rel_tol=1e-5)


@pytest.mark.parametrize("chunk", [None, 5])
def test_media_are_told_from_other_texts_but_not_from_their_own(chunk: int | None) -> None:
    raw_media, raw_texts, scale = (tensor.detach() for tensor in leaves())
    media, texts = normalize(raw_media, dim=-1), normalize(raw_texts, dim=-1)
    more, own = texts[[4, 5, 3]] + 0.1, torch.arange(12)
    loss = contrast(ObjectiveSpec(chunk=chunk), media, texts, scale, (own,), more=(more, (torch.tensor([20, 21, 3]),)))
    logits = scale.exp() * media @ torch.cat([texts, more]).T
    logits[3, 14] = -torch.inf
    expected = (cross_entropy(logits, own) + cross_entropy(logits[:, :12].T, own)) / 2
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)


def test_golden_values() -> None:
    """Three orthogonal pairs at temperature 1 / e: what each loss must be, worked out by hand."""
    eye = torch.eye(3)
    keys = (torch.arange(3),)
    e = math.e
    log_p = [e - math.log(math.exp(e) + 2), -math.log(math.exp(e) + 2)]
    expected = {
        "info_nce": -log_p[0],
        "sdm": 2 * (math.exp(log_p[0]) * log_p[0] + 2 * math.exp(log_p[1]) * (log_p[1] - math.log(1e-8))),
    }
    for kind, golden in expected.items():
        spec = ObjectiveSpec(kind=kind)  # type: ignore[arg-type]
        got = contrast(spec, eye, eye, torch.tensor(1.0), keys)
        assert math.isclose(got.item(), golden, rel_tol=1e-5), kind


@kinds
@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_gradients_in_blocks_equal_those_of_the_whole(spec: ObjectiveSpec, chunk: int) -> None:
    whole, blocks = leaves(), leaves()
    first = value(spec, whole, SHARED)
    second = value(spec.model_copy(update={"chunk": chunk}), blocks, SHARED)
    first.backward()  # type: ignore[no-untyped-call]
    second.backward()  # type: ignore[no-untyped-call]
    assert math.isclose(first.item(), second.item(), rel_tol=1e-6)
    for one, other in zip(whole, blocks, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_blocks_never_hold_the_whole_matrix() -> None:
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                Sizes.largest = max(Sizes.largest, result.numel())
            return result

    generator = torch.Generator().manual_seed(0)
    media, texts = (torch.randn(256, 4, generator=generator).requires_grad_() for _ in range(2))
    with Sizes():
        loss = contrast(ObjectiveSpec(chunk=16), media, texts, torch.tensor(0.0), (torch.arange(256),))
        loss.backward()  # type: ignore[no-untyped-call]
    assert Sizes.largest == 16 * 256


@kinds
def test_gradients_are_those_of_finite_differences(spec: ObjectiveSpec) -> None:
    # Logits are float32 by design, so the differences are coarse: a wide step, and a tolerance that fits it.
    inputs = leaves(3)
    value(spec, inputs, SHARED).backward()  # type: ignore[no-untyped-call]
    step = 1e-2
    for index in range(3):
        grad = inputs[index].grad
        assert grad is not None
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(index))
        ends = []
        for sign in (1, -1):
            moved = [t.detach().clone() for t in inputs]
            moved[index] = moved[index] + sign * step * direction
            ends.append(by_definition(spec, moved, SHARED))
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert math.isclose(float((grad * direction).sum()), numeric, rel_tol=2e-2, abs_tol=1e-4)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_learns_and_logits_are_float32(spec: ObjectiveSpec, dtype: torch.dtype) -> None:
    media, texts, scale = leaves()
    loss = value(spec, [media.to(dtype), texts.to(dtype), scale], UNIQUE)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype is torch.float32
    assert scale.grad is not None and abs(scale.grad.item()) > 1e-4


def test_same_pairs_unites_its_keys_and_negative_keys_match_nothing() -> None:
    same = same_pairs(torch.tensor([0, 0, 1, 2]), torch.tensor([-1, -1, 5, 5]))
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[2, 3] = expected[3, 2] = True
    assert torch.equal(same, expected)


@pytest.mark.parametrize(("start", "end"), [(100.0, MIN_TEMPERATURE), (-100.0, MAX_TEMPERATURE)])
def test_the_temperature_stays_in_its_range(start: float, end: float) -> None:
    log_scale = torch.tensor(start)
    clamp_log_scale(log_scale)
    assert math.isclose(math.exp(-log_scale.item()), end, rel_tol=1e-5)


@kinds
@settings(max_examples=20)
@given(order=st.permutations(range(12)))
def test_the_order_of_the_pairs_does_not_matter(spec: ObjectiveSpec, order: list[int]) -> None:
    inputs, pick = leaves(1), torch.tensor(order)
    moved = [inputs[0][pick], inputs[1][pick], inputs[2]]
    keys = tuple(key[pick] for key in SHARED)
    assert math.isclose(value(spec, inputs, SHARED).item(), value(spec, moved, keys).item(), rel_tol=1e-5)


def test_a_masked_false_negative_pulls_nothing_apart() -> None:
    """Two pairs that share a caption: the media of one feels nothing of the other's text."""
    spec = ObjectiveSpec(chunk=2)
    for keys, felt in (((torch.arange(2),), True), ((torch.tensor([7, 7]),), False)):
        media = torch.eye(2, 3)
        texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
        loss = contrast(spec, media, texts, torch.tensor(0.5), keys)
        loss.backward()  # type: ignore[no-untyped-call]
        assert texts.grad is not None
        assert (abs(texts.grad[1, 0].item()) > 1e-3) is felt


def test_a_distribution_over_unique_positives_is_one_hot() -> None:
    inputs = leaves()
    spread = value(ObjectiveSpec(repeats="positive"), inputs, UNIQUE)
    media, texts = (normalize(t, dim=-1) for t in inputs[:2])
    assert math.isclose(spread.item(), info_nce(media, texts, inputs[2]).item(), rel_tol=1e-6)
    logits = inputs[2].exp() * media @ texts.T
    one_hot = torch.eye(12)
    expected = torch.tensor(0.0)
    for scores in (logits, logits.T):
        log_p = scores.log_softmax(1)
        expected = expected + (log_p.exp() * (log_p - torch.log(one_hot + 1e-8))).sum(1).mean()
    assert math.isclose(value(ObjectiveSpec(kind="sdm"), inputs, UNIQUE).item(), expected.item(), rel_tol=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 99))
def test_cut_vectors_are_unit_vectors_of_the_first_numbers(length: int, seed: int) -> None:
    vectors = normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)
    cut = nested(vectors, length).numpy()
    assert cut.shape == (4, length)
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)
    assert np.allclose(cut * np.linalg.norm(vectors[:, :length].numpy(), axis=1, keepdims=True), vectors[:, :length])
