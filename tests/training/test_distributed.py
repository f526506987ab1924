"""Two real processes over gloo do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from service.contract.bundle import read_bundle
from tests.training import ranks as program
from tests.training import tiny
from training.__main__ import main
from training.distributed import ALONE, Ranks, joined

DEADLINE_S = 600.0
ROOT = Path(__file__).parents[2]


def torchrun(port: int, count: int, *arguments: str) -> None:
    """Run `python arguments` as `count` processes with the variables that torchrun sets."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=DEADLINE_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors)[-3000:]


def test_without_torchrun_there_is_one_process() -> None:
    rows = torch.randn(3, 2)
    assert joined() is ALONE
    assert ALONE.gather(rows) is rows
    assert ALONE.share(rows) is rows
    assert ALONE.agree(2.5) == 2.5


@pytest.mark.parametrize(("count", "items"), [(1, 5), (2, 5), (3, 2), (4, 0)])
def test_the_shares_of_all_processes_are_all_items(count: int, items: int) -> None:
    shares = [range(items)[Ranks(index, count).share_of(items)] for index in range(count)]
    assert [item for share in shares for item in share] == list(range(items))


def test_losses_and_gradients_of_two_processes_are_those_of_one(tmp_path: Path, free_port: int) -> None:
    program.run(tmp_path)
    torchrun(free_port, 2, "-m", "tests.training.ranks", str(tmp_path))
    one = json.loads((tmp_path / "0of1.json").read_text())
    alone = one["losses"]
    first, second = (json.loads((tmp_path / f"{rank}of2.json").read_text()) for rank in range(2))
    assert first["agreed"] == second["agreed"] == 5.0
    assert first["history"] == second["history"]
    losses = [[entry["loss"] for entry in process["history"]] for process in (one, first)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # of all pairs, not of one process's share
    for name, expected in alone.items():
        parts = [each["losses"][name] for each in (first, second)]
        assert sum(part["loss"] for part in parts) == pytest.approx(expected["loss"], rel=1e-6), name
        for part in parts:
            assert np.allclose(part["gradients"], expected["gradients"], atol=1e-6), name


@pytest.mark.full
def test_training_on_two_processes_gives_the_weights_of_one(tmp_path: Path, tiny_root: Path, free_port: int) -> None:
    values = tiny.recipe_values(tiny_root)
    values["train"] |= {"steps": 6, "validate_every": 3, "baseline": False}
    del values["pairs"]["pictures"], values["encoders"]["image"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = ("-m", "training", "train", str(tmp_path / "recipe.yaml"), "--cache", str(tmp_path / "cache"))
    # Of each process: six pairs are two times three.
    torchrun(free_port, 1, *command, "--work", str(tmp_path / "one"), "--set", "train.batch_size=6")
    torchrun(free_port, 2, *command, "--work", str(tmp_path / "two"), "--set", "train.batch_size=3")
    one, two = (load_file(tmp_path / run / "projectors.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-4), key


def test_a_run_of_two_processes_from_a_cold_cache_writes_one_bundle(
    tmp_path: Path, tiny_root: Path, free_port: int
) -> None:
    """The first process encodes, chooses, evaluates and exports; the second finds the features in the cache."""
    values = tiny.recipe_values(tiny_root)
    values["train"] |= {"steps": 4, "validate_every": 2, "baseline": False}
    del values["pairs"]["tones"], values["encoders"]["audio"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = ("-m", "training", "run", str(tmp_path / "recipe.yaml"), "--cache", str(tmp_path / "cache"))
    torchrun(free_port, 2, *command, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "bundle"))
    bundle = read_bundle(tmp_path / "bundle")
    assert set(bundle.manifest.towers) == {"image", "text"}
    assert "pictures.i2t.r1" in bundle.manifest.evaluation


def test_a_command_for_one_process_says_so_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["export", "x.yaml", "--out", str(tmp_path / "b")]) == 2
    assert "export is for one process" in capsys.readouterr().err
