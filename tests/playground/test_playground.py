"""Each flow of the playground, as a person goes through it."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Error, Locator, Page, Route, expect

from tests.playground.conftest import DESKTOP, shoot

SEARCHED = re.compile(r"results? in ")
_DROPS = 4


def search(page: Page, words: str) -> None:
    page.get_by_label("Words to search for").fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text(SEARCHED)


def shown(page: Page, view: str) -> dict[str, Any]:
    """The JSON in the view's command."""
    words = shlex.split(page.locator(f"#{view}-request code").text_content() or "")
    [body] = [word.removeprefix("request=") for word in words if word.startswith(("request={", "{"))]
    answer = json.loads(body)
    assert isinstance(answer, dict)
    return answer


def ids(page: Page) -> list[str]:
    return page.locator("#results .id > span:last-child").all_inner_texts()


def card(page: Page, id: str) -> Locator:
    return page.locator("#results .card").filter(has=page.get_by_text(id, exact=True))


def run_curl(page: Page, view: str, folder: Path, **environment: str) -> Any:
    """What the view's command answers, run as it stands."""
    page.locator(f"#{view}-request summary").click()
    page.locator(f"#{view}-request").get_by_role("button", name="Copy").click()
    expect(page.locator(f"#{view}-request")).to_contain_text("Copied")
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
    expect(page.locator("#found")).to_have_text("Some of the 25 items here")
    expect(page.locator("#results .card")).to_have_count(12)
    expect(page.locator("#serving")).to_contain_text("384 dimensions")
    expect(page.get_by_label("Collection", exact=True)).to_have_value("default")


def test_searching_by_typing(page: Page, media: Path) -> None:
    search(page, 'it\'s a cup of "coffee" & $HOME;type=x\\n')
    expect(page.locator("#results .card")).to_have_count(24)
    answer = run_curl(page, "search", media)
    assert [each["id"] for each in answer["results"]] == ids(page)
    assert f"{answer['results'][0]['score']:.3f}" in page.locator("#results .score").first.inner_text()
    page.get_by_role("button", name="More results").click()
    expect(page.locator("#results .card")).to_have_count(25)
    expect(page.get_by_role("button", name="More results")).to_be_hidden()
    search(page, "a police siren")
    first = page.url
    search(page, "a cat")
    assert {"cat.jpg", "cat.wav"} & set(ids(page)[:3])
    expect(card(page, "cat.jpg").locator("img")).to_have_js_property("complete", True)
    assert card(page, "cat.jpg").locator("img").evaluate("image => image.naturalWidth") > 100
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "search-typed")
    page.go_back()
    expect(page.get_by_label("Words to search for")).to_have_value("a police siren")
    expect(page.locator("#results .card").first).to_contain_text("siren.wav")
    assert page.url == first and "q=a+police+siren" in first


