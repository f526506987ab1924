import json

import pytest

from benchmarks import gpu


def test_without_a_gpu_it_says_so_and_every_figure_is_null(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "devices", lambda: 0)
    assert gpu.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "not run: no CUDA device"
    result = json.loads(lines[-1])
    assert (result.pop("run"), result.pop("why")) == (False, "not run: no CUDA device")
    assert set(result) == set(gpu.keys())
    assert all(value is None for value in result.values())
