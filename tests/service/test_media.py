"""Originals: which files are given out, as what, and which never are."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.api.app import open_parts
from service.engine.originals import OTHER, media_type, open_original
from service.settings import Settings, SettingsError, read_settings
from tests.conftest import serving
from tests.service.media import png, wav

PICTURE, SOUND = png(3, size=(40, 30)), wav(seconds=0.5)
PAGE = b"<html><script>alert(1)</script></html>"
DRAWING = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
SECRET = b"SECRET outside of every root"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of pictures, with much in it that is not to be given out."""
    above = tmp_path_factory.mktemp("media")
    (above / "secret.txt").write_bytes(SECRET)
    root = above / "pictures"
    (root / "a b").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name, data in {
        "a b/ä?#.png": PICTURE,
        "sound.wav": SOUND,
        "page.html": PAGE,
        "drawing.svg": DRAWING,
        "empty.txt": b"",
        ".hidden/key.png": PICTURE,
        ".key.png": PICTURE,
    }.items():
        (root / name).write_bytes(data)
    os.symlink(above / "secret.txt", root / "leaves.txt")
    os.symlink(above, root / "out")
    os.symlink("sound.wav", root / "stays.wav")
    os.symlink("/dev/zero", root / "zero")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket"))
    return root


@pytest.fixture(scope="module")
def giving(bundle_dir, tmp_path_factory, root) -> Iterator[httpx.Client]:
    store = tmp_path_factory.mktemp("giving") / "store"
    with serving(Settings(bundle=bundle_dir, store=store, device="cpu", threads=1, media=(root,))) as client:
        yield client


def put(client: httpx.Client, id: str, metadata=None) -> None:
    item = {"id": id, "text": "a dog", "metadata": metadata or {}}
    assert client.post("/items", json={"items": [item]}).status_code == 200


