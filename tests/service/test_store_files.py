"""A store whose files cannot be written, or are taken away, says so, and loses nothing that it answered for."""

import asyncio
import resource
import shutil
import sqlite3
from contextlib import closing, contextmanager

import faiss
import numpy as np
import pytest

from service.errors import NotReady
from service.store import Entry, SqliteStore, VectorSearch, log_copier, schema, snapshot
from service.store.kinds import IndexSnapshot, IndexSpec
from tests.conftest import on_a_loop, serving
from tests.service.fakes import fake_manifest, vector_of
from tests.service.stores import in_store, on_a_store, sqlite


def entry(id, **metadata):
    return Entry("default", id, "text", metadata, vector_of(id))


@contextmanager
def file_size_limit(size):
    """No file of this process may grow beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", ["-wal", "-shm", ""])
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("noticed", ["by a write", "by a look"])
def test_files_that_are_taken_away_end_the_writing_and_lose_nothing(tmp_path, suffix, replaced, noticed):
    async def run(store):
        await store.upsert([entry("before")])
        file = tmp_path / "sqlite" / f"{schema.FILE}{suffix}"
        content = file.read_bytes()
        file.unlink()
        if replaced:
            file.write_bytes(content)
        if noticed == "by a look":
            assert not await store.writable()
        for _ in range(2):
            with pytest.raises(NotReady, match="deleted or replaced"):
                await store.upsert([entry("after")])
        assert await store.ready() and not await store.writable()
        [hits] = await store.search(VectorSearch("default", vector_of("before")[None], 5, with_vector=True))
        assert [hit.item.id for hit in hits] == ["before"]
        if suffix:  # what `kill -9` leaves
            shutil.copytree(tmp_path / "sqlite", tmp_path / "left" / "sqlite")

    async def left(store):
        assert [item.id for item in (await store.page(None, None, None, 5))[0]] == ["before"]

    in_store(sqlite, tmp_path, run)
    if suffix:
        in_store(sqlite, tmp_path / "left", left)


def test_a_disk_that_takes_no_more_is_noticed_and_so_is_its_end(settings):
    with serving(settings) as client:

        def readiness():
            answer = client.get("/readyz").json()
            return answer["status"], answer["failing"]

        def write(count):
            vector = [1.0] + [0.0] * (dimensions - 1)
            items = [{"id": f"{n}", "vector": vector, "metadata": {"text": "x" * 4_000}} for n in range(count)]
            return client.post("/items", json={"items": items})

        dimensions = client.get("/models").json()["models"][0]["dimensions"]
        assert write(1).status_code == 200 and readiness() == ("ready", [])
        log = settings.store / f"{schema.FILE}-wal"
        with file_size_limit(log.stat().st_size + 2**18):
            refused = write(100)
            assert refused.status_code == 503 and "nothing of this request was stored" in refused.text
            assert client.get("/readyz").status_code == 200
            # A little would still have room.
            assert readiness() == ("degraded", ["store"]) == readiness()
            assert client.get("/items/0").status_code == 200
        assert readiness() == ("ready", [])
        assert write(100).status_code == 200


@on_a_store(sqlite)
async def test_looking_whether_it_can_be_written_changes_no_map(store, monkeypatch):
    await store.upsert([entry("a")])
    version, sequence = await store.version("default"), store._writer.sequence
    assert await store.writable() and store._writer.sequence == sequence
    monkeypatch.setattr("service.store.sqlite._TRIED_S", 0)
    assert await store.writable() and store._writer.sequence == sequence + 1
    assert await store.version("default") == version


@on_a_loop
async def test_the_log_stays_short_though_it_is_always_read(tmp_path, monkeypatch):
    monkeypatch.setattr(log_copier, "_LONGEST_LOG", 2**19)
    monkeypatch.setattr(log_copier, "_PAUSE_S", 0.01)
    store = SqliteStore.open(tmp_path, fake_manifest())
    await store.upsert([entry(f"{n}", text="x" * 4_000) for n in range(100)])
    log, longest, done = tmp_path / f"{schema.FILE}-wal", 0, asyncio.Event()

    async def search():
        while not done.is_set():
            assert (
                len((await store.search(VectorSearch("default", vector_of("q")[None], 100, with_vector=True)))[0])
                == 100
            )

    searching = [asyncio.create_task(search()) for _ in range(2)]
    for turn in range(8):
        await store.upsert([entry(f"{n}", text="x" * 4_000, turn=turn) for n in range(100)])
        longest = max(longest, log.stat().st_size)
    done.set()
    await asyncio.gather(*searching)
    await store.close()
    assert longest < 2**22


@on_a_loop
async def test_writes_wait_for_a_backup_once_and_not_each(tmp_path, monkeypatch):
    monkeypatch.setattr(log_copier, "_LONGEST_LOG", 2**17)
    monkeypatch.setattr(log_copier, "_PAUSE_S", 0.001)
    monkeypatch.setattr(log_copier, "_WAIT_MS", 1)
    monkeypatch.setattr(log_copier, "_LAST_WAIT_MS", 1)
    monkeypatch.setattr(log_copier, "_AGAIN_S", 600.0)
    copies = []

    async def until(copied):
        async with asyncio.timeout(20):
            while not copied():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    store = SqliteStore.open(tmp_path, fake_manifest())
    copying, log = store._connections[3], tmp_path / f"{schema.FILE}-wal"
    copying.set_trace_callback(lambda sql: copies.append(sql.partition("(")[2]) if "checkpoint" in sql else None)
    with closing(sqlite3.connect(tmp_path / schema.FILE)) as backup:
        backup.execute("BEGIN")
        backup.execute("SELECT count(*) FROM items").fetchone()
        await store.upsert([entry("large", text="x" * 2**18)])
        await until(lambda: "TRUNCATE)" in copies)
        for n in range(20):
            before = len(copies)
            await store.upsert([entry(f"{n}")])
            await until(lambda: len(copies) > before)  # noqa: B023
        assert copies.count("TRUNCATE)") == 1 and log.stat().st_size > 2**18
    monkeypatch.setattr(store._writer._copier, "_again", 0)
    await store.upsert([entry("after")])
    await until(lambda: log.stat().st_size < 2**17)
    await store.close()


@on_a_loop
async def test_a_commit_copies_nothing_into_the_database(tmp_path, monkeypatch):
    """A write waits for the end of the log, however many pages the log has by then."""
    monkeypatch.setattr(log_copier, "_PAUSE_S", 3_600)
    store = SqliteStore.open(tmp_path, fake_manifest())
    await store.upsert([entry("first")])
    with store._writer._copier._copying:  # it pauses by now, or waits
        before = (tmp_path / schema.FILE).stat()
        # More pages than SQLite would wait for.
        await store.upsert([entry(f"{n}", text="x" * 2**18) for n in range(200)])
        after = (tmp_path / schema.FILE).stat()
    assert (tmp_path / f"{schema.FILE}-wal").stat().st_size > 4_000 * 8_192 + 2**20
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    await store.close()


def test_an_index_for_which_there_is_no_room_leaves_no_part_of_its_files(tmp_path):
    index = faiss.IndexFlatIP(64)
    index.add(np.ones((400, 64), np.float32))
    built = IndexSnapshot(IndexSpec("hnsw", "float32"), index, 400)
    with file_size_limit(10_000), pytest.raises((OSError, RuntimeError)):
        snapshot.save(tmp_path, "store", 1, snapshot.Saved(1, "text", built, np.arange(400)))
    assert list(tmp_path.iterdir()) == []
