"""The servers that are measured, each a process of its own: where it listens, what it costs, how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

_LISTENING = re.compile(r"listening on (http://\S+)")
_TICKS = os.sysconf("SC_CLK_TCK")
_START_S, _END_S = 120.0, 60.0


class BenchmarkError(Exception):
    """A part cannot be measured: the message says why."""


def environment(folder: Path, requirements: Path, *first: str) -> Path:
    """The interpreter of a peer's own virtual environment, made where it is not there yet.

    `first` is installed first, and then what the file lists, without dependencies.
    """
    python = folder.resolve() / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        print(f"  making {folder} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, stdout=sys.stderr)
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if first:
            subprocess.run([*install, *first], check=True, stdout=sys.stderr)
        subprocess.run([*install, "--no-deps", "-r", requirements], check=True, stdout=sys.stderr)
        done.touch()
    return python


@dataclass(frozen=True)
class Server:
    name: str
    address: str
    pid: int

    @property
    def rss(self) -> int:
        """Bytes of memory that it holds now."""
        with open(f"/proc/{self.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_s(self) -> float:
        """Processor time that it took so far, in seconds."""
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


def tuned(bundle: Path, folder: Path, texts: Sequence[str]) -> Path:
    """A cache folder with the profile that `tune` makes of a bundle's text tower in full precision, of these texts."""
    file = folder / "texts.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    command = [sys.executable, "-m", "service", "tune", str(bundle), "--full", "--texts", str(file), "--json"]
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "tuned"), "ISTHMUS_MODALITIES": "text"}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    return folder / "tuned"


@contextmanager
def isthmus(name: str, bundle: Path, store: Path, *, cache: object = None, **settings: object) -> Iterator[Server]:
    """`python -m service serve`, ready. `settings` are its variables without the prefix, `cache` has its profiles."""
    env = variables(**settings) | {"XDG_CACHE_HOME": str(cache or store)}
    with _process(_command(bundle, store, 0), env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # Read by a thread of its own: a pipe that nobody reads would stop the server.
        addresses: list[str] = []
        said = deque[str](maxlen=1)
        listening = threading.Event()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.strip())
                if address := _LISTENING.search(line):
                    addresses.append(address[1])
                    listening.set()
            listening.set()

        threading.Thread(target=read, daemon=True).start()
        listening.wait(_START_S)
        if not addresses:
            raise BenchmarkError(f"{name} did not start: {' '.join(said)}")
        wait_until(f"{addresses[0]}/readyz", process)
        yield Server(name, addresses[0], process.pid)


def variables(**settings: object) -> dict[str, str]:
    """This process's environment with these settings of the service, and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    return kept | {f"ISTHMUS_{name.upper()}": str(value) for name, value in settings.items()}


def _command(bundle: Path, store: Path, port: int, module: str = "service") -> list[str]:
    command = [sys.executable, "-m", module, "serve", "--bundle", str(bundle), "--store", str(store)]
    return [*command, "--port", str(port), "--log-level", "error"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Restarted:
    """A server that is ended and started again, always at the same address and on the same store; output into `log`."""

    def __init__(
        self, bundle: Path, store: Path, env: Mapping[str, str], log: Path = Path(os.devnull), module: str = "service"
    ) -> None:
        self.port, self.store, self.log, self._env = free_port(), store, log, env
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = _command(bundle, store, self.port, module)
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=dict(self._env), stdout=log, stderr=log, text=True)

    def wait(self) -> None:
        """Waits until the server is ready. Raises BenchmarkError with the end of its log."""
        assert self.process is not None
        try:
            wait_until(f"{self.address}/readyz", self.process, pause_s=0.05)
        except BenchmarkError as error:
            self.kill()
            raise BenchmarkError(f"{error} {self.log.read_text(errors='replace')[-2_000:]}".strip()) from None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> bool:
        """Tell it to end, and wait; whether it ended as it should."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        try:
            return self.process.wait(_END_S) in (0, -signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self.kill()
            return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def stored_items(http: httpx2.Client) -> Iterator[dict[str, Any]]:
    """Return every item of the default collection, page after page."""
    page: dict[str, Any] = {"next_cursor": ""}
    while (cursor := page["next_cursor"]) is not None:
        asked = {"limit": 1_000} | ({"cursor": cursor} if cursor else {})
        page = http.get("/items", params=asked).raise_for_status().json()
        yield from page["items"]


@contextmanager
def at_once(*works: Callable[[threading.Event], object]) -> Iterator[threading.Event]:
    """Run each work in a thread of its own while the block runs. The event that they are given is set when it ends.

    All of them are waited for. The first error of one sets the event too, and is raised in the end.
    """
    over, errors = threading.Event(), list[BaseException]()

    def run(work: Callable[[threading.Event], object]) -> None:
        try:
            work(over)
        except BaseException as error:
            errors.append(error)
            over.set()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield over
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


@contextmanager
def other(name: str, command: Sequence[str], env: Mapping[str, str], address: str, log: Path) -> Iterator[Server]:
    """Somebody else's server, at a given address, with /health; its output goes to `log`."""
    with log.open("w") as output, _process(command, env, stdout=output) as process:
        wait_until(f"{address}/health", process)
        yield Server(name, address, process.pid)


@contextmanager
def _process(command: Sequence[str], env: Mapping[str, str], *, stdout: object) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(command, env=dict(env), stdout=stdout, stderr=subprocess.STDOUT, text=True)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_until(url: str, process: "subprocess.Popen[str]", pause_s: float = 0.01) -> None:
    """Waits until the URL is answered with 200. Raises BenchmarkError when the process ends, or in the end."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(f"the server at {url} ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=_START_S) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(pause_s)
    raise BenchmarkError(f"{url} was not answered within {_START_S:.0f} s")