@pytest.mark.full
def test_searching_by_an_image_that_is_chosen_and_one_that_is_dropped(page: Page, media: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose an image or a sound").click()
    chooser.value.set_files(media / "photographs/cat.jpg")
    expect(page.locator("#found")).to_have_text(SEARCHED)
    assert ids(page)[0] == "cat.jpg"
    answer = run_curl(page, "search", media / "photographs")
    assert [each["id"] for each in answer["results"]] == ids(page)
    page.get_by_role("button", name="Remove cat.jpg").click()
    expect(page.locator("#found")).to_contain_text("Some of the")
    drop(page, media / "photographs/coins.jpg")
    expect(page.locator("#results .card").first).to_contain_text("coins.jpg")


@pytest.mark.full
def test_what_no_server_reads_is_converted_or_refused(page: Page, tmp_path: Path, complaints: list[str]) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    page.set_input_files("#file", tmp_path / "notes.pdf")
    expect(page.locator("#found")).to_have_text("notes.pdf is neither an image nor a sound")
    (tmp_path / "broken.m4a").write_bytes(b"nothing")
    page.set_input_files("#file", tmp_path / "broken.m4a")
    expect(page.locator("#found")).to_contain_text("either an image, a sound nor a video")
    assert len(complaints) == 1 and "status of 415" in complaints.pop()


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
    expect(page.locator("#record")).to_have_attribute("title", "Stop 0:02")
    page.locator("#record").click()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    assert ids(page)[0] == "siren.wav", "the microphone plays a siren"
    with page.expect_download() as saved:
        page.get_by_role("link", name="Save").click()
    saved.value.save_as(tmp_path / saved.value.suggested_filename)
    answer = run_curl(page, "search", tmp_path)
    assert [each["id"] for each in answer["results"]] == ids(page)


@pytest.mark.full
def test_composing_with_weights(page: Page, media: Path, site: httpx.Client, tmp_path: Path) -> None:
    page.get_by_label("Words to search for").fill("thunder")
    page.set_input_files("#file", [media / "photographs/cat.jpg", media / "sounds/siren.wav"])
    expect(page.locator("#found")).to_have_text(SEARCHED)
    page.get_by_label("Weight of siren.wav").focus()
    with page.expect_response("**/search"):
        page.keyboard.press("Home")
    body = shown(page, "search")
    assert body["query"]["compose"] == [{"text": "thunder", "weight": 1}, {"weight": 1}, {"weight": -1}]
    expect(page.locator(".part").last.locator("output")).to_have_text("−1.0")
    found = ids(page)
    assert "cat.jpg" in found[:2], "beside the text about thunder"
    for path in ("photographs/cat.jpg", "sounds/siren.wav"):
        (tmp_path / Path(path).name).write_bytes((media / path).read_bytes())
    assert [each["id"] for each in run_curl(page, "search", tmp_path)["results"]] == found
    files = [("file", (path, (media / path).read_bytes())) for path in ("photographs/cat.jpg", "sounds/siren.wav")]
    same = site.post("/search", data={"request": json.dumps(body)}, files=files).json()["results"]
    assert [each["id"] for each in same] == found and "siren.wav" not in found[:15]
    shoot(page, "search-composed")


@pytest.mark.full
def test_filters_and_kinds(page: Page, media: Path) -> None:
    search(page, "an animal")
    page.get_by_text("Sounds", exact=True).click()
    expect(page.locator("#found")).to_have_text(re.compile("^11 results"))
    page.get_by_text("Sounds", exact=True).click()
    page.get_by_role("button", name="Filters").click()
    page.get_by_label("Metadata key").fill("set")
    page.get_by_label("Condition", exact=True).select_option("is not")
    page.get_by_label("Value").fill("sounds")
    page.keyboard.press("Tab")
    expect(page.locator("#found")).to_have_text(re.compile("^14 results"))
    page.get_by_role("button", name="Another condition").click()
    page.get_by_label("Metadata key").nth(1).fill("what")
    page.get_by_label("Condition", exact=True).nth(1).select_option("contains")
    page.get_by_label("Value").nth(1).fill("cat")
    page.keyboard.press("Tab")
    expect(page.locator("#found")).to_have_text(re.compile("^1 result in"))
    assert ids(page) == ["cat.jpg"]
    assert [each["id"] for each in run_curl(page, "search", media)["results"]] == ["cat.jpg"]
    expect(page.get_by_role("button", name="Filters")).to_contain_text("(2)")
    page.get_by_role("button", name="Remove this condition").nth(1).click()
    page.get_by_role("button", name="Remove this condition").click()
    expect(page.locator("#found")).to_have_text(re.compile("^24 results"))


@pytest.mark.full
def test_more_like_this_and_combining(page: Page) -> None:
    search(page, "church bells")
    page.get_by_role("button", name="More like church_bell.wav").click()
    expect(page.get_by_role("button", name="Remove church_bell.wav")).to_be_visible()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    assert "church_bell.wav" not in ids(page), "an item is not like itself"
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
    expect(page.locator("#chosen .id")).to_contain_text(tip.inner_text())
    before = page.locator("#canvas").evaluate("canvas => canvas.toDataURL()")
    page.keyboard.press("+")
    assert page.locator("#canvas").evaluate("canvas => canvas.toDataURL()") != before
    page.keyboard.press("0")
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
    page.get_by_role("button", name="siren.wav").click()
    expect(page.locator("#chosen .id")).to_contain_text("siren.wav")
    page.locator("#legend").get_by_label("photographs").check()
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "map")
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
    expect(page.locator("#chosen .id")).to_contain_text(name)


