"""Records the first run in a terminal: a cast for asciinema's players, and a picture of it that plays by itself.

    python -m tests.docs.cast docs/recordings/first-run

A shell in a pseudo-terminal is given the commands one by one, as if they were typed, and what it prints is written down
with its times: FILE.cast in asciicast v2, and FILE.svg, in which every line comes when it came.
"""

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pyte

from examples.photos import write_photos

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, ROWS = 88, 46
COMMANDS = (
    "isthmus serve --bundle build/starter --store ~/store --log-level warning &",
    "isthmus index ~/Pictures",
    'isthmus search "a cat" --modality image --top 2',
    'isthmus search "stars at night" --modality image --top 1',
)
DEADLINE_S = 180.0
_PROMPT = "\x1b]133;A\x07"
"""What marks a prompt; terminals draw nothing for it."""
_READY = "serving starter"
_TYPED_S, _LONGEST_S = 0.04, 1.5
"""Seconds between two typed letters, and without anything new at most."""
_CELL_PX, _LINE_PX, _EDGE_PX = 8.4, 17, 14
_COLOURS = {
    "default": "#e8e6df",
    "black": "#10181b",
    "red": "#e06c75",
    "green": "#98c379",
    "brown": "#e5c07b",
    "blue": "#61afef",
    "magenta": "#c678dd",
    "cyan": "#56b6c2",
    "white": "#e8e6df",
}
_GROUND = "#10181b"


class CastError(Exception):
    """The session did not go on: the message holds what it printed."""


@dataclass(frozen=True)
class Event:
    """Holds what was printed at once."""

    seconds: float
    text: str


class Session:
    """An interactive shell in a pseudo-terminal, with a home of its own."""

    def __init__(self, home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = str(free.getsockname()[1])
        left_out = ("ISTHMUS_", "KITTY_", "TERM_", "TMUX")  # half blocks, in whatever terminal this runs
        environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        environment |= {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "PS1": r"$ \[\e]133;A\a\]",
            "ISTHMUS_PORT": self._port,
            "ISTHMUS_URL": f"http://127.0.0.1:{self._port}",
        }
        self._own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "+m", "-i"],
            cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._began = time.monotonic()
        self._rest = b""
        self.events: list[Event] = []

    def read_until(self, mark: str) -> None:
        """Read until that was printed. Raises CastError where it is not, or the shell ends."""
        printed = ""
        until = time.monotonic() + DEADLINE_S
        while mark not in printed:
            if not select.select([self._own], [], [], max(0.0, until - time.monotonic()))[0]:
                raise CastError(f"{mark!r} did not come in {DEADLINE_S:g} s: {self.text[-2_000:]}")
            try:
                data = self._rest + os.read(self._own, 65_536)
            except OSError:
                raise CastError(f"the shell ended: {self.text[-2_000:]}") from None
            text = data.decode(errors="ignore")
            self._rest = data[len(text.encode()) :]
            printed += text
            text = text.replace(_PROMPT, "").replace(self._port, "8000")
            if text:
                self.events.append(Event(time.monotonic() - self._began, text))

    def type(self, command: str) -> None:
        for letter in command:
            os.write(self._own, letter.encode())
            time.sleep(_TYPED_S)
        os.write(self._own, b"\n")

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    def close(self) -> None:
        for job in _children(self._process.pid):
            os.kill(job, signal.SIGTERM)
        self._process.kill()
        self._process.wait()
        os.close(self._own)


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def record(home: Path, commands: Sequence[str] = COMMANDS) -> list[Event]:
    """Run the commands; return what the terminal was told, without pauses of more than _LONGEST_S."""
    session = Session(home)
    try:
        session.read_until(_PROMPT)
        for command in commands:
            session.type(command)
            session.read_until(_PROMPT)
            if command.endswith("&"):
                session.read_until(_READY)
                session.type("")
                session.read_until(_PROMPT)
        return list(_shortened(session.events))
    finally:
        session.close()


