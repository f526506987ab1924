import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from service.api.responses import encoded
from service.contract.bundle import read_bundle
from service.contract.vectors import l2_normalise
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import redis_server, serving
from tests.service.media import b64

D = tiny_bundle.DIMENSIONS
Make = Callable[..., bytes]


def embed(client: httpx.Client, inputs: list[Any], **more: Any) -> list[dict[str, Any]]:
    response = client.post("/embed", json={"inputs": inputs, **more})
    assert response.status_code == 200, response.text
    rows: list[dict[str, Any]] = response.json()["embeddings"]
    assert [row["index"] for row in rows] == list(range(len(inputs)))
    return rows


def vectors(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["embedding"] for row in rows])


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (body["status"], body["code"]) == (status, code)
    assert {"type", "title", "detail"} <= set(body)
    return body


def test_every_kind_of_input_is_a_unit_vector_in_one_space(shared_client: httpx.Client, png: Make, wav: Make) -> None:
    rows = embed(
        shared_client,
        [
            "red",
            {"text": "a photo of a red dog"},
            {"image": b64(png("red"))},
            {"image": f"data:image/png;base64,{b64(png('red'))}"},
            {"audio": b64(wav())},
            "tone",
        ],
    )
    assert [row["modality"] for row in rows] == ["text", "text", "image", "image", "audio", "text"]
    found = vectors(rows)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found[0] @ found[2] > 0.99
    assert found[1] @ found[2] > 0.8
    assert np.array_equal(found[2], found[3])
    assert found[4] @ found[5] > 0.99


def test_the_space_and_the_dimensions_are_stated(shared_client: httpx.Client, bundle_dir: Path) -> None:
    body = shared_client.post("/embed", json={"inputs": ["red"]}).json()
    assert body["space"] == read_bundle(bundle_dir).manifest.space
    assert body["dimensions"] == D


def test_files_of_a_form_follow_the_inputs_of_its_request(shared_client: httpx.Client, png: Make, wav: Make) -> None:
    response = shared_client.post(
        "/embed",
        files=[("file", ("a.txt", png("blue"))), ("file", ("b.png", wav(format="FLAC")))],
        data={"request": json.dumps({"inputs": ["red"], "dimensions": 8})},
    )
    assert response.status_code == 200, response.text
    body = response.json()
    assert [row["modality"] for row in body["embeddings"]] == ["text", "image", "audio"]
    assert body["dimensions"] == 8
    alone = shared_client.post("/embed", files={"file": ("x", png("blue"))}).json()["embeddings"]
    in_json = embed(shared_client, [{"image": b64(png("blue"))}])
    assert np.allclose(vectors(alone), vectors(in_json))


def test_dimensions_cut_and_renormalise(shared_client: httpx.Client, unit: Callable[..., bool]) -> None:
    whole = vectors(embed(shared_client, ["a photo of the dog"]))[0]
    short = vectors(embed(shared_client, ["a photo of the dog"], dimensions=5))[0]
    assert unit(short, 5)
    assert np.allclose(short, whole[:5] / np.linalg.norm(whole[:5]), atol=1e-6)
    response = shared_client.post("/embed", json={"inputs": ["red"], "dimensions": D + 1})
    assert str(D) in refused(response, 422, "invalid_request")["detail"]


