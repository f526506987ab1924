"""Run the demo (`make demo`): serve a bundle, index photographs and sounds, search and label them, over HTTP alone.

python -m examples.demo --bundle build/starter
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from examples.photos import PHOTOS, write_photos
from examples.sounds import SOUNDS, write_sounds

DEADLINE_S = 120.0
# A query → the name of the photograph or the sound that answers it.
IMAGE_QUERIES: Mapping[str, str] = {
    "a cat": "cat",
    "a cup of coffee": "coffee",
    "an astronaut": "astronaut",
    "a rocket": "rocket",
    "coins": "coins",
    "a brick wall": "brick",
    "grass": "grass",
    "galaxies": "hubble_deep_field",
}
SOUND_QUERIES: Mapping[str, str] = {
    "a police siren": "siren",
    "heavy rain": "rain",
    "church bells": "church_bell",
    "a cat meowing": "cat",
}
_FAREWELL = """
The server of this demonstration has ended. To keep one open, on http://127.0.0.1:8000:

  make serve

and in another terminal, for instance:

  curl -F file=@build/media/cat.jpg -F 'request={"items": [{"id": "cat.jpg"}]}' http://127.0.0.1:8000/items
  curl -H 'content-type: application/json' -d '{"query": "a cat"}' http://127.0.0.1:8000/search"""
_LISTENING = re.compile(r"listening on (http://\S+)")


class DemoError(Exception):
    """The demonstration cannot go on: the message says why."""


@contextmanager
def serving(bundle: Path, store: Path) -> Iterator[httpx2.Client]:
    """`python -m service serve` on a free port, ready, and stopped at the end. Raises DemoError."""
    command = [sys.executable, "-m", "service", "serve", "--bundle", str(bundle), "--store", str(store), "--port", "0"]
    with subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True) as server:
        overdue = threading.Timer(DEADLINE_S, server.kill)
        overdue.start()
        try:
            assert server.stdout is not None
            address = next((found[1] for line in server.stdout if (found := _LISTENING.search(line))), None)
            if address is None:
                raise DemoError(f"the server ended before it listened (exit status {server.wait()})")
            overdue.cancel()
            with httpx2.Client(base_url=address, timeout=DEADLINE_S, trust_env=False) as client:
                _wait_until_ready(client)
                yield client
        finally:
            overdue.cancel()
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_ready(client: httpx2.Client) -> None:
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not (response := client.get("/readyz")).is_success:
        if time.monotonic() > deadline:
            raise DemoError(f"the server is not ready after {DEADLINE_S:.0f} s: {response.text}")
        pause.wait(0.1)


def post(client: httpx2.Client, route: str, request: Mapping[str, Any], files: Sequence[Path] = ()) -> Any:
    """POST a request: as JSON, or with files as a multipart form. Raises DemoError for an answer that is an error."""
    if not files:
        response = client.post(route, json=request)
    else:
        with ExitStack() as stack:
            parts = [("file", (file.name, stack.enter_context(file.open("rb")))) for file in files]
            response = client.post(route, data={"request": json.dumps(request)}, files=parts)
    if not response.is_success:
        raise DemoError(f"POST {route} was answered with {response.status_code}: {response.text}")
    return response.json()


def index(client: httpx2.Client, media: Mapping[str, Path], what: Mapping[str, str]) -> None:
    """Store each file under its name, with what it is as metadata."""
    items = [{"id": file.name, "metadata": {"what": what[name]}} for name, file in media.items()]
    post(client, "/items", {"items": items}, list(media.values()))


def print_search(client: httpx2.Client, question: str, request: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
    results = post(client, "/search", {**request, "top_k": 3}, files)["results"]
    rows = [(result["id"], f"{result['score']:.3f}", result["metadata"]["what"]) for result in results]
    print_table(question, ("item", "similarity", "what it is"), rows)


def print_firsts(client: httpx2.Client, title: str, modality: str, queries: Iterable[str]) -> None:
    """Print what each query finds first, and second, among the items of one modality."""
    rows = []
    for query in queries:
        results = post(client, "/search", {"query": query, "modalities": [modality], "top_k": 2})["results"]
        first, second = results[0], results[1]
        rows.append((query, f"{first['score']:.3f}", first["id"], f"before {second['id']} ({second['score']:.3f})"))
    print_table(title, ("query", "similarity", "found first", ""), rows)


def print_classify(client: httpx2.Client, file: Path, labels: Sequence[str]) -> None:
    [result] = post(client, "/classify", {"labels": labels, "top_k": 3}, [file])["results"]
    rows = [(each["label"], f"{each['score']:.3f}") for each in result["labels"]]
    print_table(f"Which label fits {file.name}, of {len(labels)}?", ("label", "score"), rows)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns, the second aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, *rows):
        print("   ".join((f"  {row[0]:<{widths[0]}}", f"{row[1]:>{widths[1]}}", *row[2:])))


def demonstrate(client: httpx2.Client, folder: Path) -> None:
    """Index the sample media, then one search or classification of each kind."""
    photos, sounds = write_photos(folder), write_sounds(folder)
    index(client, photos, PHOTOS)
    index(client, sounds, {name: (make.__doc__ or "").partition(":")[0].strip(".") for name, make in SOUNDS.items()})
    print(f"Indexed {len(photos)} photographs and {len(sounds)} sounds.")

    print_firsts(client, "Text to image", "image", IMAGE_QUERIES)
    print_firsts(client, "Text to sound", "audio", SOUND_QUERIES)
    print_search(
        client,
        'Text to image: "a person in a space suit"',
        {"query": "a person in a space suit", "modalities": ["image"]},
    )
    print_search(client, "Sound to image: cat.wav", {"modalities": ["image"]}, [sounds["cat"]])
    print_classify(client, photos["coffee"], ["coffee", "cat", "rocket", "brick wall", "astronaut", "coins"])
    print_classify(client, sounds["church_bell"], ["church bells", "siren", "rain", "sea waves", "crickets", "clock"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="Demonstrate a bundle.")
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    bundle = parser.parse_args().bundle
    print(f"Serving {bundle} …", flush=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="isthmus-demo-") as folder,
            serving(bundle, Path(folder, "store")) as client,
        ):
            demonstrate(client, Path(folder, "media"))
    except (DemoError, httpx2.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_FAREWELL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
