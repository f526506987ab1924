"""`python -m training embed`: Parquet of a bundle's vectors, in processes and on a real local Ray, shard by shard."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as parquet
import pytest

from tests.conftest import serving
from training.__main__ import main
from training.embed.shard import Shards


@pytest.fixture
def media(tmp_path: Path, png: Any, wav: Any) -> Path:
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for name, colour in (("red.png", "red"), ("sub/blue.png", "blue")):
        (folder / name).write_bytes(png(colour))
    (folder / "tone.wav").write_bytes(wav())
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("no item")
    return folder


@pytest.fixture
def table(tmp_path: Path, media: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": f"t{n}", "text": text, "n": n} for n, text in enumerate(("red", "a dog", "cat"))
    ]
    rows += [{"file": "red.png", "tags": ["warm"]}, {"text": " "}]
    path = media / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def embed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["embed", *map(str, arguments)]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return said


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for file in sorted(out.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()}


def served(client: httpx.Client, **form: Any) -> Any:
    answer = client.post("/embed", **form)
    assert answer.status_code == 200, answer.text
    return answer.json()["embeddings"][0]["embedding"]


def test_vectors_are_those_that_the_service_gives(
    bundle_dir: Path, media: Path, table: Path, tmp_path: Path, shared_client: httpx.Client, capsys: Any
) -> None:
    out = tmp_path / "out"
    said = embed(capsys, bundle_dir, "--data", media, "--data", table, "--out", out, "--shard", 3)
    assert (said["items"], said["failed"], said["shards"]) == (7, 2, 3)
    rows = rows_of(out)
    assert rows.keys() == {"red.png", "sub/blue.png", "tone.wav", "t0", "t1", "t2"} and len(rows) == 6
    assert {row["space"] for row in rows.values()} == {said["space"]}
    assert rows["t1"]["text"] == "a dog" and json.loads(rows["t1"]["metadata"]) == {"n": 1}
    assert json.loads(rows["red.png"]["metadata"]) == {"tags": ["warm"]} and rows["red.png"]["modality"] == "image"
    for id, row in rows.items():
        if row["modality"] == "text":
            expected = served(shared_client, json={"inputs": [row["text"]], "role": "passage"})
        else:
            expected = served(shared_client, files={"file": (id, (media / id).read_bytes())})
        assert np.allclose(row["vector"], expected, atol=1e-6)
    failures = [json.loads(line) for file in (out / "failures").iterdir() for line in file.read_text().splitlines()]
    assert {each["id"] for each in failures} == {"broken.png", "table/5"}
    assert all(each["error"] for each in failures)


def test_what_is_embedded_is_loaded_and_found(
    bundle_dir: Path, media: Path, tmp_path: Path, settings: Any, capsys: Any
) -> None:
    embed(capsys, bundle_dir, "--data", media, "--out", tmp_path / "out")
    command = [sys.executable, "-m", "service", "load", str(tmp_path / "out"), "--collection", "big"]
    store = ["--bundle", str(bundle_dir), "--store", str(settings.store)]
    for count in (3, 0):
        done = subprocess.run([*command, *store], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{count} items of space") and "1 of 1 files" in done.stderr
    with serving(settings) as client:
        found = client.post("/search", json={"query": "red", "collection": "big", "modalities": ["image"]}).json()
        assert found["results"][0]["id"] == "red.png" and found["results"][0]["score"] > 0.99


def test_an_interrupted_run_goes_on_where_it_was(
    bundle_dir: Path, table: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "out", ("--data", table, "--out", tmp_path / "out", "--shard", 1)
    embedded, whole = [], Shards.embed

    def interrupted(self: Shards, task: Any) -> tuple[str, int, int]:
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(task)
        return whole(self, task)

    monkeypatch.setattr(Shards, "embed", interrupted)
    assert main(["embed", str(bundle_dir), *map(str, arguments)]) == 130
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert len(before) == 2
    monkeypatch.undo()
    assert embed(capsys, bundle_dir, *arguments)["items"] == 4
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert len(after) == 5 and before.items() <= after.items() and not list(out.glob("*.part"))


@pytest.mark.full
@pytest.mark.parametrize("how", ["--workers=2", "--workers=2 --ray"])
def test_workers_write_the_same(bundle_dir: Path, table: Path, tmp_path: Path, capsys: Any, how: str) -> None:
    """A real local Ray of two workers, in a process of its own: it leaves threads and warnings behind."""
    embed(capsys, bundle_dir, "--data", table, "--out", tmp_path / "one", "--shard", 2)
    arguments = ["embed", str(bundle_dir), "--data", str(table), "--shard", "2", *how.split()]
    command = [sys.executable, "-m", "training", *arguments]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "many")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["items"] == 4
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x", "neither a folder nor a"),
        ("a.jsonl", "[1]\n", "line 1 of"),
        ("a.jsonl", "{\n", "is not JSON"),
        ("a.jsonl", '{"text": "a", "file": "b.png"}\n', "row 1 of"),
        ("a.csv", "id,title\n1,x\n", "row 1 of"),
        ("a.csv", "id,text\n1\n", "not as many fields"),
        ("a.csv", "id,text\n", "no image, sound or text is there"),
    ],
)
def test_what_cannot_be_planned(
    bundle_dir: Path, tmp_path: Path, capsys: Any, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["embed", str(bundle_dir), "--data", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_another_plan_is_not_mixed_with_the_first(bundle_dir: Path, table: Path, tmp_path: Path, capsys: Any) -> None:
    embed(capsys, bundle_dir, "--data", table, "--out", tmp_path / "out")
    for others in (["--shard", "7"], ["--root", str(tmp_path)]):
        arguments = ["embed", str(bundle_dir), "--data", str(table), "--out", str(tmp_path / "out"), *others]
        assert main(arguments) == 2
        assert "give another --out" in capsys.readouterr().err


def test_a_plan_that_failed_leaves_no_rows_behind(bundle_dir: Path, media: Path, tmp_path: Path, capsys: Any) -> None:
    table = media / "named.csv"
    table.write_text("file\nred.png\nred.png\nred.png\n,too,many\n")
    common = [bundle_dir, "--data", table, "--out", tmp_path / "out", "--shard", 1]
    assert main(["embed", *map(str, common)]) == 2
    table.write_text("file\nred.png\n")
    said = embed(capsys, *common)
    assert (said["items"], said["shards"]) == (1, 1)
