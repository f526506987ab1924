"""Real components for every test: a bundle, a server on a socket, a Redis, and the data where there is some."""

import asyncio
import base64
import fcntl
import functools
import gc
import io
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker imports every test, and a third of the processor time of that went into looking for garbage.
    gc.disable()
    # For each of its operators torch looks through all modules that are there: before the others it takes 2 seconds,
    # after them 14.
    import torch  # noqa: F401

import httpx
import hypothesis
import numpy as np
import pytest
import redis
import soundfile
from PIL import Image

from isthmus_client import Isthmus
from service.api.app import Parts, create_app
from service.commands.serve import Server, uvicorn_config
from service.settings import Settings
from tests import tiny_bundle

DEADLINE_S = 60.0
"""Only what never comes about waits so long: a busy machine is slow, not wrong."""
CORES = len(os.sched_getaffinity(0))
"""With so many threads for a call, a tower runs one call at a time."""

# How long an example takes says something of the machine, not of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Variables of the developer's environment would take the place of what the tests set: they are read here, once. The
# workers of a run are started after that, and find the data by another name.
DATA_ROOT = os.environ.get("ISTHMUS_DATA") or os.environ.get("DATA_OF_TESTS")
if DATA_ROOT:
    os.environ["DATA_OF_TESTS"] = DATA_ROOT
for name in [name for name in os.environ if name.startswith("ISTHMUS_")]:
    del os.environ[name]

Colour = tuple[int, int, int]


def pytest_collection_finish() -> None:
    """Leave what was collected out of all later looks for garbage."""
    gc.freeze()
    gc.enable()


def on_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test on an event loop of its own, for DEADLINE_S at most."""

    @functools.wraps(test)
    def run(*arguments: object, **fixtures: object) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **fixtures), DEADLINE_S))

    return run


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills in the first process of a run that asks, and that all others read."""
    root = factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker's own, in the folder of the run
        root = root.parent
    whole, part = root / name, root / f"{name}.part"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(whole)
    return whole


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundles") / "tiny").path


def patient(settings: Settings) -> Settings:
    """The queue is one that a busy machine does not fill: by the usual 5 seconds two requests at once may get 429."""
    return settings if "queue_s" in settings.model_fields_set else settings.model_copy(update={"queue_s": 600.0})


@contextmanager
def serving(settings: Settings, parts: Parts | None = None) -> Iterator[httpx.Client]:
    """The real app on a real socket, for as long as the block lasts."""
    with served(settings, parts) as (_, client):
        yield client


@contextmanager
def served(settings: Settings, parts: Parts | None = None) -> Iterator[tuple[Server, httpx.Client]]:
    """The server too, which can be told to stop."""
    settings = patient(settings)
    listening = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()

    class Started(Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Started(uvicorn_config(create_app(settings, parts), settings), settings.shutdown_grace_s)

    def run() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(DEADLINE_S), "the server did not start in time"
        assert server.started, "the server failed to start"
        port = listening.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_S, trust_env=False) as client:
            yield server, client
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listening.close()
        assert not thread.is_alive(), "the server did not stop in time"


@pytest.fixture
def settings(bundle_dir: Path, tmp_path: Path) -> Settings:
    return Settings(bundle=bundle_dir, store=tmp_path / "store", device="cpu", threads=CORES)


@pytest.fixture(scope="module")
def shared_client(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One server serves a whole module, for tests that leave nothing behind."""
    store = tmp_path_factory.mktemp("shared") / "store"
    with serving(Settings(bundle=bundle_dir, store=store, device="cpu", threads=1)) as client:
        yield client


@pytest.fixture
def fresh_client(settings: Settings) -> Iterator[httpx.Client]:
    """A server of the test's own, for what stays in one: its jobs, figures and files."""
    with serving(settings) as client:
        yield client


@pytest.fixture
def client(shared_client: httpx.Client) -> Iterator[httpx.Client]:
    """The module's server, which holds nothing when a test begins. Label sets are a test's own to delete."""
    yield shared_client
    for collection in shared_client.get("/collections").json()["collections"]:
        assert shared_client.delete(f"/collections/{collection['name']}").status_code == 204
    assert shared_client.put("/collections/default").status_code == 201


@contextmanager
def redis_server(folder: Path, port: int) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        assert "CI" not in os.environ, "redis-server is not installed: `make redis` installs it"
        pytest.skip("redis-server is not installed")
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        # Redis says when it is ready; reading until then needs no polling, and a Redis that dies ends the lines.
        assert any("Ready to accept connections" in line for line in process.stdout), "redis-server did not start"
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def free_port() -> int:
    return unused_port()


def unused_port() -> int:
    """A port below those that the system gives out: no other server of the tests gets it before it is listened at."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis"), unused_port()) as url:
        yield url


@pytest.fixture
def patient_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer for a command than a server waits."""
    monkeypatch.setattr("service.runtime.quotas.REDIS_TIMEOUT_S", 5.0)


@pytest.fixture
def redis_url(_redis: str) -> str:
    """An empty Redis."""
    with redis.Redis.from_url(_redis) as connection:
        connection.flushall()
    return _redis


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real media and encoders, where there is one."""
    root = Path(DATA_ROOT or Path(__file__).resolve().parents[2] / "shared")
    if not root.is_dir():
        pytest.skip(f"no data: {root} is absent, and ISTHMUS_DATA is not set")
    return root


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """A plain image's file: png("red"), png((1, 2, 3), size=(1, 1), format="JPEG")."""

    def make(colour: str | Colour = "red", size: tuple[int, int] = (40, 30), format: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        plain = tiny_bundle.COLOURS[colour] if isinstance(colour, str) else colour
        Image.new("RGB", size, plain).save(buffer, format)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def wav() -> Callable[..., bytes]:
    """A tone's file: wav(440.0, seconds=1.0)."""

    def make(hertz: float = 440.0, seconds: float = 1.0, format: str = "WAV") -> bytes:
        buffer = io.BytesIO()
        samples = tiny_bundle.tone(hertz, seconds)
        soundfile.write(buffer, samples, tiny_bundle.AUDIO.sampling_rate, format=format)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def unit() -> Callable[..., bool]:
    def check(vector: list[float], dimensions: int = tiny_bundle.DIMENSIONS) -> bool:
        return len(vector) == dimensions and abs(float(np.linalg.norm(vector)) - 1.0) < 1e-5

    return check


@pytest.fixture
def picture(png: Callable[..., bytes]) -> str:
    return "data:image/png;base64," + base64.b64encode(png("red")).decode()


@pytest.fixture
def sound(wav: Callable[..., bytes]) -> str:
    return "data:audio/wav;base64," + base64.b64encode(wav()).decode()


@pytest.fixture
def space(client: httpx.Client) -> Iterator[Isthmus]:
    with Isthmus(str(client.base_url)) as space:
        yield space


@pytest.fixture
def media(tmp_path: Path, png: Callable[..., bytes], wav: Callable[..., bytes]) -> Path:
    """red.png, blue.png, tone.wav, and broken.png, which is none."""
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "red.png").write_bytes(png("red"))
    (folder / "blue.png").write_bytes(png("blue"))
    (folder / "tone.wav").write_bytes(wav())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder
