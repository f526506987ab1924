"""The ledger of jobs: what is left after a crash, and ledgers of earlier versions."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from service.jobs.ledger import Chunk, Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with closing(Ledger(tmp_path / "jobs.sqlite3")) as ledger:
        job, _ = ledger.create("a", "jsonl", "default", "f", most=1)
        ledger.begin(job, 700)
    return tmp_path / "jobs.sqlite3"


def test_an_attempt_that_no_process_outlived_is_there_until_its_items_are_stored(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        job = ledger.job("a")
        for first in (0, 256):
            ledger.begin_attempt(job, Chunk(first, 256))
        ledger.undo_attempt(job, Chunk(256, 256))
    with closing(Ledger(path)) as ledger:
        assert ledger.attempted(job) == {0: Chunk(0, 256, attempts=1)}
        ledger.begin_attempt(job, Chunk(0, 256, attempts=1))
        assert ledger.attempted(job) == {0: Chunk(0, 256, attempts=2)}
        assert ledger.split(job, Chunk(0, 2)) == [Chunk(0, 1, attempts=1), Chunk(1, 1, attempts=1)]
        assert ledger.advance(job, 1, 1, []).next == 1
        assert ledger.attempted(job) == {1: Chunk(1, 1, attempts=1)}


def test_a_ledger_of_an_earlier_version_goes_on_at_the_first_item_that_is_not_stored(path: Path) -> None:
    with closing(sqlite3.connect(path)) as older, older:
        older.execute("CREATE TABLE chunks (job INTEGER, first INTEGER, count INTEGER)")
        older.executemany("INSERT INTO chunks VALUES (1, ?, 256)", [(256,), (512,)])
        older.execute("UPDATE jobs SET next = 700, done = 256")
    for _ in range(2):
        with closing(Ledger(path)) as ledger:
            assert (ledger.job("a").next, ledger.job("a").done) == (256, 256)
