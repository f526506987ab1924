"""Servers that are killed in the middle of a job: nothing is lost, nothing is there twice."""

from pathlib import Path
from typing import Any

import pytest

from tests.service.jobs.processes import begun, ended, errors, kill, server, stored, submitted

LETHAL = "tests.service.jobs.lethal"


def texts(count: int) -> list[dict[str, Any]]:
    return [{"id": f"{number}", "text": f"dog {number}", "metadata": {"n": number}} for number in range(count)]


def whole(client: Any, id: str, items: list[dict[str, Any]], refused: int = 0) -> None:
    """Every item is stored once, as it was sent, and counted once."""
    job = ended(client, id)
    assert (job["state"], job["total"]) == ("done", len(items) + refused)
    assert (job["done"], job["failed"], len(errors(client, id))) == (len(items), refused, refused)
    assert {key: item["metadata"] for key, item in stored(client).items()} == {
        item["id"]: item["metadata"] for item in items
    }


def test_a_server_that_is_killed_goes_on_with_its_jobs(bundle_dir: Path, tmp_path: Path) -> None:
    items = texts(6_000)
    items.insert(2_000, {"id": "bad"})
    items.insert(5_999, {"id": "bad too"})
    good = [item for item in items if "text" in item]
    with server(bundle_dir, tmp_path / "store") as (running, client):
        id = submitted(client, items, headers={"idempotency-key": "k"})
        begun(client, id)
        kill(running)
    with server(bundle_dir, tmp_path / "store") as (running, client):
        begun(client, id, 2_000)
        kill(running)
    with server(bundle_dir, tmp_path / "store") as (_, client):
        whole(client, id, good, refused=2)
        assert [each["line"] for each in errors(client, id)] == [2_001, 6_000]


@pytest.mark.full
def test_an_item_that_kills_the_server_is_left_out_in_the_end(bundle_dir: Path, tmp_path: Path) -> None:
    items = texts(40)
    items.insert(20, {"id": "poison", "text": "a dog barks"})
    deaths = 0
    while True:
        # Twice for the chunk; for the item alone that counts as once.
        with server(bundle_dir, tmp_path / "store", LETHAL) as (running, client):
            if not deaths:
                id = submitted(client, items)
            if deaths == 3:
                whole(client, id, [item for item in items if item["id"] != "poison"], refused=1)
                assert [(each["line"], each["code"]) for each in errors(client, id)] == [(21, "poison")]
                break
            assert running.wait(20) == -9
            deaths += 1
