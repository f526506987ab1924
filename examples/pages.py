"""Runs the commands of a page of the docs, in order, as a reader would; with --record, writes what they printed.

    python -m examples.pages docs/tutorial.md --record docs/recordings/tutorial.txt

In ```console blocks the lines after `$ ` are commands and the rest is output; in ```sh blocks every line is a command;
```python blocks are programs. A command that ends in `&`, or that serves, runs beside those that follow until the end.
"""

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 120.0
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SERVES = re.compile(r"(isthmus|python -m service) serve\b")
_LISTENING = re.compile(r"listening on http://")
_NAMED = "http://127.0.0.1:8000"
"""The server, in the pages."""


class PageError(Exception):
    """A command of a page failed: the message holds it and what it printed."""


@dataclass(frozen=True)
class Command:
    text: str
    language: str
    shown: str = ""
    """The output that the page shows under the command."""

    @property
    def serves(self) -> bool:
        return bool(_SERVES.search(self.text)) and self.language != "python"


def commands(page: str) -> list[Command]:
    """The commands of a page of Markdown, in order."""
    found = []
    for language, body in _FENCE.findall(page):
        if language == "python":
            found.append(Command(body, language))
        elif language == "console":
            # The text before the first prompt is empty.
            for block in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                text, shown = _first_command(block.splitlines())
                found.append(Command(text, language, shown))
        elif language == "sh":
            left = body.splitlines()
            while left:
                text, rest = _first_command(left)
                left = rest.splitlines()
                if text.strip() and not text.lstrip().startswith("#"):
                    found.append(Command(text, language))
    return found


def _first_command(lines: list[str]) -> tuple[str, str]:
    """The command at the head of the lines, which may go on over several of them, and what follows it."""
    for count in range(1, len(lines) + 1):
        text = "\n".join(lines[:count])
        if not _is_open(text):
            break
    return text, "\n".join(lines[count:])


def _is_open(text: str) -> bool:
    """Return whether a command goes on on the next line."""
    if text.endswith("\\"):
        return True
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


@dataclass
class Reader:
    """A folder that looks like a checkout with a built starter, and a shell in it. Servers end with the block.

    `address`, on a free port, is what the pages call http://127.0.0.1:8000: a server that a page starts listens there.
    `variables` are added to the environment. A command that does not end within `deadline_s` seconds fails.
    """

    folder: Path
    address: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    deadline_s: float = DEADLINE_S
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> "Reader":
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        programs = self.folder / ".programs"
        programs.mkdir(parents=True)
        for name, module in (("isthmus", "-m isthmus_client.command"), ("python", "")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
            program.chmod(0o755)
        (self.folder / "build").mkdir()
        for name in ("build/starter", "build/media", "docs", "starter", "training"):
            (self.folder / name).symlink_to(ROOT / name)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(DEADLINE_S)
            assert server.stdout is not None
            server.stdout.close()

    @property
    def env(self) -> Mapping[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
        clean |= {"PATH": f"{self.folder / '.programs'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        port = self.address.rpartition(":")[2]
        clean |= {"ISTHMUS_PORT": port, "ISTHMUS_URL": self.address, "NO_COLOR": "1", "COLUMNS": "110"}
        return clean | dict(self.variables)

    def _shown(self, text: str) -> str:
        """Return the text as it would read with the port that the pages name."""
        return text.replace(self.address.removeprefix("http://"), _NAMED.removeprefix("http://"))

    def run(self, command: Command) -> str:
        """Return what a command prints, on both outputs. Raises PageError where it fails or does not end."""
        text = command.text.replace(_NAMED, self.address)
        if command.serves:
            return self._serve(text.rstrip("& "))
        shell = [sys.executable, "-"] if command.language == "python" else ["bash", "-e", "-o", "pipefail"]
        try:
            done = subprocess.run(
                shell,
                input=text,
                cwd=self.folder,
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=self.deadline_s,
            )
        except subprocess.TimeoutExpired:
            raise PageError(f"{command.text}\ndid not end in {self.deadline_s:.0f} s") from None
        if done.returncode != 0:
            raise PageError(f"{command.text}\nended with {done.returncode}:\n{done.stdout}")
        return self._shown(done.stdout)

    def _serve(self, text: str) -> str:
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {text}"],
            cwd=self.folder,
            env=dict(self.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.servers.append(server)
        overdue = threading.Timer(DEADLINE_S, server.kill)
        overdue.start()
        said = []
        assert server.stdout is not None
        for line in server.stdout:
            said.append(line)
            if _LISTENING.search(line):
                overdue.cancel()
                # What it logs from now on is read, so that it never waits for a reader.
                threading.Thread(target=_drain, args=(server,), daemon=True).start()
                return self._shown("".join(each for each in said if not each.startswith("{")))
        overdue.cancel()
        raise PageError(f"{text}\nended before it listened:\n{''.join(said)}")


def _drain(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    try:
        for _ in server.stdout:
            pass
    except ValueError:  # closed meanwhile
        pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.pages", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--record", type=Path, help="a file for the commands and what they printed")
    options = parser.parse_args()
    recorded = []
    with tempfile.TemporaryDirectory(prefix="isthmus-page-") as folder, Reader(Path(folder, "isthmus")) as reader:
        for command in commands(options.page.read_text()):
            if command.text.startswith(NOT_HERE):
                continue
            printed = reader.run(command)
            shown = f"$ {command.text}\n{printed}" if command.language != "python" else f"{command.text}\n{printed}"
            recorded.append(shown.replace(folder, "~").replace(str(ROOT), "~/isthmus"))
            print(recorded[-1], flush=True)
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text("\n".join(recorded))
    return 0


NOT_HERE = ("make starter", ". .venv/bin/activate", "git clone", "cd isthmus")
"""Commands that set up what a Reader is given."""


if __name__ == "__main__":
    sys.exit(main())
