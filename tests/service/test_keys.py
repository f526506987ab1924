"""The file of keys, and the command that writes it."""

import asyncio
import datetime
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from service.__main__ import main
from service.api.keys import Keyring, KeysError, create_key, read_keys, revoke_key
from service.errors import NotReady, Unauthenticated
from service.runtime.quotas import Limit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def find(ring: Keyring, clear: str) -> str:
    return asyncio.run(ring.find(clear)).id


def test_a_key_is_found_again_and_is_nowhere_in_the_file(path: Path) -> None:
    limits = [Limit.parse("items=5/minute"), Limit.parse("items=100/day")]
    key, clear = create_key(path, "ours", ["read", "write"], limits, days=30)
    assert find(Keyring.open(path), clear) == key.id
    text = path.read_text()
    secret = clear.removeprefix(f"isthmus_{key.id}_")
    assert len(secret) == 43 and secret not in text and clear not in text
    assert read_keys(path) == (key,)
    assert json.loads(text)["keys"][0]["limits"] == ["items=5/minute", "items=100/day"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_two_keys_are_alike(path: Path) -> None:
    made = [create_key(path, f"n{n}", ["read"]) for n in range(20)]
    assert len({clear for _, clear in made}) == len({key.id for key, _ in made}) == 20
    assert [key.name for key in read_keys(path)] == [f"n{n}" for n in range(20)]


def test_what_is_not_the_key_is_refused(path: Path) -> None:
    key, clear = create_key(path, "ours", ["read"])
    other, other_clear = create_key(path, "theirs", ["read"])
    ring = Keyring.open(path)
    swapped = clear[:21] + other_clear[21:]  # an id with the secret of another
    last = "A" if clear[-1] != "A" else "B"
    for wrong in (
        "",
        "isthmus_",
        clear[:-1],
        clear[:-1] + last,
        clear + "A",
        clear.upper(),
        swapped,
        key.sha256,
        "é" * 64,
    ):
        with pytest.raises(Unauthenticated):
            find(ring, wrong)
    assert find(ring, other_clear) == other.id


def test_expired_and_revoked_keys_are_refused(path: Path) -> None:
    _, late = create_key(path, "late", ["read"], days=0)
    revoked, gone = create_key(path, "gone", ["read"])
    _, fine = create_key(path, "fine", ["read"], days=1)
    revoke_key(path, revoked.id)
    ring = Keyring.open(path)
    for clear in (late, gone):
        with pytest.raises(Unauthenticated):
            find(ring, clear)
    find(ring, fine)
    now = datetime.datetime.now(datetime.UTC)
    assert [key.state(now) for key in read_keys(path)] == ["expired", "revoked", "valid"]
    with pytest.raises(KeysError, match="is revoked already"):
        revoke_key(path, revoked.id)
    with pytest.raises(KeysError, match="has no key 'abc'"):
        revoke_key(path, "abc")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held | {"version": 2}, "version"),
        (lambda held: held | {"keys": [held["keys"][0]] * 2}, "two keys have one id"),
        (lambda held: {"keys": [held["keys"][0] | {"scopes": ["root"]}]}, "scopes"),
        (lambda held: {"keys": [held["keys"][0] | {"limits": ["items"]}]}, "is no limit"),
        (lambda held: {"keys": [held["keys"][0] | {"sha256": "short"}]}, "sha256"),
        (lambda held: {"keys": [held["keys"][0] | {"surprise": 1}]}, "surprise"),
        (lambda held: [], "the file"),
    ],
)
def test_a_file_that_is_wrong_says_where(path: Path, change: object, said: str) -> None:
    create_key(path, "ours", ["read"])
    assert callable(change)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(KeysError, match=said) as refused:
        Keyring.open(path)
    assert str(path) in str(refused.value)


def test_while_the_file_cannot_be_read_nobody_is_let_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.keys._RECHECKED_S", 0.0)
    _, clear = create_key(path, "ours", ["read"])
    whole = path.read_bytes()

    def write(data: bytes | None) -> None:
        path.unlink() if data is None else path.write_bytes(data)

    async def run() -> None:
        ring = Keyring.open(path)
        await ring.find(clear)
        write(whole[:-20])
        assert not await ring.readable()
        with pytest.raises(NotReady):
            await ring.find(clear)
        write(None)
        with pytest.raises(NotReady):
            await ring.find(clear)
        write(whole)
        await ring.find(clear)
        assert await ring.readable()

    asyncio.run(run())


