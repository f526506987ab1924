"""A person goes through each flow of the playground."""

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, Locator, Page, Route, expect

from tests.conftest import DEADLINE_S
from tests.playground.conftest import DESKTOP, PHONE, VECTORS, WIDE, put_vectors, shoot

SEARCHED = re.compile(r"Best first, of .* ms")
SIZES = {"phone": PHONE, "desktop": DESKTOP, "wide": WIDE}
_DROPS = 4


def search(page: Page, words: str) -> None:
    page.get_by_label("Words to search for").fill(words)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(re.escape(urlencode({"q": words})) + "(&|$)"))  # it is set when the search begins
    expect(page.locator("#found")).to_have_text(SEARCHED)
    settle(page)


def settle(page: Page) -> None:
    """Wait until a view has all that it asked for: what is drawn anew under the pointer loses a click."""
    expect(page.locator("[aria-busy]")).to_have_count(0)


def open_large(page: Page, name: str) -> Locator:
    """Show an item large, and wait for what the server knows of it: its buttons are then drawn again."""
    page.get_by_role("button", name=name, exact=True).click()
    detail = page.get_by_role("dialog")
    expect(detail.get_by_role("heading", name=name)).to_be_visible()
    expect(detail.locator("#facts")).to_contain_text("Stored here")
    return detail


def close_large(page: Page) -> None:
    """Close it, and wait until the history is back where it was: the next step would begin from there."""
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page).not_to_have_url(re.compile("open="))


def shown(page: Page, view: str) -> dict[str, Any]:
    """The JSON in the view's command."""
    words = shlex.split(page.locator(f"#{view}-request code").text_content() or "")
    [body] = [word.removeprefix("request=") for word in words if word.startswith(("request={", "{"))]
    answer = json.loads(body)
    assert isinstance(answer, dict)
    return answer


def ids(page: Page, within: str = "#results") -> list[str]:
    found = page.locator(f"{within} .card").evaluate_all("cards => cards.map((card) => card.dataset.id)")
    assert isinstance(found, list)
    return found


def chip(page: Page, kind: str) -> Locator:
    return page.locator(".chips label").filter(has_text=kind)


def card(page: Page, id: str, within: str = "#results") -> Locator:
    return page.locator(f'{within} .card[data-id="{id}"]')


def scroll_to_the_end(page: Page, within: str, count: int) -> None:
    """More comes each time that the end comes near, until there are so many cards."""
    cards = page.locator(f"{within} .card")
    while (before := cards.count()) < count:
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        expect(cards).not_to_have_count(before)
    expect(cards).to_have_count(count)


def run_curl(page: Page, view: str, folder: Path, **environment: str) -> Any:
    """Return what the view's command answers, run as it stands."""
    page.locator(f"#{view}-request summary").click()
    page.locator(f"#{view}-request").get_by_role("button", name="Copy").click()
    expect(page.locator("#live")).to_have_text("The command is copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator(f"#{view}-request code").inner_text()
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, check=True, env=environment)
    return json.loads(done.stdout)


def drop(page: Page, path: Path) -> None:
    """Drag a file or folder of the disk onto the page, as the browser is told by the desktop.

    Now and then Chromium loses a drop that comes this way; it is then made again.
    """
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for left in reversed(range(_DROPS)):
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": 400, "y": 300, "data": data})
            if kind == "dragOver":
                expect(page.locator("#veil")).to_be_visible()
        try:
            expect(page.locator("#veil")).to_be_hidden(timeout=3_000)
            return
        except AssertionError:
            if not left:
                raise


def test_what_is_there_is_shown_before_anything_is_asked(page: Page) -> None:
    expect(page).to_have_title("Search · Isthmus")
    expect(page.locator("#found")).to_have_text("Newest first, of 25 items")
    expect(page.locator("#results .card")).to_have_count(25)
    expect(page.locator("#serving")).to_contain_text("384 dimensions")
    expect(page.get_by_label("Collection", exact=True)).to_have_value("default")
    expect(page.get_by_label("Words to search for")).to_be_focused()
    page.get_by_role("link", name="Map").click()
    page.keyboard.press("/")
    expect(page.get_by_label("Words to search for")).to_be_focused()


def test_searching_by_typing(page: Page, media: Path) -> None:
    search(page, 'it\'s a cup of "coffee" & $HOME;type=x\\n')
    expect(page.locator("#results .card")).to_have_count(25)
    expect(page.locator("#ending")).to_have_text("That is all: 11 pictures, 11 sounds, 3 texts.")
    answer = run_curl(page, "search", media)
    assert sorted(each["id"] for each in answer["results"]) == sorted(ids(page))
    for kind, name in (("image", "Pictures"), ("audio", "Sounds"), ("text", "Texts")):
        first = next(each for each in answer["results"] if each["modality"] == kind)
        section = page.get_by_role("region", name=name)
        assert section.locator(".card").first.get_attribute("data-id") == first["id"]
        expect(section.locator(".match").first).to_have_attribute("title", re.compile(f"{first['score']:.3f}"))
    search(page, "a police siren")
    first_url = page.url
    search(page, "a cat")
    assert ids(page)[0] == "cat.jpg", "the section of pictures comes first where the best result is one"
    expect(card(page, "cat.jpg").locator("img")).to_have_js_property("complete", True)
    assert card(page, "cat.jpg").locator("img").evaluate("image => image.naturalWidth") > 100
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "search-typed")
    page.go_back()
    expect(page.get_by_label("Words to search for")).to_have_value("a police siren")
    expect(page.get_by_role("region", name="Sounds").locator(".card").first).to_contain_text("siren.wav")
    expect(page).to_have_url(first_url)


