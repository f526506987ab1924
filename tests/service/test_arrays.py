"""Modalities that a bundle adds: arrays, and a second tower of images, texts and sounds, at every entrance."""

import base64
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as npy
from PIL import Image

from isthmus_client import Isthmus, NewItem, array
from isthmus_client.folder import FolderIndex, list_folder
from service.__main__ import main
from service.contract.arrays import ArrayPreprocessing
from service.contract.bundle import Manifest, read_bundle
from service.contract.errors import InputError
from service.engine.handling import handling
from service.engine.inputs import Media
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import serving
from tests.service.films import colours, film
from tests.service.jobs.archives import tar
from tests.service.jobs.processes import LINES, ended
from tests.service.media import b64

POINTS = ArrayPreprocessing(shape=(3,), rows=8, most_rows=64)
FURTHER = {"points": POINTS, "depth": tiny_bundle.IMAGE, "code": tiny_bundle.TEXT, "speech": tiny_bundle.AUDIO}


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value, **options)
    return stream.getvalue()


def cloud(colour: str, rows: int = 5) -> bytes:
    """Points that the tower takes for a colour."""
    axis = list(tiny_bundle.COLOURS).index(colour)
    return saved(np.eye(3, dtype=np.float32)[[axis]].repeat(rows, 0))


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), tiny_bundle.COLOURS[colour]).save(stream, "PNG")
    return stream.getvalue()


def header(**changed: Any) -> bytes:
    """A file of one point whose header says something else."""
    told = {"descr": "<f4", "fortran_order": False, "shape": (1, 3)} | changed
    stream = io.BytesIO()
    text = repr(told).encode() + b"\n"
    stream.write(npy.MAGIC_PREFIX + b"\1\0" + len(text).to_bytes(2, "little") + text + np.zeros(3, "<f4").tobytes())
    return stream.getvalue()


class Long(int):
    def __repr__(self) -> str:
        return f"{int(self)}L"


class Evil:
    def __reduce__(self) -> Any:
        return (Path("unpickled").write_text, ("x",))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("further")
    bundle = tiny_bundle.build(folder / "bundle", further=FURTHER)
    return Settings(bundle=bundle.path, store=folder / "store", device="cpu", threads=1, previews=True)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[httpx.Client]:
    with serving(settings) as client:
        yield client


def embedded(client: httpx.Client, *inputs: Any) -> np.ndarray:
    response = client.post("/embed", json={"inputs": list(inputs)})
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["embeddings"]])


@pytest.mark.parametrize(
    "given",
    [
        {"modality": "points", "array": b64(cloud("red"))},
        {"array": b64(cloud("red", 30))},
        {"modality": "points", "array": b64(saved(np.asfortranarray(np.load(io.BytesIO(cloud("red"))).astype("f8"))))},
        f"data:application/octet-stream;base64,{b64(cloud('red'))}",
        {"compose": [{"array": b64(cloud("red"))}, {"modality": "points", "array": b64(cloud("red")), "weight": 2}]},
        {"modality": "depth", "image": b64(png("red"))},
        {"modality": "code", "text": "red"},
    ],
)
def test_an_input_of_a_further_modality_lies_where_its_tower_says(client: httpx.Client, given: Any) -> None:
    mine, red, blue = embedded(client, given, "red", "blue")
    assert mine @ red > 0.9 > mine @ blue


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (saved(np.zeros((5, 4))), 422, "the shape (5, 4), not (n, 3)"),
        (saved(np.zeros((0, 3))), 422, "no rows"),
        (saved(np.zeros(3)), 422, "the shape (3), not (n, 3)"),
        (saved(np.zeros((65, 3))), 413, "65 rows, more than the 64"),
        (saved(np.zeros((2, 3), int)), 415, "the type <i8"),
        (saved(np.zeros((2, 3), ">f4")), 415, "little-endian"),
        (saved(np.zeros((2, 3), complex)), 415, "the type <c16"),
        (saved(np.array([Evil()], object), allow_pickle=True), 415, "Python objects"),
        (saved(np.array([[1.0, np.nan, 0.0]])), 422, "not finite"),
        (saved(np.array([[1e300, 0.0, 0.0]])), 422, "too large for float32"),
        (cloud("red")[:-1], 422, "shorter or longer"),
        (cloud("red") + b"x", 422, "shorter or longer"),
        (header(shape=(10**15, 3)), 413, "rows, more than"),
        (header(shape=(-1, 3)), 422, "states a size that is no whole number"),
        (header(descr="<V99999999999"), 422, "header"),
        (header(shape="(" * 5_000), 422, "header"),
        (header(shape=(True, 3)), 422, "states a size that is no whole number"),
        (header(shape=(10**900, 3)), 413, f"the array has 1,{'000,' * 15}000 rows"[:78]),
        (header(shape=(3, 10**900)), 422, f"the shape (3, 1{'0' * 60}), not (n, 3)"),
        (npy.MAGIC_PREFIX + b"\x04\x01", 415, "of version 4.1: 1.0, 2.0 and 3.0 are read"),
        (pickle.dumps(Evil()), 415, "no .npy file"),
        (png("red"), 415, "no .npy file"),
    ],
)
def test_a_hostile_array_is_refused_by_itself_at_every_entrance(
    client: httpx.Client, given: bytes, status: int, words: str
) -> None:
    bad = {"modality": "points", "array": b64(given)}
    answer = client.post("/embed", json={"inputs": [bad]})
    assert answer.status_code == status and words in answer.json()["detail"], answer.text
    beside = client.post("/embed", json={"inputs": ["red", bad], "on_error": "null"}).json()["embeddings"]
    assert beside[0]["embedding"] and words in beside[1]["error"]["detail"]
    for path, body in (
        ("/items", {"items": [{"id": "bad", **bad}]}),
        ("/search", {"query": bad}),
        ("/classify", {"inputs": [bad], "labels": ["red", "blue"]}),
        ("/score", {"pairs": [{"a": "red", "b": bad}]}),
    ):
        assert client.post(path, json=body).status_code in (status, 404), path
    assert client.get("/items/bad").status_code == 404 and not Path("unpickled").exists()


