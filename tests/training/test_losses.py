import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import normalize

from training.fit.losses import clamp_log_scale, info_nce, same_pairs
from training.recipe import MAX_TEMPERATURE, MIN_TEMPERATURE


def unit(seed: int, rows: int = 6) -> torch.Tensor:
    return normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def reference(media: np.ndarray, texts: np.ndarray, scale: float, same: np.ndarray) -> float:
    """InfoNCE in float64 by its definition, pair by pair."""
    logits = scale * media.astype(np.float64) @ texts.astype(np.float64).T
    total = 0.0
    for scores in (logits, logits.T):
        for i in range(len(scores)):
            others = [scores[i, j] for j in range(len(scores)) if j == i or not same[i, j]]
            total += math.log(sum(math.exp(x - scores[i, i]) for x in others))
    return total / (2 * len(logits))


@given(arrays(bool, (6, 6)), st.integers(0, 1000), st.floats(0.0, 4.0))
def test_info_nce_is_its_definition(mask: np.ndarray, seed: int, log_scale: float) -> None:
    same = mask | mask.T
    media, texts = unit(seed), unit(seed + 1)
    loss = info_nce(media, texts, torch.tensor(log_scale), torch.from_numpy(same))
    assert math.isclose(loss.item(), reference(media.numpy(), texts.numpy(), math.exp(log_scale), same), abs_tol=1e-4)


def test_the_scale_learns_and_logits_are_float32() -> None:
    log_scale = torch.tensor(2.0, requires_grad=True)
    loss = info_nce(unit(0).bfloat16(), unit(1).bfloat16(), log_scale)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype is torch.float32
    assert log_scale.grad is not None
    assert abs(log_scale.grad.item()) > 1e-4


def test_false_negatives_do_not_count() -> None:
    media, texts = unit(0), unit(1)
    twins = torch.cat([media, media]), torch.cat([texts, texts])
    key = torch.arange(6).repeat(2)
    masked = info_nce(*twins, torch.tensor(2.0), same_pairs(key))
    plain = info_nce(media, texts, torch.tensor(2.0))
    other = torch.tensor([reference(media.numpy(), texts.numpy(), math.exp(2.0), np.zeros((6, 6), bool))])
    assert torch.allclose(plain, other.float(), atol=1e-5)
    assert info_nce(*twins, torch.tensor(2.0)) > masked > plain  # each of the five others stands there twice


def test_same_pairs_unites_its_keys_and_negative_keys_match_nothing() -> None:
    same = same_pairs(torch.tensor([0, 0, 1, 2]), torch.tensor([-1, -1, 5, 5]))
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[2, 3] = expected[3, 2] = True
    assert torch.equal(same, expected)


def test_the_temperature_stays_in_its_range() -> None:
    for start, end in ((100.0, MIN_TEMPERATURE), (-100.0, MAX_TEMPERATURE)):
        log_scale = torch.tensor(start)
        clamp_log_scale(log_scale)
        assert math.isclose(math.exp(-log_scale.item()), end, rel_tol=1e-5)