def test_one_item_large(page: Page, tmp_path: Path) -> None:
    search(page, "a cup of coffee")
    address = page.url
    page.get_by_role("button", name="coffee.jpg", exact=True).focus()
    page.keyboard.press("Enter")
    detail = page.get_by_role("dialog")
    expect(detail.get_by_role("heading", name="coffee.jpg")).to_be_visible()
    image = detail.locator(".frame img")
    expect(image).to_have_js_property("naturalWidth", 600)  # the original's, and not the preview's 480
    expect(detail.locator("#facts")).to_contain_text("600 × 400 pixels")
    expect(detail.locator("#facts")).to_contain_text("a cup of espresso on a saucer")
    expect(detail.locator("#facts")).not_to_contain_text("sha256")
    expect(page).to_have_url(re.compile("open=coffee.jpg"))
    for size, viewport in SIZES.items():
        page.set_viewport_size(viewport)
        shoot(page, f"{size}-detail")
    page.set_viewport_size(DESKTOP)
    page.keyboard.press("+")
    expect(image).to_have_attribute("style", re.compile(r"scale\(1\.5\)"))
    page.keyboard.press("0")
    expect(image).to_have_attribute("style", re.compile(r"scale\(1\)"))
    with page.expect_download() as saved:
        detail.get_by_role("button", name="Download").click()
    assert saved.value.suggested_filename == "coffee.jpg"
    saved.value.save_as(tmp_path / "coffee.jpg")
    assert (tmp_path / "coffee.jpg").read_bytes()[:2] == b"\xff\xd8", "the original, which is a JPEG"
    page.keyboard.press("ArrowRight")
    second = ids(page)[ids(page).index("coffee.jpg") + 1]
    expect(detail.get_by_role("heading", name=second)).to_be_visible()
    page.reload()
    expect(detail.get_by_role("heading", name=second)).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(detail.get_by_role("heading", name="coffee.jpg")).to_be_visible()
    close_large(page)
    assert page.url == address
    open_large(page, "coffee.jpg")
    page.go_back()
    expect(detail).to_be_hidden()


def test_thumbs_teach_the_collection_and_can_be_undone(page: Page) -> None:
    taught = page.get_by_text("As people taught it (version ")
    search(page, "a cup of coffee")
    page.get_by_role("button", name="coins.jpg", exact=True).hover()
    page.locator("[data-id='coins.jpg']").get_by_role("button", name="More like this for this search").click()
    undo = page.get_by_role("button", name="Undo")
    expect(undo).to_be_visible()
    search(page, "a mug of coffee")
    expect(taught).to_be_visible()
    undo.click()
    expect(page.locator(".toast")).to_contain_text("Undone: searches answer as before.")
    search(page, "a cup of coffee")
    expect(taught).to_have_count(0)
    detail = open_large(page, "coffee.jpg")
    detail.get_by_role("button", name="Less like this").click()
    detail.get_by_role("button", name="Undo").click()
    expect(page.locator(".toast")).to_contain_text("Undone: searches answer as before.")


def test_why_a_result_was_found_is_drawn(page: Page) -> None:
    search(page, "a cup of coffee")
    detail = open_large(page, "coffee.jpg")
    expect(detail.locator(".heat")).to_have_count(0)
    detail.get_by_role("button", name="Why?").click()
    heat, image = detail.locator(".heat"), detail.locator(".frame img")
    expect(heat).to_be_visible()
    expect(detail.locator("#why mark")).to_have_text(["a", "cup", "of", "coffee"])
    opacities = heat.evaluate(
        "map => [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data].filter((_, at) => at % 4 == 3)"
    )
    assert min(opacities) < 20 < 120 < max(opacities), "some places are warm, and others are not"
    page.keyboard.press("+")
    assert heat.evaluate("map => map.style.transform") == image.evaluate("image => image.style.transform") != ""
    shoot(page, "desktop-why")
    page.keyboard.press("ArrowRight")
    expect(heat).to_have_count(0)
    expect(detail.locator("#why")).to_be_empty()
    close_large(page)
    search(page, "church bells")
    open_large(page, "church_bell.wav")
    detail.get_by_role("button", name="Why?").click()
    expect(detail.locator(".why-parts button").first).to_be_visible()


@pytest.mark.full
def test_a_sound_large_plays_and_similar_ones_are_found(page: Page) -> None:
    search(page, "church bells")
    detail = open_large(page, "church_bell.wav")
    film = detail.locator("audio")
    expect(film).to_have_js_property("readyState", 4)
    assert film.evaluate("sound => sound.duration") > 1
    detail.get_by_role("button", name="More like church_bell.wav").click()
    expect(detail).to_be_hidden()
    expect(page.get_by_role("button", name="Remove church_bell.wav")).to_be_visible()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    assert "church_bell.wav" not in ids(page), "an item is not like itself"


