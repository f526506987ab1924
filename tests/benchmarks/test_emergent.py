import json
from pathlib import Path

import pytest

from benchmarks.emergent import main
from service.contract.bundle import read_bundle
from tests.training import spaces, tiny


@pytest.mark.full
def test_joint_spaces_are_made_and_measured(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(spaces.CALLED.values())
    shows = {"queries": "tones", "gallery": ["pictures"], "shows": {name: [name] for name in names}}
    words = tiny.WORDS
    templates = {"image": ["a picture of {}"], "audio": ["{}", *(f"{word} {{}}" for word in words)]}
    changes = {"emergent": {"colours": shows}, "templates": templates}
    recipe = spaces.recipe(tiny_root, tmp_path, "image", "audio", **changes)
    common = [str(recipe), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert main(common) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    for name in ("extended", "bound"):
        assert results[f"{name}.colours.map"] > results[f"{name}.colours.chance"]
        manifest = read_bundle(tmp_path / "out" / name).manifest
        pictures = read_bundle(tmp_path / "out/pictures").manifest
        assert manifest.towers["image"] == pictures.towers["image"] and manifest.admits == (pictures.space,)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/manifest.json")}
    assert main(common) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert made == {path: path.stat().st_mtime_ns for path in made}
