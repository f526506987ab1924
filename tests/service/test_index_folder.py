"""`python -m service index FOLDER`, over HTTP and on a store."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from isthmus_client import command
from service.__main__ import main
from service.api.keys import create_key
from service.contract.containers import UNKNOWN
from service.settings import Settings
from tests.conftest import serving
from tests.service.jobs.processes import stored
from tests.service.slow import Slow
from tests.service.test_serving import with_towers

Make = Callable[..., bytes]


@pytest.fixture
def folder(tmp_path: Path, png: Make, wav: Make) -> Path:
    root = tmp_path / "media"
    (root / "2024").mkdir(parents=True)
    (root / "2024" / "red.png").write_bytes(png("red"))
    (root / "2024" / "red.json").write_text('{"colour": "red"}')
    (root / "tone.wav").write_bytes(wav())
    (root / "words.txt").write_text("a blue dog")
    (root / "broken.png").write_bytes(png("blue")[:60])
    (root / "table.csv").write_text("a,b")
    (root / "too-much.txt").write_text("x" * 40_000)
    (root / "link.png").symlink_to("2024/red.png")
    (root / ".hidden.png").write_bytes(png("red"))
    return root


REFUSED = {
    "broken.png": "the image is truncated or damaged",
    "link.png": "not a plain file: links and devices are not read",
    "table.csv": UNKNOWN,
    "too-much.txt": "the text is longer than 32000 characters",
}


def indexed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> tuple[str, dict[str, str]]:
    """What it says, and what it says of each file that it refused."""
    assert main(["index", *arguments]) == code
    said, *refused = capsys.readouterr().out.strip().splitlines()[-100:]
    return said, dict(line.strip().split(": ", 1) for line in refused if line.startswith("  "))  # type: ignore[misc]


def test_a_folder_is_indexed_and_again_only_what_is_new(
    settings: Settings, folder: Path, png: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(settings) as client:
        arguments = (str(folder), "--url", str(client.base_url), "--collection", "mine")
        capsys.readouterr()
        said, refused = indexed(capsys, *arguments)
        assert said == "3 indexed, 0 unchanged, 4 refused"
        assert set(refused) == set(REFUSED)
        told = ("link.png", "table.csv", "too-much.txt")
        assert {name: refused[name] for name in told} == {name: REFUSED[name] for name in told}
        items = stored(client, collection="mine")
        assert {id: item["modality"] for id, item in items.items()} == {
            "2024/red.png": "image",
            "tone.wav": "audio",
            "words.txt": "text",
        }
        assert items["2024/red.png"]["metadata"]["colour"] == "red"
        assert items["words.txt"]["metadata"]["file"]["bytes"] == 10
        found = client.post("/search", json={"query": "blue", "collection": "mine"}).json()["results"]
        assert found[0]["id"] == "words.txt"

        for name in REFUSED:
            (folder / name).unlink()
        assert indexed(capsys, *arguments, code=0)[0] == "0 indexed, 3 unchanged, 0 refused"
        os.utime(folder / "tone.wav", (1, 1))  # touched, and the same
        (folder / "2024" / "red.json").write_text('{"colour": "scarlet"}')  # described anew
        (folder / "words.txt").write_text("a green dog")
        (folder / "new.png").write_bytes(png("green"))
        assert indexed(capsys, *arguments, code=0)[0] == "3 indexed, 1 unchanged, 0 refused"
        items = stored(client, collection="mine")
        assert items["2024/red.png"]["metadata"]["colour"] == "scarlet"
        assert items["words.txt"]["updated"] > items["words.txt"]["created"]
        assert items["tone.wav"]["updated"] == items["tone.wav"]["created"]


def test_a_store_is_filled_without_a_server(
    settings: Settings, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(folder), "--store", str(settings.store), "--bundle", str(settings.bundle), "--device", "cpu")
    said, refused = indexed(capsys, *arguments)
    assert (said, set(refused)) == ("3 indexed, 0 unchanged, 4 refused", set(REFUSED))
    assert indexed(capsys, *arguments)[0] == "0 indexed, 3 unchanged, 4 refused"
    with serving(settings) as client:
        assert set(stored(client)) == {"2024/red.png", "tone.wav", "words.txt"}
        assert main(["index", *arguments]) == 2
        assert "--url" in capsys.readouterr().err


def test_what_the_client_s_command_stored_is_known(
    settings: Settings, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in REFUSED:
        (folder / name).unlink()
    with serving(settings) as client:
        done = CliRunner().invoke(command.cli, ["--url", str(client.base_url), "index", str(folder)])
        assert done.stdout == "2 indexed\n"
        capsys.readouterr()
        arguments = (str(folder), "--url", str(client.base_url))
        # The text is not the client's to send, and the picture is described.
        assert indexed(capsys, *arguments, code=0)[0] == "2 indexed, 1 unchanged, 0 refused"
        done = CliRunner().invoke(command.cli, ["--url", str(client.base_url), "index", str(folder), "--again"])
        assert done.stdout == "2 indexed\n"
        assert stored(client)["2024/red.png"]["metadata"]["colour"] == "red"


def test_what_is_wrong_is_said(
    settings: Settings, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    create_key(keys, "reader", ["read"])
    with serving(settings.model_copy(update={"keys": keys})) as client:
        for url, said in ((str(client.base_url), "refuses: "), ("nonsense", "cannot be reached")):
            assert main(["index", str(folder), "--url", url]) == 2
            assert said in capsys.readouterr().err
    with serving(settings) as client:
        assert main(["index", str(tmp_path / "absent"), "--url", str(client.base_url)]) == 2
        assert "the folder is not there" in capsys.readouterr().err


def test_a_key_opens_a_server_that_has_keys(
    settings: Settings,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = tmp_path / "keys.json"
    _, clear = create_key(keys, "filler", ["read", "write"])
    monkeypatch.setenv("ISTHMUS_API_KEY", clear)
    with serving(settings.model_copy(update={"keys": keys})) as client:
        capsys.readouterr()
        assert indexed(capsys, str(folder), "--url", str(client.base_url))[0] == "3 indexed, 0 unchanged, 4 refused"


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell's background processes ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_run_that_is_stopped_goes_on(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"dog {number}")
    with with_towers(settings, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        tower = towers["text"]
        main_thread = threading.get_ident()

        def interrupt() -> None:
            tower.entered.wait(60)
            signal.pthread_kill(main_thread, signal.SIGINT)  # as a terminal's Ctrl-C, which the kernel gives to it

        threading.Thread(target=interrupt).start()
        assert main(["index", str(folder), "--url", str(client.base_url)]) == 130
        assert "run it again" in capsys.readouterr().err
        tower.released.set()
        assert main(["index", str(folder), "--url", str(client.base_url)]) == 0
        assert set(stored(client)) == {f"{number}.txt" for number in range(200)}


def test_only_the_item_that_spoils_a_request_is_refused(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text("dog")
    (folder / "described.txt").write_text("dog")
    # On the verge: with what is added to them the metadata are too large.
    (folder / "described.json").write_text('{"long": "%s"}' % ("x" * 16_300))
    with serving(settings) as client:
        capsys.readouterr()
        said, refused = indexed(capsys, str(folder), "--url", str(client.base_url))
        assert said == "5 indexed, 0 unchanged, 1 refused"
        assert "larger than 16384 bytes" in refused["described.txt"]


def test_bulk_work_over_http_waits_behind_requests(settings: Settings) -> None:
    """Priority: u=7 (RFC 9218)."""
    small = settings.model_copy(update={"batch_tokens": 2, "cache_bytes": 0})
    with with_towers(small, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        tower = towers["text"]
        order: list[str] = []

        def send(name: str, path: str, body: dict[str, Any], headers: dict[str, str]) -> threading.Thread:
            def ask() -> None:
                answer = httpx.post(client.base_url.join(path), json=body, headers=headers, trust_env=False, timeout=60)
                assert answer.status_code == 200
                order.append(name)

            thread = threading.Thread(target=ask)
            thread.start()
            return thread

        items = [{"id": f"{number}", "text": f"dog {number}"} for number in range(60)]
        bulk = send("bulk", "/items", {"items": items}, {"priority": "u=7, i"})
        assert tower.entered.wait(20)
        asked = send("request", "/embed", {"inputs": ["red", "green", "blue"]}, {})
        for _ in range(2_000):
            if 'isthmus_queue_depth{modality="text",model="tiny"} 63.0' in client.get("/metrics").text:
                break
        tower.released.set()
        for thread in (bulk, asked):
            thread.join(60)
        assert order == ["request", "bulk"]
