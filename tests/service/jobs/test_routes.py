"""/jobs over HTTP, with the server embedding by itself."""

import gzip
import os
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.app import open_parts
from service.api.keys import create_key
from service.jobs import run
from service.runtime.quotas import Limit
from service.settings import Settings
from service.store import StoreInUse
from tests.conftest import served, serving
from tests.service.films import colours
from tests.service.jobs.archives import tar
from tests.service.jobs.processes import LINES, ended, errors, lines, stored, submitted
from tests.service.media import b64
from tests.service.slow import WAIT_S, Slow
from tests.service.test_serving import in_queue, metric, sent, until, with_towers

Make = Callable[..., bytes]
TAR = {"content-type": "application/x-tar"}


@pytest.fixture
def client(shared_client: httpx.Client) -> httpx.Client:
    """Nothing is taken away after a test: its jobs stay."""
    return shared_client


def test_lines_of_every_kind_of_input(client: httpx.Client, png: Make, wav: Make) -> None:
    items: list[Any] = [
        {"id": "words", "text": "a red dog", "metadata": {"n": 1}},
        {"id": "picture", "image": b64(png("red"))},
        {"id": "tone", "audio": b64(wav()), "collection": "other"},
        {"id": "given", "vector": [1.0] * 16, "modality": "image"},
    ]
    answer = client.post("/jobs", params={"collection": "lines"}, content=lines(items), headers=LINES)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
    job = ended(client, answer.json()["id"])
    assert (job["state"], job["total"], job["done"], job["failed"], job["error"]) == ("done", 4, 4, 0, None)
    assert (job["form"], job["collection"]) == ("jsonl", "lines")
    assert job["created"] <= job["started"] <= job["ended"]
    assert set(stored(client, collection="lines")) == {"words", "picture", "given"}
    assert set(stored(client, collection="other")) == {"tone"}
    found = client.post("/search", json={"query": "red", "collection": "lines"}).json()["results"]
    assert [each["id"] for each in found[:2]] == ["picture", "words"] or found[0]["id"] == "words"


def test_previews_are_kept_where_they_are_wanted_and_moments_of_videos_always(
    settings: Settings, png: Make, wav: Make
) -> None:
    items = [
        {"id": "picture", "image": b64(png("red"))},
        {"id": "tone", "audio": b64(wav())},
        {"id": "film", "video": b64(colours("red", "green", seconds=2))},
    ]
    with serving(settings.model_copy(update={"previews": True})) as client:
        assert ended(client, submitted(client, items))["done"] == 3
        kinds = {id: client.get(f"/previews/{id}").headers["content-type"] for id in ("picture", "tone")}
        assert kinds == {"picture": "image/jpeg", "tone": "audio/mpeg"}
        [found] = client.post("/search", json={"query": "green", "modalities": ["video"]}).json()["results"]
        assert found["id"] == "film" and found["moment"]["start"] >= 2
        # What replaces a video takes its moments away.
        assert ended(client, submitted(client, [{"id": "film", "text": "words"}]))["done"] == 1
        assert client.post("/search", json={"query": "green", "modalities": ["video"]}).json()["results"] == []


def test_each_bad_line_is_in_the_file_of_errors_and_the_others_are_stored(client: httpx.Client, png: Make) -> None:
    good = [{"id": f"good {number}", "text": f"dog {number}", "collection": "errors"} for number in range(3)]
    body = [
        lines(good[:1]),
        b"{broken\n",
        b"[1]\n",
        b"\n",
        lines([{"id": "two", "text": "a", "image": "b"}]),
        lines([{"id": "corrupt", "image": b64(png()[:50])}]),
        lines([{"text": "no id"}]),
        lines(good[1:]),
        b'{"id": "deep", "text": "x", "metadata": ' + b'{"a":' * 2_000 + b"1" + b"}" * 2_001 + b"\n",
        b'{"id": "surrogate \\ud800", "text": "x"}\n',
        lines([{"id": "short", "vector": [1.0]}]),
        lines([{"id": "url", "image": "https://example.org/a.png"}]),
    ]
    id = client.post("/jobs", content=b"".join(body), headers=LINES).json()["id"]
    job = ended(client, id)
    assert (job["state"], job["total"], job["done"], job["failed"]) == ("done", 12, 3, 9)
    answer = client.get(f"/jobs/{id}/errors")
    assert answer.headers["content-type"] == "application/jsonl"
    assert answer.headers["content-disposition"] == f'attachment; filename="{id}-errors.jsonl"'
    found = [(each["line"], each["id"], each["code"]) for each in errors(client, id)]
    assert found == [
        (2, None, "malformed_item"),
        (3, None, "malformed_item"),
        (5, "two", "invalid_item"),
        (6, "corrupt", "undecodable_media"),
        (7, None, "invalid_item"),
        (10, None, "malformed_item"),
        (11, None, "malformed_item"),
        (12, "short", "invalid_input"),
        (13, "url", "url_fetch_disabled"),
    ]
    assert set(stored(client, collection="errors")) == {item["id"] for item in good}


