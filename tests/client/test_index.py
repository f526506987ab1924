"""`isthmus index` on folders as people have them, against a live server."""

import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from isthmus_client import Batching, Isthmus, NewItem, command, vector
from isthmus_client.folder import FolderIndex, Outcome, list_folder
from service.api.keys import create_key
from service.settings import Settings
from tests.conftest import DEADLINE_S, serving
from tests.service.films import colours, film, frame_of
from tests.service.jobs.archives import tar
from tests.service.jobs.processes import ended, errors, kill, server, stored
from tests.service.media import b64
from tests.service.slow import Slow, Stuck
from tests.service.test_serving import metric, until, with_towers

Make = Callable[..., bytes]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(shared_client: httpx2.Client) -> httpx2.Client:
    """Nothing is taken away after a test: each has a collection of its own."""
    return shared_client


@pytest.fixture
def collection(request: pytest.FixtureRequest) -> str:
    """One for each test."""
    return request.node.name[:64]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "holiday"
    folder.mkdir()
    return folder


@pytest.fixture
def index(client: httpx2.Client, folder: Path, collection: str) -> Callable[..., Result]:
    """Runs the command on the folder, or on another `of` the same collection."""

    def run(*more: str, of: Path = folder) -> Result:
        arguments = ["--url", str(client.base_url), "index", str(of), "-c", collection, *more]
        return CliRunner().invoke(command.cli, arguments)

    return run


def counts(result: Result) -> dict[str, int]:
    told: dict[str, int] = json.loads(result.stdout)
    assert result.exit_code == (1 if told["failed"] else 0), result.output
    return {name: count for name, count in told.items() if count and name != "skipped"}


def refused(result: Result) -> dict[str, str]:
    """Return what it says of each file that is not stored."""
    said = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    return dict(line.split(": ", 1) for line in said)


def write(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def texts(folder: Path, count: int) -> None:
    write(folder, {f"{number}.txt": f"dog {number}" for number in range(count)})


def test_images_sounds_videos_and_texts_are_stored_and_found(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], png: Make, wav: Make
) -> None:
    write(folder, {"2024/RED.PNG": png("red"), "2024/deep/tone.wav": wav(), "notes.md": "a blue dog"})
    write(folder, {"film.mkv": colours("red", "green", seconds=2)})
    write(folder, {"café.txt": b"\xef\xbb\xbfcaf\xc3\xa9", "IMG_0001": png("blue"), "Makefile": "all:"})
    write(folder, {"camera.HIF": png("blue"), "studio.wave": wav(), "films/old.mpga": wav()})
    write(folder, {".hidden.png": png(), ".git/a.png": png(), "a.pdf": b"%PDF", "b.pdf": b"%PDF", "lone.json": "{}"})
    broadcast = film([frame_of("red", (64, 64))] * 8, format="mpegts", codec="mpeg4", pixels="yuv420p")
    write(folder, {"program.ts": "let dog = 1;", "broadcast.ts": broadcast})
    (folder / "link.png").symlink_to("2024/RED.PNG")
    (folder / "again").symlink_to("2024")
    result = index()
    assert (result.exit_code, result.stdout) == (0, "11 indexed\n")
    assert result.stderr.splitlines() == [
        "note: links to folders are not followed: again",
        "note: left alone: 5 files of other kinds (2 .pdf, 1 without a suffix, 1 .ts, 1 .json): "
        "Makefile, a.pdf, b.pdf, lone.json, program.ts",
        "note: left alone: 2 hidden: .git, .hidden.png",
    ]
    left_alone = ["Makefile", "a.pdf", "b.pdf", "lone.json", "program.ts", ".git", ".hidden.png", "again"]
    assert json.loads(index("--json").stdout)["skipped"] == left_alone
    assert {id: item["modality"] for id, item in stored(client, collection=collection).items()} == {
        "2024/RED.PNG": "image",
        "2024/deep/tone.wav": "audio",
        "film.mkv": "video",
        "broadcast.ts": "video",
        "notes.md": "text",
        "café.txt": "text",
        "IMG_0001": "image",
        "link.png": "image",
        "camera.HIF": "image",
        "studio.wave": "audio",
        "films/old.mpga": "audio",
    }
    with Isthmus(str(client.base_url)) as space:
        found = space.search("green", modalities=["video"], collection=collection)[0]
        assert found.id == "film.mkv"
        assert found.moment is not None and found.moment.start >= 2
        assert space.search("blue dog", modalities=["text"], collection=collection)[0].id == "notes.md"