def test_encodings_say_the_same_vector(shared_client: httpx.Client) -> None:
    text = ["a photo of the cat"]
    whole = vectors(embed(shared_client, text))[0].astype(np.float32)
    in_base64 = embed(shared_client, text, encoding="base64")[0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(in_base64), "<f4"), whole)
    in_int8 = embed(shared_client, text, encoding="int8")[0]["embedding"]
    assert in_int8 == np.rint(127 * whole / min(1, 5 / np.sqrt(D))).clip(-127, 127).astype(int).tolist()
    in_bits = embed(shared_client, text, encoding="binary")[0]["embedding"]
    assert np.unpackbits(np.array(in_bits, np.uint8)).tolist() == (whole > 0).astype(int).tolist()


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=300), st.integers(0, 2**32))
def test_int8_keeps_the_direction(numbers: list[float], seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal(len(numbers))  # a direction whose numbers are not far apart
    vector = l2_normalise(0.1 * np.array(numbers) + noise / np.abs(noise).max())
    quantised = np.asarray(encoded(vector, None, "int8"), np.float32)
    assert np.abs(quantised).max() <= 127
    if np.abs(vector).max() <= 5 / np.sqrt(len(vector)):  # nothing is cut
        assert l2_normalise(quantised) @ vector > 0.999


def test_a_long_text_is_cut_and_says_so(shared_client: httpx.Client) -> None:
    rows = embed(shared_client, ["dog " * 31, "dog " * 33])
    assert [row["truncated"] for row in rows] == [False, True]
    again = embed(shared_client, ["dog " * 33])
    assert again[0]["truncated"] is True, "from the cache too"


def test_identical_inputs_get_identical_vectors_from_the_cache(shared_client: httpx.Client) -> None:
    first = embed(shared_client, ["the cat barks", "the cat barks"])
    again = embed(shared_client, ["the cat barks"])
    assert first[0]["embedding"] == first[1]["embedding"] == again[0]["embedding"]


@pytest.mark.usefixtures("patient_redis")
def test_servers_share_vectors_through_redis(settings: Settings, redis_url: str) -> None:
    settings = settings.model_copy(update={"redis_url": redis_url})
    with serving(settings) as client:
        first = embed(client, ["the cat barks"])
    with redis.Redis.from_url(redis_url) as connection:
        (key,) = connection.keys()
    assert read_bundle(settings.bundle).manifest.space.encode() in key
    with serving(settings) as client:
        assert embed(client, ["the cat barks"]) == first
        assert 'isthmus_cache_total{result="hit"} 1.0' in client.get("/metrics").text


@pytest.mark.usefixtures("patient_redis")
def test_an_outage_of_redis_is_only_a_miss(settings: Settings, tmp_path: Path, free_port: int) -> None:
    url = f"redis://127.0.0.1:{free_port}/0"
    settings = settings.model_copy(update={"redis_url": url})
    with redis_server(tmp_path, free_port), serving(settings) as client:
        first = embed(client, ["red"])
        with redis.Redis.from_url(url) as connection:
            connection.shutdown(nosave=True)
        assert embed(client, ["red"]) == first
        assert 'isthmus_cache_total{result="error"} 1.0' in client.get("/metrics").text


BAD_INPUTS = {
    "empty text": ("", 422, "invalid_input"),
    "white space": (" \n", 422, "invalid_input"),
    "long text": ("x" * 32_001, 422, "invalid_input"),
    "not base64": ({"image": "!!!"}, 422, "undecodable_media"),
    "empty image": ({"image": ""}, 422, "undecodable_media"),
    "not an image": ({"image": b64(b"hello, I am a text")}, 415, "unsupported_media"),
    "text called wav": ({"audio": b64(b"hello, I am a text")}, 415, "unsupported_media"),
    "url": ({"image": "https://example.com/cat.jpg"}, 422, "url_fetch_disabled"),
    "loopback url": ({"audio": "HTTP://127.0.0.1/a.wav"}, 422, "url_fetch_disabled"),
    "data uri without base64": ({"image": "data:image/png,abc"}, 422, "undecodable_media"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_fails_the_request_by_its_index(shared_client: httpx.Client, name: str) -> None:
    bad, status, code = BAD_INPUTS[name]
    problem = refused(shared_client.post("/embed", json={"inputs": ["red", bad, "blue"]}), status, code)
    assert problem["index"] == 1
    assert embed(shared_client, ["red"]), "the next request works"


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_fails_alone_where_asked(shared_client: httpx.Client, name: str) -> None:
    bad, _, code = BAD_INPUTS[name]
    rows = embed(shared_client, ["red", bad, "blue"], on_error="null")
    assert rows[1]["embedding"] is None
    assert rows[1]["error"]["code"] == code
    assert [len(row["embedding"]) for row in (rows[0], rows[2])] == [D, D]


def test_broken_media(shared_client: httpx.Client, png: Make, wav: Make) -> None:
    jpeg = png((1, 2, 3), size=(200, 200), format="JPEG")
    rows = embed(
        shared_client,
        [
            {"image": b64(jpeg[: len(jpeg) // 2])},
            {"image": b64(png("red", size=(1, 1)))},
            {"audio": b64(wav()[:44])},
            {"image": b64(wav())},
            {"audio": b64(png())},
            {"image": b64(png("red", size=(6400, 6400)))},
        ],
        on_error="null",
    )
    assert [row.get("error", {}).get("code") for row in rows] == [
        "undecodable_media",
        None,
        "undecodable_media",
        "unsupported_media",
        "unsupported_media",
        "media_too_large",
    ]


def test_an_undecidable_file_is_named_by_its_index(shared_client: httpx.Client, png: Make) -> None:
    files = [("file", ("a.png", png())), ("file", ("b.wav", b"not a sound"))]
    problem = refused(shared_client.post("/embed", files=files), 415, "unsupported_media")
    assert problem["index"] == 1


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({}, ["body", "inputs"]),
        ({"inputs": []}, ["body", "inputs"]),
        ({"inputs": "red"}, ["body", "inputs"]),
        ({"inputs": [1]}, ["body", "inputs", 0]),
        ({"inputs": [None]}, ["body", "inputs", 0]),
        ({"inputs": [{}]}, ["body", "inputs", 0]),
        ({"inputs": [{"text": "a", "image": "b"}]}, ["body", "inputs", 0]),
        ({"inputs": [{"text": 7}]}, ["body", "inputs", 0, "text", "text"]),
        ({"inputs": [{"vector": [1]}]}, ["body", "inputs", 0]),
        ({"inputs": ["red"] * 257}, ["body", "inputs"]),
        ({"inputs": ["red"], "dimensions": 0}, ["body", "dimensions"]),
        ({"inputs": ["red"], "dimensions": "many"}, ["body", "dimensions"]),
        ({"inputs": ["red"], "encoding": "ascii"}, ["body", "encoding"]),
        ({"inputs": ["red"], "dimension": 3}, ["body", "dimension"]),
        ([], ["body"]),
        (7, ["body"]),
    ],
)
def test_a_request_of_the_wrong_shape_says_where(shared_client: httpx.Client, body: Any, loc: list[Any]) -> None:
    response = shared_client.post("/embed", json=body)
    problem = refused(response, 422, "invalid_request")
    assert problem["errors"][0]["loc"] == loc
    assert set(problem["errors"][0]) == {"loc", "msg"}


NOT_JSON = {
    "empty": (b"", ""),
    "half": (b"{", ""),
    "not utf-8": (b"\xff\xfe", ""),
    "nan": (b'{"inputs": ["red"], "dimensions": NaN}', ""),
    "infinity": (b'{"inputs": ["red"], "dimensions": Infinity}', ""),
    "overflow": (b'{"inputs": ["red"], "dimensions": 1e999}', ""),
    "lone surrogate": (b'{"inputs": ["\\ud800"]}', ""),
    "bottomless": (b"[" * 100_000, ""),
    "latin-1": ('{"inputs": ["Hündchen"]}'.encode("latin-1"), "the body is not valid JSON: it is not UTF-8"),
    "utf-16": ('{"inputs": ["red"]}'.encode("utf-16"), "the body is not valid JSON: it is not UTF-8"),
    "a comma": (b'{"inputs":\n  ["red",]}', "the body is not valid JSON: see line 2, column 9"),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_not_json_is_malformed_and_says_where(shared_client: httpx.Client, name: str) -> None:
    body, words = NOT_JSON[name]
    response = shared_client.post("/embed", content=body, headers={"Content-Type": "application/json"})
    assert words in refused(response, 400, "malformed_request")["detail"]


def test_a_byte_order_mark_is_passed_over(shared_client: httpx.Client) -> None:
    body = b'\xef\xbb\xbf{"inputs": ["red"]}'
    response = shared_client.post("/embed", content=body, headers={"Content-Type": "application/json"})
    assert response.json() == shared_client.post("/embed", json={"inputs": ["red"]}).json()


def test_huge_numbers_are_refused(shared_client: httpx.Client) -> None:
    body = b'{"inputs": ["red"], "dimensions": 123456789012345678901234567890}'
    response = shared_client.post("/embed", content=body, headers={"Content-Type": "application/json"})
    refused(response, 422, "invalid_request")


def test_another_content_type_is_refused(shared_client: httpx.Client) -> None:
    response = shared_client.post("/embed", content=b"red", headers={"Content-Type": "text/plain"})
    refused(response, 415, "unsupported_body")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no boundary in here",
        b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\nv\r\n--x--\r\n',
        b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{\r\n--x--\r\n',
        b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n[]\r\n--x--\r\n',
    ],
)
def test_a_form_that_cannot_be_read_gets_an_answer(shared_client: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = shared_client.post("/embed", content=content, headers=headers)
    assert response.status_code in (400, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_score_is_the_cosine_of_each_pair(shared_client: httpx.Client, png: Make) -> None:
    image = {"image": b64(png("red"))}
    pairs = [{"a": "red", "b": image}, {"a": "blue", "b": "blue"}, {"a": "green", "b": image}]
    response = shared_client.post("/score", json={"pairs": pairs})
    assert response.status_code == 200, response.text
    red, same, green = response.json()["scores"]
    assert red > 0.99
    assert same == pytest.approx(1, abs=1e-6)
    found = vectors(embed(shared_client, ["green", image]))
    assert green == pytest.approx(float(found[0] @ found[1]), abs=1e-5)
    assert green < red


def test_score_takes_files_for_the_sides_that_are_left_out(shared_client: httpx.Client, png: Make, wav: Make) -> None:
    files = [("file", ("1", png("red"))), ("file", ("2", wav())), ("file", ("3", wav()))]
    data = {"request": json.dumps({"pairs": [{"a": "red"}]})}
    response = shared_client.post("/score", files=files, data=data)
    assert response.status_code == 200, response.text
    assert response.json()["scores"] == pytest.approx([1, 1], abs=0.01)


def test_score_names_the_pair_that_fails(shared_client: httpx.Client) -> None:
    pairs = [{"a": "red", "b": "red"}, {"a": "red", "b": ""}]
    problem = refused(shared_client.post("/score", json={"pairs": pairs}), 422, "invalid_input")
    assert problem["index"] == 1
    odd = shared_client.post("/score", files={"file": ("x", b"1")})
    assert refused(odd, 422, "invalid_request")["errors"][0]["loc"][:4] == ["body", "pairs", 0, "b"]
