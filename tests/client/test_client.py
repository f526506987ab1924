"""The client against a live server: every method, sync and async, good and bad input."""

import asyncio
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
from packaging.requirements import Requirement

import isthmus_client
import service
from isthmus_client import (
    AsyncIsthmus,
    Batching,
    Embedding,
    InvalidInput,
    Isthmus,
    IsthmusWarning,
    Judgement,
    NewItem,
    NotFound,
    Refused,
    ServerFailed,
    Unreachable,
    UnreadableAnswer,
    audio,
    calls,
    composed,
    image,
    stored,
    vector,
)
from isthmus_client.inputs import wire_size
from isthmus_client.retries import Retries
from service.schemas.classify import ClassifyRequest
from service.schemas.embed import EmbedRequest
from service.schemas.items import CollectionRequest
from service.schemas.search import ScriptRequest, SearchRequest
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import on_a_loop, serving

ROOT = Path(__file__).parents[2]


def fill(space: Isthmus, media: Path) -> None:
    names = ("red.png", "blue.png", "tone.wav")
    space.upsert([NewItem(name, media / name, {"name": name}) for name in names] + [NewItem("t", "red")])


def test_texts_images_and_sounds_become_unit_vectors(shared_space: Isthmus, media: Path) -> None:
    given = ["red", media / "red.png", (media / "tone.wav").read_bytes(), {"text": "tone"}, image(media / "blue.png")]
    embedded = shared_space.embed(given)
    assert [each.modality for each in embedded] == ["text", "image", "audio", "text", "image"]
    vectors = np.array([each.vector for each in embedded])
    assert vectors.shape == (5, tiny_bundle.DIMENSIONS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[4], "red is nearer to red than to blue"
    short = shared_space.embed(["red"], dimensions=8)[0].vector
    assert short is not None and len(short) == 8


def test_what_is_stored_is_found_listed_described_and_deleted(space: Isthmus, media: Path) -> None:
    fill(space, media)
    [first, *_] = space.search("red", modalities=["image"])
    assert (first.id, first.modality, first.metadata) == ("red.png", "image", {"name": "red.png"})
    assert space.search(media / "tone.wav", top_k=1)[0].id == "tone.wav"
    assert "red.png" not in [each.id for each in space.search(stored("red.png"))]
    both = composed(("red", 1.0), (media / "blue.png", -1.0))
    assert space.search(both, modalities=["image"])[-1].id == "blue.png"
    red, blue = space.search_many(["red", "blue"], modalities=["image"], top_k=1)
    assert [red[0].id, blue[0].id] == ["red.png", "blue.png"]
    itself = space.search("red", include=["vector", "explain"], modalities=["image"])[0]
    assert itself.vector is not None and itself.explain is not None
    assert space.search(vector(itself.vector), modalities=["image"])[0].score == pytest.approx(1, abs=1e-5)

    assert [each.id for each in space.items(limit=2)] == ["red.png", "blue.png", "tone.wav", "t"]
    assert space.item("t").metadata == {}
    pictures = {"name": {"$contains": "png"}}
    newest = space.items(collection="default", filter=pictures, order="desc", limit=1)
    assert [each.id for each in newest] == ["blue.png", "red.png"]
    counted = space.facets(keys=["name"], filter=pictures)
    assert counted.total == 2 and counted.modalities == {"image": 2} and counted.facets["name"]["missing"] == 0
    found = space.search("red", balance=True, include=["confidence"])
    assert len(found) == 4 and all(each.confidence is not None and 0 <= each.confidence <= 1 for each in found)
    assert len(space.search("red", fdr=0.1)) < 4
    got = space.item("t", with_vector=True).vector
    assert got is not None and len(got) == tiny_bundle.DIMENSIONS
    assert space.move({"t": "text", "nobody": "else"}) == 1 and space.item("text").modality == "text"
    assert space.delete(["text", "nobody"]) == 1
    assert space.delete(filter={"name": {"$contains": "png"}}) == 2
    with pytest.raises(NotFound) as raised:
        space.item("t")
    assert (raised.value.status, raised.value.code) == (404, "not_found")
    assert raised.value.request_id


def test_ids_may_hold_anything(space: Isthmus) -> None:
    odd = "a b/ü?#%2F&c.png"
    space.upsert([NewItem(odd, "red")])
    assert space.item(odd).id == odd


def test_collections_and_label_sets(space: Isthmus, media: Path) -> None:
    assert space.put_collection("photos", keywords=["name"], index="flat").keywords == ["name"]
    space.upsert([NewItem("r", media / "red.png", collection="photos")])
    assert space.collection("photos").count == 1
    assert "photos" in [each.name for each in space.collections()]
    assert space.search("red", collection="photos")[0].id == "r"
    space.drop_collection("photos")
    with pytest.raises(NotFound):
        space.collection("photos")

    assert space.put_label_set("colours", ["red", {"name": "blue", "prompts": ["blue"]}]).labels == ["red", "blue"]
    assert space.label_set("colours").labels == ["red", "blue"]
    assert space.label_sets() == ["colours"] and space.label_sets(after="colours") == []
    [said] = space.classify([media / "blue.png"], label_set="colours")
    assert said.labels[0].label == "blue"
    taught = space.put_label_set("colours", [{"name": "shown", "examples": [media / "blue.png"]}, "with examples"])
    assert taught.labels == ["shown", "with examples"]
    [said] = space.classify([media / "blue.png"], label_set="colours")
    assert said.labels[0].label == "shown"
    space.delete_label_set("colours")
    with pytest.raises(NotFound):
        space.label_set("colours")


def test_a_collection_is_taught(space: Isthmus, media: Path) -> None:
    space.upsert([NewItem("r", media / "red.png"), NewItem("b", media / "blue.png")])
    version = space.teach([Judgement("red", ["b"], ["r"]), Judgement(media / "blue.png", ["b"])])
    assert (version.version, version.judgements, version.queries) == (1, 3, 2)
    taught, plain = ({one.id: one.score for one in space.search("red", feedback=on)} for on in (True, False))
    assert taught["b"] - taught["r"] > plain["b"] - plain["r"]
    assert space.use_feedback(None).current is None and space.feedback().versions == [version]
    space.delete_feedback(1)
    assert space.feedback().versions == []


def test_labels_scores_models_and_readiness(shared_space: Isthmus, media: Path) -> None:
    [said] = shared_space.classify([media / "red.png"], labels=["blue", "red"], grid={"rows": 1, "columns": 2})
    assert said.labels[0].label == "red"
    assert sum(each.score for each in said.labels) == pytest.approx(1)
    assert said.cells is not None and len(said.cells[0]) == 2
    same, other = shared_space.score([("red", "red"), ("red", "blue")])
    assert same == pytest.approx(1, abs=1e-5) and other < same
    [model] = shared_space.models()
    assert (model.name, model.dimensions) == ("tiny", tiny_bundle.DIMENSIONS)
    assert shared_space.keeps_previews()
    ready = shared_space.ready()
    assert ready.ready and ready.checks["tower.text"]


def test_errors_say_what_and_which(shared_space: Isthmus, media: Path) -> None:
    with pytest.raises(InvalidInput, match=r"inputs\[1\]") as raised:
        shared_space.embed(["red", media / "broken.png"])
    assert (raised.value.index, raised.value.code) == (1, "undecodable_media")
    with pytest.raises(InvalidInput, match=r"body\.top_k: .*top_k is at most"):
        shared_space.search("red", top_k=10_000_000)
    with pytest.raises(TypeError, match="not int"):
        shared_space.embed([3])  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError):
        shared_space.embed([media / "gone.png"])