def test_a_file_that_cannot_be_read_is_named_in_the_words_of_every_door_and_the_others_are_stored(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], png: Make
) -> None:
    everywhere = {"cut.png": png()[:60], "fake.png": "hello", "latin.txt": b"caf\xe9", "long.txt": "x" * 40_000}
    everywhere |= {"unmarked.txt": "a dog".encode("utf-16-le"), "page.jpg": "<html><title>404</title></html>"}
    everywhere |= {"empty.wav": "", "data.txt": f"data:image/png;base64,{b64(png())}"}
    good = {"good.txt": "a dog", "windows.txt": "ein Hündchen".encode("utf-16")}
    write(folder, everywhere | good)
    (folder / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.wav")
    write(folder, {f"{'x' * 150}/{'y' * 150}.txt": "a dog", "a\nb.txt": "a dog"})
    (folder / os.fsdecode(b"bad\xff.txt")).write_text("a dog")
    for name in ("film.mp4", "endless.txt"):
        (folder / name).touch()
        os.truncate(folder / name, 2**40)  # a hole, of which nothing is to be read
    result = index("--json")
    assert counts(result) == {"indexed": 2, "failed": 15}
    why = refused(result)
    assert {name: why.pop(name) for name in ("dangling.jpg", "pipe.wav", "film.mp4", "endless.txt")} == {
        "dangling.jpg": "No such file or directory",
        "pipe.wav": "not a plain file",
        "film.mp4": "the file is larger than 256000000 bytes",
        "endless.txt": "the file is larger than 1000000 bytes",
    }
    assert why.pop(r"'bad\udcff.txt'") == "the name is not valid UTF-8"
    assert why.pop(r"'a\nb.txt'") == "id: control characters are not allowed"
    assert why.pop(f"{'x' * 150}/{'y' * 150}.txt") == "id: String should have at most 256 characters"
    assert why["page.jpg"].endswith("This is a web page")
    archive = tar({name: (folder / name).read_bytes() for name in everywhere | good})
    parameters = {"collection": "of-a-job"}
    job = client.post("/jobs", content=archive, headers={"content-type": "application/x-tar"}, params=parameters)
    assert ended(client, job.json()["id"])["failed"] == len(everywhere)
    assert {each["id"]: each["detail"] for each in errors(client, job.json()["id"])} == why
    for name in (collection, parameters["collection"]):
        item = client.get("/items/windows.txt", params={"collection": name, "include": "preview"}).json()
        assert item["preview"]["text"] == "ein Hündchen", name


def test_what_is_stored_already_is_not_sent_again(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], png: Make, wav: Make
) -> None:
    write(folder, {"red.png": png("red"), "tone.wav": wav(), "words.txt": "a blue dog", "broken.png": png()[:60]})
    assert index().stdout == "3 indexed, 1 failed\n"
    (folder / "broken.png").unlink()
    assert index().stdout == "0 indexed, 3 were there already\n"
    os.utime(folder / "tone.wav", (1, 1))  # touched, and the same
    write(folder, {"words.txt": "a green dog", "new.png": png("green")})
    assert counts(index("--json")) == {"indexed": 2, "already": 2}
    items = stored(client, collection=collection)
    assert items["words.txt"]["updated"] > items["words.txt"]["created"]
    assert items["tone.wav"]["updated"] == items["tone.wav"]["created"]
    with Isthmus(str(client.base_url)) as space:
        space.upsert([NewItem("new.png", "red", {"mine": 1}, collection)])  # of no file, as far as it says
    assert counts(index("--json")) == {"already": 4}
    assert counts(index("--again", "--json")) == {"indexed": 4}
    assert stored(client, collection=collection)["new.png"]["metadata"]["mine"] == 1


def test_metadata_come_from_files_beside_and_from_the_table(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], png: Make
) -> None:
    def metadata(name: str) -> dict[str, Any]:
        every = stored(client, collection=collection)[name]["metadata"]
        return {key: value for key, value in every.items() if not key.startswith("file")}

    write(folder, {"a/b.png": png(), "a/b.json": '{"n": 1}', "a/b.png.json": '{"n": 2, "place": "quay"}'})
    write(folder, {"c.txt": "a dog", "c.json": b'\xef\xbb\xbf{"n": 3}', "d.txt": "a dog"})
    table = '{"file_name": "a/b.png", "n": 0, "set": "x"}\n\n{"file_name": "./d.txt", "n": 4}'
    write(folder, {"metadata.jsonl": table})
    assert index().stdout == "3 indexed\n"
    assert metadata("a/b.png") == {"n": 2, "place": "quay", "set": "x"}
    assert (metadata("c.txt"), metadata("d.txt")) == ({"n": 3}, {"n": 4})

    with Isthmus(str(client.base_url)) as space:  # what was added there stays
        item = space.item("a/b.png", collection=collection)
        picture = NewItem("a/b.png", folder / "a/b.png", {**item.metadata, "seen": True}, collection)
        space.upsert([picture])
    write(folder, {"a/b.png.json": '{"n": 5}'})
    (folder / "c.json").unlink()
    assert counts(index("--json")) == {"indexed": 2, "already": 1}
    assert metadata("a/b.png") == {"n": 5, "set": "x", "seen": True}
    assert metadata("c.txt") == {}
    assert counts(index("--json")) == {"already": 3}


def test_metadata_that_cannot_be_taken_are_named(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result]
) -> None:
    wrong = {
        "cut": '{"a": ',
        "list": "[1]",
        "nan": '{"a": NaN}',
        "huge": '{"a": 1e999}',
        "half": r'{"a": "\ud800"}',
        "deep": "[" * 10_000,
        "large": json.dumps({"a": "x" * 20_000}),
        "integer": json.dumps({"a": 10**30}),
        "verge": json.dumps({"a": "x" * 16_300}),  # with what is added to it it is too large
    }
    for name, content in wrong.items():
        write(folder, {f"{name}.txt": "dog", f"{name}.json": content})
    write(folder, {"link.txt": "dog", "good.txt": "dog"})
    (folder / "link.json").symlink_to("nowhere")
    table = '{"file_name": "gone.png"}\n{"n": 1}\nnonsense\n{"file_name": "good.txt", "n": 1}'
    write(folder, {"metadata.jsonl": table})
    result = index("--json")
    assert counts(result) == {"indexed": 1, "failed": 12}
    invalid = "the file's metadata ({}.json) is not valid JSON"
    assert result.stderr.splitlines()[:2] == [
        "error: metadata.jsonl: line 2 has no file_name",
        "error: metadata.jsonl: line 3 is not valid JSON",
    ]
    assert {name: why for name, why in refused(result).items() if name != "metadata.jsonl"} == {
        **{f"{name}.txt": invalid.format(name) for name in ("cut", "nan", "huge", "half", "deep")},
        "list.txt": "the file's metadata (list.json) is not a JSON object",
        "large.txt": "the file's metadata (large.json) is larger than 16384 bytes",
        "link.txt": "the file's metadata (link.json) cannot be read: No such file or directory",
        "integer.txt": "metadata: an integer does not fit in 64 bits: write it as a text, or as a number such as 1e300",
        "verge.txt": "metadata: the metadata are larger than 16384 bytes of JSON",
    }
    assert "note: metadata.jsonl describes 1 missing file, such as gone.png" in result.stderr
    assert stored(client, collection=collection)["good.txt"]["metadata"]["n"] == 1


