import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo import print_table

ROOT = Path(__file__).parents[2]


def run_demo(bundle: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.demo", "--bundle", str(bundle)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_demonstration_runs_to_its_end(bundle_dir: Path) -> None:
    done = run_demo(bundle_dir)
    assert done.returncode == 0, done.stderr
    sections = [section.splitlines() for section in done.stdout.split("\n\n")]
    answers = {lines[0]: lines[1:] for lines in sections if len(lines) == 5}
    for kind, count in (("Text to image", 3), ("Text to sound", 2), ("Sound to image", 1), ("Which label fits", 2)):
        tables = [table for title, table in answers.items() if title.startswith(kind)]
        assert len(tables) == count, kind
    for title, table in answers.items():
        rows = [line.split() for line in table[1:]]
        scores = [float(row[-1] if title.startswith("Which") else row[1]) for row in rows if row]
        assert scores == sorted(scores, reverse=True), title
    for line in answers["Sound to image: cat.wav"][1:]:
        assert line.split()[0].endswith(".jpg"), "only images were asked for"
    assert "make serve" in done.stdout


def test_a_failure_is_told_and_is_the_exit_status(tmp_path: Path) -> None:
    done = run_demo(tmp_path)
    assert done.returncode == 1
    assert "is not a bundle" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", ("item", "score"), [("a", "0.5"), ("longer name", "-10.25")])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Title",
        "  item           score",
        "  a                0.5",
        "  longer name   -10.25",
    ]
