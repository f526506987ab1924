"""The site builds without a warning, holds what it includes, names every page, and makes no external requests."""

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from service.settings import Settings

ROOT = Path(__file__).parents[2]
_LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="(https?://[^"]+)"|<link[^>]*\srel="(?:stylesheet|preload|icon)"[^>]*href="(https?://[^"]+)"|url\((https?://[^)]+)\)'
)


SITE = ROOT / "build/site"


@pytest.fixture(scope="module")
def site() -> Path:
    """Builds the site as `make docs` does, in its place: zensical has no option for another."""
    for command in (["docs/api_pages.py"], ["-m", "zensical", "build", "--strict"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return SITE


def test_it_builds_and_holds_the_reference(site: Path) -> None:
    routes = (site / "reference/api/index.html").read_text()
    for route in ("/embed", "/search", "/classify", "/items", "/v1/embeddings"):
        assert route in routes
    assert "modalities" in (site / "reference/api/search.html").read_text()
    assert "heavy rain" in (site / "tutorial.html").read_text()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        loaded = [next(filter(None, found)) for found in _LOADED.findall(page.read_text())]
        assert loaded == [], page
        assert 'class="mermaid"' not in page.read_text(), "the theme fetches the program that draws it"


def test_files_that_pages_include_are_shown(site: Path) -> None:
    included = 0
    for page in (ROOT / "docs").rglob("*.md"):
        shown = text_of(site / page.relative_to(ROOT / "docs").with_suffix(".html"))
        assert "--8" not in shown, f"{page}: the name of a file stands in the place of the file"
        for name in re.findall(r'^--8<-- "(.+)"$', page.read_text(), re.MULTILINE):
            assert squeezed((ROOT / name).read_text()) in squeezed(shown), f"{page}: {name} is not shown"
            included += 1
    assert included >= 5


def text_of(page: Path) -> str:
    """Return what a reader sees, without markup."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_pages_are_in_the_navigation_and_history_is_not_at_its_first_level(site: Path) -> None:
    index = (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):  # those of the API too, which are made
        address = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert f'href="./{address}"' in index or address == Path("index.html"), page
    sections = re.findall(r'<label class="md-nav__title" for="__nav_\d+">(.*?)</label>', index, re.DOTALL)
    assert [squeezed(re.sub(r"<[^>]+>", "", section)) for section in sections] == ["How-to", "Reference", "Explanation"]


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 160
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", readme)]
    assert len(links) > 40
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_pages_name_settings_that_exist() -> None:
    of_others = {"ISTHMUS_URL", "ISTHMUS_API_KEY", "ISTHMUS_DATA"}
    known = {f"ISTHMUS_{name.upper()}" for name in Settings.model_fields} | of_others
    pages = [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/tutorial.md", "docs/index.md")
    ]
    for part in ("how-to", "reference", "explanation"):
        pages += (ROOT / "docs" / part).glob("*.md")
    for page in pages:
        # A name that ends in … stands for every setting that begins so.
        for name, more in re.findall(r"(ISTHMUS_[A-Z_]*[A-Z_])(…?)", page.read_text()):
            assert name in known or (more and any(setting.startswith(name) for setting in known)), f"{page}: {name}"


def test_the_search_works_where_the_site_is_opened_from_its_folder(site: Path) -> None:
    program = shutil.which("chromium")
    if program is None:
        assert "CI" not in os.environ, "Chromium is not installed: `make tools` installs it"
        pytest.skip("Chromium is not installed")
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("Control+k")
        page.keyboard.type("reciprocal")
        expect(page.locator("mark", has_text="reciprocal").first).to_be_visible()  # in what was found
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