def test_only_items_of_this_folder_whose_files_are_gone_are_pruned(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write(folder, {"a.txt": "a dog", "deep/b.txt": "a dog", "c.txt": "a dog", "d.txt": "a dog"})
    write(other, {"e.txt": "a dog"})
    assert index().stdout == "4 indexed\n" and index(of=other).stdout == "1 indexed\n"
    with Isthmus(str(client.base_url)) as space:
        space.upsert([NewItem("by hand", "a dog", collection=collection)])
        earlier = {"file": {"bytes": 1, "modified": 1, "sha256": "0"}}
        space.upsert([NewItem("earlier.txt", "a dog", earlier, collection)])
    (folder / "a.txt").unlink()
    (folder / "deep/b.txt").unlink()
    (folder / "deep").rmdir()
    (folder / "deep").touch()
    (folder / "c.txt").rename(folder / "c.pdf")
    (folder / "c.txt").symlink_to("c.pdf")
    assert index().stdout == "0 indexed, 2 were there already\n"
    assert len(stored(client, collection=collection)) == 7, "without --prune all stay"
    result = index("--prune")
    assert (result.exit_code, result.stdout) == (0, "0 indexed, 2 were there already, 2 deleted\n")
    assert result.stderr.splitlines()[:2] == ["deleted: a.txt", "deleted: deep/b.txt"]
    assert set(stored(client, collection=collection)) == {"c.txt", "d.txt", "e.txt", "by hand", "earlier.txt"}
    for name in ("c.txt", "d.txt"):
        (folder / name).unlink()
    empty = index("--prune")  # such as a disk that is not mounted
    assert (empty.exit_code, "there is no image, sound, video or text" in empty.stderr) == (1, True)
    assert len(stored(client, collection=collection)) == 5


def test_a_file_that_was_renamed_takes_its_item_along(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], png: Make, wav: Make
) -> None:
    write(folder, {"a/red.png": png("red"), "a/red.json": '{"n": 1}', "tone.wav": wav(), "gone.txt": "a dog"})
    write(folder, {"twin 1.txt": "twins", "twin 2.txt": "twins", "stays.txt": "stays"})
    assert index().stdout == "6 indexed\n"
    before = stored(client, collection=collection)
    picture = client.get("/previews/a/red.png", params={"collection": collection}).content
    (folder / "a").rename(folder / "b")
    (folder / "tone.wav").rename(folder / "440 Hz, ü.wav")
    for number in (1, 2):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / f"twin {number}.txt").rename(folder / "deep" / f"twin {number}.txt")
    (folder / "gone.txt").unlink()
    write(folder, {"new.txt": "a new dog"})
    result = index("--prune")
    assert result.stdout == "1 indexed, 5 were there already, 4 renamed, 1 deleted\n"
    assert result.stderr.splitlines() == [
        "renamed: tone.wav → 440 Hz, ü.wav",
        "renamed: a/red.png → b/red.png",
        "renamed: twin 1.txt → deep/twin 1.txt",
        "renamed: twin 2.txt → deep/twin 2.txt",
        "deleted: gone.txt",
    ]
    after = stored(client, collection=collection)
    assert set(after) == {"b/red.png", "440 Hz, ü.wav", "deep/twin 1.txt", "deep/twin 2.txt", "stays.txt", "new.txt"}
    for old, new in (("a/red.png", "b/red.png"), ("tone.wav", "440 Hz, ü.wav")):
        for kept in ("created", "modality"):
            assert after[new][kept] == before[old][kept]
        changed = {"file.folder": "/".join(["holiday", *new.split("/")[:-1]])}
        assert after[new]["metadata"] == before[old]["metadata"] | changed
    assert picture[:2] == b"\xff\xd8"
    assert client.get("/previews/b/red.png", params={"collection": collection}).content == picture
    assert counts(index("--prune", "--json")) == {"already": 6}


def test_a_file_that_was_copied_is_another_item(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result]
) -> None:
    write(folder, {"a.txt": "a dog"})
    index()
    write(folder, {"b.txt": "a dog"})
    assert counts(index("--prune", "--json")) == {"indexed": 1, "already": 1}
    (folder / "a.txt").rename(folder / "c.txt")
    assert counts(index("--json")) == {"indexed": 1, "already": 1}, "nothing is moved without --prune"
    assert set(stored(client, collection=collection)) == {"a.txt", "b.txt", "c.txt"}