@given(st.binary(max_size=200), st.integers(0, 150))
def test_whatever_the_bytes_only_an_input_error_is_raised(noise: bytes, place: int) -> None:
    whole = cloud("red")
    for data in (npy.MAGIC_PREFIX + noise, whole[:place] + noise[:3] + whole[place + 3 :]):
        try:
            read = POINTS.read(data)
        except InputError:
            continue
        assert read.shape == (8, 3) and np.isfinite(read).all()


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        (
            "/embed",
            {"inputs": [{"modality": "smell", "array": b64(cloud("red"))}]},
            415,
            "no smell tower is served here: there are image, audio, text, points, depth, code",
        ),
        ("/embed", {"inputs": [{"modality": "points", "image": b64(png("red"))}]}, 415, "are sent as: array"),
        ("/embed", {"inputs": [{"modality": "text", "array": b64(cloud("red"))}]}, 415, "are sent as: text"),
        ("/embed", {"inputs": [{"modality": "points", "text": "red"}]}, 415, "are sent as: array"),
        ("/embed", {"inputs": ["red", {"modality": "image", "text": "red"}]}, 415, "are sent as: image"),
        ("/embed", {"inputs": [{"modality": "Points!", "array": ""}]}, 422, "pattern"),
        ("/embed", {"inputs": [{"image": b64(cloud("red"))}]}, 415, ""),
        ("/items", {"items": [{"id": "a", "modality": "smell", "vector": [1] * 16}]}, 422, "'smell'"),
        ("/items", {"items": [{"id": "a", "modality": "points", "compose": [{"text": "red"}]}]}, 422, "modality goes"),
        ("/embed", {"inputs": [{"image": b64(b"noise")}]}, 415, "an array, where the model takes some, is a .npy file"),
        ("/search", {"query": "red", "modalities": ["smell"]}, 422, "'smell'"),
        (
            "/search",
            {"query": "red", "balance": True, "top_k": 1_000, "include": ["vector"]},
            422,
            "modalities is at most 2560",
        ),
        ("/classify", {"inputs": ["red"], "labels": ["a"], "templates": {"smell": ["{}"]}}, 422, "'smell'"),
    ],
)
def test_what_no_tower_takes_is_said(client: httpx.Client, route: str, body: Any, status: int, words: str) -> None:
    embedded(client, "red", {"array": b64(cloud("red"))})  # what another tower made of the same bytes is not the answer
    answer = client.post(route, json=body)
    assert answer.status_code == status and words in json.dumps(answer.json()), answer.text


SOUND = film([], sound=tiny_bundle.tone())
CONTAINERS = {"sound": SOUND, "film": colours("red"), "cut": SOUND[:64]}


