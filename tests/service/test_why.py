"""Why a result was found, over HTTP: where in a picture, when in a sound, and which word."""

import io
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from PIL import Image

from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import serving
from tests.service.films import colours
from tests.service.media import b64, png
from tests.service.test_items_routes import upsert

RATE = 16_000


def mosaic(side, place):
    """A picture of side × side fields, of which one is red and the others are blue and green."""
    image = Image.new("RGB", (side * 60, side * 60), (0, 0, 255))
    for field in range(side * side):
        colour = (255, 0, 0) if field == place else ((0, 0, 255), (0, 255, 0))[field % 2]
        image.paste(colour, (field % side * 60, field // side * 60, field % side * 60 + 60, field // side * 60 + 60))
    return written(image)


def written(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def tone_at(second, seconds):
    """A sound of noise, with three seconds of a tone in it."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, seconds * RATE).astype(np.float32)
    samples[second * RATE : (second + 3) * RATE] = tiny_bundle.tone(seconds=3.0)
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def client(bundle_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("why")
    (folder / "media").mkdir()
    (folder / "media" / "lent.png").write_bytes(mosaic(2, 3))
    (folder / "media" / "cut.png").write_bytes(mosaic(2, 3)[:200])
    settings = Settings(
        bundle=bundle_dir, store=folder / "store", device="cpu", threads=1, previews=True, media=(folder / "media",)
    )
    with serving(settings) as client:
        yield client


def why(client, query, **body):
    response = client.post("/search", json={"query": query, "top_k": 1, "include": ["why"], **body})
    assert response.status_code == 200, response.text
    return response.json()["results"][0]["why"]


@pytest.mark.parametrize(("side", "place"), [(2, 0), (2, 1), (2, 2), (3, 4), (3, 5), (3, 8)])
def test_the_peak_of_a_mosaic_lies_in_the_red_field(client, side, place):
    upsert(client, {"id": f"{side}-{place}", "collection": f"m{side}{place}", "image": b64(mosaic(side, place))})
    cells = np.array(why(client, "red", collection=f"m{side}{place}")["cells"])
    assert cells.shape == (6, 6)
    row, column = np.unravel_index(cells.argmax(), cells.shape)
    assert (row * side // 6, column * side // 6) == divmod(place, side)
    assert cells.max() > 0.1 + cells.min()


@pytest.mark.parametrize("second", [1, 5])
def test_the_peak_of_a_short_sound_is_where_the_tone_is(client, second):
    collection = f"tone{second}"
    upsert(client, {"id": "tone", "collection": collection, "audio": b64(tone_at(second, 9))})
    parts = why(client, "tone", collection=collection)["parts"]
    assert (parts[0]["start"], parts[-1]["end"]) == (0, pytest.approx(9, abs=0.1))
    assert len(parts) == 9 and all(before["end"] == part["start"] for before, part in pairwise(parts))
    # The tiny tower hears a tone in every window that holds some of it, so the hot seconds stand around the tone.
    hot = [(part["start"] + part["end"]) / 2 for part in parts if part["similarity"] > 0]
    assert len(hot) < 7 and np.mean(hot) == pytest.approx(second + 1.5, abs=0.2)


@pytest.mark.parametrize(("seconds", "count"), [(0.4, 1), (2.9, 1), (3.4, 3), (19.6, 20)])
def test_a_sound_is_told_of_from_its_beginning_to_its_end(client, seconds, count):
    file = io.BytesIO()
    soundfile.write(file, tiny_bundle.tone(seconds=seconds), RATE, format="WAV")
    upsert(client, {"id": "whole", "collection": f"whole{count}", "audio": b64(file.getvalue())})
    parts = why(client, "tone", collection=f"whole{count}")["parts"]
    assert (len(parts), parts[0]["start"], parts[-1]["end"]) == (count, 0, pytest.approx(seconds, abs=0.1))


def test_a_long_sound_and_a_film_tell_of_their_stored_moments(client):
    upsert(client, {"id": "long", "collection": "long", "audio": b64(tone_at(12, 30))})
    parts = why(client, "tone", collection="long")["parts"]
    assert [part["start"] for part in parts] == [0, 10, 20] and parts[-1]["end"] == 30
    assert max(parts, key=lambda part: part["similarity"])["start"] == 10
    upsert(client, {"id": "film", "collection": "film", "video": b64(colours("green", "red", seconds=3.0))})
    parts = why(client, "red", collection="film")["parts"]
    best = max(parts, key=lambda part: part["similarity"])
    assert len(parts) > 1 and best["modality"] == "image" and best["start"] >= 3
    assert parts == sorted(parts, key=lambda part: part["start"])


def test_a_word_counts_for_what_the_similarity_loses_without_it(client):
    upsert(client, {"id": "photo", "collection": "words", "image": b64(mosaic(1, 0))})
    said = why(client, "a photo of a red dog", collection="words")["words"]
    assert [word["text"] for word in said] == ["a", "photo", "of", "a", "red", "dog"]
    assert max(said, key=lambda word: word["contribution"])["text"] == "red"
    find = {"collection": "words", "include": []}
    whole, less = (
        client.post("/search", json={"query": text, **find}).json()["results"][0]["score"]
        for text in ("a photo of a red dog", "a photo of a  dog")
    )
    assert said[4]["contribution"] == pytest.approx(whole - less, abs=1e-5)
    [word] = why(client, "red", collection="words")["words"]
    assert word["contribution"] == pytest.approx(
        client.post("/search", json={"query": "red", **find}).json()["results"][0]["score"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("query", "pieces"),
    [
        ({"compose": [{"text": "red dog"}, {"text": "tone", "weight": 0.5}]}, ["red", "dog", "tone"]),
        ({"compose": [{"id": "photo"}, {"text": "cat"}]}, ["cat"]),
        (" ".join(["red"] * 60), ["red red red"] * 20),
        ("红 red", ["红", "red"]),
        ({"id": "other"}, []),
    ],
)
def test_the_words_of_a_query(client, query, pieces):
    collection = "of-words"
    items = [{"id": "photo", "image": b64(png(1))}, {"id": "other", "image": b64(png(2))}]
    upsert(client, *({**item, "collection": collection} for item in items))
    said = why(client, query, collection=collection, why_of=["photo"], modalities=["image"], top_k=1)
    assert [word["text"] for word in said.get("words", [])] == pieces


def test_what_is_not_at_hand_is_left_out_and_a_broken_file_fails_alone(client):
    vector = [1.0] + [0.0] * 15
    items = [{"id": id, "vector": vector, "modality": "image"} for id in ("bare.png", "cut.png", "lent.png")]
    upsert(client, *({**item, "collection": "bare"} for item in items))
    options = {"collection": "bare", "top_k": 3, "include": ["why"]}
    results = client.post("/search", json={"query": {"vector": vector}, **options}).json()["results"]
    reasons = {result["id"]: result["why"] for result in results}
    assert reasons["bare.png"] is None and reasons["cut.png"] is None
    assert np.array(reasons["lent.png"]["cells"]).shape == (6, 6)
    assert set(why(client, "red", collection="bare", why_of=["cut.png"], top_k=3) or ()) <= {"words"}


def test_only_the_results_that_are_named_are_explained(client):
    items = [{"id": f"{place}", "collection": "few", "image": b64(png(place))} for place in range(3)]
    upsert(client, *items)
    body = {"queries": ["red", "blue"], "collection": "few", "include": ["why"], "why_of": ["1"]}
    for results in client.post("/search/batch", json=body).json()["results"]:
        assert {result["id"]: bool(result["why"]) for result in results} == {"0": False, "1": True, "2": False}
    [result, *_] = client.post("/search", json={"query": "red", "collection": "few"}).json()["results"]
    assert "why" not in result


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"top_k": 11, "include": ["why"]}, "at most 10 results"),
        ({"top_k": 3, "balance": True, "include": ["why"]}, "at most 10 results"),
        ({"why_of": ["a"]}, '"why" in include'),
    ],
)
def test_too_much_is_refused(client, body, words):
    response = client.post("/search", json={"query": "red", **body})
    assert response.status_code == 422 and words in str(response.json())