def test_many_inputs_keep_their_order_and_each_fails_alone(shared_client: httpx2.Client, media: Path) -> None:
    given = ["red", media / "broken.png", media / "gone.png", "blue", media / "red.png", b"", "x" * 40_000, "tone"] * 3
    with Isthmus(str(shared_client.base_url), batching=Batching(inputs=5, concurrency=3)) as space:
        whole = list(space.embed_many(given))
        alone = space.embed(["tone"])[0]
    codes = [None, "undecodable_media", "unreadable_file", None, None, "undecodable_media", "invalid_input", None]
    assert [each.index for each in whole] == list(range(24))
    assert [each.error and each.error.code for each in whole] == codes * 3
    assert whole[-1].vector == pytest.approx(alone.vector, abs=1e-5)


def test_a_request_that_is_too_much_is_asked_in_halves(shared_client: httpx2.Client) -> None:
    with Isthmus(str(shared_client.base_url), batching=Batching(inputs=600)) as space:  # the service takes 256
        whole = list(space.embed_many(f"red {number}" for number in range(600)))
    assert [each.index for each in whole] == list(range(600))
    assert all(each.vector for each in whole)


def test_an_option_that_is_wrong_is_not_said_of_each_input(shared_space: Isthmus) -> None:
    with pytest.raises(Refused, match="dimensions"):
        list(shared_space.embed_many(["red", "blue"], dimensions=-1))


