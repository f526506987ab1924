import json
from pathlib import Path

import pytest

from benchmarks import sessions


def test_every_option_is_compared_with_what_the_service_uses(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sessions, "_SHARED_S", 0.05)
    assert sessions.main(["--bundle", str(bundle_dir), "--rounds", "1", "--only", "spinning"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for case in ("image.one", "image.many", "audio.one", "audio.many", "text.one", "text.many", "shared"):
        assert result[f"{case}.as_it_is"] == 1.0
        assert result[f"{case}.spinning"] > 0
    assert result["text.fp32.rows_1.ms"] > 0


def test_what_is_no_bundle_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sessions.main(["--bundle", str(tmp_path)]) == 2
    assert "it is not a bundle" in capsys.readouterr().err
