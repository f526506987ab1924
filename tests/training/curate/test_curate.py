"""The command, end to end: tiny encoders, pools on disk, leaks and repetitions that were planted."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from service.contract.bundle import Bundle
from tests.training import tiny
from training.__main__ import main
from training.curate.allocation import allocate
from training.curate.blocks import Block, Record
from training.curate.candidates import Candidates, Heap, best_share, histogram
from training.curate.recipe import CurateSpec
from training.pairs import read_pairs
from training.recipe import load_recipe

CONCEPTS = {"names": ["red", "blue"], "least": -1.0, "each": 4, "top": 100}
TEXTS = [
    f"{a} {b} {c}" for a in ("red", "blue", "green") for b in ("tone", "photo", "sound") for c in ("low", "high", "the")
]

MakeCuration = Callable[..., Path]


@pytest.fixture
def make_curation(tiny_root: Path, tmp_path: Path) -> MakeCuration:
    """A curation beside the tiny recipe, whose files are looked for in the test's own folder."""

    def make(**values: Any) -> Path:
        tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe_values(tiny_root))
        path = tmp_path / "curation.yaml"
        path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", **values}))
        return path

    return make


def texts(path: Path, rows: list[str]) -> dict[str, Any]:
    """A pool of texts alone."""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {"files": [str(path)], "text": "text"}


