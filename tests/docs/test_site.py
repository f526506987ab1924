"""The site builds without a warning, names every page, and asks nobody outside."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="(https?://[^"]+)"|<link[^>]*\srel="(?:stylesheet|preload|icon)"[^>]*href="(https?://[^"]+)"|url\((https?://[^)]+)\)'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_it_builds_and_holds_the_reference(site: Path) -> None:
    reference = (site / "api.html").read_text()
    for route in ("/embed", "/search", "/classify", "/items", "/v1/embeddings"):
        assert route in reference
    assert "heavy rain" in (site / "tutorial.html").read_text()
    assert (site / "search/search_index.json").is_file()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        loaded = [next(filter(None, found)) for found in _LOADED.findall(page.read_text())]
        assert loaded == [], page
        assert 'class="mermaid"' not in page.read_text(), "the theme fetches the program that draws it"


def test_every_decision_is_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text()
    for decision in (ROOT / "docs/decisions").glob("*.md"):
        assert f"decisions/{decision.stem}.html" in index
