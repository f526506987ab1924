import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.everyday import main, others
from examples.demo import IMAGE_QUERIES
from examples.photos import write_photos

ROOT = Path(__file__).parents[2]


def write_sets(root: Path, count: int) -> None:
    """Test photographs of both sets, noise in grey, and a train photograph of each that must not be drawn."""
    rng = np.random.default_rng(0)
    for folder in ("flickr8k/images", "corel5k/images"):
        (root / "data" / folder).mkdir(parents=True)
        for name in (*map(str, range(count)), "train"):
            pixels = np.repeat(rng.integers(0, 256, (24, 24, 1), np.uint8), 3, axis=2)
            Image.fromarray(pixels).save(root / "data" / folder / f"{folder[0]}-{name}.png")
    names = [f"f-{index}.png" for index in range(count)]
    (root / "data/flickr8k/split_test.txt").write_text("\n".join(names) + "\n")
    with (root / "data/corel5k/index.csv").open("w", newline="") as stream:
        rows = [(f"images/c-{index}.png", "test") for index in range(count)]
        rows = [(file, "a field", split) for file, split in [("images/c-train.png", "train"), *rows]]
        csv.writer(stream).writerows([("file", "tags", "split"), *rows])
    captions = ["image,caption", *(f"{name},A lake\n{name},A boat" for name in names)]
    (root / "data/flickr8k/captions.csv").write_text("\n".join(captions) + "\n")


def test_the_others_are_drawn_from_the_tests_and_are_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.everyday._PHOTOGRAPHS_PER_SET", 5)
    write_sets(tmp_path, 12)
    drawn = others(tmp_path)
    assert drawn == others(tmp_path)
    assert len(set(drawn)) == 10 and all(path.is_file() and "train" not in path.name for path in drawn)
    assert [path.name[0] for path in drawn] == ["f"] * 5 + ["c"] * 5


@pytest.mark.skipif(not (ROOT / "build/starter/manifest.json").is_file(), reason="`make starter` builds build/starter")
def test_each_query_has_the_rank_of_its_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cat's own photograph, drawn as one of the others too, comes beside it: nothing else is so near to "a cat"."""
    monkeypatch.setattr("benchmarks.everyday._PHOTOGRAPHS_PER_SET", 2)
    write_sets(tmp_path, 2)
    photos = write_photos(tmp_path / "photos")
    Image.open(photos["cat"]).save(tmp_path / "data/flickr8k/images/f-0.png")
    main(["--bundle", str(ROOT / "build/starter"), "--data", str(tmp_path)])
    *_, last = lines = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["queries"] == len(IMAGE_QUERIES) == len(result["ranks"])
    assert result["first"] == list(result["ranks"].values()).count(1)
    assert all(1 <= rank <= len(photos) + 4 for rank in result["ranks"].values())
    assert result["ranks"]["a cat"] <= 2
    row = next(line for line in lines if line.startswith("  a cat "))
    assert {"cat.jpg", "f-0.png"} <= set(row.replace(",", "").split()[3:5])


@pytest.mark.skipif(not (ROOT / "build/starter/manifest.json").is_file(), reason="`make starter` builds build/starter")
def test_the_queries_of_a_file_are_right_by_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.everyday._PHOTOGRAPHS_PER_SET", 2)
    write_sets(tmp_path, 2)
    media = tmp_path / "media"
    main(["--data", str(tmp_path), "--media", str(media)])
    assert len(list(media.iterdir())) == 5, "four photographs and their labels"
    Image.open(write_photos(tmp_path / "photos")["cat"]).save(media / "cat.png")
    queries = tmp_path / "queries.csv"
    queries.write_text("query,right\na cat,cat\\.png\na whale,whale\nnoise,BOAT|field\n")
    main(["--media", str(media), "--queries", str(queries)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"top1": 100.0, "top5": 100.0, "n": 2}, "nothing is right for a whale"