def test_previews_that_are_missing_are_filled_in_once(settings: Settings, folder: Path, png: Make, wav: Make) -> None:
    def run(client: httpx2.Client, *more: str) -> str:
        return CliRunner().invoke(command.cli, ["--url", str(client.base_url), "index", str(folder), *more]).stdout

    write(folder, {"red.png": png("red"), "red.json": '{"n": 1}', "tone.wav": wav(), "words.txt": "a dog"})
    write(folder, {"film.mkv": colours("red", "green", seconds=2)})
    with serving(settings.model_copy(update={"previews": False})) as client:
        assert run(client) == "4 indexed\n"
        assert run(client) == "0 indexed, 4 were there already\n"
        assert client.get("/previews/red.png").status_code == 404
    with serving(settings.model_copy(update={"previews": True})) as client:
        write(folder, {"tone.wav": wav(880.0)})
        before = stored(client)
        assert run(client) == "1 indexed, 1 preview filled in, 2 were there already\n"
        assert run(client) == "0 indexed, 4 were there already\n"
        assert client.get("/previews/red.png").headers["content-type"] == "image/jpeg"
        after = stored(client)
        assert after["red.png"]["metadata"]["n"] == 1
        assert [before[name] == after[name] for name in ("words.txt", "film.mkv")] == [True, True]
        with Isthmus(str(client.base_url)) as space:  # one of which no preview can be made is asked for once
            item = space.item("red.png", with_vector=True)
            assert item.vector is not None
            space.upsert([NewItem("red.png", vector(item.vector), item.metadata, modality="image")])
        assert client.get("/previews/red.png").status_code == 404
        assert run(client) == "0 indexed, 4 were there already\n"


def test_a_text_that_is_cut_is_counted_and_a_damaged_file_named(folder: Path, index: Callable[..., Result]) -> None:
    picture = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(picture, "JPEG")
    write(folder, {"0.txt": "dog " * 2_000, "1.txt": "dog " * 2_000, "half.jpg": picture.getvalue()[:-10]})
    result = index()
    assert (result.exit_code, result.stdout) == (0, "3 indexed\n")
    assert result.stderr.splitlines() == [
        "warning: half.jpg: the file ends early or is damaged in places: what can be read of it is stored",
        "note: 2 texts longer than the model reads: searches see the beginning only",
    ]


def test_a_folder_without_files_or_that_cannot_be_read_is_said(folder: Path, index: Callable[..., Result]) -> None:
    nothing = index()
    assert (nothing.exit_code, "next:" in nothing.stderr) == (1, True)
    write(folder, {f"{number}.{number}": "" for number in range(7)})
    assert "it holds 7 files of other kinds (1 .0, 1 .1, 1 .2, 1 .3, 1 .4, …)" in index().stderr
    assert index(of=folder / "absent").exit_code == 2
    gone = list_folder(folder / "absent")
    assert gone.unreadable == {".": "the folder cannot be read: No such file or directory"}


def test_files_as_large_as_one_that_was_too_large_are_not_sent(settings: Settings, folder: Path, png: Make) -> None:
    large = os.urandom(60_000)
    write(folder, {"a.jpg": large, "b.png": png(), "c.jpg": large + b"x", "d.jpg": large[:-1]})
    said: list[Outcome] = []
    one_by_one = Batching(inputs=1, concurrency=1)
    with (
        serving(settings.model_copy(update={"max_body_bytes": 70_000})) as client,
        Isthmus(str(client.base_url), batching=one_by_one) as space,
    ):
        FolderIndex(space, list_folder(folder), "default").send(again=False, report=said.append)
        assert metric(client, "isthmus_rejections_total", reason="body_too_large") == 2
    why = "the body is larger than 70000 bytes"
    assert {each.name: each.error for each in said} == {"a.jpg": why, "b.png": None, "c.jpg": why, "d.jpg": why}


# What ends in the midst