@pytest.mark.parametrize(
    ("named", "file", "words"),
    [
        ("speech", "sound", None),
        ("audio", "sound", None),
        ("video", "film", None),
        ("text", "sound", "are sent as: text"),
        ("points", "sound", "are sent as: array"),
        ("smell", "sound", "no smell tower"),
        ("speech", "cut", "truncated or corrupt"),
        *(
            (each, "film", f"a video, which the modality {each} does")
            for each in ("speech", "points", "image", "smell")
        ),
    ],
)
def test_a_container_goes_to_the_tower_that_a_form_names(
    client: httpx.Client, named: str, file: str, words: str | None
) -> None:
    told = {"request": json.dumps({"items": [{"id": "contained", "modality": named}], "on_error": "null"})}
    [answer] = client.post("/items", data=told, files={"file": ("a", CONTAINERS[file])}).json()["items"]
    if words is None:
        assert answer["modality"] == named and client.delete("/items/contained").is_success
    else:
        assert words in answer["error"]["detail"], answer
        assert client.get("/items/contained").status_code == 404


def test_items_of_further_modalities_stay_theirs_when_embedded_again(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items: list[dict[str, Any]] = [
        {"id": "speech", "modality": "speech", "audio": b64(SOUND)},
        {"id": "points", "modality": "points", "array": b64(cloud("red"))},
        {"id": "depth", "modality": "depth", "image": b64(png("red"))},
        {"id": "code", "modality": "code", "text": "red"},
        {"id": "caption", "compose": [{"modality": "code", "text": "red"}, {"image": b64(png("red"))}]},
        {"id": "kind", "modality": "points", "array": b64(cloud("blue"))},
    ]
    (tmp_path / "media").mkdir()
    for name, data in {"speech": SOUND, "points": cloud("red"), "kind": png("red")}.items():
        (tmp_path / "media" / name).write_bytes(data)
    store = tmp_path / "store"
    with serving(settings.model_copy(update={"store": store})) as client:
        written = client.post("/items", json={"items": items}).json()["items"]
        assert written[4]["modality"] == "image", "the first part that is no text"
    other = tiny_bundle.build(tmp_path / "other", seed=1, further=FURTHER)
    arguments = ["reembed", str(store), "--bundle", str(other.path), "--media", str(tmp_path / "media")]
    for more in (["--dry-run"], []):
        assert main([*arguments, *more]) == 0
        said = capsys.readouterr().out
        assert "1 from texts, 2 from files, 1 from previews" in said, said
        assert "image: its vector is that of several parts" in said and "points: its file is of another kind" in said
    with serving(settings.model_copy(update={"bundle": other.path, "store": store})) as client:
        kept = {item["id"]: item["modality"] for item in client.get("/items").json()["items"]}
        assert kept == {name: name for name in ("speech", "points", "depth", "code")}
        found = client.post("/search", json={"query": "red", "modalities": ["points", "depth", "code"]}).json()
        assert min(hit["score"] for hit in found["results"]) > 0.9
    plain = tiny_bundle.build(tmp_path / "plain", seed=2)
    assert main(["reembed", str(store), "--bundle", str(plain.path), "--dry-run"]) == 0
    assert "code: the bundle has no tower of this modality" in capsys.readouterr().out


def test_without_a_tower_for_arrays_or_with_two_the_modality_is_asked_for(
    settings: Settings, tmp_path: Path, shared_client: httpx.Client
) -> None:
    given = {"inputs": [{"array": b64(cloud("red"))}]}
    assert "no tower for arrays" in shared_client.post("/embed", json=given).json()["detail"]
    two = tiny_bundle.build(tmp_path / "two", further={"points": POINTS, "motion": POINTS})
    with serving(settings.model_copy(update={"bundle": two.path, "store": tmp_path / "store"})) as client:
        assert "points, motion" in client.post("/embed", json=given).json()["detail"]
        assert client.post("/embed", json={"inputs": [given["inputs"][0] | {"modality": "motion"}]}).status_code == 200


def test_a_form_and_an_index_name_the_modality_of_their_arrays(settings: Settings, tmp_path: Path) -> None:
    two = tiny_bundle.build(tmp_path / "two", further={"points": POINTS, "motion": POINTS})
    red, blue = ({"modality": "motion", "array": b64(cloud(colour))} for colour in ("red", "blue"))
    waiting, heavy = {"modality": "motion"}, {"modality": "motion", "weight": 2}
    fused, unfilled = {"compose": [{"text": "green"}, red | {"weight": 2}]}, {"compose": [{"text": "green"}, heavy]}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "red.npy").write_bytes(cloud("red"))
    with serving(settings.model_copy(update={"bundle": two.path, "store": tmp_path / "store"})) as client:
        with Isthmus(str(client.base_url)) as space:
            for modality, said in ((None, "points, motion"), ("motion", None)):
                outcomes: list[Any] = []
                index = FolderIndex(space, list_folder(tmp_path / "folder"), "default", modality)
                index.send(again=True, report=outcomes.append)
                assert said is None or said in outcomes[0].error
            assert client.get("/items/red.npy").json()["modality"] == "motion"
        client.post("/items", json={"items": [{"id": "blue", **blue}, {"id": "words", "text": "green"}]})
        files = [("file", ("red.npy", cloud("red"))), ("file", ("blue.npy", cloud("blue")))]
        for path, of_form, alike in (
            ("/embed", {"inputs": ["green", waiting, unfilled]}, {"inputs": ["green", red, fused]}),
            ("/search", {"query": waiting}, {"query": red}),
            ("/search", {"query": unfilled}, {"query": fused}),
            ("/search/batch", {"queries": [waiting, "green", unfilled]}, {"queries": [red, "green", fused]}),
            ("/score", {"pairs": [{"a": waiting, "b": unfilled}]}, {"pairs": [{"a": red, "b": fused}]}),
            ("/classify", {"inputs": [unfilled], "labels": ["a"]}, {"inputs": [fused], "labels": ["a"]}),
        ):
            count = json.dumps(alike).count("array")
            sent = [files[0]] * count
            answers = (
                client.post(path, data={"request": json.dumps(of_form)}, files=sent),
                client.post(path, json=alike),
            )
            assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
            form, body = ({**answer.json(), "took_ms": None} for answer in answers)
            assert form == body, path
        composed = {"items": [{"id": "composed", "compose": [{"text": "green"}, heavy]}]}
        stored = client.post("/items", data={"request": json.dumps(composed)}, files=files[:1])
        assert stored.json()["items"][0]["modality"] == "motion"
        wrong = client.post("/embed", data={"request": json.dumps({"inputs": [{"modality": "no"}]})}, files=files[:1])
        assert (wrong.status_code, "'no'" in wrong.text or "no no " in wrong.text) == (415, True), wrong.text