@pytest.mark.full
def test_deleting_and_undoing(page: Page, site: httpx.Client) -> None:
    items = [{"id": f"note {n}", "text": f"a note about tea, number {n}", "collection": "notes"} for n in range(3)]
    assert site.post("/items", json={"items": items}).status_code == 200
    try:
        page.goto("/#/search?q=tea&in=notes")
        page.reload()
        open_large(page, "note 1").get_by_role("button", name="Delete").click()
        expect(page.locator(".toast")).to_contain_text("Its file stays where it is")
        expect(card(page, "note 1")).to_have_count(0)
        page.get_by_role("button", name="Undo").click()
        expect(card(page, "note 1")).to_have_count(1)
        assert site.get("/items/note 1?collection=notes").status_code == 200
        expect(page.locator(".toast")).to_be_hidden()
        page.keyboard.press("Delete")  # the one that came in its place
        expect(page.locator(".toast")).to_contain_text("Its file stays where it is")
        page.goto("about:blank")  # whoever leaves does not undo
        deadline = time.monotonic() + DEADLINE_S
        while len(site.get("/items?collection=notes").json()["items"]) == len(items):
            assert time.monotonic() < deadline, "the item is there still"
    finally:
        left = [each["id"] for each in site.get("/items?collection=notes").json()["items"]]
        site.delete("/collections/notes")
    assert len(left) == 2 and "note 1" in left


def test_nothing_here_is_said(page: Page, site: httpx.Client) -> None:
    search(page, "a cat")
    chip(page, "Videos").click()
    expect(page.locator("#verdict")).to_have_text(re.compile("^No videos are in this collection"))
    page.get_by_role("button", name="Search every kind").click()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    expect(page.locator("#verdict")).to_be_hidden()
    put_vectors(site, "many")
    try:
        page.goto("/#/search?q=qwertyzxc&in=many")
        page.reload()
        expect(page.locator("#verdict")).to_contain_text("Probably nothing here")
        widths = "bars => bars.map((bar) => parseFloat(bar.style.width))"
        expect(page.locator("#results .bar > span").nth(11)).to_be_attached()  # the others follow, row by row
        bars = page.locator("#results .bar > span").evaluate_all(widths)
        assert max(bars) < 80, "a bar is as long as the fit is good, whatever the others are"
        scroll_to_the_end(page, "#results", VECTORS)
        expect(page.locator("#ending")).to_contain_text(f"That is all: {VECTORS} vectors")
    finally:
        site.delete("/collections/many")


def test_rows_stay_full_when_the_window_changes(page: Page, site: httpx.Client) -> None:
    """Results come in lists of full rows, which are one list again where rows have another width."""
    put_vectors(site, "wide")
    try:
        page.goto("/#/search?in=wide")
        page.reload()
        lists = page.locator("#results .grid:visible")
        expect(lists.nth(2)).to_be_attached()
        rows = """lists => lists.map((list) => [...list.querySelectorAll(".card")].at(-1).getBoundingClientRect().right
            / list.getBoundingClientRect().right)"""
        assert all(share > 0.98 for share in lists.evaluate_all(rows)[:-1])
        before = ids(page)
        page.set_viewport_size({"width": 1_000, "height": 860})
        expect(lists.nth(2)).not_to_be_attached()
        after = ids(page)
        assert after[: len(before)] == before and len(after) == len(set(after))
        scroll_to_the_end(page, "#results", VECTORS)
    finally:
        site.delete("/collections/wide")


def test_browsing_by_folder_and_month(page: Page, site: httpx.Client) -> None:
    put_vectors(site, "album")
    try:
        page.goto("/#/browse?in=album")
        page.reload()
        expect(page.locator("#browsed")).to_have_text(f"{VECTORS} items")
        expect(page.locator("#browse-items h2").first).to_have_text("March 2024")
        settle(page)
        page.locator("#folders").get_by_role("button", name="rome").click()
        expect(page.locator("#browsed")).to_have_text("65 items")
        settle(page)
        page.locator("#months").get_by_role("button", name="January 2024").click()
        expect(page.locator("#browsed")).to_have_text("22 items")
        expect(page.locator("#browse-items .card")).to_have_count(22)
        settle(page)
        assert {int(each[:3]) % 6 for each in ids(page, "#browse-items")} == {3}
        page.get_by_label("Order").select_option("oldest")
        expect(page.locator("#browse-items .card").first).to_have_attribute("data-id", "003.vec")
        page.reload()
        expect(page.locator("#browsed")).to_have_text("22 items")
        expect(page.get_by_label("Order")).to_have_value("oldest")
        settle(page)
        page.get_by_role("button", name="Search here").click()
        expect(page.get_by_label("Condition", exact=True).first).to_have_value("under")
        expect(page.locator("#found")).to_have_text(re.compile("Newest first"))
        expect(page.locator("#results .card")).to_have_count(22)
        page.go_back()
        page.get_by_role("button", name="Everything", exact=True).click()
        expect(page.locator("#browsed")).to_have_text(f"{VECTORS} items")
        scroll_to_the_end(page, "#browse-items", VECTORS)
    finally:
        site.delete("/collections/album")


