"""The ledger of jobs: what is left after a crash."""

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