def test_adding_a_folder(page: Page, media: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my things"
    for name in ("photographs", "sounds"):
        (folder / name).mkdir(parents=True)
        for file in sorted((media / name).iterdir())[:6]:
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "note.md").write_text("# A lighthouse in the fog")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (folder / "table.xlsx").write_bytes(b"no media")
    (folder / ".hidden.jpg").write_bytes(b"")
    page.get_by_role("link", name="Add", exact=True).click()
    drop(page, folder)
    expect(page.locator("#added")).to_contain_text("14 files")
    expect(page.locator("#added")).to_contain_text("2 other files are left out")
    page.get_by_label("Into the collection").fill("mine")
    page.get_by_role("button", name="Add 14 files").click()
    expect(page.locator("#added")).to_contain_text("13 items added to mine, 1 not in")
    expect(page.locator("#refusals li")).to_have_count(1)
    expect(page.locator("#refusals li")).to_contain_text("my things/broken.jpg")
    expect(page.get_by_label("Files added")).to_have_js_property("value", 1)
    shoot(page, "add")
    answer = run_curl(page, "add", tmp_path)
    assert answer["upserted"] >= 1
    page.get_by_label("Collection", exact=True).select_option("mine")
    page.get_by_role("link", name="Search").click()
    expect(page.locator("#found")).to_have_text("Some of the 13 items here")
    search(page, "a lighthouse")
    assert ids(page)[0] == "my things/note.md"
    expect(page.locator("#results .card").first).to_contain_text("folder")
    page.reload()
    expect(page.get_by_label("Collection", exact=True)).to_have_value("mine")


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


def test_a_key_is_asked_for_kept_in_the_tab_and_not_shown(
    browser: Browser, keyed: httpx.Client, key: str, media: Path, watching: Callable[..., Page], complaints: list[str]
) -> None:
    page = watching(keyed)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("This server asks for a key")
    dialog.get_by_label("Key").fill("isthmus_wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The server refuses this key")
    dialog.get_by_label("Key").fill(key)
    dialog.get_by_role("button", name="Use it").click()
    expect(page.locator("#found")).to_contain_text("Some of the")
    expect(page.get_by_role("button", name="API key (one is set)")).to_be_visible()
    expect(page.locator("#results img.waiting")).to_have_count(0)
    assert all("401" in each for each in complaints)
    complaints.clear()
    search(page, "a cat")
    assert key not in page.content() and key not in page.evaluate("JSON.stringify(localStorage)")
    answer = run_curl(page, "search", media, ISTHMUS_API_KEY=key)
    assert [each["id"] for each in answer["results"]] == ids(page)
    page.reload()
    expect(page.locator("#found")).to_have_text(SEARCHED)
    page.get_by_role("button", name="API key (one is set)").click()
    page.get_by_role("button", name="Forget it").click()
    expect(dialog).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    page.close()  # what it still asks for is refused, and said
    complaints.clear()


@pytest.mark.full
def test_without_previews_a_card_is_tidy(bare: httpx.Client, watching: Callable[..., Page]) -> None:
    page = watching(bare)
    search(page, "a cat")
    expect(page.locator("#results .card .blank")).to_have_count(21)
    expect(page.locator("#results blockquote")).to_have_count(3)
    assert page.locator("#results img").count() == 0
    shoot(page, "search-without-previews")


HOSTILE = "<img src=x onerror=alert(1)><script>window.pwned=1</script>\"'`${1}"


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
        page.get_by_role("button", name="More like").first.click()
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
    expect(page.locator("#found")).to_have_text("The server cannot be reached")
    assert len(complaints) == 1 and "ERR_FAILED" in complaints.pop()


NAME = "(({ariaLabel, innerText, value}) => ariaLabel || innerText || value)(document.activeElement)"


@pytest.mark.full
def test_by_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Words to search for")).to_be_focused()
    page.keyboard.type("rain")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text(SEARCHED)
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(NAME))
    assert {"Choose an image or a sound", "Record a sound", "image", "audio", "text", "Another text"} <= reached
    assert any(each.startswith("Play ") for each in reached) or any(each.startswith("More like") for each in reached)


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