@pytest.mark.full
def test_searching_by_an_image_that_is_chosen_and_one_that_is_dropped(page: Page, media: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose an image or a sound").click()
    chooser.value.set_files(media / "photographs/cat.jpg")
    expect(page.locator("#found")).to_have_text(SEARCHED)
    assert ids(page)[0] == "cat.jpg"
    answer = run_curl(page, "search", media / "photographs")
    assert sorted(each["id"] for each in answer["results"]) == sorted(ids(page))
    page.get_by_role("button", name="Remove cat.jpg").click()
    expect(page.locator("#found")).to_contain_text("Newest first")
    drop(page, media / "photographs/coins.jpg")
    expect(page.locator("#results .card").first).to_contain_text("coins.jpg")
    expect(page).to_have_url(re.compile("part=file"))
    page.reload()
    expect(page.get_by_role("button", name="Remove coins.jpg")).to_be_visible()
    expect(page.locator("#results .card").first).to_contain_text("coins.jpg")
    page.evaluate("location.hash = '#/search?q=a+cat&part=file~1~nowhere~gone.jpg'")
    expect(page.locator("#found")).to_contain_text("gone.jpg is no longer in this browser: drop it here again")


@pytest.mark.full
def test_what_no_server_reads_is_converted_or_refused(page: Page, tmp_path: Path, complaints: list[str]) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    page.set_input_files("#file", tmp_path / "notes.pdf")
    expect(page.locator("#found")).to_have_text("notes.pdf is no picture, sound or video")
    (tmp_path / "broken.m4a").write_bytes(b"nothing")
    page.set_input_files("#file", tmp_path / "broken.m4a")
    expect(page.locator("#found")).to_contain_text("either an image, a sound nor a video")
    assert len(complaints) == 1 and "status of 415" in complaints.pop()


def test_one_bad_file_spoils_nothing_else(page: Page, media: Path, tmp_path: Path, complaints: list[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page.set_input_files("#file", [tmp_path / "broken.png", media / "photographs/cat.jpg"])
    expect(page.locator("#found")).to_contain_text(re.compile("Best first.*broken.png: .*left out"))
    expect(page.locator(".part.spoilt")).to_contain_text("broken.png")
    assert ids(page)[0] == "cat.jpg"
    assert len(complaints) == 1 and "status of 4" in complaints.pop()


@pytest.mark.full
def test_a_bad_file_is_told(page: Page, tmp_path: Path, complaints: list[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page.set_input_files("#file", tmp_path / "broken.png")
    expect(page.locator("#found")).to_have_text(re.compile("^(Not an image|The image is)"))
    expect(page.locator("#found")).to_have_class(re.compile("bad"))
    assert len(complaints) == 1 and "status of 4" in complaints.pop()


@pytest.mark.full
def test_searching_by_a_sound_that_is_recorded(page: Page, tmp_path: Path) -> None:
    page.get_by_role("button", name="Record a sound").click()
    expect(page.get_by_role("button", name="Record a sound")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#recording")).to_contain_text(re.compile("0:(0[2-9]|[12][0-9]) of 0:30"))
    page.wait_for_function("document.querySelector('meter').value > 0.05")
    page.locator("#record").click()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    assert page.locator("#results .card.audio").first.get_attribute("data-id") == "siren.wav", "the microphone plays it"
    with page.expect_download() as saved:
        page.get_by_role("link", name="Save").click()
    saved.value.save_as(tmp_path / saved.value.suggested_filename)
    answer = run_curl(page, "search", tmp_path)
    assert sorted(each["id"] for each in answer["results"]) == sorted(ids(page))


@pytest.mark.full
def test_composing_with_weights(page: Page, media: Path, site: httpx.Client, tmp_path: Path) -> None:
    page.get_by_label("Words to search for").fill("thunder")
    page.set_input_files("#file", [media / "photographs/cat.jpg", media / "sounds/siren.wav"])
    expect(page.locator("#found")).to_have_text(SEARCHED)
    page.get_by_label("Weight of siren.wav").focus()
    with page.expect_response("**/search"):
        page.keyboard.press("Home")
    settle(page)
    body = shown(page, "search")
    assert body["query"]["compose"] == [{"text": "thunder", "weight": 1}, {"weight": 1}, {"weight": -1}]
    expect(page.locator(".part").last.locator("output")).to_have_text("−1.0")
    assert page.locator("#results .card.image").first.get_attribute("data-id") == "cat.jpg"
    for path in ("photographs/cat.jpg", "sounds/siren.wav"):
        (tmp_path / Path(path).name).write_bytes((media / path).read_bytes())
    found = [each["id"] for each in run_curl(page, "search", tmp_path)["results"]]
    assert sorted(found) == sorted(ids(page))
    files = [("file", (path, (media / path).read_bytes())) for path in ("photographs/cat.jpg", "sounds/siren.wav")]
    same = site.post("/search", data={"request": json.dumps(body)}, files=files).json()["results"]
    assert [each["id"] for each in same] == found
    assert "siren.wav" not in [each["id"] for each in same if each["modality"] == "audio"][:6]
    page.reload()
    expect(page.locator(".part")).to_have_count(3)
    expect(page.locator(".part").last.locator("output")).to_have_text("−1.0")
    shoot(page, "search-composed")


@pytest.mark.full
def test_filters_and_kinds(page: Page, media: Path) -> None:
    search(page, "an animal")
    chip(page, "Sounds").click()
    expect(page.locator("#results .card")).to_have_count(11)
    chip(page, "Sounds").click()
    page.get_by_role("button", name="Filters").click()
    page.get_by_label("Metadata key").fill("set")
    page.get_by_label("Condition", exact=True).select_option("is not")
    page.get_by_label("Value").fill("sounds")
    page.keyboard.press("Tab")
    expect(page.locator("#results .card")).to_have_count(14)
    page.get_by_role("button", name="Another condition").click()
    page.get_by_label("Metadata key").nth(1).fill("what")
    page.get_by_label("Condition", exact=True).nth(1).select_option("contains")
    page.get_by_label("Value").nth(1).fill("cat")
    page.keyboard.press("Tab")
    expect(page.locator("#results .card")).to_have_count(1)
    assert ids(page) == ["cat.jpg"]
    assert [each["id"] for each in run_curl(page, "search", media)["results"]] == ["cat.jpg"]
    page.reload()
    expect(page.get_by_role("button", name="Filters")).to_contain_text("(2)")
    expect(page.locator("#results .card")).to_have_count(1)
    page.get_by_label("Value").nth(1).fill("no such thing")
    page.keyboard.press("Tab")
    expect(page.locator("#verdict")).to_contain_text("No items pass the filters")
    page.get_by_role("button", name="Remove the filters").click()
    expect(page.locator("#results .card")).to_have_count(25)


@pytest.mark.full
def test_combining(page: Page) -> None:
    search(page, "church bells")
    card(page, "church_bell.wav").hover()
    page.get_by_role("button", name="More like church_bell.wav").click()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    card(page, "rain.wav").hover()
    with page.expect_response("**/search"):
        page.get_by_role("button", name="Combine with rain.wav").click()
    compose = [{"id": "church_bell.wav", "weight": 1}, {"id": "rain.wav", "weight": 1}]
    assert shown(page, "search")["query"] == {"compose": compose}


@pytest.mark.full
def test_a_sound_plays_and_can_be_sought(page: Page) -> None:
    search(page, "a police siren")
    siren = card(page, "siren.wav")
    siren.get_by_role("button", name="Play siren.wav").click()
    expect(siren.get_by_role("button", name="Pause siren.wav")).to_be_visible()
    seek = siren.get_by_label("Position in siren.wav")
    expect(seek).to_have_attribute("aria-valuetext", re.compile("0:0[1-9]"))
    card(page, "rain.wav").get_by_role("button", name="Play rain.wav").click()
    expect(siren.get_by_role("button", name="Play siren.wav")).to_be_visible()
    expect(card(page, "rain.wav").get_by_role("button", name="Pause rain.wav")).to_be_visible()
    seek.fill("900")
    expect(seek).to_have_attribute("aria-valuetext", "0:05")


def test_classifying_by_labels_of_ones_own(page: Page, media: Path, tmp_path: Path) -> None:
    page.get_by_role("link", name="Classify").click()
    expect(page).to_have_title("Classify · Isthmus")
    page.get_by_label("Labels, one a line").fill("church bells\nrain\nespresso: a cup of coffee | a small cup\n\nit's")
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator("#classified")).to_have_text("Give it an image, a sound or a text")
    page.set_input_files("#classify-file", [media / "photographs/coffee.jpg", media / "sounds/church_bell.wav"])
    expect(page.locator("#classified")).to_have_text("2 inputs, 4 labels")
    bells = page.get_by_role("list", name="Labels of church_bell.wav").get_by_role("listitem")
    expect(bells).to_have_count(4)
    expect(bells.first).to_contain_text("church bells")
    scores = [float(each) for each in page.locator(".bars").first.locator(".number").all_inner_texts()]
    assert abs(sum(scores) - 1) < 0.01 and scores == sorted(scores, reverse=True)
    width = bells.first.locator(".bar > span").evaluate("bar => bar.style.width")
    assert abs(float(width.removesuffix("%")) / 100 - float(bells.first.locator(".number").inner_text())) < 0.001
    shoot(page, "classify")
    for name, folder in (("coffee.jpg", "photographs"), ("church_bell.wav", "sounds")):
        (tmp_path / name).write_bytes((media / folder / name).read_bytes())
    answer = run_curl(page, "classify", tmp_path)
    shown = page.locator(".bars").first.locator(".label").all_inner_texts()
    assert [each["label"] for each in answer["results"][0]["labels"]] == shown
    page.get_by_label("or a text").fill("it pours")
    page.get_by_label("Say “none of these”").check()
    page.get_by_label("Least score").fill("1")
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator("#classified")).to_have_text("3 inputs, 4 labels")
    expect(page.get_by_text("None of these, by the score")).to_have_count(3)
    page.reload()
    expect(page.get_by_label("Labels, one a line")).to_have_value(re.compile("church bells"))


@pytest.mark.full
def test_labels_are_taught_by_examples_and_kept(page: Page, media: Path, site: httpx.Client) -> None:
    page.goto("/#/classify")
    page.get_by_label("Labels, one a line").fill("breakfast\nmetal")
    page.get_by_text("Teach the labels by examples").click()
    shown_to_it = [media / "photographs/coins.jpg", media / "sounds/siren.wav"]
    page.get_by_label("Examples of metal", exact=True).set_input_files(shown_to_it)
    expect(page.get_by_text("Teach the labels by examples (2)")).to_be_visible()
    page.get_by_label("Keep these as").fill("mine")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("#classified")).to_have_text("The set mine is saved: 2 labels")
    assert {"name": "metal", "examples": 2} in site.get("/label-sets/mine").json()["labels"]
    page.set_input_files("#classify-file", media / "photographs/coins.jpg")
    expect(page.get_by_role("list", name="Labels of coins.jpg").get_by_role("listitem").first).to_contain_text("metal")
    assert shown(page, "classify")["label_set"] == "mine"
    page.locator(".verdict").drag_to(page.locator(".example").first)
    expect(page.get_by_role("button", name="Remove the example coins.jpg of breakfast")).to_be_visible()
    page.reload()
    page.get_by_label("Saved sets of labels").select_option("mine")
    expect(page.locator(".example").nth(1).locator(".tile")).to_have_count(2)
    page.get_by_role("button", name="Delete this set").click()
    expect(page.locator("#classified")).to_contain_text("The set mine is deleted")
    assert site.get("/label-sets/mine").status_code == 404


def test_sets_of_the_server_are_there_to_choose(page: Page, media: Path, site: httpx.Client) -> None:
    labels = ["church bells", {"name": "espresso", "prompts": ["a cup of coffee", "a small cup"]}]
    assert site.put("/label-sets/of-the-server", json={"labels": labels}).status_code == 200
    page.goto("/#/classify")
    page.get_by_label("Saved sets of labels").select_option("of-the-server")
    expect(page.locator("#classified")).to_have_text("The set of-the-server is here")
    expect(page.get_by_label("Labels, one a line")).to_have_value(
        "church bells\nespresso: a cup of coffee | a small cup"
    )
    page.set_input_files("#classify-file", media / "photographs/coffee.jpg")
    expect(page.get_by_role("list", name="Labels of coffee.jpg").get_by_role("listitem").first).to_contain_text("espr")
    assert shown(page, "classify")["label_set"] == "of-the-server"
    page.get_by_role("button", name="Delete this set").click()
    expect(page.locator("#classified")).to_contain_text("The set of-the-server is deleted")
    assert site.get("/label-sets").json() == {"label_sets": []}


def test_the_map(page: Page) -> None:
    page.get_by_role("link", name="Map").click()
    expect(page.locator("#mapped")).to_have_text("25 items")
    page.get_by_label("Coloured by").select_option("set")
    expect(page.locator("#legend")).to_contain_text("photographs11")
    canvas = page.get_by_role("application", name="Map of the collection")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    tip = page.locator("#tip strong")
    first = tip.inner_text()
    expect(page.locator("#live")).to_contain_text(first)
    page.keyboard.press("ArrowRight")
    expect(tip).not_to_have_text(first)
    page.keyboard.press("Enter")
    expect(page.locator("#chosen .name")).to_contain_text(tip.inner_text())
    before = page.locator("#canvas").evaluate("canvas => canvas.toDataURL()")
    page.keyboard.press("+")
    assert page.locator("#canvas").evaluate("canvas => canvas.toDataURL()") != before
    page.keyboard.press("0")
    expect(page.locator("#map-words")).to_contain_text("Together lie: ")
    with page.expect_request("**/previews/**"):  # from close by, points are pictures
        for _ in range(4):
            page.get_by_role("button", name="Zoom in").click()
    page.mouse.move(500, 450)
    page.mouse.wheel(0, -300)
    page.mouse.down()
    page.mouse.move(560, 470, steps=3)
    page.mouse.up()
    page.get_by_role("button", name="Show all").click()
    page.keyboard.press("Escape")
    page.get_by_text("The same as a list").click()
    expect(page.locator("#list li")).to_have_count(25)
    page.locator("#legend").get_by_label("photographs").uncheck()
    expect(page.locator("#list li")).to_have_count(14)
    page.get_by_label("Only those whose id or label has").fill("siren")
    page.locator("#list").get_by_role("button", name="siren.wav").click()
    expect(page.locator("#chosen .name")).to_contain_text("siren.wav")
    page.locator("#legend").get_by_label("photographs").check()
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "map")
    page.locator("#chosen .card").hover()
    page.locator("#chosen").get_by_role("button", name="More like siren.wav").click()
    expect(page).to_have_title("Search · Isthmus")
    expect(page.get_by_role("button", name="Remove siren.wav")).to_be_visible()


@pytest.mark.full
def test_a_point_is_told_on_hovering_and_opened_by_a_click(page: Page) -> None:
    page.goto("/#/map")
    expect(page.locator("#mapped")).to_have_text("25 items")
    canvas = page.locator("#canvas")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    name = page.locator("#tip strong").inner_text()
    left, top = page.locator("#tip").evaluate("tip => [parseFloat(tip.style.left), parseFloat(tip.style.top) + 20]")
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    expect(page.locator("#tip")).to_be_hidden()
    page.mouse.move(box["x"] + left, box["y"] + top)
    expect(page.locator("#tip strong")).to_have_text(name)
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#chosen .name")).to_contain_text(name)


@pytest.mark.full
def test_adding_a_folder(page: Page, media: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my things"
    for name in ("photographs", "sounds"):
        (folder / name).mkdir(parents=True)
        for file in sorted((media / name).iterdir())[:6]:
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "note.md").write_text("# A lighthouse in the fog")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    taken = Image.Exif()
    taken.get_ifd(0x8769)[0x9003] = "2019:07:14 18:30:00"  # Exif.DateTimeOriginal
    Image.new("RGB", (64, 48), "teal").save(folder / "bastille.jpg", exif=taken)
    (folder / "table.xlsx").write_bytes(b"no media")
    (folder / ".hidden.jpg").write_bytes(b"")
    page.get_by_role("link", name="Add", exact=True).click()
    drop(page, folder)
    expect(page.locator("#added")).to_contain_text("15 files")
    expect(page.locator("#added")).to_contain_text("2 other files are left out")
    page.get_by_text("Left out: 2 files").click()
    expect(page.locator("#left-out")).to_contain_text("my things/table.xlsx is no picture, video, sound or text")
    page.get_by_label("Into the collection").fill("mine")
    page.get_by_role("button", name="Add 15 files").click()
    expect(page.locator("#added")).to_contain_text("14 items added to mine, 1 not in")
    expect(page.locator("#arrivals .card")).to_have_count(14)
    expect(page.locator("#refusals li")).to_have_count(1)
    expect(page.locator("#refusals li")).to_contain_text("my things/broken.jpg")
    expect(page.get_by_label("Files added")).to_have_js_property("value", 1)
    shoot(page, "add")
    answer = run_curl(page, "add", tmp_path)
    assert answer["upserted"] >= 1
    page.get_by_role("link", name="Browse them").click()
    expect(page.locator("#browsed")).to_have_text("14 items")
    expect(page.locator("#months")).to_contain_text("July 2019")
    settle(page)
    page.locator("#folders").get_by_role("button", name="photographs").click()
    expect(page.locator("#browsed")).to_have_text("6 items")
    expect(page.locator("#browse-items .where").first).to_contain_text("my things/photographs")
    page.get_by_role("link", name="Search").click()
    expect(page.locator("#found")).to_have_text("Newest first, of 14 items")
    search(page, "a lighthouse")
    assert page.locator("#results .card.text").first.get_attribute("data-id") == "my things/note.md"
    page.reload()
    expect(page.get_by_label("Collection", exact=True)).to_have_value("mine")


def test_an_item_that_is_replaced_shows_its_new_picture(page: Page, tmp_path: Path) -> None:
    def add(colour: str) -> None:
        Image.new("RGB", (64, 48), colour).save(tmp_path / "sheet.png")
        page.get_by_role("link", name="Add", exact=True).click()
        drop(page, tmp_path / "sheet.png")
        page.get_by_label("Into the collection").fill("replaced")
        page.get_by_role("button", name="Add 1 file").click()
        expect(page.locator("#added")).to_contain_text("1 item added to replaced")
        page.get_by_role("link", name="Browse them").click()

    def wait_for(channel: int) -> None:
        page.wait_for_function(
            """channel => {
              const image = document.querySelector("#browse-items .card img");
              if (!image?.complete || !image.naturalWidth) return false;
              const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
              context.drawImage(image, 0, 0);
              return context.getImageData(0, 0, 1, 1).data[channel] > 200;
            }""",
            arg=channel,
        )

    add("red")
    wait_for(0)
    add("blue")
    wait_for(2)


@pytest.mark.full
def test_adding_can_be_stopped_and_a_folder_chosen(page: Page, media: Path) -> None:
    page.goto("/#/add")
    page.set_input_files("#folder-input", media / "photographs")
    expect(page.get_by_role("button", name="Add 11 files")).to_be_focused()
    page.get_by_label("Into the collection").fill("stopped")
    held: list[Route] = []
    page.route("**/items", lambda route: held.append(route))  # no answer comes before the button is pressed
    with page.expect_request("**/items"):
        page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    for route in held:
        with suppress(Error):  # given up by the page
            route.continue_()
    expect(page.locator("#added")).to_contain_text(re.compile(r"Stopped|added to stopped in"))
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


@pytest.mark.full
def test_a_key_is_asked_for_kept_in_the_tab_and_not_shown(
    browser: Browser, keyed: httpx.Client, key: str, media: Path, watching: Callable[..., Page], complaints: list[str]
) -> None:
    page = watching(keyed)
    dialog = page.get_by_role("dialog", name="A key for this server")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("This server asks for a key")
    dialog.get_by_label("Key").fill("isthmus_wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The server refuses this key")
    dialog.get_by_label("Key").fill(key)
    dialog.get_by_role("button", name="Use it").click()
    expect(page.locator("#found")).to_contain_text("Newest first")
    expect(page.get_by_role("button", name="API key (one is set)")).to_be_visible()
    page.locator("#results img").first.scroll_into_view_if_needed()
    expect(page.locator("#results img").first).not_to_have_class("waiting")
    assert all("401" in each for each in complaints)
    complaints.clear()
    search(page, "a cat")
    assert key not in page.content() and key not in page.evaluate("JSON.stringify(localStorage)")
    answer = run_curl(page, "search", media, ISTHMUS_API_KEY=key)
    assert sorted(each["id"] for each in answer["results"]) == sorted(ids(page))
    page.reload()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    page.get_by_role("button", name="API key (one is set)").click()
    page.get_by_role("button", name="Forget it").click()
    expect(dialog).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    page.close()  # what it still asks for is refused, and said
    complaints.clear()


@pytest.mark.full
def test_without_previews_it_is_said_why_and_what_to_do(bare: httpx.Client, watching: Callable[..., Page]) -> None:
    page = watching(bare)
    search(page, "a cat")
    expect(page.locator("#previews-note")).to_contain_text("this server keeps no previews")
    expect(page.locator("#previews-note")).to_contain_text("isthmus serve --previews")
    expect(page.locator("#results .card .blank")).to_have_count(22)
    expect(page.locator("#results blockquote")).to_have_count(3)
    assert page.locator("#results img").count() == 0
    page.get_by_role("button", name="cat.jpg", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("There is no preview of this picture")
    shoot(page, "search-without-previews")


HOSTILE = "<img src=x onerror=alert(1)><script>window.pwned=1</script>\"'`${1}"


@pytest.mark.full
def test_items_are_text_and_never_markup(site: httpx.Client, page: Page) -> None:
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog: {dialog.message}"))
    hostile = {"text": HOSTILE, "collection": "hostile", "metadata": {HOSTILE: HOSTILE, "__proto__": [HOSTILE]}}
    items = [{"id": f"{HOSTILE}{n}"} | hostile for n in range(4)]
    assert site.post("/items", json={"items": items}).status_code == 200
    try:
        page.reload()
        page.get_by_label("Collection", exact=True).select_option("hostile")
        search(page, HOSTILE)
        assert sorted(ids(page)) == sorted(each["id"] for each in items)
        expect(page.locator("#results blockquote").first).to_have_text(HOSTILE)
        page.locator("#results .open").first.click()
        expect(page.get_by_role("dialog").locator("#facts")).to_contain_text(HOSTILE)
        page.get_by_role("dialog").get_by_text("Similar", exact=True).click()
        expect(page.locator("#found")).to_have_text(SEARCHED)
        page.get_by_role("button", name="Filters").click()
        page.goto("/#/map")
        expect(page.locator("#mapped")).to_have_text("4 items")
        page.get_by_label("Coloured by").select_option(HOSTILE)
        expect(page.locator("#legend")).to_contain_text("window.pwned=1")
        page.get_by_text("The same as a list").click()
        page.locator("#list button").first.click()
        expect(page.locator("#chosen blockquote")).to_have_text(HOSTILE)
        assert page.locator("img[src=x], main script").count() == 0
        assert page.evaluate("window.pwned") is None
    finally:
        site.delete("/collections/hostile")


@pytest.mark.full
def test_a_server_that_cannot_be_reached_is_told(page: Page, complaints: list[str]) -> None:
    page.route("**/search", lambda route: route.abort())
    page.get_by_label("Words to search for").fill("a cat")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text("The server cannot be reached. Is it still running?")
    assert len(complaints) == 1 and "ERR_FAILED" in complaints.pop()


BEFORE_THE_WORDS = 10  # the skip link, the brand, five views, the collection, the theme, the key
NAME = "(({ariaLabel, innerText, value}) => ariaLabel || innerText || value)(document.activeElement)"


def test_by_keyboard_alone(page: Page) -> None:
    expect(page.get_by_label("Words to search for")).to_be_focused()
    for _ in range(BEFORE_THE_WORDS):
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Words to search for")).to_be_focused()
    page.keyboard.type("rain")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text(SEARCHED)
    reached = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(NAME))
    kinds = {"image", "video", "audio", "text"}
    assert {"Choose an image or a sound", "Record a sound", "Another text"} | kinds <= reached
    assert any(each.endswith((".jpg", ".wav", ".txt")) for each in reached)


@pytest.mark.full
def test_the_theme_is_chosen_and_remembered(browser: Browser, site: httpx.Client) -> None:
    with browser.new_context(viewport=DESKTOP, base_url=str(site.base_url), color_scheme="dark") as context:
        page = context.new_page()
        page.goto("/")
        paper = "getComputedStyle(document.documentElement).backgroundColor"
        assert page.evaluate(paper) == "rgb(15, 22, 24)"
        page.get_by_role("button", name="Use the light theme").click()
        assert page.evaluate(paper) == "rgb(250, 248, 244)"
        page.reload()
        assert page.evaluate(paper) == "rgb(250, 248, 244)"
        expect(page.get_by_role("button", name="Use the dark theme")).to_be_visible()
