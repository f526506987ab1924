"""Several bundles side by side, some modalities only, and bundles whose folder changes while they are served."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus_client import Isthmus
from service.api.app import open_parts
from service.commands.check import check_bundle as check
from service.commands.doctor import examine
from service.commands.load import load_files
from service.contract.bundle import Bundle, BundleError, Manifest, read_bundle, write_bundle
from service.engine.towers import TowerError
from service.retrieval.reembedding import Filling, Originals, reembed
from service.settings import Settings, SettingsError, read_settings
from service.store import SpaceMismatch
from tests import tiny_bundle
from tests.conftest import serving
from tests.service.test_serving import metric

Make = Callable[..., bytes]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle of another space."""
    return tiny_bundle.build(tmp_path_factory.mktemp("other") / "other", name="other", seed=1)


@pytest.fixture(scope="module")
def both(bundle_dir: Path, other: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    store = tmp_path_factory.mktemp("both") / "store"
    with serving(Settings(bundle=bundle_dir, more_bundles=(other.path,), store=store, device="cpu", threads=1)) as it:
        yield it


def rewritten(bundle: Bundle, **changes: object) -> Manifest:
    """Put another manifest in the bundle's place, over the same files."""
    manifest = Manifest.model_validate(bundle.manifest.model_dump() | changes)
    names = {*manifest.files, *(tower.file for tower in manifest.towers.values())}
    return write_bundle(bundle.path, manifest, {name: bundle.path / name for name in names}).manifest


def post(client: httpx.Client, route: str, **body: object) -> dict:
    response = client.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_both_are_listed_the_default_first(both: httpx.Client, other: Bundle) -> None:
    models = both.get("/models").json()["models"]
    assert [model["name"] for model in models] == ["tiny", "other"]
    assert models[1]["space"] == other.manifest.space
    assert [model["id"] for model in both.get("/v1/models").json()["data"]] == ["tiny", "other"]
    assert both.get("/v1/models/other").json()["id"] == "other"


def test_a_request_chooses_its_model(both: httpx.Client, other: Bundle) -> None:
    plain = post(both, "/embed", inputs=["red"])
    named = post(both, "/embed", inputs=["red"], model="tiny")
    elsewhere = post(both, "/embed", inputs=["red"], model="other")
    assert plain == named
    assert elsewhere["space"] == other.manifest.space != plain["space"]
    assert elsewhere["embeddings"][0]["embedding"] != plain["embeddings"][0]["embedding"]
    openai = post(both, "/v1/embeddings", input="red", model="other")
    assert openai["data"][0]["embedding"] == pytest.approx(elsewhere["embeddings"][0]["embedding"])
    score = post(both, "/score", pairs=[{"a": "red", "b": "red"}], model="other")
    assert score["space"] == other.manifest.space
    assert score["scores"] == pytest.approx([1.0])
    labelled = post(both, "/classify", inputs=["red"], labels=["red", "blue"], model="other")
    assert labelled["results"][0]["labels"][0]["label"] == "red"


def test_a_stored_label_set_serves_models_of_other_spaces_too(both: httpx.Client) -> None:
    assert both.put("/label-sets/colours", json={"labels": ["red", "blue"]}).status_code == 200
    for model in ("tiny", "other"):
        labelled = post(both, "/classify", inputs=["blue"], label_set="colours", model=model)["results"][0]["labels"]
        assert labelled[0]["label"] == "blue"
        assert labelled[0]["similarity"] > 0.99, "by its own label vectors"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/embed", {"inputs": ["red"]}),
        ("/score", {"pairs": [{"a": "red", "b": "red"}]}),
        ("/classify", {"inputs": ["red"], "labels": ["red"]}),
    ],
)
def test_an_unknown_model_is_404(both: httpx.Client, route: str, body: dict) -> None:
    response = both.post(route, json=body | {"model": "nothing"})
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


def test_readiness_and_metrics_name_the_model(both: httpx.Client) -> None:
    checks = both.get("/readyz").json()["checks"]
    assert {"tower.text", "other: tower.text", "workers", "store"} <= set(checks)
    before = metric(both, "isthmus_batch_items_count", modality="text", model="other")
    post(both, "/embed", inputs=["dog dog cat"], model="other")
    assert metric(both, "isthmus_batch_items_count", modality="text", model="other") == before + 1


def test_the_store_is_searched_with_the_model_of_its_space(bundle_dir: Path, other: Bundle, tmp_path: Path) -> None:
    settings = Settings(bundle=other.path, store=tmp_path / "store", device="cpu", threads=1)
    with serving(settings) as client:
        post(client, "/items", items=[{"id": "a", "text": "red"}, {"id": "b", "text": "blue"}])
    with serving(settings.model_copy(update={"bundle": bundle_dir, "more_bundles": (other.path,)})) as client:
        (best, _) = post(client, "/search", query="red")["results"]
        assert best["id"] == "a" and best["score"] == pytest.approx(1.0)
        post(client, "/items", items=[{"id": "c", "text": "green"}])
        assert post(client, "/search", query="green")["results"][0]["score"] == pytest.approx(1.0)
        assert post(client, "/embed", inputs=["red"])["space"] == read_bundle(bundle_dir).manifest.space
    third = tiny_bundle.build(tmp_path / "third", name="third", seed=2)
    with pytest.raises(SpaceMismatch):
        open_parts(settings.model_copy(update={"bundle": bundle_dir, "more_bundles": (third.path,)}))


def test_two_bundles_of_one_name_stop_the_start(bundle_dir: Path, tmp_path: Path) -> None:
    twin = tiny_bundle.build(tmp_path / "twin", seed=1)
    settings = Settings(bundle=bundle_dir, more_bundles=(twin.path,), store=tmp_path / "store", device="cpu")
    with pytest.raises(SettingsError, match="are both called 'tiny'"):
        open_parts(settings)


