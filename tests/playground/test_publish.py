"""A published folder in a real Chromium, on files alone: it answers as the server that has the same store."""

import base64
import io
import json
import random
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from benchmarks.beyond.publish import ASK, VERSION, files_served, worst_inversion
from service.commands.publish import publish
from service.contract.graphs import weights
from service.contract.images import ImagePreprocessing, read_image
from service.contract.tokens import TextPreprocessing, TextTokenizer
from service.engine.packing import pack
from service.settings import Settings
from tests import npm, tiny_bundle
from tests.conftest import serving
from tests.playground.conftest import DEADLINE_MS, fill
from tests.playground.test_playground import drop
from tests.service.graphs import graph_of

TOKENIZER = TextPreprocessing(max_length=32)
HARD = [
    *(
        "Crème BRÛLÉE à l'Île-de-France",
        "ΑΣ ὈΔΥΣΣΕΎΣ",
        "İstanbul ǅ ß ﬁ ŉ",
        "日本語の東京タワー 𠀀𪜶",
        "한국어 คำ हिन्दी",
    ),
    *("a\x00b\x07c\u200bd\ufeffe\u00adf", "tab\tnew\nline\r\u2028\u3000\u00a0end", " \u0085 leading"),
    *(
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 emoji\U0001f600text",
        "\U0001d400 ① ² ½",
    ),
    *("x" * 100, "x" * 101, "word " * 300, "unaffable antidisestablishmentarianism", "e\u0301\u0302\u0327"),
    *("it's (really) $5.00—“so” they—say…", "[CLS] a [SEP] [mask] [MASK]b", "don’t-stop_me+now=1/2", "．，！？"),
    "\ud7ff\ue000\uffff\ufffd a",
]


@dataclass(frozen=True)
class Published:
    """A server, and the folder that was published of its store."""

    client: httpx.Client
    bundle: Path
    site: httpx.Client


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    npm.install(folder, f"onnxruntime-web@{VERSION}")
    return folder / "node_modules/onnxruntime-web/dist"


@pytest.fixture(scope="module", params=["tiny", pytest.param("starter", marks=pytest.mark.full)])
def published(
    request: pytest.FixtureRequest, media: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("published")
    tiny = request.param == "tiny"
    bundle = tiny_bundle.build(folder / "bundle", bert=True).path if tiny else request.getfixturevalue("starter")
    settings = Settings(bundle=bundle, store=folder / "store", device="cpu", previews=True)
    with serving(settings) as client:
        fill(client, media)
        with closing(sqlite3.connect(folder / "store/store.sqlite3")) as file, file:
            file.execute("INSERT INTO mapped SELECT slot, 0.07 FROM items WHERE id = 'cat.jpg'")
        publish(folder / "site", "default", runtime, settings)
        with files_served(folder / "site") as address, httpx.Client(base_url=address) as site:
            yield Published(client, bundle, site)


@pytest.fixture
def page(published: Published, watching: Callable[..., Page]) -> Page:
    page = watching(published.site)
    expect(page.locator(".card").first).to_be_visible()
    return page


def test_it_answers_as_the_server(page: Page, published: Published, media: Path) -> None:
    pictures = [(media / "photographs" / name).read_bytes() for name in ("cat.jpg", "coffee.jpg")]
    with Image.open(io.BytesIO(pictures[0])) as picture:
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        pictures.append(saved(picture))
    texts = ["a cat", "a red cup of coffee on a table", "Thunder, and rain!", "blue"]
    for content in [*texts, *pictures]:
        if isinstance(content, str):
            wire: Any = content
            question = {"text": content}
        else:
            wire = {"image": base64.b64encode(content).decode()}
            question = {"file": wire["image"]}
        [embedded] = published.client.post("/embed", json={"inputs": [wire]}).json()["embeddings"]
        found = published.client.post("/search", json={"query": wire, "top_k": 100}).json()["results"]
        answer = page.evaluate(ASK, question)
        assert np.dot(embedded["embedding"], answer["vector"]) > 0.9999
        scores = {hit["id"]: hit["score"] for hit in found}
        assert scores.keys() == set(answer["order"])
        assert worst_inversion(answer["order"], scores) < 0.002


def test_a_person_searches_by_words_by_a_picture_and_by_an_item(page: Page, media: Path) -> None:
    found = page.locator("#found")
    expect(found).to_have_text(re.compile(r"^\d+ items$"))
    page.fill("#words", "a cat")
    page.press("#words", "Enter")
    expect(found).to_have_text(re.compile("best first"))
    expect(page).to_have_url(re.compile(r"words=a\+cat"))
    drop(page, media / "photographs/cat.jpg")
    expect(found).to_have_text(re.compile("most like cat.jpg first"))
    first = page.locator(".card").first
    expect(first).to_have_attribute("data-id", "cat.jpg")
    first.locator(".open").click()
    expect(page.locator("#facts")).to_contain_text("Similarity 1.000")
    expect(page.locator("#facts")).to_contain_text("mapped from another model's, about 0.07 off")
    expect(page.get_by_role("button", name="Download")).to_be_visible()
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)
    page.locator("#detail-acts").get_by_role("button", name="More like cat.jpg").click()
    expect(found).to_have_text(re.compile("most like cat.jpg first"))
    expect(page).to_have_url(re.compile("like=cat.jpg"))
    expect(page.locator(".card[data-id='cat.jpg']")).to_have_count(0)
    page.get_by_text("Sounds (").click()
    expect(page.locator(".card:not(.audio)")).to_have_count(0)
    for _ in range(3):  # the item that was open is a step too
        page.go_back()
    expect(page.locator("#words")).to_have_value("a cat")
    expect(found).to_have_text(re.compile("best first"))
    expect(page.locator("[aria-busy]")).to_have_count(0)  # results that are being replaced are faint
    wrong = page.evaluate("async () => (await axe.run(document)).violations.map(({id, nodes}) => [id, nodes[0].html])")
    assert wrong == []