def asked(client: httpx.Client, id: str, method="GET", **headers: str) -> httpx.Response:
    path = f"/media/{id.replace('?', '%3F').replace('#', '%23')}"
    return client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_a_picture_and_a_sound_come_as_what_they_are(giving):
    put(giving, "a b/ä?#.png")
    put(giving, "sound.wav")
    response = asked(giving, "a b/ä?#.png")
    assert response.status_code == 200 and response.content == PICTURE
    assert response.headers["content-type"] == "image/png" and "content-disposition" not in response.headers
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "private, no-cache"
    assert asked(giving, "sound.wav").headers["content-type"] == "audio/wav"
    again = asked(giving, "a b/ä?#.png", if_none_match=response.headers["etag"])
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize("id", ["page.html", "drawing.svg"])
def test_what_could_run_in_a_browser_is_only_saved(giving, id):
    put(giving, id)
    response = asked(giving, id)
    assert response.content in (PAGE, DRAWING) and response.headers["content-type"] == OTHER
    assert response.headers["content-disposition"] == f"attachment; filename*=UTF-8''{id}"
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_parts_of_a_file(giving):
    put(giving, "sound.wav")
    put(giving, "empty.txt")
    size = len(SOUND)
    whole = asked(giving, "sound.wav")
    assert whole.headers["accept-ranges"] == "bytes" and whole.headers["content-length"] == str(size)
    for given, start, end in (("0-0", 0, 1), ("100-", 100, size), ("-7", size - 7, size), (f"5-{size * 9}", 5, size)):
        part = asked(giving, "sound.wav", range=f"bytes={given}")
        assert part.status_code == 206 and part.content == SOUND[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert part.headers["content-type"] == "audio/wav"
    for given in (f"{size}-", "-0", "9-3", "-"):
        beyond = asked(giving, "sound.wav", range=f"bytes={given}")
        assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{size}"
        assert beyond.json()["code"] == "range_not_satisfiable"
    for given in ("bytes=0-1,3-4", "lines=1-2", "bytes=x-", f"bytes={'9' * 5_000}-"):
        assert asked(giving, "sound.wav", range=given).content == SOUND
    assert asked(giving, "sound.wav", range="bytes=0-3", if_range=whole.headers["etag"]).status_code == 206
    assert asked(giving, "sound.wav", range="bytes=0-3", if_range='"another"').content == SOUND
    assert asked(giving, "empty.txt").content == b"" and asked(giving, "empty.txt", range="bytes=0-").status_code == 416


def test_head_says_what_get_would(giving):
    put(giving, "sound.wav")
    head, got = asked(giving, "sound.wav", "HEAD"), asked(giving, "sound.wav")
    assert head.status_code == 200 and head.content == b""
    for name in ("content-length", "content-type", "etag", "accept-ranges"):
        assert head.headers[name] == got.headers[name]
    assert asked(giving, "sound.wav", "HEAD", range="bytes=2-3").headers["content-length"] == "2"


OUTSIDE = [
    "../secret.txt",
    "a b/../../secret.txt",
    "out/secret.txt",
    "leaves.txt",
    "stays.wav",
    "zero",
    "pipe",
    "socket",
    "a b",
    ".key.png",
    ".hidden/key.png",
    "/etc/passwd",
    "//etc/passwd",
    "sound.wav/",
    "sound.wav/x",
    "./sound.wav",
    "a b//ä?#.png",
    "x" * 256,
    "gone.png",
]


@pytest.mark.parametrize("id", OUTSIDE)
def test_what_is_no_plain_file_below_the_root_is_not_given_out(giving, root, id):
    put(giving, id)
    assert open_original([root], id, {}) is None
    response = giving.get("/media/" + "".join(f"%{byte:02X}" for byte in id.encode()))
    assert (response.status_code, response.json()["code"]) == (404, "not_found"), response.text
    assert "isthmus index" in response.json()["detail"] and str(root) not in response.text


def test_only_items_have_originals(giving):
    assert asked(giving, "a b/nobody.png").json()["detail"].startswith("no item")
    assert giving.get("/media/sound.wav", params={"collection": "nowhere"}).status_code == 404


def test_a_file_that_becomes_a_link_or_a_pipe_between_the_look_and_the_opening_is_refused(root, tmp_path, monkeypatch):
    name, looked = "swapped.txt", os.stat
    inside = root / name

    def swap(made):
        def stat(path, **named):
            result = looked(path, **named)
            if path == name:
                inside.unlink()
                made()
            return result

        return stat

    for made in (lambda: os.symlink(root.parent / "secret.txt", inside), lambda: os.mkfifo(inside)):
        inside.unlink(missing_ok=True)
        inside.write_bytes(b"harmless")
        monkeypatch.setattr(os, "stat", swap(made))
        assert open_original([root], name, {}) is None
        monkeypatch.undo()
    inside.unlink()


def test_the_folder_and_the_size_that_were_noted_choose_the_file(tmp_path):
    for folder, data in (("one/pictures", b"1"), ("two/pictures", b"22"), ("two", b"333")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "a.txt").write_bytes(data)
    roots = [tmp_path / "one" / "pictures", tmp_path / "two"]

    def given(**stamp):
        original = open_original(roots, "a.txt", {"file": stamp} if stamp else {})
        return None if original is None else original.read(0, 9)

    assert given() == b"1"
    assert given(folder="pictures", bytes=1) == b"1"
    assert given(folder="pictures", bytes=2) == b"22"
    assert given(bytes=3) == b"333"
    assert given(bytes=4) is None, "it was changed since"
    assert given(folder="../../etc") == b"1" and given(folder="..", bytes=9) is None
    assert open_original(roots, "a.txt", {"file": "a text"}) is not None


def test_open_files_are_closed(giving):
    put(giving, "sound.wav")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        asked(giving, "sound.wav")
        asked(giving, "sound.wav", "HEAD")
        asked(giving, "sound.wav", range="bytes=9-3")
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_large_file_is_read_as_it_is_sent_and_left_when_the_client_goes(giving, root):
    with (root / "large.wav").open("wb") as file:
        file.write(SOUND)
        file.truncate(2**30)
    put(giving, "large.wav")
    with giving.stream("GET", "/media/large.wav") as response:
        assert next(response.iter_bytes(1_000)) == SOUND[:1_000]
    end = asked(giving, "large.wav", range="bytes=-3")
    assert end.content == b"\0\0\0"
    (root / "large.wav").unlink()


def test_types_are_told_by_content():
    assert media_type(b"\xff\xd8\xff\xe0") == "image/jpeg"
    assert media_type(b"RIFF\0\0\0\0WEBP") == "image/webp"
    assert media_type(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == "image/heic"
    assert media_type(b"\0\0\0\x18ftypM4A \0\0\0\0") == "audio/mp4"
    assert media_type(b"\0\0\0\x18ftypisom\0\0\0\0") == "video/mp4"
    assert media_type(b"\x1a\x45\xdf\xa3" + b"\0" * 20 + b"webm") == "video/webm"
    assert media_type(b"ID3\4\0\0\0\0\0\0") == "audio/mpeg"
    for other in (b"", PAGE, DRAWING, b"%PDF-1.7", b"MZ", b"plain words"):
        assert media_type(other) == OTHER


def test_without_the_setting_there_are_none_and_the_answer_says_what_to_do(client):
    put(client, "sound.wav")
    response = client.get("/media/sound.wav")
    assert response.status_code == 404 and "--media FOLDER" in response.json()["detail"]


def test_a_root_that_is_no_folder_is_refused_at_start(settings, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"ISTHMUS_MEDIA: .*gone is no folder"):
        open_parts(settings.model_copy(update={"media": (tmp_path / "gone",)}))
    monkeypatch.setenv("ISTHMUS_MEDIA", "a, b/c")
    assert read_settings().media == (Path("a"), Path("b/c"))
    assert read_settings(media=["d,e"]).media == (Path("d,e"),)
