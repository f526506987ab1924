import numpy as np
import pytest

from service.contract.vectors import l2_normalise
from training.measure.gap import Paired, corrected, gap, gap_figures


def paired(shift: float, count: int = 60, name: str = "some", seed: int = 0) -> Paired:
    """Pictures and their texts, the same points but for noise, pushed apart along one direction."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 8))
    away = np.eye(8)[0] * shift
    media, texts = points + rng.normal(0, 0.1, points.shape) + away, points - away
    links = np.stack([np.arange(count), np.arange(count)], 1)
    return Paired(name, "image", *(l2_normalise(v.astype(np.float32)) for v in (media, texts)), links)


def means(sets: Paired) -> dict[str, list[float]]:
    return {"image": sets.media.mean(0).tolist(), "text": sets.texts.mean(0).tolist()}


def test_golden_figures() -> None:
    """Pictures all in one place, texts all in another at right angles."""
    one, other = np.tile([[1.0, 0.0]], (4, 1)).astype(np.float32), np.array([[0.0, 1.0]], np.float32)
    figures = gap([Paired("x", "image", one, other, np.array([[i, 0] for i in range(4)]))])
    assert figures["gap.image_text"] == round(float(np.sqrt(2)), 4)
    assert figures["uniformity.image"] == 0.0
    assert figures["alignment.image_text"] == 2.0


def test_a_gap_is_seen_and_the_correction_closes_it() -> None:
    wide, narrow = paired(4.0), paired(0.0)
    before, none = gap([wide]), gap([narrow])
    assert before["modality_classifier"] == 100.0 and none["modality_classifier"] < 70
    assert before["top10.image.image"] == 100.0 and 35 < none["top10.image.text"] < 65
    assert before["gap.image_text"] > 1.5 > none["gap.image_text"]
    figures = gap_figures([wide], [paired(4.0, seed=1)], means(paired(4.0, seed=2)))
    assert figures["corrected.strength"] == 1.0
    assert figures["corrected.gap.image_text"] < before["gap.image_text"] / 4
    assert figures["corrected.modality_classifier"] < 75
    assert figures["corrected.top10.image.text"] > 30
    assert figures["corrected.some.i2t.r1"] >= 0


def test_shares_of_a_mixed_top_ten_sum_to_a_hundred() -> None:
    sound = paired(1.0, seed=3)
    figures = gap([paired(1.0), Paired("other", "audio", sound.media, sound.texts, sound.links)])
    for query in ("image", "audio", "text"):
        shares = [figures[f"top10.{query}.{found}"] for found in ("image", "audio", "text")]
        assert sum(shares) == pytest.approx(100, abs=0.05)


def test_a_correction_that_costs_recall_is_not_made() -> None:
    """The means of these pairs point where half of what tells them apart lies."""
    sets = paired(0.0)
    turned = {"image": (3 * sets.media[0]).tolist(), "text": (-3 * sets.media[0]).tolist()}
    figures = gap_figures([sets], [sets], turned)
    assert figures["corrected.strength"] == 0.0
    assert figures["corrected.gap.image_text"] == figures["gap.image_text"]


def test_nothing_to_choose_by_leaves_the_space_as_it_is() -> None:
    sets = paired(2.0)
    assert gap_figures([sets], [], means(sets))["corrected.strength"] == 0.0
    np.testing.assert_allclose(corrected(sets.media, [0.0] * 8, 1.0), sets.media, atol=1e-6)
