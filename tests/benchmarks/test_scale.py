"""benchmarks.scale on a few hundred pairs: what it writes, and that a killed run ends with the same weights."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale


def test_features_are_as_large_as_they_say(tmp_path: Path) -> None:
    scale.write_features(tmp_path, 50, tokens=True)
    pooled, tokens, weights = scale._store(tmp_path, "texts", True).read(scale._keys(50))
    assert pooled.shape == (50, 1024) and tokens is not None and weights is not None
    assert len(np.unique(pooled[:][:, 0])) > 40
    assert {np.count_nonzero(weights[np.array([row])]) for row in range(50)} > {9, 12, 20}
    size = sum(file.stat().st_size for file in (tmp_path / "media").iterdir())
    assert size == 50 * (16 + 2 * 1024 + 4 + 324 * (2 * 1024 + 4))


def test_what_a_process_holds_is_measured() -> None:
    import os

    before = scale.held(os.getpid())
    kept = np.ones(25_000_000)
    assert scale.held(os.getpid()) - before == pytest.approx(kept.nbytes, rel=0.1)
    assert scale.held(2**22 + 1) == 0


@pytest.mark.full
def test_a_small_run_has_every_figure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pairs", "600", "--steps", "6", "--batch-size", "8", "--ranks", "1", "2"]
    assert scale.main([*arguments, "--work", str(tmp_path / "scale")]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(result) == {"pairs", "peak_rss_ratio", "host_share", "step_s", "disk_gb", "resume_equal", "ranks"}
    assert result["resume_equal"] is True
    assert set(result["ranks"]) == {"1", "2"}
    assert not (tmp_path / "scale").exists()