def test_the_parts_of_a_fused_input_count_as_bytes_of_a_request() -> None:
    picture = "A" * 4_000_000
    assert wire_size({"compose": [{"image": picture}, {"text": "red", "weight": 0.5}]}) > len(picture)
    assert wire_size({"vector": [0.5] * 384}) == 16 * 384


@pytest.mark.parametrize("path", ["red.png", None])
def test_a_number_that_json_has_not_is_refused_before_it_is_sent(space: Isthmus, media: Path, path: str | None) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        space.upsert([NewItem("a", "red" if path is None else media / path, {"size": float("nan")})])


def test_inputs_are_read_only_as_they_are_needed(shared_client: httpx2.Client) -> None:
    read = 0

    def endless() -> typing.Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "red"

    with Isthmus(str(shared_client.base_url), batching=Batching(inputs=4, concurrency=2)) as space:
        some = space.embed_many(endless())
        for _ in range(8):
            assert isinstance(next(some), Embedding)
        some.close()
    assert read <= 8 + 2 * 4 + 1


def test_items_are_stored_in_batches(space: Isthmus, media: Path) -> None:
    items = [NewItem(f"t{number}", "red") for number in range(70)]
    items[40:40] = [NewItem("broken", media / "broken.png"), NewItem("gone", media / "gone.png")]
    done = list(space.upsert_many(items))
    assert [each.id for each in done] == [each.id for each in items]
    assert {each.id: each.error.code for each in done if each.error} == {
        "broken": "undecodable_media",
        "gone": "unreadable_file",
    }
    assert space.collection("default").count == 70


def test_files_are_sent_as_they_are(media: Path) -> None:
    """Files are parts of a form, in order; what no content tells from a sound is base64, in its own place."""
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        request.read()
        asked.append(request)
        return httpx2.Response(200, json={"upserted": 0, "items": []})

    red, blue = (media / "red.png"), (media / "blue.png").read_bytes()
    with Isthmus("http://there", transport=httpx2.MockTransport(answer)) as space:
        space.upsert([NewItem("r", red), NewItem("t", "red"), NewItem("?", b"no file"), NewItem("b", blue)])
        space.upsert([NewItem("t", "red")])
    form, plain = asked
    assert form.headers["content-type"].startswith("multipart/form-data")
    assert form.content.index(red.read_bytes()) < form.content.index(blue)
    items = json.loads(re.search(rb"\{.*\}", form.content)[0])["items"]  # type: ignore[index]
    assert [set(item) - {"id", "metadata", "collection"} for item in items] == [set(), {"text"}, {"audio"}, set()]
    assert plain.headers["content-type"] == "application/json"


@on_a_loop
async def test_the_asynchronous_client_does_the_same(client: httpx2.Client, media: Path) -> None:
    async with AsyncIsthmus(str(client.base_url), batching=Batching(inputs=2, concurrency=2)) as space:
        items = [NewItem(name, media / name, {"name": name}) for name in ("red.png", "broken.png", "tone.wav")]
        stored_now = [each async for each in space.upsert_many(items)]
        assert [bool(each.error) for each in stored_now] == [False, True, False]
        await space.upsert([NewItem("t", "blue")])
        assert (await space.search("red", modalities=["image"]))[0].id == "red.png"
        assert (await space.search_many(["tone"], top_k=1, modalities=["audio"]))[0][0].id == "tone.wav"
        texts = ["red", media / "gone.png", "blue"]
        assert [bool(each.error) async for each in space.embed_many(texts)] == [False, True, False]
        assert len(await space.embed(["red"])) == 1
        [said] = await space.classify([audio(media / "tone.wav")], labels=["tone", "red"])
        assert said.labels[0].label == "tone"
        assert (await space.score([("red", "red")]))[0] == pytest.approx(1, abs=1e-5)
        assert {each.id async for each in space.items(limit=1)} == {"red.png", "tone.wav", "t"}
        assert (await space.item("t")).modality == "text"
        assert await space.move({"t": "u"}) == 1
        assert await space.delete(["u"]) == 1
        await space.put_collection("c")
        assert (await space.collection("c")).count == 0
        assert len(await space.collections()) == 2
        await space.drop_collection("c")
        await space.put_label_set("l", ["red"])
        assert (await space.label_set("l")).labels == ["red"]
        await space.delete_label_set("l")
        assert (await space.models())[0].name == "tiny"
        assert (await space.ready()).ready and await space.keeps_previews()
        with pytest.raises(NotFound):
            await space.item("nobody")


