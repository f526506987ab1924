"""Measure how long it is from a clone to one's own photograph, and what it is like then: python -m benchmarks.first_run

Clones this checkout into an empty folder, with an empty pip cache, and runs the README's four commands as a newcomer
would: clone, serve, index a folder, search. Then it indexes 1,000 photographs of one megapixel, previews included, and
compares the rate with a bare loop that decodes and embeds the same files on every core. Last it searches in the page
with Chromium, and scrolls through 1,000 results. It prints when each step ended and, as the last line, one JSON object.

With `--here` this checkout serves build/starter as it is installed: no clone, and only what comes after it is measured.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import numpy as np
import onnxruntime
from PIL import Image

from benchmarks.commands import finish, parser_of
from benchmarks.paired import ratio, say, take_turns
from benchmarks.plan import Plan
from benchmarks.servers import BenchmarkError
from benchmarks.servers import isthmus as isthmus_server
from examples.demo import print_table
from examples.photos import write_photos
from service.contract.bundle import OUTPUT, read_bundle
from service.contract.images import ImagePreprocessing, read_image

ROOT = Path(__file__).parents[1]
_CORES = len(os.sched_getaffinity(0))
_READY_S = 600.0
_MANY, _SIZE_PX, _BATCH = 1_000, (1_152, 864), 8
_LARGE, _COPIES, _LARGE_PX = 48, 4, (4_000, 3_000)
_QUERY, _FIRST = "a cat", "cat.jpg"
_PAINTED = """() => new Promise(done => {
    const words = document.querySelector("#words"), results = document.querySelector("#results");
    const former = results.querySelector("img"), began = performance.now();
    const look = () => {
        const image = results.querySelector("img");
        if (image && image !== former && image.complete && image.naturalWidth)
            requestAnimationFrame(() => done(performance.now() - began));
        else requestAnimationFrame(look);
    };
    words.value = WORDS;
    words.dispatchEvent(new Event("input", { bubbles: true }));
    document.querySelector("#ask").requestSubmit();
    look();
})"""
_SCROLLED = """() => new Promise(done => {
    let last = performance.now(), longest = 0, still = 0;
    const step = now => {
        longest = Math.max(longest, now - last);
        last = now;
        const before = scrollY;
        scrollBy(0, 120);
        still = scrollY === before ? still + 1 : 0;
        if (still > 60 || document.querySelectorAll("#results li").length >= MANY)
            done([longest, document.querySelectorAll("#results li").length]);
        else requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
})"""


def clone(folder: Path) -> Path:
    checkout = folder / "isthmus"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    return checkout


@contextmanager
def serving(checkout: Path, folder: Path) -> Iterator[str]:
    """Runs `make serve` until the block ends; it sets up the environment and the starter first. This very checkout
    serves what it has."""
    command = ["make", "serve"]
    if checkout == ROOT:
        bundle = ["--bundle", "build/starter", "--store", str(folder / "store")]
        command = [sys.executable, "-m", "service", "serve", *bundle]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ISTHMUS_", "VIRTUAL_ENV"))}
    if checkout != ROOT:
        kept.pop("PYTHONPATH", None)
    environment = kept | {"ISTHMUS_PORT": str(port), "PIP_CACHE_DIR": str(folder / "pip"), "HF_HUB_OFFLINE": "1"}
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, folder / "serve.log")
        yield address
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    """Returns when the server is ready. Raises BenchmarkError where it ends, or takes more than _READY_S."""
    until = time.monotonic() + _READY_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx2.get(f"{address}/readyz", trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.2)
    raise BenchmarkError(f"`make serve` did not come up:\n{log.read_text()[-2_000:]}")


def isthmus(checkout: Path, address: str, *arguments: str) -> str:
    """Runs the command of a checkout; returns what it prints."""
    program = [sys.executable, "-m", "isthmus_client"] if checkout == ROOT else [str(checkout / ".venv/bin/isthmus")]
    command = [*program, *arguments]
    environment = os.environ | {"ISTHMUS_URL": address}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def photographs(folder: Path, count: int, size_px: tuple[int, int] = _SIZE_PX) -> list[Path]:
    """Photographs of one megapixel: parts of the demo's, each another, as a camera would store them."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        sources = [Image.open(path).convert("RGB") for path in write_photos(Path(name)).values()]
        for source in sources:
            source.load()
    folder.mkdir(parents=True)
    paths = []
    for n in range(count):
        source = sources[n % len(sources)]
        share = rng.uniform(0.6, 1.0)
        width, height = (int(share * side) for side in source.size)
        left, top = (
            int(rng.integers(0, side - part + 1)) for side, part in zip(source.size, (width, height), strict=True)
        )
        part = source.crop((left, top, left + width, top + height)).resize(size_px)
        paths.append(folder / f"{n:04}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def bare_rate(bundle: Path, files: Sequence[Path]) -> float:
    """Photographs a second of a loop that decodes and embeds, a thread on every core."""
    opened = read_bundle(bundle)
    spec = opened.manifest.towers["image"].preprocessing
    assert isinstance(spec, ImagePreprocessing)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        opened.tower_path("image", opened.manifest.towers["image"].default("cpu")),
        options,
        providers=["CPUExecutionProvider"],
    )
    name = session.get_inputs()[0].name

    def embed(batch: Sequence[Path]) -> None:
        session.run([OUTPUT], {name: np.stack([read_image(path.read_bytes(), spec) for path in batch])})

    began = time.perf_counter()
    with ThreadPoolExecutor(_CORES) as pool:
        list(pool.map(embed, [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]))
    return len(files) / (time.perf_counter() - began)


def index(plan: Plan) -> dict[str, float | None]:
    """Large photographs by `isthmus index`, previews included, in turns with the bare loop.

    No photograph of 12 megapixels is at hand: these are of a megapixel or less, enlarged, and each is there several
    times, so that the start of the command is a small part; with another comment, since one file is embedded once.
    """
    files = photographs(plan.fresh() / "large", _LARGE, _LARGE_PX)
    for file in files[:]:
        data = file.read_bytes()
        for number in range(1, _COPIES):
            files.append(file.with_stem(f"{file.stem}-{number}"))
            files[-1].write_bytes(data[:2] + b"\xff\xfe\0\3" + bytes([number]) + data[2:])
    with isthmus_server("isthmus", plan.bundle, plan.fresh(), cache_bytes=0) as server:

        def indexed() -> float:
            started, cpu_s = time.perf_counter(), server.cpu_s
            isthmus(ROOT, server.address, "index", str(files[0].parent), "--again")
            say("isthmus index", server_cpu_ms=1e3 * (server.cpu_s - cpu_s) / len(files))
            return len(files) / (time.perf_counter() - started)

        rates = take_turns({"isthmus index": indexed, "bare": lambda: bare_rate(plan.bundle, files)}, plan.rounds)
    for name, measured in rates.items():
        say(f"12 megapixels, {name}", per_second=statistics.median(measured))
    return {"index_over_bare_decode": ratio(rates["isthmus index"], rates["bare"])}


def page_times(address: str) -> tuple[float, float, int]:
    """Milliseconds from a search in the page to its first picture (median), and of the longest frame in a scroll; and
    how many results the scroll passed."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise BenchmarkError("there is no Chromium: `make tools` installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1_280, "height": 900})
        page.goto(address)
        page.locator("#words").wait_for()
        queries = ("a cat", "a cup of coffee", "coins", "a brick wall", "galaxies", "grass")
        painted = [page.evaluate(_PAINTED.replace("WORDS", json.dumps(query))) for query in queries]
        longest, passed = page.evaluate(_SCROLLED.replace("MANY", str(_MANY)))
        browser.close()
    return statistics.median(painted), longest, passed


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("first_run", __doc__, bundle=False)
    parser.add_argument("--photographs", type=int, default=_MANY, help="how many are indexed after the first run")
    parser.add_argument("--here", action="store_true", help="measure this checkout, without a clone")
    options = parser.parse_args(arguments)
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = write_photos(folder / "photos")
        many = photographs(folder / "many", options.photographs)
        began = time.perf_counter()

        def passed(step: str) -> float:
            rows.append((step, f"{time.perf_counter() - began:.1f} s"))
            return time.perf_counter()

        checkout = ROOT if options.here else clone(folder)
        passed("git clone")
        with serving(checkout, folder) as address:
            passed("make serve: installed, and ready")
            isthmus(checkout, address, "index", str(folder / "photos"))
            asked = passed(f"isthmus index: {len(few)} photographs")
            hits = isthmus(checkout, address, "search", _QUERY, "--json").splitlines()
            seconds, first_search_s = time.perf_counter() - began, time.perf_counter() - asked
            passed(f"isthmus search {_QUERY!r}")
            if _FIRST not in hits[0]:
                raise BenchmarkError(f"{_QUERY!r} finds {hits[0][:200]} first, not {_FIRST}")
            started = time.perf_counter()
            isthmus(checkout, address, "index", str(folder / "many"), "--collection", "default")
            index_per_s = len(many) / (time.perf_counter() - started)
            first_paint_ms, longest_frame_ms, results = page_times(address)
        bare_per_s = bare_rate(checkout / "build/starter", many)
    figures = {
        "seconds": round(seconds, 1),
        "commands": 4,
        "first_search_s": round(first_search_s, 2),
        "index_per_s": round(index_per_s, 1),
        "index_over_bare": round(index_per_s / bare_per_s, 3),
        "first_paint_ms": round(first_paint_ms, 1),
        "longest_frame_ms": round(longest_frame_ms, 1),
        "results_scrolled": results,
    }
    rows += [
        (name.replace("_", " "), str(value)) for name, value in figures.items() if name not in ("seconds", "commands")
    ]
    if options.here:
        rows = rows[-len(figures) + 2 :]
        figures = {name: value for name, value in figures.items() if name not in ("seconds", "commands")}
    print_table("From a clone to one's own photograph", ("step", "after"), rows)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    finish(main)