def test_arrays_are_stored_found_labelled_and_counted(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "clouds"
    folder.mkdir()
    for colour in tiny_bundle.COLOURS:
        (folder / f"{colour}.npy").write_bytes(cloud(colour))
    with serving(settings.model_copy(update={"store": tmp_path / "store"})) as client:
        url = str(client.base_url)
        with Isthmus(url) as space:
            towers = space.models()[0].towers
            assert towers["points"]["preprocessing"]["rows"] == 8 and set(towers) == {
                *FURTHER,
                "image",
                "audio",
                "text",
            }
            items = [NewItem(path.stem, path, modality="points") for path in sorted(folder.iterdir())]
            assert {written.modality for written in space.upsert(items)} == {"points"}
            space.upsert([NewItem("a photo", png("green")), NewItem("words", "green")])
            hits = space.search("green", modalities=["points", "image"])
            assert {hit.id for hit in hits[:2]} == {"green", "a photo"}
            [labelled] = space.classify([array(folder / "blue.npy")], labels=list(tiny_bundle.COLOURS))
            assert labelled.labels[0].label == "blue"
            assert space.facets("default").modalities == {"image": 1, "points": 3, "text": 1}
            assert [item.id for item in space.items(modality="points")] == ["blue", "green", "red"]
            (folder / "notes.txt").write_text("red")
            FolderIndex(space, list_folder(folder), "folder").send(again=False, report=lambda _: None)
            assert space.facets("folder").modalities == {"points": 3, "text": 1}
        found = client.post("/search", json={"query": {"id": "red"}, "balance": True, "top_k": 2}).json()
        assert {row["modality"] for row in found["results"]} == {"image", "points", "text"}
        form = client.post("/items", files={"file": ("b.npy", cloud("blue"))}).json()
        assert form["items"][0]["modality"] == "points"
        line = json.dumps({"id": "job/line", "modality": "points", "array": b64(cloud("red"))}).encode()
        for kind, data in ({"content-type": "application/x-tar"}, tar({"job/red.npy": cloud("red")})), (LINES, line):
            job = ended(client, client.post("/jobs", content=data, headers=kind).json()["id"])
            assert (job["done"], job["failed"]) == (1, 0)
        assert client.get("/items/job/red.npy").json()["modality"] == "points"
        assert client.get("/items/job/line").json()["modality"] == "points"
        assert client.get("/items?modality=smell").status_code == 422


def test_an_array_without_a_direction_is_refused_by_itself_and_is_no_failure_of_the_tower(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"modality": "points", "array": b64(cloud("red"))}
    for value in (np.zeros((2, 3)), np.full((2, 3), 1e-320), np.full((2, 3), 3e38)):
        bad = {"modality": "points", "array": b64(saved(value))}
        alone = client.post("/embed", json={"inputs": [bad]})
        assert alone.status_code == 422 and "gives this array no direction" in alone.json()["detail"], alone.text
        both = client.post("/embed", json={"inputs": [good, bad, "red"], "on_error": "null"}).json()["embeddings"]
        assert [row["embedding"] is None for row in both] == [False, True, False]
    assert not [record for record in caplog.records if "tower" in record.message]


def test_the_place_of_a_mistake_is_what_the_client_wrote(client: httpx.Client) -> None:
    wrong = client.post("/embed", json={"inputs": [{"modality": "points", "array": 3}]})
    assert wrong.status_code == 422 and [error["loc"] for error in wrong.json()["errors"]] == [
        ["body", "inputs", 0, "array"]
    ]


@pytest.mark.parametrize(("rows", "inputs"), [(8, 8), (100_000, 8), (300_000, 4)])
def test_a_call_of_arrays_is_bounded_in_numbers(tmp_path: Path, rows: int, inputs: int) -> None:
    spec = ArrayPreprocessing(shape=(3,), rows=rows, most_rows=max(rows, 16))
    bundle = read_bundle(tiny_bundle.build(tmp_path / "bundle", further={"points": spec}).path)
    how = handling(bundle, "points", Settings(bundle=bundle.path))
    [size] = {how.prepare(Media("points", cloud("red"), front_end="array")).size, how.canary.size}
    assert how.budget(True, None).limit // size == inputs and how.budget(True, 1).limit == size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda towers: {"video": towers["points"]}, "cannot be called video"),
        (lambda towers: {"Points": towers["points"]}, "pattern"),
        (lambda towers: {"image": towers["points"]}, "the image tower has array preprocessing"),
        (lambda towers: {"x" * 17: towers["points"]}, "pattern"),
    ],
)
def test_the_names_of_towers_are_checked(settings: Settings, change: Any, words: str) -> None:
    told = json.loads((settings.bundle / "manifest.json").read_text())
    with pytest.raises(ValueError, match=words):
        Manifest.model_validate(told | {"towers": change(told["towers"])})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shape": ()}, "shape"),
        ({"shape": (3,), "most_rows": 4}, "goes with rows"),
        ({"shape": (3,), "rows": 8, "most_rows": 4}, "smaller than rows"),
        ({"shape": (4_000, 5_000)}, "at most"),
        ({"shape": (3,), "rows": 400_000, "most_rows": 400_000}, "at most 1,000,000 numbers of an array, not 1,200"),
        ({"shape": (3,), "mean": (0.0, 1.0)}, "1 number each, or 3"),
        ({"shape": (3,), "std": (0.0,)}, "greater than 0"),
    ],
)
def test_the_settings_of_arrays_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ArrayPreprocessing(**values)


