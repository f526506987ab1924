"""benchmarks.mteb: a served bundle under MTEB's own evaluation, over a small data set that is made here."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # of MTEB and what it imports


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, png: Callable[..., bytes], wav: Callable[..., bytes]) -> Path:
    """Two photographs with five captions each, and sounds of three classes."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("flickr8k/images", "esc50/audio"):
        (root / folder).mkdir(parents=True)
    captions = ["image,caption"]
    for colour in ("red", "blue"):
        (root / f"flickr8k/images/{colour}.png").write_bytes(png(colour))
        captions += [f"{colour}.png,a photo of {what} {colour}" for what in ("the", "a", "one", "dog", "cat")]
    (root / "flickr8k/captions.csv").write_text("\n".join(captions) + "\n")
    (root / "flickr8k/split_test.txt").write_text("red.png\nblue.png\n")
    rows = ["file,class,fold"]
    for n in range(60):
        name = f"1-{n}-A.wav"
        (root / "esc50/audio" / name).write_bytes(wav())
        rows.append(f"{name},{('Dog', 'Door knock', 'Siren')[n % 3]},{5 if n < 6 else 3}")
    rows.append("2-0-A.wav,Dog,3")  # of the same recording as a sound of fold 5, which is left out for it
    (root / "esc50/audio/2-0-A.wav").write_bytes(wav())
    (root / "esc50/index.csv").write_text("\n".join(rows) + "\n")
    return root


def test_texts_images_and_sounds_are_evaluated(
    shared_client: httpx.Client, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import mteb

    assert mteb.main(["--url", str(shared_client.base_url), "--data", str(data), "--out", str(tmp_path)]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(scores) == {task.metadata.name for task in mteb.LOCAL}
    assert all(0 <= score <= 1 for score in scores.values())
    assert scores["LocalFlickr8kT2IRetrieval"] > 0.9, "the tiny bundle knows red from blue"
    assert list(tmp_path.rglob("LocalFlickr8kT2IRetrieval.json"))


def test_what_cannot_be_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import mteb

    assert mteb.main(["--data", str(tmp_path)]) == 1
    assert "flickr8k/captions.csv is not there" in capsys.readouterr().err
    assert mteb.main([]) == 1
    assert "nothing to run" in capsys.readouterr().err


def test_recordings_of_other_folds_are_left_out(data: Path) -> None:
    from benchmarks import mteb

    assert len(mteb._clips(data, ["5"], mteb._LABELS)) == 5