def test_a_tar_of_media_texts_and_metadata(client: httpx.Client, png: Make, wav: Make) -> None:
    files = {
        "a/red.png": png("red"),
        "a/red.json": b'{"colour": "red"}',
        "tone.wav": wav(),
        "words.txt": "\ufeffa blue dog".encode(),
        "metadata.jsonl": b'{"file_name": "tone.wav", "hertz": 440}\n',
        "bad.png": b"no picture",
        "bad.txt": b"\xff\xfe\xfd",
        "beside.txt": b"dog",
        "beside.json": b"[]",
    }
    for archive, kind in ((tar(files), "application/x-tar"), (tar(files, "w:gz"), "application/gzip")):
        answer = client.post("/jobs?collection=tar", content=archive, headers={"content-type": kind})
        job = ended(client, answer.json()["id"])
        assert (job["state"], job["total"], job["done"], job["failed"]) == ("done", 6, 3, 3)
    items = stored(client, collection="tar")
    assert {id: (item["modality"], item["metadata"]) for id, item in items.items()} == {
        "a/red.png": ("image", {"colour": "red"}),
        "tone.wav": ("audio", {"hertz": 440}),
        "words.txt": ("text", {}),
    }
    assert [(each["id"], each["code"]) for each in errors(client, job["id"])] == [
        ("bad.png", "unsupported_media"),
        ("bad.txt", "malformed_item"),
        ("beside.txt", "malformed_item"),
    ]
    blue = client.post("/search", json={"query": "blue", "collection": "tar"}).json()["results"][0]
    assert blue["id"] == "words.txt"


def test_a_tar_cannot_reach_out_and_a_body_that_is_no_tar_fails_as_a_whole(client: httpx.Client, png: Make) -> None:
    hostile = tar({"../up.png": png(), "/absolute.png": png(), "a/../../b.png": png()})
    job = ended(client, client.post("/jobs", content=hostile, headers=TAR).json()["id"])
    assert (job["done"], job["failed"]) == (0, 3)
    for body in (b"x" * 2_000, b"", tar({"a.png": png()})[:1_000]):
        answer = client.post("/jobs?collection=whole", content=body, headers=TAR)
        job = ended(client, answer.json()["id"])
        assert (job["state"], job["done"], job["error"]["code"]) == ("failed", 0, "unusable_input")
    assert "whole" not in {each["name"] for each in client.get("/collections").json()["collections"]}


def test_a_folder_of_the_server_is_no_input(client: httpx.Client) -> None:
    refused = client.post("/jobs", json={"folder": "photos"})
    assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_body")
    assert "`isthmus index` sends" in refused.json()["detail"]


def test_an_id_that_comes_twice_ends_up_as_its_last(client: httpx.Client) -> None:
    items = [{"id": f"{number % 7}", "text": f"dog {number}", "metadata": {"n": number}} for number in range(2_000)]
    job = ended(client, submitted(client, items, params={"collection": "twice"}))
    assert (job["done"], job["failed"]) == (2_000, 0)
    assert {id: item["metadata"]["n"] for id, item in stored(client, collection="twice").items()} == {
        str(number % 7): number for number in range(1_993, 2_000)
    }


def test_an_idempotency_key_makes_one_job_of_many_requests(client: httpx.Client) -> None:
    items = [{"id": "a", "text": "dog", "collection": "idempotent"}]
    key = {"idempotency-key": "once"}
    first = client.post("/jobs", content=lines(items), headers=LINES | key)
    again = client.post("/jobs", content=lines(items), headers=LINES | key)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    ended(client, first.json()["id"])
    assert client.post("/jobs", content=lines(items), headers=LINES | key).json()["state"] == "done"
    for other in (
        client.post("/jobs", content=lines(items * 2), headers=LINES | key),
        client.post("/jobs?collection=other", content=lines(items), headers=LINES | key),
        client.post("/jobs", content=lines(items), headers=TAR | key),
    ):
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert client.post("/jobs", content=lines(items), headers=LINES).json()["id"] != first.json()["id"]


