import json
import statistics
from pathlib import Path

import pytest

from benchmarks.seeds import main
from tests.training import tiny


@pytest.mark.full
def test_the_seed_that_is_best_on_validation_ships(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe_values(tiny_root))
    work = tmp_path / "work"
    arguments = [str(recipe), "--data", str(tiny_root), "--work", str(work), "--cache", str(tmp_path / "cache")]
    arguments += ["--set", "train.steps=5"]
    main([*arguments, "--seeds", "0", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = [json.loads((work / f"seed-{seed}/evaluation.json").read_text()) for seed in (0, 1)]
    assert json.loads((work / "seed-1/training.json").read_text())["history"][-1]["step"] == 5
    for name in ("pictures.i2t.r1", "pictures.t2i.r1", "tones.top1"):
        values = [seed[name] for seed in figures]
        assert result["mean"][name] == pytest.approx(statistics.fmean(values), abs=0.01)
        assert result["deviation"][name] == pytest.approx(statistics.pstdev(values), abs=0.01)
    assert result["shipped"] == int(max(result["seeds"], key=lambda seed: result["seeds"][seed]))

    # A finished seed is not done again, and what is tried never chooses: validation does.
    written = (work / "seed-0/projectors.safetensors").stat().st_mtime_ns
    for seed, (score, tested) in enumerate([(99.0, 0.0), (1.0, 100.0)]):
        record = json.loads((work / f"seed-{seed}/training.json").read_text())
        record["history"].append({"step": 41, "score": score})
        (work / f"seed-{seed}/training.json").write_text(json.dumps(record))
        evaluation = figures[seed] | {"tones.top1": tested}
        (work / f"seed-{seed}/evaluation.json").write_text(json.dumps(evaluation))
    main([*arguments, "--seeds", "0", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (work / "seed-0/projectors.safetensors").stat().st_mtime_ns == written
    assert result["shipped"] == 0
    assert (result["mean"]["tones.top1"], result["figures"]["tones.top1"]) == (50.0, 0.0)
    for name in ("projectors.safetensors", "evaluation.json", "training.json"):
        assert (work / name).read_bytes() == (work / "seed-0" / name).read_bytes()
