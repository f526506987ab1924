"""A root of jobs on a mount that never answers: a real one, of a FUSE file system that nobody serves."""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.conftest import DEADLINE_S, serving
from tests.service.jobs.processes import ended, submitted
from tests.service.media import b64

_MNT_DETACH = 2


@contextmanager
def hung(folder: Path) -> Iterator[None]:
    """Whatever asks anything of the folder waits, until the end of the block: then it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"hung", bytes(folder), b"fuse", 0, options):
            pytest.skip(f"nothing can be mounted here: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            os.close(device)
            device = -1
            libc.umount2(bytes(folder), _MNT_DETACH)
    finally:
        if device >= 0:
            os.close(device)


def test_folders_that_never_answer_keep_no_other_request_waiting(
    settings: Settings, tmp_path: Path, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.jobs._FOLDER_S", 0.2)
    root = tmp_path / "root"
    root.mkdir()
    large = {"image": b64(png(size=(200, 200), format="BMP"))}
    with hung(root), serving(settings.model_copy(update={"jobs_root": root, "previews": True})) as client:
        with ThreadPoolExecutor(40) as pool:

            def ask(_: int) -> httpx.Response:
                return client.post("/jobs", json={"folder": "."})

            for answer in pool.map(ask, range(40), timeout=DEADLINE_S):
                assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
                assert answer.headers["retry-after"] == "1"
        # Their threads still wait.
        assert client.post("/embed", json={"inputs": [large, "red"]}).status_code == 200
        assert client.post("/embed", files={"file": ("a", png())}).status_code == 200
        assert client.post("/items", json={"items": [{"id": "a"} | large]}).status_code == 200
        assert client.post("/search", json={"query": large}).json()["results"][0]["id"] == "a"
        assert client.get("/previews/a").status_code == 200
        assert client.get("/collections/default/map").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert ended(client, submitted(client, [{"id": "b", "text": "red"}]))["done"] == 1
        # The server is told to end here, and does.