@contextmanager
def running(url: str, folder: Path, *more: str) -> Iterator["subprocess.Popen[str]"]:
    # A shell's background processes ignore Ctrl-C.
    program = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from isthmus_client import __main__ as m"
    started = subprocess.Popen(
        [sys.executable, "-c", f"{program}; m.main()", "--url", url, "index", str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_in_the_midst_is_gone_on_with(
    settings: Settings, folder: Path, how: signal.Signals
) -> None:
    texts(folder, 600)
    with with_towers(settings, lambda tower: Stuck(tower, 100)) as (_, client, towers):
        with running(str(client.base_url), folder) as stopped:
            assert towers["text"].entered.wait(DEADLINE_S)
            until(lambda: len(stored(client)) >= 64)
            stopped.send_signal(how)
            code = 130 if how == signal.SIGINT else -how
            assert stopped.wait(DEADLINE_S) == code, "at once, whatever the server does"
            said = stopped.stderr.read()
            stops = re.search(r"^stopped after (\d+) of 600; run again to continue$", said, re.MULTILINE)
            assert how == signal.SIGKILL or (stops and int(stops[1]) < 600)
        towers["text"].released.set()
        there = len(stored(client))
        assert 64 <= there < 600
        result = CliRunner().invoke(command.cli, ["--url", str(client.base_url), "index", str(folder), "--json"])
        told = counts(result)
        assert told["already"] >= there and told["already"] + told["indexed"] == 600
        assert set(stored(client)) == {f"{number}.txt" for number in range(600)}


@pytest.mark.full
def test_a_run_outlives_its_server(bundle_dir: Path, tmp_path: Path, folder: Path, free_port: int) -> None:
    texts(folder, 3_000)
    with (
        server(bundle_dir, tmp_path / "store", port=free_port) as (first, client),
        running(f"http://127.0.0.1:{free_port}", folder) as run,
    ):
        until(lambda: len(stored(client)) > 0)
        kill(first)
        with server(bundle_dir, tmp_path / "store", port=free_port) as (_, client):
            said = run.communicate(timeout=2 * DEADLINE_S)
            assert (run.returncode, said) == (0, ("3,000 indexed\n", ""))
            assert len(stored(client)) == 3_000


def test_items_say_for_browsing_where_and_when_their_files_are(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], png: Make
) -> None:
    """A photograph has the date of its EXIF, any other file its own; both are what a clock on the wall showed."""
    image, exif = Image.new("RGB", (8, 8)), Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2019:08:24 15:30:00"
    written = io.BytesIO()
    image.save(written, "JPEG", exif=exif)
    write(folder, {"2019/rome/photo.jpg": written.getvalue(), "note.txt": "a dog", "broken.png": png()[:60]})
    for name in ("2019/rome/photo.jpg", "note.txt"):
        os.utime(folder / name, (1_700_000_000, 1_700_000_000))
    assert index().exit_code == 1
    items = stored(client, collection=collection)
    fields = ("file.folder", "file.month", "file.date")
    photo, note = ([items[name]["metadata"][key] for key in fields] for name in ("2019/rome/photo.jpg", "note.txt"))
    assert photo == ["holiday/2019/rome", "2019-08", 1_566_660_600]
    assert note[:2] == ["holiday", "2023-11"] and abs(note[2] - 1_700_000_000) < 15 * 3600
    facets = client.get(f"/collections/{collection}/facets", params={"key": ["file.month"]}).json()["facets"]
    assert facets["file.month"]["values"] == [{"value": "2019-08", "count": 1}, {"value": "2023-11", "count": 1}]


def test_a_watched_folder_is_followed(settings: Settings, folder: Path, png: Make, tmp_path: Path) -> None:
    write(folder, {"a.txt": "a dog", "broken.png": png()[:60]})
    with serving(settings) as client, running(str(client.base_url), folder, "--watch", "--prune", "--json") as run:
        assert run.stdout is not None and run.stderr is not None

        def seen() -> dict[str, int]:
            told = json.loads(run.stdout.readline())
            return {name: count for name, count in told.items() if count and name != "skipped"}

        assert seen() == {"indexed": 1, "failed": 1}
        said = [run.stderr.readline(), run.stderr.readline()]
        assert "broken.png" in said[0] and said[1] == f"watching {folder}; Ctrl-C ends it\n"
        write(folder, {".hidden.txt": "a dog"})
        write(tmp_path, {"deep/red.png": png("red")})
        (tmp_path / "deep").rename(folder / "deep")  # one step: a look may come between two
        assert seen() == {"indexed": 1, "already": 1, "failed": 1}
        (folder / "deep").rename(folder / "deeper")
        assert seen() == {"already": 2, "renamed": 1, "failed": 1}
        (folder / "broken.png").unlink()  # of which alone nothing is said
        (folder / "a.txt").unlink()
        assert seen() == {"already": 1, "deleted": 1}
        assert set(stored(client)) == {"deeper/red.png"}
        run.send_signal(signal.SIGINT)
        assert run.wait(DEADLINE_S) == 130
        said = run.stderr.read().splitlines()
        assert said == ["renamed: deep/red.png → deeper/red.png", "deleted: a.txt", "", "stopped watching"]


def test_of_a_watched_folder_that_became_empty_nothing_is_deleted(
    client: httpx2.Client, folder: Path, collection: str, index: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a disk that is not mounted any more."""

    def changes(*given: object, **options: object) -> Iterator[set[str]]:
        yield set()
        for number in range(2):
            (folder / f"{number}.txt").unlink()
        yield {"0.txt", "1.txt"}
        texts(folder, 1)
        yield {"0.txt"}
        raise OSError(28, "the end of the test")

    texts(folder, 2)
    monkeypatch.setattr("watchfiles.watch", changes)
    result = index("--watch", "--prune")
    assert result.stdout.splitlines() == ["2 indexed", "0 indexed, 1 were there already, 1 deleted"]


def test_a_watch_goes_on_where_its_server_does_not_answer_and_says_what_to_do_where_it_cannot_watch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts(folder, 1)

    def changes(*given: object, **options: object) -> Iterator[set[str]]:
        """Yield what watchfiles does: the first look, the look after a failure, and then no room for more watches."""
        yield set()
        yield set()
        raise OSError(28, "OS file watch limit reached")

    monkeypatch.setattr("watchfiles.watch", changes)
    monkeypatch.setattr("isthmus_client.command_index._TRY_AGAIN_S", 0.0)
    result = CliRunner().invoke(command.cli, ["--url", "http://127.0.0.1:1", "index", str(folder), "--watch"])
    assert result.exit_code == 1 and "indexed" not in result.stdout
    assert result.stderr.count("http://127.0.0.1:1 cannot be reached") == 2
    assert f"{folder} cannot be watched" in result.stderr and "WATCHFILES_FORCE_POLLING=true" in result.stderr


def test_what_the_server_refuses_as_a_whole_ends_the_run(settings: Settings, folder: Path, tmp_path: Path) -> None:
    texts(folder, 3)
    keys = tmp_path / "keys.json"
    _, reader = create_key(keys, "reader", ["read"])
    with serving(settings.model_copy(update={"keys": keys})) as client:
        ask = ["--url", str(client.base_url), "--api-key"]
        for key, stopped in ((reader, True), ("nonsense", False)):
            result = CliRunner().invoke(command.cli, [*ask, key, "index", str(folder)])
            assert (result.exit_code, "give a key that may do this" in result.stderr) == (1, True)
            assert ("stopped after 0 of 3; run again to continue" in result.stderr) is stopped


def test_another_server_is_told_from_an_empty_collection(folder: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    texts(folder, 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as other:
        threading.Thread(target=other.serve_forever).start()
        result = CliRunner().invoke(
            command.cli, ["--url", f"http://127.0.0.1:{other.server_port}", "index", str(folder)]
        )
        other.shutdown()
    assert (result.exit_code, "something else listens there" in result.stderr) == (1, True)


def test_an_index_waits_behind_requests(settings: Settings, folder: Path) -> None:
    """It sends Priority: u=7 (RFC 9218)."""
    texts(folder, 60)
    small = settings.model_copy(update={"batch_tokens": 2, "cache_bytes": 0})
    with with_towers(small, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        order: list[str] = []
        address = str(client.base_url).rstrip("/")

        def ask() -> None:
            body = {"inputs": ["red", "green", "blue"]}
            answer = httpx2.post(f"{address}/embed", json=body, trust_env=False, timeout=60)
            assert answer.status_code == 200
            order.append("request")

        with running(str(client.base_url), folder) as run:
            assert towers["text"].entered.wait(DEADLINE_S)
            asking = threading.Thread(target=ask)
            asking.start()
            until(lambda: metric(client, "isthmus_queue_depth", modality="text", model="tiny") == 63)
            towers["text"].released.set()
            assert run.communicate(timeout=DEADLINE_S)[0] == "60 indexed\n"
            order.append("index")
            asking.join(DEADLINE_S)
        assert order == ["request", "index"]