def curate(file: Path, *arguments: object) -> int:
    folder = file.parent
    return main(["curate", *map(str, [file, "--out", folder / "out", "--work", folder / "work", *arguments])])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_concepts_take_their_share_and_nothing_twice(
    make_curation: MakeCuration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = {"web": texts(tmp_path / "pool.jsonl", [*TEXTS, TEXTS[0].upper(), TEXTS[0]])}
    assert curate(make_curation(concepts=CONCEPTS, pool=pool, duplicates={"text": None})) == 0
    figures = last(capsys)
    kept = rows(tmp_path / "out/web.jsonl")
    assert (figures["rows"], figures["kept"], figures["starved"]) == (len(TEXTS) + 2, 8, 0)
    assert [row["concept"] for row in kept] == ["red"] * 4 + ["blue"] * 4
    for concept in ("red", "blue"):
        scores = [row["score"] for row in kept if row["concept"] == concept]
        assert scores == sorted(scores, reverse=True)
    assert len({row["text"].lower() for row in kept}) == 8
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["concepts"]["red"] == {"matching": len(TEXTS) + 2, "kept": 4}
    assert "Rows per concept" in (tmp_path / "out/report.html").read_text()


def test_the_outcome_depends_on_neither_order_nor_block_size(make_curation: MakeCuration, tmp_path: Path) -> None:
    outcomes = []
    for seed, block in ((0, 512), (1, 3), (2, 7)):
        shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
        half = len(shuffled) // 2
        source = texts(tmp_path / "a.jsonl", shuffled[:half])
        texts(tmp_path / "b.jsonl", shuffled[half:])
        pool = {"web": {**source, "files": [str(tmp_path / "[ab].jsonl")]}}
        assert curate(make_curation(concepts=CONCEPTS, pool=pool, block=block), "--work", tmp_path / f"w{seed}") == 0
        outcomes.append((tmp_path / "out/web.jsonl").read_bytes())
    assert outcomes[0]
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.full
def test_ray_keeps_the_same_rows(make_curation: MakeCuration, tmp_path: Path) -> None:
    """A real local Ray of two workers, in a process of its own: it leaves threads and warnings behind."""
    for part in range(3):
        texts(tmp_path / f"{part}.jsonl", TEXTS[part::3])
    pool = {"web": {"files": [str(tmp_path / "[0-2].jsonl")], "text": "text", "cap": 6}}
    file = make_curation(concepts=CONCEPTS, pool=pool, block=4, against={"pictures": ["test"], "tones": ["test"]})
    assert curate(file) == 0
    command = [sys.executable, "-m", "training", "curate", str(file), "--ray", "--workers", "2"]
    folders = ["--out", str(tmp_path / "by-ray"), "--work", str(tmp_path / "ray-work")]
    done = subprocess.run(
        [*command, *folders], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("web.jsonl", "report.json", "report.html", "pairs.yaml"):
        assert (tmp_path / "by-ray" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_an_interrupted_run_goes_on_where_it_was(
    make_curation: MakeCuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_curation(concepts=CONCEPTS, pool={"web": texts(tmp_path / "pool.jsonl", TEXTS)}, block=5)
    from training.curate import blocks

    written: list[Path] = []
    write_block = blocks.write_block

    def interrupted(path: Path, block: Block) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write_block(path, block)
        written.append(path)

    monkeypatch.setattr(blocks, "write_block", interrupted)
    assert curate(file) == 130
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work/blocks").iterdir()}
    assert set(before) == set(written)
    monkeypatch.setattr(blocks, "write_block", write_block)
    assert curate(file) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    resumed = (tmp_path / "out/web.jsonl").read_bytes()
    assert curate(file, "--work", tmp_path / "fresh") == 0
    assert (tmp_path / "out/web.jsonl").read_bytes() == resumed


def test_nothing_of_an_evaluation_set_gets_in(
    make_curation: MakeCuration, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures 0 to 3 are the test split: one as it is, one as a smaller JPEG under a new text; and their captions."""
    with tarfile.open(tmp_path / "pool.tar", "w") as shard:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))

        def jpeg(image: Image.Image) -> bytes:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            return buffer.getvalue()

        rng = np.random.default_rng(3)
        own = [Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).resize((60, 60)) for _ in range(3)]
        add("exact.png", (tiny_root / "pictures/0.png").read_bytes())
        add("exact.txt", b"the very high tone")
        add("smaller.jpg", jpeg(Image.open(tiny_root / "pictures/1.png")))
        add("smaller.txt", b"the low sound")
        add("said.jpg", jpeg(own[0]))
        add("said.txt", b"A picture of RED")
        add("good.jpg", jpeg(own[1]))
        add("good.txt", b"something plain of the sound")
        add("broken.jpg", b"no image")
        add("broken.txt", b"something middle")
    pool = {"web": {"files": [str(tmp_path / "pool.tar")], "text": "txt", "media": "jpg;png"}}
    against = {"pictures": ["test"], "tones": ["test"]}
    concepts = {**CONCEPTS, "names": ["red", "low tones", "blue"]}
    assert curate(make_curation(concepts=concepts, pool=pool, against=against)) == 0
    figures = last(capsys)
    assert {key: value for key, value in figures.items() if key.startswith("web.dropped")} == {
        "web.dropped.leak.pictures.medium": 1,
        "web.dropped.leak.pictures.medium_near": 1,
        "web.dropped.leak.pictures.text": 1,
        "web.dropped.unreadable medium": 1,
    }
    kept = rows(tmp_path / "out/web.jsonl")
    assert [row["text"] for row in kept] == ["something plain of the sound"]
    assert (tmp_path / "out/media" / kept[0]["media"]).is_file()
    # "low tones" is the class "low tone" in another form; the other classes stay free of the concepts' exact names.
    assert figures["overlap.tones.lemma"] == 1
    assert figures["tones.concept_informed"] is True


def test_pairs_that_do_not_fit_are_dropped_and_the_output_is_a_recipe_s_pairs(
    make_curation: MakeCuration,
    picture_space: Bundle,
    tiny_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of the captions are another colour's: the space that learnt colours drops those."""
    colours = list(tiny.COLOURS)
    pairs = [
        (f"{place}.png", f"a picture of {colours[(place + wrong) % 4]}", wrong)
        for place in range(8, 32)
        for wrong in (0, 2)
    ]
    table = ["file,text,wrong", *(",".join(map(str, row)) for row in pairs)]
    (tmp_path / "noisy.csv").write_text("\n".join(table) + "\n")
    source = {"files": [str(tmp_path / "noisy.csv")], "text": "text", "media": "file", "folder": "pictures"}
    common: dict[str, Any] = {"bundle": str(picture_space.path), "duplicates": {"text": None, "image": None}}
    filtered = {"noisy": {**source, "similarity": {"best": 0.5}}}
    concepts = {**CONCEPTS, "names": list(tiny.COLOURS), "each": 100}
    assert curate(make_curation(concepts=concepts, pool=filtered, **common)) == 0
    assert last(capsys)["noisy.dropped.dissimilar"] >= len(pairs) // 2
    kept = rows(tmp_path / "out/noisy.jsonl")
    assert kept
    assert np.mean([row["fields"]["wrong"] == "0" for row in kept]) >= 0.9
    stanza = yaml.safe_load((tmp_path / "out/pairs.yaml").read_text())["pairs"]
    values = tiny.recipe_values(tiny_root, pairs=stanza)
    read = read_pairs(load_recipe(tiny.write_recipe(tmp_path / "next.yaml", values)), "noisy")["train"]
    assert sorted(read.texts) == sorted({row["text"] for row in kept})
    # By the fit alone, no concept needed: the best pairs of all, as many as the cap.
    alone = {"noisy": {**source, "by": "similarity", "cap": 10}}
    assert curate(make_curation(pool=alone, **common)) == 0
    best = rows(tmp_path / "out/noisy.jsonl")
    assert [row["concept"] for row in best] == [None] * 10
    similar = [row["similarity"] for row in best]
    assert similar == sorted(similar, reverse=True)
    assert min(similar) >= min(row["similarity"] for row in kept)


def test_images_can_stand_for_a_concept(
    make_curation: MakeCuration, picture_space: Bundle, tiny_root: Path, tmp_path: Path
) -> None:
    pool = {"web": texts(tmp_path / "pool.jsonl", [f"a picture of {name}" for name in tiny.COLOURS])}
    concepts = {"examples": str(tiny_root / "by_class"), "encoder": "bundle", "least": -1.0, "each": 1, "top": 1}
    assert curate(make_curation(concepts=concepts, pool=pool, bundle=str(picture_space.path))) == 0
    said = {row["concept"]: row["text"] for row in rows(tmp_path / "out/web.jsonl")}
    assert sum(text.endswith(concept) for concept, text in said.items()) >= 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"concepts": CONCEPTS, "pool": {"web": {"files": ["nowhere/*.csv"], "text": "t"}}}, "matches no file"),
        ({"concepts": CONCEPTS, "pool": {}}, "pool"),
        ({"pool": {"web": {"files": ["x"], "text": "t"}}}, "there are none"),
        ({"concepts": {**CONCEPTS, "top": 2}, "pool": {"web": {"files": ["x"], "text": "t"}}}, "top must be at least"),
        ({"concepts": CONCEPTS, "pool": {"web": {"files": ["x"], "text": "t", "by": "similarity"}}}, "needs media"),
        (
            {"concepts": CONCEPTS, "pool": {"web": {"files": ["x"], "text": "t"}}, "against": {"moon": ["test"]}},
            "no pairs named moon",
        ),
        (
            {"concepts": CONCEPTS, "pool": {"web": {"files": ["x"], "text": "t", "where": {"a": {"matches": "("}}}}},
            "not a regular expression",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    values: dict[str, Any], says: str, make_curation: MakeCuration, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curate(make_curation(**values)) == 2
    assert says in capsys.readouterr().err


def test_the_rarest_concept_chooses_first_and_a_cap_holds() -> None:
    """All three rows are about "common", the best of them is all that "rare" has; the source may give two."""
    spec = CurateSpec.model_validate(
        {
            "concepts": {"names": ["common", "rare"], "least": 0.5, "each": 2, "top": 5},
            "pool": {"web": {"files": ["x"], "text": "t", "cap": 2}},
        }
    )
    records = [Record(0, "", text, "{}", "", -1, None) for text in ("one dog", "two cats", "three trees")]
    vectors = np.array([[0.9, 0.6], [0.8, 0.0], [0.7, 0.0]], np.float32)
    candidates = Candidates([Heap(5), Heap(5)])
    candidates.add(Block(0, 4, {"words": 1}, records, vectors), np.eye(2, dtype=np.float32), 0.5, -1.0)
    allocation = allocate(["common", "rare"], candidates, spec)
    assert [(row.concept, row.record.text) for row in allocation.taken] == [("common", "two cats"), ("rare", "one dog")]
    assert allocation.of_concept == {"common": 1, "rare": 1}
    assert allocation.capped[0] == 1
    assert (candidates.rows[0], candidates.dropped[0, "words"]) == (4, 1)


def test_heaps_of_parts_merge_into_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    entries = [
        (float(score), key, Record(0, "", str(key), "{}", "", -1, None))
        for key, score in enumerate(rng.integers(0, 9, 60) / 9)
    ]
    whole, parts = Heap(7), [Heap(7), Heap(7)]
    for place, entry in enumerate(entries):
        whole.add(*entry)
        parts[place % 2].add(*entry)
    for entry in parts[1].ranked():
        parts[0].add(*entry)
    expected = sorted(entries, key=lambda entry: (-entry[0], entry[1]))[:7]
    assert list(whole.ranked()) == list(parts[0].ranked()) == expected


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_best_share_keeps_no_more_than_it_says(share: float) -> None:
    similarities = np.random.default_rng(1).uniform(-1, 1, 2000).tolist()
    edge = best_share(histogram(similarities), share)
    kept = sum(one >= edge for one in similarities)
    assert share * 2000 - 3 <= kept <= share * 2000