def test_rows_are_chosen_evenly_repeated_and_standardised() -> None:
    spec = ArrayPreprocessing(shape=(2,), rows=4, mean=(1.0, 0.0), std=(2.0,))
    read = spec.read(saved(np.stack([np.arange(8.0), np.zeros(8)], 1)))
    np.testing.assert_array_equal(read[:, 0], (np.array([0, 2, 4, 6]) - 1) / 2)
    np.testing.assert_array_equal(spec.read(saved(np.array([[1.0, 2.0], [3.0, 4.0]])))[:, 1], [1, 2, 1, 2])
    assert ArrayPreprocessing(shape=(2, 3)).read(saved(np.ones((2, 3), "f2"))).dtype == np.float32
    offset = ArrayPreprocessing(shape=(1,), mean=(1.7e9,)).read(saved(np.array([1.7e9 + 0.25])))
    assert offset == [0.25]  # float64 is standardised as such
    read = spec.read(saved(np.asfortranarray(np.ones((4, 2)))))
    assert read.flags.c_contiguous and read.flags.writeable
    assert POINTS.read(header(shape=(Long(1), Long(3)))).shape == (8, 3)  # as Python 2 wrote it; warnings are errors
    assert base64.b64decode(array(saved(np.ones(2)))["array"])[:6] == npy.MAGIC_PREFIX


def test_without_a_tower_for_arrays_an_index_leaves_them_alone(shared_client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(cloud("red"))
    (tmp_path / "a.txt").write_text("red")
    with Isthmus(str(shared_client.base_url)) as space:
        listing = list_folder(tmp_path)
        FolderIndex(space, listing, "arrays").send(again=False, report=lambda _: None)
        assert listing.skipped == ["a.npy"] and space.facets("arrays").total == 1
