import asyncio
import os
import resource
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from service.__main__ import main
from service.errors import NotReady
from service.store import Entry, Rules, SqliteStore, StoreDamaged, StoreError, VectorSearch, upkeep
from tests.conftest import on_a_loop
from tests.service.fakes import DIMENSIONS, fake_manifest, vector_of
from tests.service.stores import in_sqlite

SMALL = Rules(flat_up_to=20, graph_from=20, rest_at_least=10)


def entry(id, **metadata):
    return Entry("default", id, "text", metadata, vector_of(id), text=id)


def in_store(path, use, rules=SMALL):
    return in_sqlite(path, use, rules=rules)


async def fill(store):
    await store.upsert([entry(f"{number}", n=number) for number in range(60)])
    assert await store.indexed(300)


async def held(store):
    items, _ = await store.page(None, None, None, 10_000)
    for item in items:
        hits = (await store.search(VectorSearch("default", vector_of(item.id)[None], 1)))[0]
        assert hits[0].item.id == item.id
    return {item.id for item in items}


def wrong(path):
    return [said for good, said in upkeep.check(path) if not good]


class TestBackup:
    def test_of_a_store_that_is_written_to_and_back(self, tmp_path, capsys):
        async def run(store):
            await fill(store)
            writing = asyncio.gather(*(store.upsert([entry(f"more {number}")]) for number in range(50)))
            assert await asyncio.to_thread(main, ["backup", str(tmp_path / "store"), str(tmp_path / "copy")]) == 0
            await writing

        in_store(tmp_path / "store", run)
        assert main(["restore", str(tmp_path / "copy"), str(tmp_path / "again")]) == 0
        assert "items" in capsys.readouterr().out
        ids = in_store(tmp_path / "again", held)
        assert {f"{number}" for number in range(60)} <= ids and len(ids) <= 110
        assert wrong(tmp_path / "again") == []

    def test_nothing_is_overwritten(self, tmp_path, capsys):
        in_store(tmp_path / "store", fill)
        (tmp_path / "copy").write_text("precious")
        assert main(["backup", str(tmp_path / "store"), str(tmp_path / "copy")]) == 2
        assert (tmp_path / "copy").read_text() == "precious"
        assert main(["backup", str(tmp_path / "store"), str(tmp_path / "copy 2")]) == 0
        assert main(["restore", str(tmp_path / "copy 2"), str(tmp_path / "store")]) == 2
        assert "holds a store already" in capsys.readouterr().err
        assert len(in_store(tmp_path / "store", held)) == 60

    def test_what_is_no_store_or_damaged(self, tmp_path, capsys):
        assert main(["backup", str(tmp_path / "never"), str(tmp_path / "copy")]) == 2
        assert "is not there" in capsys.readouterr().err
        in_store(tmp_path / "store", fill)
        upkeep.backup(tmp_path / "store", tmp_path / "copy")
        data = bytearray((tmp_path / "copy").read_bytes())
        data[2 * 8_192 : 3 * 8_192] = b"\xff" * 8_192
        (tmp_path / "copy").write_bytes(data)
        with pytest.raises(StoreDamaged):
            upkeep.restore(tmp_path / "copy", tmp_path / "again")
        assert not (tmp_path / "again" / "store.sqlite3").exists()
        (tmp_path / "text").write_text("no database" * 1_000)
        with pytest.raises(StoreError):
            upkeep.restore(tmp_path / "text", tmp_path / "again")


class TestCheck:
    def test_of_a_whole_store_also_while_it_is_served(self, tmp_path, capsys):
        async def run(store):
            await fill(store)
            await store.upsert([entry("rest"), entry("3", changed=True)])
            assert await asyncio.to_thread(main, ["check", str(tmp_path)]) == 0

        in_store(tmp_path, run)
        said = capsys.readouterr().out
        assert "vectors: 61, of which 0" in said and "59 of its 60 vectors live, 0 differ" in said

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("UPDATE vectors SET vector = zeroblob(32) WHERE slot = 5", "1 are not finite and of unit length"),
            ("UPDATE vectors SET vector = x'00' WHERE slot = 5", "1 are not finite and of unit length"),
            ("DELETE FROM vectors WHERE slot = 5", "items without a vector: 1"),
            ("DELETE FROM items WHERE id = '5'", "vectors without an item: 1"),
            ("UPDATE items SET metadata = '{' WHERE id = '5'", "metadata that are no JSON: 1"),
            ("UPDATE items SET collection = 77 WHERE id = '5'", "references: 1 broken"),
        ],
    )
    def test_of_rows_that_are_wrong(self, tmp_path, damage, message):
        in_store(tmp_path, fill)
        assert wrong(tmp_path) == []
        connection = sqlite3.connect(tmp_path / "store.sqlite3")
        with connection:
            connection.execute(damage)
        connection.close()
        assert any(message in said for said in wrong(tmp_path))

    def test_of_an_index_that_does_not_agree_with_the_rows(self, tmp_path, capsys):
        in_store(tmp_path, fill)
        connection = sqlite3.connect(tmp_path / "store.sqlite3")
        with connection:
            connection.execute("UPDATE vectors SET vector = ? WHERE slot = 5", (vector_of("other").tobytes(),))
        connection.close()
        assert main(["check", str(tmp_path)]) == 1
        assert "WRONG" in (said := capsys.readouterr().out) and "1 differ from the rows" in said
        [file] = (tmp_path / "snapshot").glob("*.faiss")
        file.write_bytes(file.read_bytes()[:-1])
        assert any("the next start builds it anew" in said for said in wrong(tmp_path))


