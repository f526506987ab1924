"""The playground's files, without a browser: served safely, all there, and none of them inline or from elsewhere."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from service.api.routes.playground import FOLDER
from tests.service.media import png

ROOT = Path(__file__).parents[2]
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
PAGE = (FOLDER / "index.html").read_text()
REFERENCE = (FOLDER / "docs.html").read_text()


def test_the_page_and_its_files_are_served(shared_client):
    page = shared_client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "script-src 'self'" in policy
    assert page.headers["cache-control"] == "no-cache"
    linked = re.findall(r'(?:src|href)="(playground/[^"#]+)', page.text)
    assert {"playground/app.css", "playground/app.js", "playground/theme.js", "playground/icons.svg"} <= set(linked)
    for name in {*linked, *(f"playground/{file.name}" for file in FILES)}:
        response = shared_client.get(f"/{name}")
        assert response.status_code == 200, name
        assert response.headers["x-content-type-options"] == "nosniff"
        kind = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}[
            Path(name).suffix
        ]
        assert kind in response.headers["content-type"]
        again = shared_client.get(f"/{name}", headers={"if-none-match": response.headers["etag"]})
        assert again.status_code == 304


@pytest.mark.parametrize(
    "path", ["/playground/../settings.py", "/playground/%2e%2e/settings.py", "/playground/", "/playground/x"]
)
def test_nothing_else_is_served(shared_client, path):
    response = shared_client.get(path)
    assert response.status_code == 404 and response.json()["code"] == "route_not_found"


def test_nothing_is_inline_and_nothing_from_elsewhere():
    for page in (PAGE, REFERENCE):
        assert not re.search(r"<script(?![^>]*\bsrc=)", page)
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", page)
    for file in FILES:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), file.name
    for file in SCRIPTS:
        unsafe = (
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"style|srcdoc"
        )
        assert not re.search(unsafe, file.read_text()), file.name


def test_every_id_and_icon_that_a_script_asks_for_is_there():
    ids, of_reference = (set(re.findall(r'\sid="([^"]+)"', page)) for page in (PAGE, REFERENCE))
    icons = set(re.findall(r'<symbol id="([^"]+)"', (FOLDER / "icons.svg").read_text()))
    assert set(re.findall(r"icons\.svg#(\w+)", PAGE)) <= icons
    for file in SCRIPTS:
        text = file.read_text()
        there = of_reference if file.name == "docs.js" else ids
        assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= there, file.name
        assert set(re.findall(r'\bicon\("(\w+)"\)', text)) <= icons, file.name
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert (FOLDER / module).is_file(), f"{file.name} imports {module}"


def test_the_wheel_carries_every_file():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    carried = {path for pattern in patterns for path in (ROOT / "service").glob(pattern)}
    assert set(FILES) <= carried and all(file.is_file() for file in FILES)


def test_files_are_parts_of_a_composed_query(client):
    files = [("file", ("a.png", png(1))), ("file", ("b.png", png(2)))]
    upserted = client.post("/items", files=[*files, ("file", ("c.png", png(3)))])
    assert upserted.json()["upserted"] == 3

    def search(compose, files, **more):
        request = {"query": {"compose": compose}, "include": [], **more}
        return client.post("/search", data={"request": json.dumps(request)}, files=files)

    mixed = search([{"weight": 1.0}, {"text": "a dog", "weight": 0.5}, {"weight": -0.3}], files).json()["results"]
    by_id = [{"id": "a.png"}, {"text": "a dog", "weight": 0.5}, {"id": "b.png", "weight": -0.3}]
    same = client.post("/search", json={"query": {"compose": by_id}, "include": []}).json()["results"]
    assert [each["id"] for each in mixed] == [each["id"] for each in same]
    assert [each["score"] for each in mixed] == pytest.approx([each["score"] for each in same], abs=1e-6)
    assert search([{}], files[:1]).json()["results"][0]["id"] == "a.png"
    explained = search([{}, {"text": "a dog"}], files[:1], include=["explain"]).json()["results"][0]["explain"]
    assert [each["weight"] for each in explained["parts"]] == [1.0, 1.0]

    missing = search([{"weight": 1.0}, {"text": "a dog"}], [("file", ("a.png", png(1)[:50]))])
    assert missing.status_code == 422 and missing.json()["code"] in ("bad_media", "undecodable_media")
    bare = client.post("/search", json={"query": {"compose": [{"weight": 1.0}, {"text": "a dog"}]}})
    assert bare.status_code == 422, "a part without an input takes a file, and there is none"
    named = client.post("/search", json={"query": {"compose": [{"file": "a.png"}]}})
    assert named.status_code == 422