def test_a_pipe_in_the_place_of_the_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.keys._RECHECKED_S", 0.0)
    _, clear = create_key(path, "ours", ["read"])
    ring = Keyring.open(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(NotReady):
        find(ring, clear)
    with pytest.raises(KeysError, match="no regular file"):
        Keyring.open(path)
    with pytest.raises(KeysError, match="no regular file"):
        revoke_key(path, "abc")


def test_a_disk_that_does_not_answer_holds_nobody_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.keys._RECHECKED_S", 0.0)
    _, clear = create_key(path, "ours", ["read"])
    answers = threading.Event()
    answers.set()
    read = read_keys

    def slow(path: Path) -> object:
        assert answers.wait(30)
        return read(path)

    monkeypatch.setattr("service.api.keys.read_keys", slow)

    async def run() -> None:
        ring = Keyring.open(path)
        await ring.find(clear)
        os.utime(path)  # it is read again
        answers.clear()
        threads = threading.active_count()
        monkeypatch.setattr("service.api.keys._PATIENCE_S", 0.05)
        refused = await asyncio.gather(*(ring.find(clear) for _ in range(50)), return_exceptions=True)
        assert all(isinstance(each, NotReady) for each in refused)
        assert threading.active_count() <= threads + 1, "one thread waits, and no more"
        await asyncio.to_thread(lambda: None)
        answers.set()
        monkeypatch.setattr("service.api.keys._PATIENCE_S", 30.0)
        while not await ring.readable():
            pass
        await ring.find(clear)

    asyncio.run(run())


def test_keys_made_at_the_same_time_are_all_there(path: Path) -> None:
    threads = [threading.Thread(target=create_key, args=(path, f"n{n}", ["read"])) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {key.name for key in read_keys(path)} == {f"n{n}" for n in range(12)}
    assert {each.name for each in path.parent.iterdir()} == {"keys.json", ".keys.json.lock"}


def test_a_file_that_others_may_read_stays_readable(path: Path) -> None:
    create_key(path, "one", ["read"])
    path.chmod(0o640)
    create_key(path, "two", ["read"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_command_creates_lists_and_revokes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISTHMUS_KEYS", str(path))

    def keys(*arguments: str) -> tuple[int, str, str]:
        return main(["keys", *arguments]), *capsys.readouterr()

    limit = ("--limit", "items=10/hour", "--limit", "pixels=1/day")
    code, said, beside = keys("create", "--name", "batch jobs", "--scopes", "write, read", *limit, "--days", "7")
    clear = said.strip()
    assert code == 0 and clear.startswith("isthmus_") and clear not in beside
    (key,) = read_keys(path)
    assert find(Keyring.open(path), clear) == key.id
    _, listed, _ = keys("list")
    assert listed.startswith(f"{key.id}  valid    read,write        batch jobs  (made ")
    assert "items=10/hour pixels=1/day" in listed and clear not in listed and key.sha256 not in listed
    assert keys("revoke", key.id)[0] == 0
    assert f"{key.id}  revoked" in keys("list")[1]
    code, _, beside = keys("revoke", "nothing")
    assert (code, beside) == (2, f"error: {path} has no key 'nothing': `keys list` shows what there is\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--name", "x", "--scopes", "root"], "'root' is none of read, write"),
        (["create", "--name", "x", "--scopes", "read", "--limit", "items=1"], "'items=1' is no limit"),
        (["create", "--name", "x", "--scopes", "read", "--limit", "items=1/day", "--limit", "items=2/day"], "twice"),
        (["create", "--name", "", "--scopes", "read"], "at least 1 character"),
        (["list"], "cannot be read: No such file"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], said: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["keys", *arguments, "--file", str(path)])
    except SystemExit as exit:  # argparse's
        code = exit.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not path.exists()


def test_the_command_wants_to_know_which_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list"]) == 2
    assert "ISTHMUS_KEYS is not set" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = tmp_path / "absent" / "keys.json"
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "keys.json"
    with pytest.raises(KeysError, match=f"{target} cannot be changed"):
        create_key(target, "x", ["read"])