class TestDisk:
    def test_a_damaged_page_is_a_clear_error_and_nothing_is_written_over(self, tmp_path, capsys):
        in_store(tmp_path, fill)
        file = tmp_path / "store.sqlite3"
        data = bytearray(file.read_bytes())
        connection = sqlite3.connect(file)
        [(page,)] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'items'").fetchall()
        connection.close()
        data[(page - 1) * 8_192 : page * 8_192] = b"\x7f" * 8_192
        file.write_bytes(data)
        with pytest.raises(StoreDamaged, match="service check"):
            SqliteStore.open(tmp_path, fake_manifest())
        assert file.read_bytes() == bytes(data)
        assert main(["check", str(tmp_path)]) == 1
        assert "WRONG" in capsys.readouterr().out

    @on_a_loop
    async def test_a_page_that_is_damaged_while_it_is_served(self, tmp_path):
        store = SqliteStore.open(tmp_path, fake_manifest())
        await store.upsert([entry(f"{number}", long="x" * 3_000) for number in range(300)])
        writing = store._connections[0]
        while writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            pass  # the thread that copies the log is at it
        file = tmp_path / "store.sqlite3"
        data = bytearray(file.read_bytes())
        data[8_192:] = b"\x7f" * (len(data) - 8_192)
        file.write_bytes(data)
        assert await store.ready()
        with pytest.raises(NotReady, match="the store cannot be read"):
            await asyncio.gather(*(store.get("default", f"{number}") for number in range(300)))
        assert not await store.ready()
        await store.close()

    def test_a_full_disk_refuses_the_write_and_keeps_the_rest(self, tmp_path):
        """The operating system's own limit on a file's size, in a process of its own."""
        program = """
import asyncio, resource, signal, sys
from pathlib import Path
from service.errors import NotReady
from service.store import SqliteStore
from tests.service.fakes import fake_manifest
from tests.service.stores import in_sqlite
from tests.service.test_upkeep import entry

async def run(path):
    store = SqliteStore.open(path, fake_manifest())
    await store.upsert([entry("before")])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    refused = 0
    for number in range(60):
        try:
            await store.upsert([entry(f"{number} {part}", long="x" * 4_000) for part in range(10)])
        except NotReady as error:
            assert "nothing of this request was stored" in str(error)
            refused += 1
    assert refused > 40 and await store.ready()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.upsert([entry("after")])
    await store.close()
    print(60 - refused)

asyncio.run(run(Path(sys.argv[1])))
"""
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        ids = in_store(tmp_path, held, Rules())
        assert {"before", "after"} <= ids and len(ids) == 2 + 10 * int(done.stdout)
        assert wrong(tmp_path) == []

    def test_a_disk_that_cannot_be_written(self, tmp_path):
        """Root may write anywhere but on a file system that is mounted read-only."""
        if os.geteuid() == 0:
            mounted = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True, check=False
            )
            if mounted.returncode:
                pytest.skip("nothing can be mounted here")
        try:
            in_store(tmp_path / "store", fill)
            if os.geteuid() == 0:
                subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
            else:
                (tmp_path / "store").chmod(0o500)
                (tmp_path / "store" / "lock").chmod(0o400)
            with pytest.raises(StoreError, match="cannot be written"):
                SqliteStore.open(tmp_path / "store", fake_manifest())
            if os.geteuid() == 0:
                subprocess.run(["mount", "-o", "remount,rw", str(tmp_path)], check=True)
            else:
                (tmp_path / "store").chmod(0o700)
                (tmp_path / "store" / "lock").chmod(0o600)
            assert len(in_store(tmp_path / "store", held)) == 60
        finally:
            if os.geteuid() == 0:
                subprocess.run(["umount", str(tmp_path)], check=False)


def test_a_vector_that_was_stored_is_bit_for_bit_the_same(tmp_path):
    async def run(store):
        await store.upsert([entry("a")])
        assert np.array_equal((await store.get("default", "a", with_vector=True)).vector, vector_of("a"))
        assert len(vector_of("a")) == DIMENSIONS

    in_store(tmp_path, run)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
