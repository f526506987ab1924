import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo import IMAGE_QUERIES, SOUND_QUERIES, print_table

ROOT = Path(__file__).parents[2]


def run_demo(bundle: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.demo", "--bundle", str(bundle)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def tables(said: str) -> dict[str, list[str]]:
    """The lines of each table of a demonstration, by its title."""
    sections = [section.splitlines() for section in said.split("\n\n")]
    return {lines[0]: lines[2:] for lines in sections if len(lines) > 3 and lines[1].startswith("  ")}


@pytest.mark.full
def test_the_demonstration_runs_to_its_end(bundle_dir: Path) -> None:
    done = run_demo(bundle_dir)
    assert done.returncode == 0, done.stderr
    answers = tables(done.stdout)
    assert len(answers["Text to image"]) == len(IMAGE_QUERIES)
    assert len(answers["Text to sound"]) == len(SOUND_QUERIES)
    for kind, count in (("Text to image: ", 1), ("Sound to image", 1), ("Which label fits", 2)):
        found = [rows for title, rows in answers.items() if title.startswith(kind)]
        assert len(found) == count, kind
        for rows in found:
            scores = [float(row.split()[-1] if kind.startswith("Which") else row.split()[1]) for row in rows]
            assert scores == sorted(scores, reverse=True)
    for row in answers["Sound to image: cat.wav"]:
        assert row.split()[0].endswith(".jpg"), "only images were asked for"
    assert "make serve" in done.stdout


@pytest.mark.skipif(not (ROOT / "build/starter/manifest.json").is_file(), reason="`make starter` builds build/starter")
def test_the_starter_finds_what_it_is_known_to_find() -> None:
    """A starter that found less would be a step back. What it fails to find is named in starter/README.md."""
    answers = tables(run_demo(ROOT / "build/starter").stdout)
    first = {row.split("  ")[1].strip(): row for title in ("Text to image", "Text to sound") for row in answers[title]}
    for query in ("a cat", "a cup of coffee", "a rocket", "coins", "a brick wall", "grass", "galaxies"):
        assert f" {IMAGE_QUERIES[query]}.jpg " in first[query]
    for query in SOUND_QUERIES:
        assert f" {SOUND_QUERIES[query]}.wav " in first[query]
    assert answers["Which label fits coffee.jpg, of 6?"][0].split()[0] == "coffee"


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
