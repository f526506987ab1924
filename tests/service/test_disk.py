"""Room on the disk: what a client has written there stops before the last byte, and what frees room goes on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from service.api import protocol
from service.errors import DiskFull
from service.runtime import disk
from service.runtime.disk import Disk
from service.settings import Settings
from tests.conftest import DEADLINE_S, serving
from tests.service.test_serving import until

MB = 1_000_000
LINES = {"Content-Type": "application/jsonl"}


class Small:
    """A disk of a few megabytes: what is in a folder takes room on it."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.least_seen = folder, size, size
        self.full_for = ""
        """Of a file that is there: its name."""

    def free(self, _: Path) -> int:
        if self.full_for and any(self.full_for in path.name for path in self.folder.rglob("*")):
            return 0
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file() and "input" in path.name)
        self.least_seen = min(self.least_seen, self.size - used)
        return self.size - used


@pytest.fixture
def small(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Small:
    made = Small(settings.store, 10 * MB)
    monkeypatch.setattr(disk, "free_bytes", made.free)
    monkeypatch.setattr(protocol, "_LINGER_S", 0.2)  # of clients that here write on for ever
    return made


def endless(until: Callable[[], bool] = lambda: False) -> Iterator[bytes]:
    line = b'{"id":"a","text":"' + b"a" * 30_000 + b'"}\n'
    while not until():
        yield line


def codes(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def test_uploads_leave_room_and_others_go_on_to_write(settings: Settings, small: Small) -> None:
    with serving(settings.model_copy(update={"min_free_bytes": 4 * MB})) as client:
        # It does not say how long it is.
        refused = client.post("/jobs", content=endless(), headers=LINES)
        assert codes(refused) == (503, "disk_full") and "ISTHMUS_MIN_FREE_BYTES" in refused.json()["detail"]
        assert 4 * MB <= small.least_seen < 6 * MB
        assert client.post("/items", json={"items": [{"id": "a", "text": "red"}]}).status_code == 200
        assert client.get("/jobs").json()["jobs"] == [] and small.free(small.folder) == small.size, "all of it is gone"
        # It says so, and is not read.
        stated = client.build_request("POST", "/jobs", content=b"x" * (7 * MB), headers=LINES)
        assert codes(client.send(stated)) == (503, "disk_full")
        assert client.post("/jobs", content=b'{"id":"b","text":"blue"}', headers=LINES).status_code == 202


def test_uploads_under_way_are_counted_together(settings: Settings, small: Small) -> None:
    half_way, refused = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        for sent, block in enumerate(endless()):
            if sent == 100:  # 3 MB
                half_way.set()
                assert refused.wait(DEADLINE_S)
                return
            yield block

    with (
        serving(settings.model_copy(update={"min_free_bytes": 4 * MB})) as client,
        closing(httpx.Client(base_url=client.base_url, timeout=DEADLINE_S)) as other,
    ):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(other.post("/jobs", content=slow(), headers=LINES)))
        thread.start()
        assert half_way.wait(DEADLINE_S)
        until(lambda: client.get("/healthz").is_success and small.free(small.folder) < small.size - 2 * MB)
        try:
            assert codes(client.post("/jobs", content=endless(), headers=LINES)) == (503, "disk_full")
            assert small.least_seen >= 4 * MB
        finally:
            refused.set()
            thread.join(DEADLINE_S)
        assert answers[0].status_code == 202, "who was there first has its room"


def test_items_stop_at_half_and_deletes_do_not(settings: Settings, small: Small) -> None:
    item = {"items": [{"id": "a", "text": "red"}]}
    with serving(settings.model_copy(update={"min_free_bytes": 4 * MB})) as client:
        small.size = 3 * MB
        assert client.post("/items", json=item).status_code == 200
        assert codes(client.post("/jobs", content=b"{}", headers=LINES)) == (503, "disk_full")
        small.size = MB
        assert codes(client.post("/items", json=item)) == (503, "disk_full")
        assert codes(client.put("/label-sets/a", json={"labels": ["red", "blue"]})) == (503, "disk_full")
        assert codes(client.put("/collections/a")) == (503, "disk_full")
        assert client.post("/search", json={"query": "red"}).json()["results"]
        assert client.delete("/items/a").status_code == 204
        small.size = 5 * MB
        assert client.post("/items", json=item).status_code == 200


def test_a_job_that_cannot_be_planned_fails_and_lets_its_input_go(settings: Settings, small: Small) -> None:
    with serving(settings.model_copy(update={"min_free_bytes": 4 * MB})) as client:
        small.full_for = "plan"
        made = client.post("/jobs", content=b'{"id":"b","text":"blue"}\n' * 10, headers=LINES)
        assert made.status_code == 202
        until = time.monotonic() + DEADLINE_S
        while (job := client.get(f"/jobs/{made.json()['id']}").json())["state"] in ("queued", "running"):
            assert time.monotonic() < until
        assert (job["state"], job["error"]["code"]) == ("failed", "disk_full")
    assert not list(small.folder.rglob("input"))


def test_what_is_being_written_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 100)
    one = Disk(tmp_path, 40)
    with one.writing(50):
        one.check(10)
        with pytest.raises(DiskFull), one.writing(11):
            pass
    one.check(60)
    monkeypatch.setattr(disk, "free_bytes", lambda _: None)  # it does not say
    one.check(1_000)