def test_a_picture_that_is_none_and_words_that_are_none_say_so(page: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    page.set_input_files("#file", tmp_path / "broken.png")
    expect(page.locator("#found.bad")).to_have_text(re.compile("cannot read that picture"))
    page.fill("#words", "\U00010380\U00010381")  # Ugaritic
    page.press("#words", "Enter")
    expect(page.locator("#found")).to_have_text(re.compile("best first"))
    expect(page.locator("#verdict")).to_contain_text("knows none of these words")


def test_weights_unpack_to_what_was_measured(page: Page) -> None:
    rng = np.random.default_rng(0)
    tables = [
        (rng.standard_normal((rows, 64 + 3 * rows)) * scale).astype(kind)
        for rows, scale, kind in (
            (64, 1, np.float16),
            (65, 1e-6, np.float16),
            (70, 3e-2, np.float32),
            (90, 9, np.float16),
        )
    ]
    tables[0][3], tables[0][4, 5] = 0, 300
    graph = graph_of(*tables)
    ratios = dict(zip((one.start for one in weights(graph)), (16, 50, 2048, 333), strict=True))
    packed, rebuilt = pack(graph, ratios)
    unpack = """async (packed) => {
      const { unpacked } = await import("./playground/weights.js");
      const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
      const file = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const graph = unpacked(new Uint8Array(await new Response(file).arrayBuffer()));
      return btoa(Array.from(graph, (byte) => String.fromCharCode(byte)).join(""));
    }"""
    assert base64.b64decode(page.evaluate(unpack, base64.b64encode(packed).decode())) == rebuilt != graph


def tokens(page: Page, path: Path, texts: list[str], most: int) -> list[dict[str, Any]]:
    """Return what the page's tokenizer makes of texts."""
    encode = """async ([file, texts, most]) => {
      const { tokenizer } = await import("./playground/tokens.js");
      return texts.map(tokenizer(JSON.parse(file), most));
    }"""
    return page.evaluate(encode, [path.read_text("utf-8"), texts, most])


def test_hard_texts_have_the_tokens_that_they_have_in_python(page: Page, published: Published) -> None:
    path = published.bundle / "tokenizer.json"
    rng = random.Random(0)
    alphabet = "".join(HARD) + "abcdefghijklmnopqrstuvwxyz     .,-"
    texts = HARD + ["a" + "".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(300)]
    expected = [TextTokenizer(path, TOKENIZER).encode(text) for text in texts]
    for text, ours, theirs in zip(texts, tokens(page, path, texts, TOKENIZER.max_length), expected, strict=True):
        assert (tuple(ours["ids"]), ours["truncated"]) == (theirs.ids, theirs.truncated), repr(text)


@pytest.mark.full
def test_every_character_has_the_tokens_that_it_has_in_python(page: Page, starter: Path) -> None:
    """But for some that Unicode has since added, or calls marks: `tokenizers` knows the kinds of version 8."""
    path = starter / "tokenizer.json"
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    python = TextTokenizer(path, TOKENIZER)
    for start in range(0, len(characters), 50_000):
        some = characters[start : start + 50_000]
        ours = tokens(page, path, [f"a{each}b" for each in some], TOKENIZER.max_length)
        for each, answer in zip(some, ours, strict=True):
            same = tuple(answer["ids"]) == python.encode(f"a{each}b").ids
            before = unicodedata.ucd_3_2_0.category(each)
            assert same or before == "Cn" or before != unicodedata.category(each), hex(ord(each))


def saved(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    picture.save(written, format, **options)
    return written.getvalue()


@pytest.mark.full
def test_pixels_are_those_of_the_server(page: Page, media: Path) -> None:
    with Image.open(media / "photographs/coffee.jpg") as opened:
        photo = opened.convert("RGB").resize((500, 380))
    clear = photo.convert("L").point(lambda level: 255 if level > 128 else 0)
    white = Image.merge("RGBA", [Image.new("L", photo.size, 255)] * 3 + [clear])
    upright = Image.Exif()
    upright[0x0112] = 6
    square = {"height": 96, "width": 96, "resample": "bicubic"}
    cases: list[tuple[bytes, dict[str, Any], float]] = [
        *((saved(each), square, 0) for each in (photo, photo.resize((70, 40)), photo.resize((50, 900)), white)),
        *((saved(photo.convert(mode)), square, 0) for mode in ("L", "P")),
        (saved(photo, "JPEG", subsampling="4:2:0", exif=upright), {**square, "height": 300, "width": 300}, 0),
        (saved(photo, "WEBP", quality=80), square, 0),
        (saved(photo.resize((1000, 760)), "JPEG"), square, 0.5),  # the server decodes it at a quarter
    ]
    for filter in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        for shape in ({}, {"squashed": [140, 120]}, {"resize": "shortest_edge", "shortest_edge": 110}):
            cases.append((saved(photo), {**square, "resample": filter, **shape}, 0))
    cases.append((saved(photo.resize((900, 60))), {**square, "resize": "shortest_edge"}, 0.5))
    read = """async ({ data, spec }) => {
      const { pixelsOf } = await import("./playground/pixels.js");
      const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
      return Array.from(await pixelsOf(new Blob([bytes]), spec));
    }"""
    for number, (data, chosen, tolerance) in enumerate(cases):
        spec = ImagePreprocessing.model_validate(chosen)
        given = {"data": base64.b64encode(data).decode(), "spec": json.loads(spec.model_dump_json())}
        ours = np.array(page.evaluate(read, given), np.float32).reshape(3, spec.height, spec.width)
        levels = np.abs(ours - read_image(data, spec)) * 127.5
        assert levels.mean() <= tolerance + 1e-4, (number, chosen, levels.mean())


def test_a_page_that_cannot_search_says_why(browser: Browser, published: Published, tmp_path: Path) -> None:
    for name in ("index.html", "playground/start.js"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(published.site.get(f"/{name}").content)
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    expect(page.locator("#found")).to_contain_text("python -m http.server", timeout=DEADLINE_MS)
    page.route("**/items.json", lambda route: route.fulfill(status=404))
    page.goto(str(published.site.base_url))
    expect(page.locator("#found")).to_contain_text("items.json cannot be fetched", timeout=DEADLINE_MS)
    page.close()
