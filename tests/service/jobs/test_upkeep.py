"""A backup holds the jobs of a store, and a restored server goes on with those that were unfinished."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from service.__main__ import main
from service.jobs.ledger import FILE
from service.settings import Settings
from service.store.schema import FILE as STORE
from tests.conftest import serving
from tests.service.jobs.processes import begun, ended, errors, stored, submitted
from tests.service.slow import Slow, Stuck
from tests.service.test_serving import with_towers


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_unfinished_job_goes_on_in_a_restored_store(settings: Settings, tmp_path: Path, elsewhere: bool) -> None:
    jobs = tmp_path / "jobs" if elsewhere else settings.store / "jobs"
    again = tmp_path / "jobs again" if elsewhere else tmp_path / "again/jobs"
    first, second = (["--jobs", str(each)] if elsewhere else [] for each in (jobs, again))
    small = settings.model_copy(update={"batch_tokens": 2, "cache_bytes": 0, "jobs": jobs if elsewhere else None})
    items = [{"id": f"{number}", "text": f"dog {number}"} for number in range(1_200)]
    once = {"idempotency-key": "once"}
    with with_towers(small, lambda tower: Stuck(tower, 600)) as (_, client, towers):
        done = submitted(client, [{"id": "early", "text": "red"}, {"id": "", "text": "no id"}])
        assert ended(client, done)["failed"] == 1
        id = submitted(client, items, headers=once)
        begun(client, id)
        waiting = submitted(client, [{"id": "late", "text": "blue"}])
        assert main(["backup", str(small.store), str(tmp_path / "copy"), *first]) == 0
        before = client.get(f"/jobs/{id}").json()["done"]
        assert 0 < before < 1_200
        towers["text"].released.set()
        assert ended(client, id)["done"] == 1_200
    assert main(["restore", str(tmp_path / "copy"), str(tmp_path / "again"), *second]) == 0
    new = small.model_copy(update={"store": tmp_path / "again", "jobs": again if elsewhere else None})
    with serving(new) as client:
        job = ended(client, id)
        assert (job["state"], job["total"], job["done"], job["failed"]) == ("done", 1_200, 1_200, 0)
        assert ended(client, waiting)["state"] == "done"
        assert set(stored(client)) == {"early", "late", *(item["id"] for item in items)}  # and none twice
        assert client.get("/jobs").json()["jobs"][-1]["id"] == done and len(errors(client, done)) == 1
        assert submitted(client, items, headers=once) == id  # its Idempotency-Key is known still


def test_a_backup_without_jobs_says_nothing_of_them(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(settings.model_copy(update={"jobs": tmp_path / "elsewhere"})) as client:
        client.post("/items", json={"items": [{"id": "a", "text": "red"}]})
    assert main(["backup", str(settings.store), str(tmp_path / "copy")]) == 0
    assert not (tmp_path / "copy.jobs").exists()
    assert "jobs" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_nothing_is_overwritten_and_what_is_damaged_is_named(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with with_towers(settings, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        id = submitted(client, [{"id": f"{number}", "text": f"dog {number}"} for number in range(600)])
        assert towers["text"].entered.wait(20)
        (tmp_path / "copy.jobs").mkdir()
        assert main(["backup", str(settings.store), str(tmp_path / "copy")]) == 2
        assert not (tmp_path / "copy").exists()
        (tmp_path / "copy.jobs").rmdir()
        assert main(["backup", str(settings.store), str(tmp_path / "copy")]) == 0
        assert "1 jobs, 1 of them unfinished" in capsys.readouterr().out
        towers["text"].released.set()
        ended(client, id)
    (tmp_path / "a/jobs").mkdir(parents=True)
    (tmp_path / "a/jobs" / FILE).write_bytes(b"")
    assert main(["restore", str(tmp_path / "copy"), str(tmp_path / "a")]) == 2
    assert "holds jobs already" in capsys.readouterr().err
    assert not (tmp_path / "a" / STORE).exists()
    (tmp_path / "copy.jobs" / id / "input").unlink()
    assert main(["restore", str(tmp_path / "copy"), str(tmp_path / "b")]) == 2
    assert "no whole backup" in capsys.readouterr().err
    assert not (tmp_path / "b/jobs" / FILE).exists()
    with closing(sqlite3.connect(tmp_path / "copy.jobs" / FILE)) as ledger, ledger:
        ledger.execute("UPDATE jobs SET id = '../../out'")
    assert main(["restore", str(tmp_path / "copy"), str(tmp_path / "d")]) == 2
    assert "no name of a folder" in capsys.readouterr().err
    (tmp_path / "copy.jobs" / FILE).write_bytes(b"nonsense" * 1_000)
    assert main(["restore", str(tmp_path / "copy"), str(tmp_path / "c")]) == 2
    assert "cannot be restored" in capsys.readouterr().err
    with closing(sqlite3.connect(tmp_path / "b" / STORE)) as restored:
        assert restored.execute("PRAGMA quick_check").fetchone() == ("ok",)
