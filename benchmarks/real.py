"""Real inputs, from the folder that ISTHMUS_DATA names: captions and photographs of Flickr8k, sounds of ESC-50."""

import base64
import csv
import io
import json
import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from benchmarks.load import request
from benchmarks.servers import BenchmarkError, Server

_QUALITY = 90  # of the JPEGs


def root() -> Path:
    """The folder of the data. Raises BenchmarkError where there is none."""
    folder = Path(os.environ.get("ISTHMUS_DATA") or Path(__file__).resolve().parents[2] / "shared")
    if not (folder / "data" / "flickr8k" / "captions.csv").is_file():
        raise BenchmarkError(f"there are no Flickr8k captions in {folder}: set ISTHMUS_DATA")
    return folder / "data"


@cache
def captions() -> tuple[str, ...]:
    """Captions of Flickr8k, no two alike, in an order of no meaning."""
    with (root() / "flickr8k" / "captions.csv").open(newline="") as file:
        distinct = sorted({row["caption"] for row in csv.DictReader(file)})
    random.Random(0).shuffle(distinct)
    return tuple(distinct)


@cache
def jpegs(count: int) -> tuple[bytes, ...]:
    """Photographs of Flickr8k at the size that they come in, as JPEG files."""
    files = sorted((root() / "flickr8k" / "images").iterdir())
    chosen = random.Random(0).sample(files, min(count, len(files)))
    return tuple(map(_jpeg, chosen))


@cache
def sounds(count: int) -> tuple[bytes, ...]:
    """Recordings of ESC-50, as they are."""
    files = sorted((root() / "esc50" / "audio").iterdir())
    return tuple(path.read_bytes() for path in random.Random(0).sample(files, min(count, len(files))))


def _jpeg(path: Path) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def groups(inputs: Sequence[Any], size: int) -> list[list[Any]]:
    """Makes as many groups of `size` as there are, no input in two."""
    return [list(inputs[start : start + size]) for start in range(0, len(inputs) - size + 1, size)]


def post(server: Server, path: str, body: dict[str, Any]) -> bytes:
    return request(urlsplit(server.address).netloc, path, json.dumps(body).encode())


def text_requests(server: Server, path: str, model: str, size: int) -> list[bytes]:
    """Requests in OpenAI's shape of `size` captions each, a bare string where it is one."""
    return [
        post(server, path, {"model": model, "input": group if size > 1 else group[0]})
        for group in groups(captions(), size)
    ]


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
