import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.probe import _PENALTIES, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("swapped", "encoder"),
    [(False, "starter/free/audio"), (True, "starter/free/audio"), (False, "training/recipes/starter-free.yaml")],
)
def test_a_classifier_of_four_folds_is_tried_on_the_fifth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], swapped: bool, encoder: str
) -> None:
    """Tones and noise are told apart; where fold 5 calls each by the other's name, nothing is right."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data/esc50/audio"
    folder.mkdir(parents=True)
    rows = ["file,class_id,fold"]
    for fold in range(1, 6):
        for index in range(6):
            tone = index % 2 == 0
            time = np.arange(16_000) / 16_000
            wave = np.sin(2 * np.pi * (400 + 20 * index) * time) if tone else rng.normal(size=16_000)
            soundfile.write(folder / f"{fold}-{index}.wav", 0.2 * wave, 16_000)
            rows.append(f"{fold}-{index}.wav,{int(tone != (swapped and fold == 5))},{fold}")
    (tmp_path / "data/esc50/index.csv").write_text("\n".join(rows) + "\n")
    main([str(ROOT / encoder), "--data", str(tmp_path), "--cache", str(tmp_path / "cache")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["fold4"] == 100.0
    assert result["fold5"] == (0.0 if swapped else 100.0)
    assert result["features"] == 504  # without the scores of 527 classes
    assert result["c"] in _PENALTIES
