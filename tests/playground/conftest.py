"""A real Chromium at a real server that serves the starter, with the demonstration's photographs and sounds in it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from examples.photos import PHOTOS, write_photos
from examples.sounds import SOUNDS, write_sounds
from service.api.keys import create_key
from service.settings import Settings
from tests.conftest import serving

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build/playground"
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
# A message that can be pressed goes after 8 seconds, which on a busy machine is before it is pressed.
PATIENT = "const wait = setTimeout; window.setTimeout = (run, ms, ...on) => wait(run, ms === 8_000 ? 6e5 : ms, ...on)"
DEADLINE_MS = 60_000  # a busy machine is slow, not wrong
expect.set_options(timeout=DEADLINE_MS)
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
WIDE = {"width": 2560, "height": 1300}
TEXTS = {
    "harbour.txt": "A cup of coffee at the harbour, while the gulls cry over the boats",
    "storm.txt": "Thunder rolls over the hills, and then the rain begins",
    "launch.txt": "An astronaut in an orange suit waits for the rocket to be launched",
}


def needed(there: object, what: str) -> None:
    if not there:
        assert "CI" not in os.environ, what
        pytest.skip(what)


@pytest.fixture(scope="package")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photographs/*.jpg and sounds/*.wav."""
    folder = tmp_path_factory.mktemp("media")
    write_photos(folder / "photographs")
    write_sounds(folder / "sounds")
    return folder


@pytest.fixture(scope="package")
def starter() -> Path:
    bundle = ROOT / "build/starter"
    needed((bundle / "manifest.json").exists(), "build/starter is not there: `make starter` builds it")
    return bundle


@pytest.fixture(scope="package")
def site(starter: Path, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that keeps previews and lends its originals, and has something to find."""
    store = tmp_path_factory.mktemp("playground") / "store"
    folders = (media / "photographs", media / "sounds")
    with serving(Settings(bundle=starter, store=store, device="cpu", previews=True, media=folders)) as client:
        fill(client, media)
        yield client


@pytest.fixture(scope="package")
def bare(starter: Path, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server as it is without any setting: it keeps no previews."""
    store = tmp_path_factory.mktemp("bare") / "store"
    with serving(Settings(bundle=starter, store=store, device="cpu", previews=False)) as client:
        fill(client, media)
        yield client


@pytest.fixture(scope="package")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="package")
def key(key_file: Path) -> str:
    return create_key(key_file, "a person", ["read", "write"])[1]


@pytest.fixture(scope="package")
def keyed(
    starter: Path, media: Path, key_file: Path, key: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A server that asks for a key."""
    store = tmp_path_factory.mktemp("keyed") / "store"
    with serving(Settings(bundle=starter, store=store, device="cpu", previews=True, keys=key_file)) as client:
        client.headers["authorization"] = f"Bearer {key}"
        fill(client, media)
        yield client


MONTHS, DATES = ("2026-06", "2026-09"), (1_781_000_000, 1_789_000_000)
VECTORS = 130
BATCH = 5  # files of one request: a busy machine answers each in time


def put_vectors(client: httpx.Client, collection: str, dimensions: int = 384) -> None:
    """Many items that cost no embedding, in two folders and three months."""
    items: list[dict[str, Any]] = []
    for n in range(VECTORS):
        vector = [0.0] * dimensions
        vector[n], vector[n + 1] = 1.0, 0.5
        month = 1 + n % 3
        described = {"file.folder": "Album/rome" if n % 2 else "Album", "file.month": f"2024-0{month}"}
        metadata: dict[str, Any] = described | {"file.date": 1_704_067_200 + 31 * 86_400 * (month - 1) + n}
        items.append({"id": f"{n:03}.vec", "vector": vector, "metadata": metadata, "collection": collection})
    response = client.post("/items", json={"items": items})
    assert response.json()["upserted"] == VECTORS, response.text


def fill(client: httpx.Client, media: Path) -> None:
    heard = {name: (make.__doc__ or "").partition(":")[0].strip(".") for name, make in SOUNDS.items()}
    what = {"photographs": PHOTOS, "sounds": heard}
    files = [*sorted((media / "photographs").iterdir()), *sorted((media / "sounds").iterdir())]
    items: list[dict[str, Any]] = []
    for place, file in enumerate(files):
        kind = file.parent.name
        # What `isthmus index` would note of its folder and its date.
        noted = {"file.folder": f"Demo/{kind}", "file.month": MONTHS[place % 2], "file.date": DATES[place % 2] - place}
        items.append({"id": file.name, "metadata": {"what": what[kind][file.stem], "set": kind} | noted})
    items += [{"id": name, "text": text, "metadata": {"set": "notes"}} for name, text in TEXTS.items()]
    for start in range(0, len(items), BATCH):
        some = items[start : start + BATCH]
        parts = [("file", (file.name, file.read_bytes())) for file in files[start : start + BATCH]]
        if parts:
            response = client.post("/items", data={"request": json.dumps({"items": some})}, files=parts)
        else:
            response = client.post("/items", json={"items": some})
        assert response.json()["upserted"] == len(some), response.text


@pytest.fixture(scope="package")
def browser(media: Path) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    needed(program, "there is no Chromium: `make tools` installs it")
    microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    heard = f"--use-file-for-fake-audio-capture={media / 'sounds/siren.wav'}"
    flags = [*microphone, heard, "--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """Return what the consoles have said. A test removes what it expects."""
    return []


@pytest.fixture
def watching(browser: Browser, complaints: list[str]) -> Iterator[Callable[..., Page]]:
    """Opens the playground of a server. The test fails if the console says anything, or anybody else is asked."""
    contexts = []

    def open_page(server: httpx.Client, **options: Any) -> Page:
        origin = str(server.base_url)
        allowed = ["clipboard-read", "clipboard-write", "microphone"]
        # Without transitions nothing is seen half-way.
        usual = {"viewport": DESKTOP, "base_url": origin, "permissions": allowed, "reduced_motion": "reduce"}
        context = browser.new_context(**usual | options)
        contexts.append(context)
        context.set_default_timeout(DEADLINE_MS)
        context.add_init_script(AXE)
        context.add_init_script(PATIENT)
        page = context.new_page()

        def heard(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                complaints.append(f"console {message.type}: {message.text} {message.location}")

        def asked(request: Request) -> None:
            if not request.url.startswith((origin, "blob:", "data:")):
                complaints.append(f"a request to somebody else: {request.url}")

        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
        page.on("request", asked)
        page.goto("/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(site: httpx.Client, watching: Callable[..., Page]) -> Page:
    """The page of the server with something in it, once it has begun."""
    page = watching(site)
    expect(page.locator("#serving")).not_to_be_empty()
    return page


def shoot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", animations="disabled")
