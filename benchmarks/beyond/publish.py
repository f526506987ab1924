"""Does a published folder answer as the server does, by a browser and a server of files alone?

The index holds Flickr8k's 1,000 test photographs. 100 of their captions are asked by text, and 20 photographs of the
validation split by picture: as they are, as JPEG with halved colours, and as PNG with transparency. Beside them stand
five mosaics in JPEG of 5 megapixels, which the server decodes at a fraction of its size, and a browser cannot; they do
not count. onnxruntime-web comes from npm.
"""

import argparse
import base64
import csv
import functools
import io
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.servers import BenchmarkError, isthmus
from isthmus_client import Isthmus, NewItem
from service.commands.publish import RUNTIME, publish
from service.settings import Settings

VERSION = "1.30.0"
"""The version of onnxruntime-web that was measured."""
ASK = """async ({text, file}) => {
  const { ask, items } = await import("./playground/api.js");
  const bytes = file && Uint8Array.from(atob(file), (character) => character.charCodeAt(0));
  const { vector, order } = await ask(file ? { file: new Blob([bytes]) } : { text });
  return { vector: Array.from(vector), order: Array.from(order, (row) => items[row].id) };
}"""
"""The page's vector of a text or a picture (base64), and the ids of all items, the nearest first."""
_ITEMS, _TEXTS, _PICTURES, _BATCH = 1_000, 100, 20, 20
_NEAR = 0.002
"""Difference of two scores up to which the order of their items may differ."""
LARGE = "large jpeg"
_TILE, _TILES, _MOSAICS = (500, 375), 5, 5
_MOST_MB = 40.0


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def files_served(folder: Path) -> Iterator[str]:
    """The address of a server that serves a folder's files and does nothing else."""
    handler = functools.partial(_Files, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def runtime(folder: Path) -> Path:
    """The folder `dist` of onnxruntime-web, installed by npm where it is not there yet. Raises BenchmarkError."""
    dist = folder / "node_modules/onnxruntime-web/dist"
    if all((dist / name).is_file() for name in RUNTIME):
        return dist
    npm = shutil.which("npm")
    if npm is None:
        raise BenchmarkError("npm is not installed: it brings onnxruntime-web")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    command += ["--prefix", str(folder), f"onnxruntime-web@{VERSION}"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, timeout=600)
    return dist


def worst_inversion(order: Sequence[str], scores: dict[str, float]) -> float:
    """The largest difference of the server's scores of two items that the page has in the other order."""
    ranked = np.array([scores[id] for id in order if id in scores])
    return float(np.max(ranked - np.minimum.accumulate(ranked), initial=0.0))


def variants(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """The pictures' files in turn as they are, as JPEG, and as PNG that becomes transparent; then mosaics of them."""
    pictures = []
    for number, file in enumerate(files):
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        pictures.append(picture.resize(_TILE))
        written = io.BytesIO()
        match number % 3:
            case 0:
                yield "webp", file.read_bytes()
            case 1:
                picture.save(written, "JPEG", quality=85, subsampling="4:2:0")
                yield "jpeg", written.getvalue()
            case _:
                ramp = np.linspace(0, 255, picture.width).astype(np.uint8)
                picture.putalpha(Image.fromarray(np.tile(ramp, (picture.height, 1))))
                picture.save(written, "PNG")
                yield "png", written.getvalue()
    for first in range(_MOSAICS):
        mosaic = Image.new("RGB", (_TILES * _TILE[0], _TILES * _TILE[1]))
        for place in range(_TILES**2):
            corner = place % _TILES * _TILE[0], place // _TILES * _TILE[1]
            mosaic.paste(pictures[(first + place * (first + 1)) % len(pictures)], corner)
        written = io.BytesIO()
        mosaic.save(written, "JPEG", quality=90)
        yield LARGE, written.getvalue()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    files, texts, pictures = _inputs(options.data / "data/flickr8k")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise BenchmarkError("there is no Chromium: `make tools` installs it")
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name, "published"), Path(name, "store")
        with (
            isthmus("isthmus", options.bundle, store) as server,
            Isthmus(server.address, timeout_s=300) as space,
        ):
            for start in range(0, _ITEMS, _BATCH):
                space.upsert([NewItem(file.name, file) for file in files[start : start + _BATCH]])
            dist = runtime(options.cache / "runtime")
            outcome = publish(folder, "default", dist, Settings(bundle=options.bundle, store=store))
            asked: list[tuple[str, Any, dict[str, str]]] = [("text", text, {"text": text}) for text in texts]
            asked += [
                (kind, content, {"file": base64.b64encode(content).decode("ascii")}) for kind, content in pictures
            ]
            cosines: dict[str, list[float]] = {}
            inversions: dict[str, list[float]] = {}
            elsewhere: list[str] = []
            with files_served(folder) as address, sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
                page = browser.new_page()
                page.on("request", lambda request: _note(elsewhere, request.url, address))
                page.goto(address)
                for number, (kind, content, question) in enumerate(asked):
                    [embedded] = space.embed([content])
                    hits = space.search(content, top_k=_ITEMS)
                    answer = page.evaluate(ASK, question)
                    cosines.setdefault(kind, []).append(float(_unit(embedded.vector) @ _unit(answer["vector"])))
                    scores = {hit.id: hit.score for hit in hits}
                    inversions.setdefault(kind, []).append(worst_inversion(answer["order"], scores))
                    print(f"\r{number + 1} of {len(asked)} asked", end="", flush=True)
                browser.close()
    print()
    for kind, values in cosines.items():
        count = sum(inversion > _NEAR for inversion in inversions[kind])
        print(f"{kind:12}{len(values):4} asked, cosine ≥ {min(values):.6f}, {count} in another order")
    worst = {kind: round(max(values), 5) for kind, values in inversions.items()}
    inverted = sum(inversion > _NEAR for kind in worst if kind != LARGE for inversion in inversions[kind])
    megabytes = sum(outcome.megabytes[what] for what in ("texts", "pictures", "page"))
    least = {kind: round(min(values), 6) for kind, values in cosines.items()}
    return {
        "holds": min(least.values()) >= 0.999 and not inverted and megabytes < _MOST_MB and not elsewhere,
        "items": len(files),
        "texts": len(texts),
        "pictures": _PICTURES,
        "cosine_lowest": least,
        "in_another_order": inverted,
        "worst_inversion": worst,
        "download_mb": round(megabytes, 2),
        "megabytes": outcome.megabytes,
        "requests_elsewhere": len(elsewhere),
    }


def _inputs(data: Path) -> tuple[list[Path], list[str], list[tuple[str, bytes]]]:
    """Photographs to publish, captions and pictures to ask for."""
    names = [sorted((data / f"split_{split}.txt").read_text().split()) for split in ("test", "dev")]
    with (data / "captions.csv").open(newline="", encoding="utf-8") as stream:
        captions = {row["image"]: row["caption"] for row in csv.DictReader(stream)}
    files = [data / "images" / name for name in names[0][:_ITEMS]]
    texts = [captions[file.name] for file in files[:: _ITEMS // _TEXTS]]
    return files, texts, list(variants([data / "images" / name for name in names[1][:_PICTURES]]))


def _note(elsewhere: list[str], url: str, address: str) -> None:
    if not url.startswith((address, "blob:", "data:")):
        elsewhere.append(url)


def _unit(vector: Any) -> NDArray[np.float64]:
    wide = np.asarray(vector, np.float64)
    return wide / np.linalg.norm(wide)
