"""Follow one image on its way through POST /embed: python -m benchmarks.path_of_an_image [--all]

A server in this process is sent a PNG as JSON, after another one, so that everything is open. A profiler in every
thread notes the functions of `service/` that are entered from the reading of the body to the answer. The image *goes
through* a function that is given it and hands it on, by a call or as its result: as base64, as the bytes of its file,
as pixels or as its vector, alone or inside another value. A function that only looks at it (its size, its kind) does
not count. A type is the class of such a value and which of these forms it holds; lists and dictionaries are no types of
their own, but count as their members.

Not counted: what every request passes, whatever it holds (middleware, the HTTP protocol, the gate, the table of
routes), what `contract/` calls inside itself (training shares it; its functions that the service calls count), and
comprehensions.

Then the image is stored, and searched for by a text, with previews: how often is the store read, each time by a hop to
a thread? The search is asked twice and the second one counts: what a collection was taught is looked up by the first,
and every five seconds. The last line is a JSON object; `functions_entered` and `files_entered` count everything between
body and answer.
"""

import argparse
import base64
import io
import json
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx2
import numpy as np
from PIL import Image
from pydantic import BaseModel
from starlette.responses import Response

import service
from examples.demo import print_table
from service.api.app import create_app
from service.commands.serve import Server, uvicorn_config
from service.settings import Settings
from tests import tiny_bundle

_OURS = f"{Path(service.__file__).parent}/"
_PLUMBING = tuple(f"{_OURS}api/{name}.py" for name in ("auth", "deadline", "direct", "middleware", "protocol"))
_CONTRACT = f"{_OURS}contract/"
_BEGINNING = "reader.<locals>.read"
_STORE_READ = "Readers._read"
_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<module>")
_MEMBERS = 8
"""How many members of a list or a dictionary are looked at."""
_DEPTH = 4
"""How deep inside a value the image is looked for."""
_START_S = 60.0


@dataclass
class Passage:
    """Holds what is noted of one request."""

    data: bytes
    functions: dict[CodeType, bool] = field(default_factory=dict)
    """Every function that is entered, in order, and whether it hands the image on."""
    types: dict[tuple[str, str], None] = field(default_factory=dict)
    """(class, form) in the order in which they first appear."""

    def __post_init__(self) -> None:
        self.text = base64.b64encode(self.data).decode()

    def called(self, code: CodeType, caller: CodeType | None, values: Iterable[Any]) -> None:
        """Notes that a function is given these values by another of ours."""
        self.functions.setdefault(code, False)
        if self._seen(values) and caller is not None:
            self.functions[caller] = True

    def returned(self, code: CodeType, value: Any) -> None:
        self.functions.setdefault(code, False)
        if self._seen([value]):
            self.functions[code] = True

    def _seen(self, values: Iterable[Any]) -> bool:
        """Return whether the image is among the values; notes the types that hold it."""
        seen = False
        for value in values:
            if isinstance(value, list | tuple | dict):
                seen |= self._seen(list(value.values() if isinstance(value, dict) else value)[:_MEMBERS])
            elif form := self._form(value, _DEPTH):
                seen = True
                self.types.setdefault((type(value).__name__, form))
        return seen

    def _form(self, value: Any, depth: int) -> str | None:
        """Return what of the image the value holds."""
        match value:
            case str():
                return "base64" if value == self.text else None
            case bytes() | bytearray() | memoryview():
                data = bytes(value)
                if data == self.data:
                    return "file"
                return "base64" if self.text.encode() in data else "answer" if b'"embedding":[' in data else None
            case Image.Image():
                return "pixels"
            case np.ndarray():
                if value.shape[-3:] == (3, tiny_bundle.SIDE, tiny_bundle.SIDE):
                    return "pixels"
                return "vector" if value.shape[-1:] == (tiny_bundle.DIMENSIONS,) else None
            case list() | tuple() | dict():
                members: Iterable[Any] = list(value.values() if isinstance(value, dict) else value)[:_MEMBERS]
            case BaseModel():
                members = [getattr(value, name) for name in type(value).model_fields]
            case _ if is_dataclass(value) and not isinstance(value, type):
                members = [getattr(value, member_field.name, None) for member_field in fields(value)]
            case _:
                return None
        return next((form for member in members if (form := self._form(member, depth - 1))), None) if depth else None


