"""The command runs from end to end on a tiny bundle. How fast anything is, is not a test's business."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.routes import main
from service.contract.bundle import read_bundle
from tests import tiny_bundle

LATENCIES = (
    "embed_text",
    "embed_image",
    "embed_audio",
    "search_vector",
    "search_text",
    "classify_warm",
    "classify_stored",
)
RATES = ("embed_text_per_second", "embed_image_per_second", "embed_audio_per_second", "store_vectors_per_second")
SMALL = ["--requests", "2", "--vectors", "300", "--labels", "3", "--concurrency", "2"]


@pytest.mark.full
def test_the_last_line_is_every_figure(bundle_dir: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.routes", "--bundle", str(bundle_dir), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    figures = {
        *RATES,
        "classify_cold_median_ms",
        *(f"{name}_{of}_ms" for name in LATENCIES for of in ("median", "p95")),
    }
    about = {"bundle", "space", "dimensions", "cores", "requests", "vectors", "labels", "concurrency"}
    assert set(result) == figures | about
    assert result["space"] == read_bundle(bundle_dir).manifest.space
    assert result["dimensions"] == tiny_bundle.DIMENSIONS
    assert (result["requests"], result["vectors"], result["labels"], result["concurrency"]) == (2, 300, 3, 2)
    for name in figures:
        assert math.isfinite(result[name]) and result[name] > 0
        assert any(line.startswith(f"{name} ") for line in lines)


def test_a_bundle_that_is_not_there_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path / "absent"), *SMALL]) == 2
    said = capfd.readouterr()
    assert not said.out
    assert "it is not a bundle" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_count_is_checked(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--requests", number])
    assert f"'{number}'" in capsys.readouterr().err
