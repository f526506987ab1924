import json

import pytest
import torch

from benchmarks.projector_throughput import main


def test_a_few_steps_on_a_cpu_give_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pairs", "96", "--batch-size", "32", "--steps", "2", "--tokens", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(result["parameters"] / 1e6 - 11.5) < 0.1
    assert result["steps"] == 2
    assert result["pairs_per_second"] > 0
    assert 0 < result["fraction_of_matmul"] < 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not run" in lines[0]
    assert json.loads(lines[-1]) == {"device": "cuda", "run": False}


def test_fewer_pairs_than_a_batch_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--pairs", "10"])
    assert "less than one batch of 1024" in capsys.readouterr().err