def _shortened(events: Iterable[Event]) -> Iterator[Event]:
    former = shown = 0.0
    for event in events:
        shown += min(_LONGEST_S, event.seconds - former)
        former = event.seconds
        yield Event(round(shown, 3), event.text)


def as_cast(events: Iterable[Event]) -> str:
    """Return events as asciicast v2 has them (docs.asciinema.org/manual/asciicast/v2)."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": "Isthmus: the first run"}
    lines = [header, *([event.seconds, "o", event.text] for event in events)]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def from_cast(text: str) -> list[Event]:
    return [Event(seconds, printed) for seconds, _, printed in map(json.loads, text.splitlines()[1:])]


Row = list[tuple[str, str, str, bool]]
"""The cells of a line: letter, colour, ground, whether bold."""


def lines_of(events: Iterable[Event]) -> list[tuple[float, Row]]:
    """The lines that are there in the end, each with the second from which on it was as it is then."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    since: list[tuple[float, Row]] = [(0.0, [])] * ROWS
    for event in events:
        stream.feed(event.text)
        for number in screen.dirty:
            row = [
                (cell.data, cell.fg, cell.bg, cell.bold)
                for cell in map(screen.buffer[number].__getitem__, range(COLUMNS))
            ]
            if row != since[number][1]:
                since[number] = (event.seconds, row)
        screen.dirty.clear()
    used = max(number for number, (_, row) in enumerate(since) if any(cell[0].strip() for cell in row))
    return since[: used + 1]


def as_svg(lines: Sequence[tuple[float, Row]]) -> str:
    """A picture in which each line appears at its time; where nothing may move, all are there."""
    width, height = COLUMNS * _CELL_PX + 2 * _EDGE_PX, len(lines) * _LINE_PX + 2 * _EDGE_PX
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">',
        "<title>A terminal: isthmus serve, index and search</title>",
        "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre}"
        ".b{font-weight:700}rect{shape-rendering:crispEdges}"
        "g{animation:s 1ms both}@keyframes s{from{opacity:0}}"
        "@media(prefers-reduced-motion:reduce){g{animation:none}}</style>",
        f'<rect width="100%" height="100%" rx="8" fill="{_GROUND}"/>',
    ]
    for number, (seconds, row) in enumerate(lines):
        top = _EDGE_PX + number * _LINE_PX
        if marks := list(_marks(row, top)):
            drawn.append(f'<g style="animation-delay:{seconds:g}s">{"".join(marks)}</g>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _marks(row: Row, top: int) -> Iterator[str]:
    start = 0
    while start < len(row):
        letter, colour, ground, bold = row[start]
        end = start + 1
        while end < len(row) and row[end][1:] == (colour, ground, bold) and (row[end][0] == "▀") == (letter == "▀"):
            end += 1
        x, wide = _EDGE_PX + start * _CELL_PX, (end - start) * _CELL_PX
        if ground != "default":
            yield f'<rect x="{x:g}" y="{top}" width="{wide:g}" height="{_LINE_PX}" fill="{_colour(ground)}"/>'
        text = "".join(cell[0] for cell in row[start:end]).rstrip()
        if letter == "▀":  # drawn: fonts leave a line between two of them
            yield f'<rect x="{x:g}" y="{top}" width="{wide:g}" height="{_LINE_PX / 2:g}" fill="{_colour(colour)}"/>'
        elif text:
            style = f'fill="{_colour(colour)}"' + (' class="b"' if bold else "")
            yield f'<text x="{x:g}" y="{top + 13}" textLength="{len(text) * _CELL_PX:g}" {style}>{escape(text)}</text>'
        start = end


def _colour(name: str) -> str:
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else _COLOURS.get(name, _COLOURS["default"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs.cast", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="FILE.cast and FILE.svg are written")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name) / "Pictures")
        events = record(Path(name))
    for suffix, text in ((".cast", as_cast(events)), (".svg", as_svg(lines_of(events)))):
        path = options.file.with_suffix(suffix)
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CastError as error:
        sys.exit(f"cast: {error}")