BARRED = [
    {"of": "Flickr8k", "licence": "non-commercial research", "commercial": False},
    {"of": "pictures", "licence": "CC-BY-4.0"},
]


def test_models_say_under_which_licences_their_parts_are(both: httpx.Client, bundle_dir: Path, tmp_path: Path) -> None:
    (plain, _) = both.get("/models").json()["models"]
    assert plain["commercial"] is None and plain["terms"] == []
    assert [each["of"] for each in plain["licences"]] == ["the training data", "test"]
    bundle = tiny_bundle.build(tmp_path / "barred")
    rewritten(bundle, licences=BARRED, terms=[{"of": "ImageNet", "terms": "research and education"}])
    with serving(Settings(bundle=bundle.path, store=tmp_path / "s", device="cpu", threads=1)) as client:
        (model,) = client.get("/models").json()["models"]
        with Isthmus(str(client.base_url)) as space:
            (seen,) = space.models()
    assert model["commercial"] is False
    assert model["licences"][0] == BARRED[0] | {"note": ""}
    assert model["licences"][2] == {"of": "test", "licence": "Apache-2.0", "commercial": True, "note": ""}
    assert model["terms"] == [{"of": "ImageNet", "terms": "research and education"}]
    assert seen.commercial is False and seen.licences == model["licences"]


@pytest.mark.parametrize(
    "stated", [BARRED, ["Flickr8k: what an older bundle says"], []], ids=["barred", "words", "none"]
)
def test_where_only_commercial_bundles_are_wanted_no_door_opens_another(
    stated: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_bundle.build(tmp_path / "bundle", licences=stated).path
    monkeypatch.setenv("ISTHMUS_LICENCES", "commercial")
    monkeypatch.setenv("ISTHMUS_BUNDLE", str(path))
    settings = read_settings(store=tmp_path / "store", device="cpu")

    doors: list[Callable[[], object]] = [
        lambda: open_parts(settings),
        lambda: asyncio.run(reembed(tmp_path / "a", tmp_path / "b", settings, Originals(), Filling)),
        lambda: load_files(tmp_path, "default", settings),
        lambda: check(path),
    ]
    because = "Flickr8k" if stated else "the training data"
    for door in doors:
        with pytest.raises(BundleError, match=f"ISTHMUS_LICENCES is commercial, and .* because of {because}"):
            door()
    (said,) = (each for each in examine(store=str(tmp_path / "store")) if each.what == "bundle")
    assert said.state == "missing" and because in said.detail
    assert not (tmp_path / "store").exists()


def test_a_bundle_that_is_free_opens_where_only_commercial_ones_are_wanted(tmp_path: Path) -> None:
    bundle = tiny_bundle.build(tmp_path / "bundle", licences=BARRED[1:])
    assert Settings(bundle=bundle.path, licences="commercial").read_bundle().manifest == bundle.manifest
    rewritten(bundle, licences=BARRED)
    assert Settings(bundle=bundle.path).read_bundle().manifest.licences[0].of == "Flickr8k"


def test_a_bundle_that_is_replaced_on_disk_is_served_from_the_next_start(tmp_path: Path) -> None:
    bundle = tiny_bundle.build(tmp_path / "bundle")
    settings = Settings(bundle=bundle.path, store=tmp_path / "store", device="cpu", threads=1)
    with serving(settings) as client:
        before = post(client, "/embed", inputs=["red"])
        rewritten(bundle, temperature=0.7)
        (bundle.path / "text.onnx").unlink()
        assert post(client, "/embed", inputs=["red", "blue"])["embeddings"][0] == before["embeddings"][0]
        assert client.get("/models").json()["models"][0]["temperature"] == bundle.manifest.temperature
        assert client.get("/readyz").json()["status"] == "ready"
    tiny_bundle.build(bundle.path)
    rewritten(bundle, temperature=0.7)
    with serving(settings) as client:
        assert client.get("/models").json()["models"][0]["temperature"] == 0.7


def test_only_the_towers_that_are_asked_for_are_loaded(settings: Settings, png: Make) -> None:
    with serving(settings.model_copy(update={"modalities": ("text",)})) as client:
        (model,) = client.get("/models").json()["models"]
        assert set(model["towers"]) == {"text"}
        assert {"tower.text", "workers", "store"} <= set(checks := client.get("/readyz").json()["checks"])
        assert "tower.image" not in checks
        post(client, "/embed", inputs=["red"])
        image = client.post("/embed", files={"file": ("a.png", png())})
        assert (image.status_code, image.json()["code"]) == (415, "unsupported_media")
        assert 'modality="image"' not in client.get("/metrics").text
        assert client.put("/label-sets/colours", json={"labels": ["red", "blue"]}).status_code == 200


def test_a_setting_that_leaves_no_tower_stops_the_start(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(TowerError, match="ISTHMUS_MODALITIES"):
        open_parts(settings.model_copy(update={"modalities": ("points",)}))


def test_a_text_runs_no_image_session(client: httpx.Client, png: Make) -> None:
    def calls(modality: str) -> float:
        return metric(client, "isthmus_batch_items_count", modality=modality, model="tiny")

    post(client, "/embed", inputs=["red", "dog"])
    post(client, "/search", query="red")
    assert (calls("image"), calls("audio")) == (0, 0)
    texts = calls("text")
    assert texts > 0
    assert client.post("/embed", files={"file": ("a.png", png())}).status_code == 200
    assert (calls("image"), calls("text")) == (1, texts)
