import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.family import __main__ as family
from benchmarks.family import heads, senses, spaces, texts
from benchmarks.family.lab import Hits, Lab, both_ways, pytest_passes, shuffled, some
from benchmarks.family.rows import NOTHING_TO_TAKE, ROWS, SYSTEMS, Outcome, Row, gain, row, tried
from tests.training import tiny
from training.features import Features
from training.measure.prepared import Prepared
from training.pairs import Pairs


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Two rows alone, one that holds and one that cannot be measured; which were measured."""
    measured: list[int] = []

    def works(lab: Lab) -> Outcome:
        measured.append(1)
        return Outcome("R@1 3.00", [1.0, 5.0], "holds")

    def breaks(lab: Lab) -> Outcome:
        measured.append(2)
        raise RuntimeError("espeak-ng is not installed")

    for theme in family.THEMES:
        importlib.import_module(f"benchmarks.family.{theme}")
    known = {1: Row(1, "One", "a gain", works), 2: Row(2, "Two", "speech", breaks)}
    kept = dict(ROWS)
    ROWS.clear()
    ROWS.update(known)
    yield measured
    ROWS.clear()
    ROWS.update(kept)


def test_each_row_is_kept_and_measured_again_only_when_asked(
    rows: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--row", "1", "2", "3", "57"]
    assert family.main(command) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == " 1  One: a gain | R@1 3.00 | [1, 5] | holds"
    assert "could not be measured: espeak-ng is not installed" in printed[1] and printed[1].endswith("| fails")
    assert "nothing here shows it yet" in printed[2]
    assert json.loads(printed[-1]) == {"rows": 4, "hold": 1, "settled": 0, "fail": 2, "none": 1}
    assert family.main(command) == 1 and rows == [1, 2]
    assert family.main([*command, "--again"]) == 1 and rows == [1, 2, 1, 2]
    assert family.main([*command, "--bundle", "another"]) == 1 and rows == [1, 2] * 3


def test_data_that_is_not_there_is_named(tmp_path: Path, rows: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        family.main(["--data", str(tmp_path / "away")])
    assert "give --data FOLDER" in capsys.readouterr().err


def test_a_row_has_one_proof_and_those_without_are_none() -> None:
    assert set(ROWS) | set(NOTHING_TO_TAKE) <= set(range(1, SYSTEMS + 1))
    for number in (next(iter(ROWS)), *NOTHING_TO_TAKE):
        with pytest.raises(ValueError, match="has its proof already"):
            row(number, "", "")(lambda lab: Outcome("", None, "holds"))


@pytest.mark.parametrize(
    ("gained", "control", "verdict"),
    [
        ([0.1, 2], [-1, 1], "holds"),
        ([-1, 1], [1, 3], "settled"),
        ([-1, 1], [-1, 3], "fails"),
        ([-3, -1], [1, 3], "settled"),
    ],
)
def test_no_gain_is_settled_only_where_a_gain_would_be_seen(gained: list, control: list, verdict: str) -> None:
    assert tried(gained, control) == verdict


def test_gains_are_paired_and_groups_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 50, 400)
    value, bounds = gain(base + 1 + rng.normal(0, 1, 400), base)
    assert bounds[0] < 1 < bounds[1] and bounds[1] - bounds[0] < 0.5 and abs(value - 1) < 0.3
    repeated = np.repeat(rng.normal(0, 10, 20), 20)
    wide, narrow = (gain(repeated, np.zeros(400), groups)[1] for groups in (np.repeat(np.arange(20), 20), None))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_both_directions_weigh_the_same_for_each_medium() -> None:
    found = {
        "m2t": Hits(np.array([100.0, 0.0]), np.array([0, 1])),
        "t2m": Hits(np.array([100.0, 0.0, 0.0]), np.array([0, 0, 1])),
    }
    assert both_ways(found).right.tolist() == [75.0, 0.0]


def test_tests_are_counted() -> None:
    file = "tests/contract/test_vectors.py"
    assert pytest_passes(f"{file}::test_a_known_vector") == (1, 1)
    with pytest.raises(RuntimeError, match="no test ran of"):
        pytest_passes(f"{file}::test_that_is_not_there")


def test_rows_name_tests_that_are_there() -> None:
    root = Path(__file__).parents[2]
    written = "".join(path.read_text() for path in (root / "benchmarks/family").glob("*.py"))
    named = re.findall(r'"(?:tests/)?([a-z]+/[a-z_/]+\.py)::(test_[a-z_0-9]+)', written)
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (root / "tests" / file).read_text()


def test_merged_cells_have_the_mean_of_all() -> None:
    cells = torch.randn(3, 9, 4)
    merged, sizes = heads.merge(cells, 4)
    assert merged.shape == (3, 5, 4) and sizes.sum(1).tolist() == [9.0] * 3
    mean = (merged * sizes[..., None]).sum(1) / 9
    assert torch.allclose(mean, cells.mean(1), atol=1e-6)


def test_bm25_prefers_rare_words_and_short_documents() -> None:
    documents = [
        "def read_file(path): return open(path)",
        "def write_file(path): pass",
        "def file(): " + "x = 1; " * 30,
    ]
    scores = texts.bm25(["read a file"], documents)[0]
    assert scores[0] > scores[1] > scores[2] > 0


def test_a_renamed_function_does_the_same() -> None:
    source = "def add(first, second):\n    total = first + second\n    return total"
    found: dict = {}
    exec(texts.renamed(source), found)
    assert found["f"](2, 3) == 5 and "total" not in texts.renamed(source)


def test_the_gate_leaves_the_part_without_a_margin() -> None:
    classes = np.eye(4, dtype=np.float32)
    clear, flat = np.eye(4, dtype=np.float32)[:2], np.full((2, 4), 0.5, np.float32)
    vectors, weights = senses.gated(5.0, False, classes, clear, flat)
    assert (weights[0] > 0.95).all() and np.allclose(weights.sum(0), 1)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.fixture
def lab(tiny_root: Path, tmp_path: Path) -> Lab:
    values = tiny.recipe_values(tiny_root)
    values["pairs"] = {"flickr8k": values["pairs"]["pictures"], "esc50": values["pairs"]["tones"]}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    return Lab(tiny_root, tmp_path / "cache", recipe=recipe, overrides=["projector.dimensions=8"])


def test_a_row_of_the_trainer_on_tiny_data(lab: Lab) -> None:
    found = spaces.several_captions(lab)
    assert found.interval is not None and found.interval[0] <= found.interval[1] and "five" in found.figure


def test_local_vectors_are_reduced_once_and_heads_learn_from_them(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_CELLS", 1)
    monkeypatch.setattr(heads, "_WORDS", 4)
    parts = heads.local(lab)
    assert parts["train"].words.shape[2] == 4 and (parts["train"].own.sum(1) > 2).all()
    pair = heads.fitted(parts, heads.Pair, 0, steps=3, batch=8)
    images, words = pair.vectors(parts["test"])
    assert images.shape == (len(parts["test"].pooled), heads._DIMENSIONS) and np.allclose(
        (words**2).sum(1), 1, atol=1e-5
    )


def splits() -> dict[str, Prepared]:
    """Twenty media with two captions each; a feature says whose it is."""
    links = np.stack([np.repeat(np.arange(20), 2), np.arange(40)], 1)
    pairs = Pairs("x", "image", [Path(str(i)) for i in range(20)], [str(i) for i in range(40)], links, None, [], 1.0)
    media, texts = np.arange(20, dtype=np.float32)[:, None], np.repeat(np.arange(20, dtype=np.float32), 2)[:, None]
    return {"train": Prepared(pairs, Features(media), Features(texts))}


@pytest.mark.parametrize("first", [0, 10])
def test_a_part_has_the_media_that_follow_and_their_pairs(first: int) -> None:
    part = some(splits(), 7, first)["train"]  # type: ignore[arg-type]
    assert (len(part.media), len(part.texts), len(part.pairs.links)) == (7, 14, 14)
    assert part.media.pooled[:, 0].tolist() == list(range(first, first + 7))
    links = part.pairs.links
    assert np.array_equal(part.media.pooled[links[:, 0]], part.texts.pooled[links[:, 1]])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_so_many_media_get_the_captions_of_others(share: float) -> None:
    part = shuffled(splits(), share)["train"]  # type: ignore[arg-type]
    links = part.pairs.links
    wrong = (part.media.pooled[links[:, 0]] != part.texts.pooled[links[:, 1]]).mean()
    assert wrong == share
    assert set(links[:, 0].tolist()) == set(range(20))
