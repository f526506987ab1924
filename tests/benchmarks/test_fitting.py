import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fitting import _shuffled, _some, main
from tests.training import tiny
from training.features import Features
from training.measure.prepared import Prepared
from training.pairs import Pairs


def splits() -> dict[str, Prepared]:
    """Twenty media with two captions each; a feature says whose it is."""
    links = np.stack([np.repeat(np.arange(20), 2), np.arange(40)], 1)
    pairs = Pairs("x", "image", [Path(str(i)) for i in range(20)], [str(i) for i in range(40)], links, None, [], 1.0)
    media, texts = np.arange(20, dtype=np.float32)[:, None], np.repeat(np.arange(20, dtype=np.float32), 2)[:, None]
    return {"train": Prepared(pairs, Features(media), Features(texts))}


def test_a_part_keeps_its_pairs() -> None:
    part = _some(splits(), 7)["train"]  # type: ignore[arg-type]
    assert (len(part.media), len(part.texts), len(part.pairs.links)) == (7, 14, 14)
    links = part.pairs.links
    assert np.array_equal(part.media.pooled[links[:, 0]], part.texts.pooled[links[:, 1]])


def test_a_part_from_the_middle_on_has_the_media_that_follow() -> None:
    part = _some(splits(), 7, first=10)["train"]  # type: ignore[arg-type]
    assert part.media.pooled[:, 0].tolist() == list(range(10, 17))
    links = part.pairs.links
    assert np.array_equal(part.media.pooled[links[:, 0]], part.texts.pooled[links[:, 1]])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_so_many_media_get_the_captions_of_others(share: float) -> None:
    part = _shuffled(splits(), share)["train"]  # type: ignore[arg-type]
    links = part.pairs.links
    wrong = (part.media.pooled[links[:, 0]] != part.texts.pooled[links[:, 1]]).mean()
    assert wrong == share
    assert set(links[:, 0].tolist()) == set(range(20))


def test_a_table_is_printed(tmp_path: Path, tiny_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe_values(tiny_root))
    common = [str(recipe), "--cache", str(tmp_path / "cache"), "--steps", "8", "--batch-size", "8"]
    assert main([*common, "--source", "pictures", "--tables", "matryoshka", "--set", "projector.dimensions=256"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"matryoshka.plain", "matryoshka.plain.at_32"} <= set(result)
    assert main([*common, "--source", "pictures", "--tables", "curriculum"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(key.startswith("curriculum.") for key in result) == 7
    assert main([*common, "--source", "tones"]) == 2
    assert "no captioned pairs named tones" in capsys.readouterr().err
