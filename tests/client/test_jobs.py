"""Bulk jobs through the clients and the command, against a live server."""

import asyncio
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner, Result

from isthmus_client import AsyncIsthmus, InvalidInput, Isthmus, Job, NewItem, NotFound, command, image, video
from isthmus_client.retries import Retries
from service.settings import Settings
from tests.conftest import serving
from tests.service.films import colours


@pytest.fixture
def client(fresh_client: httpx2.Client) -> httpx2.Client:
    return fresh_client


@pytest.fixture
def files(tmp_path: Path, media: Path) -> Path:
    """items.jsonl, of whose three lines one is bad, and media.tar."""
    with tarfile.open(tmp_path / "media.tar", "w") as tar:
        for name in ("red.png", "tone.wav", "broken.png"):
            tar.add(media / name, name)
    items = [{"id": "a", "text": "red"}, {"id": "b", "text": "\u2028 blue"}, {"id": "c\u2028", "image": "no base64!"}]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (tmp_path / "items.jsonl").write_text(lines, newline="")
    return tmp_path


def test_files_and_items_become_jobs_that_are_waited_for(space: Isthmus, files: Path, media: Path) -> None:
    seen: list[Job] = []
    made = space.create_job(files / "items.jsonl", collection="lines")
    done = space.wait_for_job(made.id, report=seen.append)
    assert (done.state, done.total, done.done, done.failed) == ("done", 3, 2, 1)
    assert seen[-1] == done == space.job(made.id)
    [bad] = space.job_errors(made.id)
    assert (bad.line, bad.id, bad.code) == (3, "c\u2028", "undecodable_media")
    of_tar = space.wait_for_job(space.create_job(files / "media.tar", collection="tar").id)
    assert (of_tar.done, of_tar.failed) == (2, 1)
    items = [NewItem("red", media / "red.png", {"n": 1}), NewItem("words", "red", collection="other")]
    assert space.wait_for_job(space.create_job(items).id).done == 2
    assert {each.id for each in space.items(collection="default")} == {"red"}
    assert [each.form for each in space.jobs()] == ["jsonl", "tar", "jsonl"]
    assert [each.id for each in space.jobs(limit=1, before=of_tar.id, states=["done"])] == [made.id]
    assert space.cancel_job(made.id).state == "done"


def test_the_same_key_is_the_same_job_and_none_is_another(space: Isthmus, files: Path) -> None:
    first = space.create_job(files / "items.jsonl", idempotency_key="monday")
    assert space.create_job(files / "items.jsonl", idempotency_key="monday").id == first.id
    assert space.create_job(files / "items.jsonl").id != first.id
    with pytest.raises(InvalidInput, match="idempotency_key_reused"):
        space.create_job(files / "media.tar", idempotency_key="monday")


def test_what_cannot_be_taken_is_said(space: Isthmus, files: Path) -> None:
    with pytest.raises(ValueError, match="neither JSON lines"):
        space.create_job(files)
    with pytest.raises(FileNotFoundError):
        space.create_job(files / "gone.tar")
    with pytest.raises(NotFound):
        space.wait_for_job("nobody")


def test_an_upload_is_sent_whole_again_with_the_same_key(files: Path) -> None:
    asked: list[tuple[str, bytes]] = []
    job: dict[str, Any] = {"id": "x", "state": "queued", "form": "jsonl", "collection": "default", "created": "now"}
    job |= dict.fromkeys(("total", "rate", "eta_s", "started", "ended", "error")) | {"done": 0, "failed": 0}

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append((request.headers["idempotency-key"], request.read()))
        return httpx2.Response(503) if len(asked) < 3 else httpx2.Response(202, json=job)

    transport = httpx2.MockTransport(answer)
    with Isthmus("http://x", transport=transport, sleep=lambda _: None, retries=Retries(attempts=3)) as space:
        assert space.create_job(files / "items.jsonl").id == "x"
    assert len(asked) == 3 and len(set(asked)) == 1
    assert asked[0][1] == (files / "items.jsonl").read_bytes()