def test_an_abandoned_asynchronous_iteration_leaves_nothing_running(shared_client: httpx2.Client) -> None:
    async def talk() -> int:
        async with AsyncIsthmus(str(shared_client.base_url), batching=Batching(inputs=1, concurrency=3)) as space:
            some = space.embed_many(["red"] * 10)
            await anext(some)
            await some.aclose()
        return len(asyncio.all_tasks())

    assert asyncio.run(talk()) == 1


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Isthmus) == public(AsyncIsthmus)


@pytest.mark.parametrize(
    ("options", "request_model", "positional"),
    [
        (calls.EmbedOptions, EmbedRequest, {"inputs", "encoding"}),
        (calls.SearchOptions, SearchRequest, {"query"}),
        (calls.ScriptOptions, ScriptRequest, {"script"}),
        (calls.ClassifyOptions, ClassifyRequest, {"inputs"}),
        (calls.CollectionOptions, CollectionRequest, set()),
    ],
)
def test_the_options_are_those_of_the_service(options: type, request_model: type, positional: set[str]) -> None:
    fields = request_model.model_fields  # type: ignore[attr-defined]
    assert set(typing.get_type_hints(options)) | positional == set(fields)


def test_what_can_be_included_is_what_the_service_includes() -> None:
    document = _document()

    def of_the_service(path: str) -> set[str]:
        [parameter] = [one for one in document["paths"][path]["get"]["parameters"] if one["name"] == "include"]
        return set(next(one for one in parameter["schema"]["anyOf"] if one["type"] == "array")["items"]["enum"])

    def of_the_client(hint: object) -> set[str]:
        inner = typing.get_args(hint)
        return {hint} if isinstance(hint, str) else set().union(*(of_the_client(one) for one in inner))

    search = document["components"]["schemas"]["SearchRequest"]["properties"]["include"]
    enum = set(next(one for one in search["anyOf"] if one["type"] == "array")["items"]["enum"])
    assert of_the_client(typing.get_type_hints(calls.SearchOptions)["include"]) == enum
    assert of_the_client(typing.get_type_hints(calls.ListOptions)["include"]) == of_the_service("/items")
    for kind in (Isthmus, AsyncIsthmus):
        asked = {name.removeprefix("with_") for name in inspect.signature(kind.item).parameters if "with_" in name}
        assert asked == of_the_service("/items/{id}")


def test_previews_are_included(bundle_dir: Path, tmp_path: Path, png: Callable[[str], bytes]) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    settings = Settings(bundle=bundle_dir, store=tmp_path / "store", device="cpu", previews=True)
    with serving(settings) as client, Isthmus(str(client.base_url)) as space:
        space.upsert([NewItem("red.png", tmp_path / "red.png"), NewItem("words", "a blue dog")])
        assert space.item("red.png").preview is None
        shown = space.item("red.png", with_preview=True).preview
        assert shown is not None and shown["media_type"].startswith("image/")
        page = space.page(collection="default", include=["preview", "total"])
        assert page.total == 2 and next(one.preview for one in page.items) == shown
        found = {hit.id: hit.preview for hit in space.search("red", include=["preview"])}
        assert found["red.png"] == shown and (found["words"] or {})["text"] == "a blue dog"