class Profiler:
    """Notes the passage of one request, in every thread that is started while it is installed."""

    passage: Passage | None = None
    store_reads = 0
    _reading = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        passage, code = self.passage, frame.f_code
        if event == "call" and code.co_qualname == _STORE_READ:
            self.store_reads += 1
        if passage is None or not _counts(code):
            return
        self._reading = self._reading or code.co_qualname == _BEGINNING
        caller = _caller(frame)
        if not self._reading or (caller and caller.co_filename.startswith(_CONTRACT)):
            return
        if event == "call":
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            passage.called(code, caller, [frame.f_locals.get(name) for name in names])
        elif event == "return":
            passage.returned(code, argument)
            if isinstance(argument, Response):
                self.passage, self._reading = None, False


def _counts(code: CodeType) -> bool:
    ours = code.co_filename.startswith(_OURS) and not code.co_filename.startswith(_PLUMBING)
    return ours and code.co_name not in _COMPREHENSIONS


def _caller(frame: FrameType) -> CodeType | None:
    """The nearest function of ours that waits for this one, whatever stands between them."""
    above = frame.f_back
    while above is not None and not _counts(above.f_code):
        above = above.f_back
    return None if above is None else above.f_code


@contextmanager
def served(profiler: Profiler, folder: Path) -> Iterator[httpx2.Client]:
    """A server of a tiny bundle whose threads are watched."""
    settings = Settings(bundle=tiny_bundle.build(folder / "bundle").path, store=folder / "store", previews=True)
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn_config(create_app(settings), settings), settings.shutdown_grace_s)
    threading.setprofile(profiler)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        address = "http://{}:{}".format(*listening.getsockname())
        with httpx2.Client(base_url=address, timeout=_START_S, trust_env=False) as client:
            client.get("/healthz").raise_for_status()  # the socket listens before the server does
            yield client
    finally:
        threading.setprofile(None)
        server.should_exit = True
        thread.join()


def image(sigma: float) -> bytes:
    """A PNG of noise."""
    written = io.BytesIO()
    Image.effect_noise((48, 48), sigma).convert("RGB").save(written, "PNG")
    return written.getvalue()


def followed() -> tuple[Passage, int]:
    """The path of one image through POST /embed, and the reads of the store for a text through POST /search."""
    profiler, passage = Profiler(), Passage(image(40))

    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder, served(profiler, Path(folder)) as client:

        def post(path: str, body: dict[str, Any]) -> None:
            client.post(path, json=body).raise_for_status()

        post("/embed", {"inputs": [{"image": base64.b64encode(image(80)).decode()}]})
        profiler.passage = passage
        post("/embed", {"inputs": [{"image": passage.text}]})
        post("/items", {"items": [{"id": "noise", "image": passage.text}]})
        search = {"query": "a photo of the red dog", "include": ["metadata", "preview"]}
        post("/search", search)  # what a collection was taught is looked up by the first one
        profiler.store_reads = 0
        post("/search", search)
        return passage, profiler.store_reads


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.path_of_an_image", description=__doc__)
    parser.add_argument("--all", action="store_true", help="list the other functions that are entered, too")
    options = parser.parse_args()
    passage, store_reads = followed()
    through = [code for code, passed in passage.functions.items() if passed]
    listed = list(passage.functions) if options.all else through
    rows = [[place_of(code), str(code.co_firstlineno), code.co_qualname, mark(passage, code)] for code in listed]
    print_table("Functions, in the order in which they are entered", ["file", "line", "function", "image"], rows)
    print_table(
        "Types, in the order in which they appear",
        ["class", "holds"],
        list(map(list, passage.types)),
    )
    figures = {
        "functions": len(through),
        "files": len({code.co_filename for code in through}),
        "type_changes": len(passage.types) - 1,
        "functions_entered": len(passage.functions),
        "files_entered": len({code.co_filename for code in passage.functions}),
        "store_reads_of_a_text_search": store_reads,
    }
    print(json.dumps(figures))


def place_of(code: CodeType) -> str:
    return code.co_filename.removeprefix(_OURS)


def mark(passage: Passage, code: CodeType) -> str:
    return "hands on" if passage.functions[code] else ""


if __name__ == "__main__":
    main()