def test_the_asynchronous_client_does_the_same(settings: Settings, files: Path) -> None:
    async def talk(url: str) -> None:
        async with AsyncIsthmus(url) as space:
            made = await space.create_job(files / "items.jsonl")
            seen: list[Job] = []
            done = await space.wait_for_job(made.id, report=seen.append)
            assert (done.done, done.failed, seen[-1]) == (2, 1, done)
            assert len(await space.job_errors(made.id)) == 1
            tar = await space.create_job(files / "media.tar", collection="tar", idempotency_key="t")
            assert (await space.wait_for_job(tar.id)).done == 2
            assert [each.id for each in await space.jobs()] == [tar.id, made.id]
            assert (await space.cancel_job(tar.id)).state == "done" == (await space.job(tar.id)).state
            assert {each.id for each in (await space.map("tar")).points} == {"red.png", "tone.wav"}
            assert (await space.preview("red.png", collection="tar")).media_type == "image/jpeg"

    with serving(settings.model_copy(update={"previews": True})) as client:
        asyncio.run(talk(str(client.base_url)))


def test_videos_are_found_by_the_second_and_what_is_kept_of_a_picture_is_there(settings: Settings, media: Path) -> None:
    with serving(settings.model_copy(update={"previews": True})) as client, Isthmus(str(client.base_url)) as space:
        film = colours("red", "green", seconds=2)
        space.upsert([NewItem("film", video(film)), NewItem("red", image(media / "red.png"), {"what": "red"})])
        [found] = space.search("green", modalities=["video"])
        assert found.moment is not None and 2 <= found.moment.start < found.moment.end <= 4
        assert found.moment.modality == "image"
        [picture] = space.search("red", modalities=["image"], include=["preview"])
        assert picture.moment is None
        assert picture.preview is not None and picture.preview["media_type"] == "image/jpeg"
        kept = space.preview("red")
        assert kept.media_type == "image/jpeg" and kept.data[:2] == b"\xff\xd8"
        drawn = space.map("default", label="what")
        assert drawn.count == 2 and {each.label for each in drawn.points} == {None, "red"}
        assert all(-1 <= each.x <= 1 and -1 <= each.y <= 1 for each in drawn.points)


def test_the_command_creates_waits_lists_and_tells(client: httpx2.Client, files: Path) -> None:
    def isthmus(*arguments: str) -> Result:
        return CliRunner().invoke(command.cli, ["--url", str(client.base_url), "jobs", *arguments])

    made = isthmus("create", str(files / "items.jsonl"), "--wait", "--key", "k")
    id, said = made.stdout.splitlines()
    assert (made.exit_code, said) == (1, f"done: 2 stored, 1 refused: isthmus jobs errors {id}")
    assert isthmus("create", str(files / "items.jsonl"), "--key", "k").stdout.strip() == id
    whole = files / "whole.jsonl"
    whole.write_text(json.dumps({"id": "a", "text": "red"}))
    told = isthmus("create", str(whole), "--wait", "--json")
    assert told.exit_code == 0 and json.loads(told.stdout)["done"] == 1
    waited = isthmus("wait", json.loads(told.stdout)["id"])
    assert (waited.exit_code, waited.stdout) == (0, "done: 1 stored\n")
    rows = isthmus("list", "--state", "done").stdout.splitlines()
    assert len(rows) == 3 and rows[0].split()[:2] == ["job", "state"]
    assert rows[2].split()[:6] == [id, "done", "default", "2", "1", "3"]
    [error] = isthmus("errors", id).stdout.split("\n")[:-1]
    assert json.loads(error)["line"] == 3
    assert isthmus("errors", id, "--json").stdout == isthmus("errors", id).stdout
    assert isthmus("cancel", id).stdout == "done: 2 stored\n"
    assert json.loads(isthmus("cancel", id, "--json").stdout)["state"] == "done"
    damaged = files / "damaged.tar"
    damaged.write_bytes(b"no tar")
    failed = isthmus("create", str(damaged), "--wait")
    assert failed.exit_code == 1 and "the body is no tar" in failed.stderr
    for bad, why in (
        ([], "Missing argument 'FILE'"),
        ([str(files / "media/tone.wav")], "neither JSON lines nor a tar"),
    ):
        refused = isthmus("create", *bad)
        assert refused.exit_code != 0 and why in refused.stderr