def test_results_have_no_field_that_the_service_never_sends() -> None:
    schemas = {
        name: set(schema["properties"])
        for name, schema in _document()["components"]["schemas"].items()
        if "properties" in schema
    }
    for ours, theirs, renamed in [
        (isthmus_client.Embedding, "Embedding", {"vector": "embedding"}),
        (isthmus_client.Found, "SearchResult", {}),
        (isthmus_client.Classified, "Classified", {}),
        (isthmus_client.Item, "ItemResponse", {}),
        (isthmus_client.Collection, "CollectionResponse", {}),
        (isthmus_client.LabelSet, "LabelSetResponse", {}),
        (isthmus_client.Model, "ModelDescription", {}),
        (isthmus_client.Moment, "ResultMoment", {}),
        (isthmus_client.Map, "MapResponse", {}),
        (isthmus_client.Point, "MapPoint", {}),
        (isthmus_client.Facets, "FacetsResponse", {}),
        (isthmus_client.Job, "JobResponse", {}),
        (isthmus_client.JobError, "JobError", {}),
    ]:
        names = {renamed.get(field.name, field.name) for field in dataclasses.fields(ours)}
        assert names <= schemas[theirs], theirs


def _document() -> dict[str, typing.Any]:
    import yaml

    document: dict[str, typing.Any] = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    return document


def test_nobody_there_is_said(free_port: int) -> None:
    waited: list[float] = []
    with (
        Isthmus(f"http://127.0.0.1:{free_port}", retries=Retries(attempts=3), sleep=waited.append) as space,
        pytest.raises(Unreachable, match=f"127.0.0.1:{free_port} cannot be reached"),
    ):
        space.models()
    assert len(waited) == 2


def test_something_else_that_answers_is_told_from_a_server_of_this_kind() -> None:
    html = httpx2.MockTransport(lambda request: httpx2.Response(200, html="<p>hello"))
    with Isthmus(transport=html) as space, pytest.raises(UnreadableAnswer, match="not one of an Isthmus server"):
        space.models()


def test_what_the_server_fails_on_is_found_and_the_others_are_stored() -> None:
    asked: list[list[str]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        ids = [item["id"] for item in json.loads(request.content)["items"]]
        asked.append(ids)
        if status := max(failing.get(id, 0) for id in ids):
            return httpx2.Response(status, json={"code": "internal_error", "detail": "the server failed"})
        return httpx2.Response(200, json={"items": [{"id": id, "collection": "default"} for id in ids]})

    items = [NewItem(id, "a dog") for id in "abcdefgh"]
    with Isthmus(transport=httpx2.MockTransport(answer)) as space:
        failing = {"b": 500, "g": 504}
        outcomes = {each.id: each.error and each.error.detail for each in space.upsert_many(items)}
        assert outcomes == dict.fromkeys("acdefh") | dict.fromkeys("bg", "the server failed")
        failing = {"b": 502}  # of a proxy: nobody is there
        asked.clear()
        with pytest.raises(ServerFailed):
            list(space.upsert_many(items))
        assert len(asked) == 1


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json={"models": []})

    monkeypatch.setenv("ISTHMUS_URL", "http://example.test:1234/behind/")
    monkeypatch.setenv("ISTHMUS_API_KEY", "secret")
    with Isthmus(transport=httpx2.MockTransport(answer)) as space:
        space.models()
    with Isthmus("http://other.test", api_key="mine", transport=httpx2.MockTransport(answer)) as space:
        space.models()
    assert [str(each.url) for each in seen] == ["http://example.test:1234/behind/models", "http://other.test/models"]
    assert [each.headers["authorization"] for each in seen] == ["Bearer secret", "Bearer mine"]


def test_it_is_of_the_service_s_version_and_imports_nothing_heavy() -> None:
    project = tomllib.loads((ROOT / "isthmus_client/pyproject.toml").read_text())["project"]
    assert service.__version__ == isthmus_client.VERSION
    assert [Requirement(line).name for line in project["dependencies"]] == ["httpx2"]
    program = "import sys, isthmus_client; print([m for m in ('numpy', 'pydantic', 'service') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_none_else() -> None:
    assert {name for name in isthmus_client.__all__ if not hasattr(isthmus_client, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = isthmus_client.Nothing


def test_what_the_model_hardly_knows_is_a_warning_and_a_share(shared_space: Isthmus) -> None:
    with pytest.warns(IsthmusWarning, match=r"inputs\[1\]: .* knows no word"):
        shared_space.classify(["red", "一只狗"], labels=["red", "blue"])
    known, half = shared_space.embed(["red", "red 狗"])
    assert (known.unknown, half.unknown) == (0, 0.5)