def test_jobs_are_listed_the_newest_first(client: httpx.Client) -> None:
    ids = [submitted(client, [{"id": "a", "text": "dog"}]) for _ in range(3)]
    for id in ids:
        ended(client, id)
    assert [each["id"] for each in client.get("/jobs?limit=3").json()["jobs"]] == ids[::-1]
    older = client.get(f"/jobs?limit=1&before={ids[2]}&state=done&state=failed").json()["jobs"]
    assert [each["id"] for each in older] == [ids[1]]
    assert client.get("/jobs?state=cancelled").json()["jobs"] == []


def test_an_item_that_cannot_be_worked_on_is_refused_and_the_others_of_its_chunk_are_stored(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = run.embed

    async def fail(context: Any, items: Any, meter: Any) -> Any:
        if any(item.id == "bad" for item in items.values()):
            raise RuntimeError
        return await embed(context, items, meter)

    monkeypatch.setattr(run, "embed", fail)
    items = [{"id": id, "text": "dog"} for id in ("first", "bad", "last")]
    with serving(settings) as client:
        id = submitted(client, items)
        job = ended(client, id)
        assert (job["state"], job["done"], job["failed"]) == ("done", 2, 1)
        assert [(each["line"], each["id"], each["code"]) for each in errors(client, id)] == [(2, "bad", "poison")]
        assert set(stored(client)) == {"first", "last"}


def test_a_replica_that_did_not_take_a_job_names_the_one_that_did(client: httpx.Client) -> None:
    id = submitted(client, [{"id": "a", "text": "dog"}])
    ended(client, id)
    token, _, here = id.partition("-")
    assert here == re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    for path in (f"/jobs/{token}-isthmus-2", f"/jobs/{token}-isthmus-2/errors", f"/jobs?before={token}-isthmus-2"):
        refused = client.get(path)
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
        assert f"on the replica {here}: ask the replica isthmus-2, which took it" in refused.json()["detail"]
    assert "isthmus-2" in client.delete(f"/jobs/{token}-isthmus-2").json()["detail"]
    for forgotten in (f"{'0' * 24}-{here}", "0" * 24, "no-such"):
        assert client.get(f"/jobs/{forgotten}").json()["detail"] == f"no job {forgotten!r}"


def test_what_is_wrong_is_named(client: httpx.Client) -> None:
    for path in ("/jobs/absent", "/jobs/absent/errors", "/jobs?before=absent"):
        assert client.get(path).status_code == 404
    assert client.delete("/jobs/absent").status_code == 404
    for kind in ("text/plain", "multipart/form-data; boundary=x", ""):
        refused = client.post("/jobs", content=b"x", headers={"content-type": kind})
        assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_body")
    assert client.post("/jobs?collection=a%20b", content=b"", headers=LINES).status_code == 422
    assert client.post("/jobs", content=b"", headers=LINES | {"idempotency-key": "x" * 256}).status_code == 422
    assert client.get("/jobs?state=lost").status_code == 422
    cut = client.post("/jobs", content=gzip.compress(b"{}" * 100)[:-5], headers=LINES)
    assert (cut.status_code, cut.json()["code"]) == (400, "malformed_request")


def test_an_empty_input_is_a_job_that_is_done(client: httpx.Client) -> None:
    job = ended(client, client.post("/jobs", content=b"\n\n", headers=LINES).json()["id"])
    assert (job["state"], job["total"], job["done"]) == ("done", 0, 0)
    assert client.get(f"/jobs/{job['id']}/errors").text == ""


def test_a_body_past_the_limit_is_413_and_leaves_nothing(settings: Settings) -> None:
    small = settings.model_copy(update={"max_job_bytes": 2_000, "max_body_bytes": 500})
    with serving(small) as client:
        fits = lines([{"id": "a", "text": "dog " * 400}])
        assert 500 < len(fits) < 2_000
        assert ended(client, client.post("/jobs", content=fits, headers=LINES).json()["id"])["failed"] == 1
        assert errors_of_last(client)[0]["detail"] == "the line is longer than 500 bytes"
        for body in (b"x" * 2_001, iter([b"x" * 1_500, b"x" * 600]), gzip.compress(b"ab" * 1_500)):
            refused = client.post("/jobs", content=body, headers=LINES)
            assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
    assert [path.name for path in (settings.store / "jobs").iterdir() if path.is_dir()] == []


def errors_of_last(client: httpx.Client) -> list[dict[str, Any]]:
    return errors(client, client.get("/jobs?limit=1").json()["jobs"][0]["id"])


def test_a_client_that_goes_away_while_it_sends_leaves_nothing(settings: Settings) -> None:
    with serving(settings) as client:
        named = "Host: localhost\r\nContent-Type: application/jsonl\r\nContent-Length: 5000"
        head = f"POST /jobs HTTP/1.1\r\n{named}\r\n\r\n{{}}\n"
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(head.encode())
        until(lambda: metric(client, "isthmus_disconnects_total") == 1)
        assert client.get("/jobs").json()["jobs"] == []
    assert [path.name for path in (settings.store / "jobs").iterdir() if path.is_dir()] == []


def test_a_job_that_is_cancelled_writes_no_more(settings: Settings) -> None:
    with with_towers(settings, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        tower = towers["text"]
        id = submitted(client, [{"id": f"{number}", "text": f"dog {number}"} for number in range(3_000)])
        assert tower.entered.wait(20)
        running = client.get(f"/jobs/{id}").json()
        assert (running["state"], running["total"], running["done"], running["ended"]) == ("running", 3_000, 0, None)
        cancelled = client.delete(f"/jobs/{id}").json()
        assert (cancelled["state"], cancelled["done"]) == ("cancelled", 0)
        assert cancelled["ended"] is not None
        tower.released.set()
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200
        assert stored(client) == {}
        assert client.delete(f"/jobs/{id}").json() == cancelled == client.get(f"/jobs/{id}").json()
        finished = submitted(client, [{"id": "a", "text": "dog"}])
        assert ended(client, finished)["state"] == "done"
        assert client.delete(f"/jobs/{finished}").json()["state"] == "done"
    assert [path.name for path in (settings.store / "jobs").iterdir() if path.is_dir()] == []


def test_a_request_does_not_wait_for_a_job(settings: Settings) -> None:
    """The model has one lane, and a job has filled its queue: a request is in the very next call."""
    small = settings.model_copy(update={"batch_tokens": 2, "cache_bytes": 0})
    with with_towers(small, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        tower = towers["text"]
        id = submitted(client, [{"id": f"{number}", "text": f"dog {number}"} for number in range(500)])
        until(lambda: in_queue(client) == 500)
        with sent(client, "red") as request:
            until(lambda: in_queue(client) == 501)
            tower.released.set()
            assert request.recv(65_536).startswith(b"HTTP/1.1 200")
        assert tower.rows < 100, "it did not wait for the job's end"
        assert ended(client, id)["done"] == 500


def test_too_many_unfinished_jobs_are_429(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.jobs.MAX_JOBS", 1)
    with with_towers(settings, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        items = [{"id": "a", "text": "dog"}]
        headers = LINES | {"idempotency-key": "k"}
        first = client.post("/jobs", content=lines(items), headers=headers)
        assert first.status_code == 202
        refused = client.post("/jobs", content=lines(items), headers=LINES)
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) > 0
        again = client.post("/jobs", content=lines(items), headers=headers)
        assert again.json()["id"] == first.json()["id"]
        towers["text"].released.set()
        ended(client, first.json()["id"])
        assert client.post("/jobs", content=lines(items), headers=LINES).status_code == 202


def test_a_queue_that_is_full_makes_a_job_wait_and_not_fail(settings: Settings) -> None:
    tight = settings.model_copy(update={"queue_inputs": 2, "max_inputs": 2})
    with with_towers(tight, lambda tower: Slow(tower, held=True)) as (_, client, towers), sent(client, "red", "blue"):
        assert towers["text"].entered.wait(WAIT_S)
        id = submitted(client, [{"id": f"{number}", "text": f"dog {number}"} for number in range(5)])
        towers["text"].released.set()
        job = ended(client, id)
        assert (job["state"], job["done"], job["failed"]) == ("done", 5, 0)


def test_jobs_go_on_where_a_stopped_server_left_them(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"id": f"{number}", "text": f"dog {number}"} for number in range(1_000)]
    with with_towers(settings, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        id = submitted(client, items)
        assert towers["text"].entered.wait(20)
        towers["text"].released.set()
    monkeypatch.setattr(run, "ATTEMPTS", 1)  # being stopped is no attempt that failed
    with serving(settings) as client:
        job = ended(client, id)
        assert (job["state"], job["done"], job["failed"]) == ("done", 1_000, 0)
        assert set(stored(client)) == {item["id"] for item in items}
        assert client.get("/jobs").json()["jobs"][0]["id"] == id


def test_a_job_counts_for_the_key_that_sent_it(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, small = create_key(path, "small", ["read", "write"], [Limit.parse("items=5/month")])
    _, other = create_key(path, "other", ["read", "write"])
    mine, theirs = ({"authorization": f"Bearer {clear}"} for clear in (small, other))
    items = [{"id": f"{number}", "text": f"dog {number}"} for number in range(5)]
    once = {"idempotency-key": "once"}
    with serving(settings.model_copy(update={"keys": path})) as client:
        assert client.post("/jobs", content=lines(items), headers=LINES).status_code == 401
        client.headers.update(mine)
        first = submitted(client, items, headers=once)
        assert ended(client, first)["done"] == 5
        refused = client.post("/items", json={"items": items[:1]})
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        waiting = submitted(client, items)
        # Another key's is another job, and is done meanwhile.
        client.headers.update(theirs)
        second = submitted(client, items, headers=once)
        assert second != first and ended(client, second)["done"] == 5
        assert client.get(f"/jobs/{waiting}").json()["done"] == 0
        assert client.delete(f"/jobs/{waiting}").json()["state"] == "cancelled"


def test_without_a_folder_for_them_no_jobs_are_taken(settings: Settings) -> None:
    parts = open_parts(settings)
    assert parts.jobs is not None
    with served(settings, replace(parts, jobs=None)) as (_, client):
        refused = client.post("/jobs", content=b"", headers=LINES)
        assert (refused.status_code, refused.json()["code"]) == (422, "jobs_disabled")
        assert client.get("/readyz").status_code == 200
    parts.jobs.ledger.close()
    os.close(parts.jobs.lock)
    assert Settings(store=Path("milvus")).jobs_folder is None
    assert Settings(store=Path("milvus"), jobs=Path("jobs")).jobs_folder == Path("jobs")


def test_a_second_server_over_the_same_jobs_is_refused(settings: Settings, tmp_path: Path) -> None:
    with serving(settings.model_copy(update={"jobs": tmp_path / "jobs"})):
        other = settings.model_copy(update={"jobs": tmp_path / "jobs", "store": tmp_path / "other"})
        with pytest.raises(StoreInUse, match="ISTHMUS_JOBS"):
            open_parts(other)


def test_jobs_that_ended_are_forgotten_in_time(settings: Settings) -> None:
    with serving(settings) as client:
        id = submitted(client, [{"id": "a", "text": "dog"}, {"text": "b"}])
        ended(client, id)
    with serving(settings.model_copy(update={"jobs_keep_s": 1e-6})) as client:
        until(lambda: client.get(f"/jobs/{id}").status_code == 404)
        assert client.get(f"/jobs/{id}/errors").status_code == 404


def test_metrics_count_items(client: httpx.Client) -> None:
    def counted(result: str) -> float:
        found = re.search(rf'isthmus_job_items_total{{result="{result}"}} (\S+)', client.get("/metrics").text)
        return float(found[1]) if found else 0.0

    before = counted("done"), counted("failed")
    ended(client, submitted(client, [{"id": "a", "text": "dog"}, {"id": "b"}, {"id": "c", "text": "cat"}]))
    assert (counted("done") - before[0], counted("failed") - before[1]) == (2, 1)


def test_metrics_tell_jobs_by_state_and_what_is_left(settings: Settings) -> None:
    with with_towers(settings, lambda tower: Slow(tower, held=True)) as (_, client, towers):

        def by_state() -> dict[str, float]:
            states = ("queued", "running", "done", "failed", "cancelled")
            return {state: metric(client, "isthmus_jobs", state=state) for state in states}

        none = dict.fromkeys(by_state(), 0.0)
        until(lambda: by_state() == none)
        assert (metric(client, "isthmus_job_items_left"), metric(client, "isthmus_job_chunks")) == (0, 0)
        id = submitted(client, [{"id": f"{number}", "text": f"dog {number}"} for number in range(600)])
        assert towers["text"].entered.wait(20)
        until(lambda: by_state() == none | {"running": 1})
        until(lambda: metric(client, "isthmus_job_chunks") == 3)  # of up to 256 items
        assert metric(client, "isthmus_job_items_left") == 600
        assert metric(client, "isthmus_jobs_running") == 1
        towers["text"].released.set()
        ended(client, id)
        ended(client, submitted(client, [{"id": "no item"}]))
        failed = client.post("/jobs", content=b"no tar", headers={"content-type": "application/x-tar"}).json()["id"]
        ended(client, failed)
        until(lambda: by_state() == none | {"done": 2, "failed": 1})
        assert (metric(client, "isthmus_job_items_left"), metric(client, "isthmus_job_chunks")) == (0, 0)
