import json
import threading
from collections import Counter

import httpx
import numpy as np
import pytest

from tests.service.jobs.processes import kill, server, stored
from tests.service.media import b64, png, wav
from tests.tiny_bundle import DIMENSIONS


def upsert(client, *items, **more):
    response = client.post("/items", json={"items": list(items), **more})
    assert response.status_code == 200, response.text
    return response.json()


def problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()


def said(response):
    """Everything a problem says."""
    body = response.json()
    return body["detail"] + " " + " ".join(each["msg"] for each in body.get("errors", []))


def test_items_of_every_kind(client):
    answer = upsert(
        client,
        {"id": "sentence", "text": "a dog in the rain", "metadata": {"n": 1, "tags": ["a", None], "é": 0.5}},
        {"id": "photo", "image": b64(png())},
        {"id": "sound", "audio": f"data:audio/wav;base64,{b64(wav())}", "collection": "sounds"},
    )
    assert answer == {
        "upserted": 3,
        "items": [
            {"id": "sentence", "collection": "default", "modality": "text", "truncated": False},
            {"id": "photo", "collection": "default", "modality": "image", "truncated": False},
            {"id": "sound", "collection": "sounds", "modality": "audio", "truncated": False},
        ],
    }
    item = client.get("/items/sentence").json()
    assert item["metadata"] == {"n": 1, "tags": ["a", None], "é": 0.5} and "vector" not in item
    vector = client.get("/items/sound", params={"collection": "sounds", "include": "vector"}).json()["vector"]
    embedding = client.post("/embed", json={"inputs": [{"audio": b64(wav())}]}).json()["embeddings"][0]["embedding"]
    assert vector == pytest.approx(embedding, abs=1e-6)
    # A vector that went out may come back in.
    upsert(client, {"id": "given", "vector": vector, "modality": "audio"}, {"id": "raw", "vector": vector})
    assert client.get("/items/given").json()["modality"] == "audio"
    assert client.get("/items/raw").json()["modality"] == "vector"


def test_an_upsert_replaces(client):
    upsert(client, {"id": "a", "text": "one", "metadata": {"old": True}})
    before = client.get("/items/a").json()
    upsert(client, {"id": "a", "image": b64(png())})
    after = client.get("/items/a").json()
    assert after["metadata"] == {} and after["modality"] == "image"
    assert after["created"] == before["created"] and after["updated"] >= before["updated"]
    assert client.get("/collections/default").json()["count"] == 1


def test_files_of_a_form_are_items(client):
    request = {"items": [{"id": "first", "metadata": {"x": 1}}, {"id": "words", "text": "a"}, {"id": "second"}]}
    response = client.post(
        "/items",
        data={"request": json.dumps(request)},
        files=[("file", ("a.png", png())), ("file", ("b.wav", wav())), ("file", ("folder/c.png", png(1)))],
    )
    assert response.status_code == 200, response.text
    assert [(item["id"], item["modality"]) for item in response.json()["items"]] == [
        ("first", "image"),
        ("words", "text"),
        ("second", "audio"),
        ("folder/c.png", "image"),
    ]
    assert client.get("/items/folder/c.png").json()["modality"] == "image"
    assert client.get("/items/folder%2Fc.png").json()["id"] == "folder/c.png"
    assert client.get("/items/first").json()["metadata"] == {"x": 1}


def test_a_bad_input_fails_the_request_and_is_named(client):
    items = [{"id": "good", "text": "fine"}, {"id": "bad", "image": b64(png()[:60])}]
    body = problem(client.post("/items", json={"items": items}), 422)
    assert body["code"] == "undecodable_media" and body["index"] == 1
    problem(client.get("/items/good"), 404)


def test_on_error_null_stores_the_others(client):
    items = [
        {"id": "no sound", "audio": b64(b"just text")},
        {"id": "good", "text": "fine"},
        {"id": "short", "vector": [1.0]},
    ]
    answer = upsert(client, *items, on_error="null")
    assert answer["upserted"] == 1
    assert [item.get("error", {}).get("code") for item in answer["items"]] == [
        "unsupported_media",
        None,
        "invalid_input",
    ]
    assert [item.get("index") for item in answer["items"]] == [0, None, 2]
    assert [item["id"] for item in client.get("/items").json()["items"]] == ["good"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"id": "", "text": "a"}, "at least 1 character"),
        ({"id": "x" * 257, "text": "a"}, "at most 256 characters"),
        ({"id": "a\nb", "text": "a"}, "control characters"),
        ({"id": "a\0b", "text": "a"}, "control characters"),
        ({"id": 7, "text": "a"}, "valid string"),
        ({"text": "a"}, "Field required"),
        ({"id": "a"}, "exactly one of: text, image, audio, video, array, compose, vector"),
        ({"id": "a", "text": "a", "image": "b"}, "exactly one of: text, image, audio, video, array, compose, vector"),
        ({"id": "a", "compose": [{"text": "a"}], "modality": "image"}, "modality goes with text, image, audio"),
        ({"id": "a", "text": "a", "txet": "b"}, "Extra inputs"),
        ({"id": "a", "file": "b"}, "File"),
        ({"id": "a", "text": "a", "collection": "../etc"}, "pattern"),
        ({"id": "a", "text": "a", "metadata": [1]}, "valid dictionary"),
        ({"id": "a", "text": "a", "metadata": {"n": 2**63}}, "64 bits"),
        ({"id": "a", "text": "a", "metadata": {"n": 10**30}}, "64 bits"),
        ({"id": "a", "text": "a", "metadata": {"n": -(2**63) - 1}}, "64 bits"),
        ({"id": "a", "text": "a", "metadata": {"f": 1e300, "n": [-(2**64)]}}, "64 bits"),
        ({"id": "a", "text": "a", "metadata": {"a": ["b\0"]}}, "NUL"),
        ({"id": "a", "text": "a", "metadata": {"a\0": 1}}, "NUL"),
        ({"id": "a", "text": "a", "metadata": {"x": "y" * 16_384}}, "larger than 16384 bytes"),
        ({"id": "a", "text": "a", "metadata": {"x": json.loads("[" * 20 + "]" * 20)}}, "nested deeper"),
        ({"id": "a", "vector": []}, "at least 1 item"),
        ({"id": "a", "vector": ["x"]}, "valid number"),
    ],
)
def test_an_item_that_is_refused(client, item, message):
    response = client.post("/items", json={"items": [item]})
    assert problem(response, 422)["code"] == "invalid_request"
    assert message in said(response)
    upsert(client, {"id": "next", "text": "works"})


@pytest.mark.parametrize(
    "value", [b"NaN", b"Infinity", b"1e999", b'"\\ud800"', b'1, "\\udfff": 1', b"1,", b'"\xff"', b"[" * 5_000]
)
def test_json_that_is_not_json(client, value):
    body = b'{"items": [{"id": "a", "text": "a", "metadata": {"x": ' + value + b"}}]}"
    response = client.post("/items", content=body, headers={"content-type": "application/json"})
    assert problem(response, 400)["code"] == "malformed_request"
    upsert(client, {"id": "next", "text": "works"})


def test_vectors_that_are_refused(client):
    for vector in ([0.0] * DIMENSIONS, [1.0] * (DIMENSIONS + 1)):
        body = problem(client.post("/items", json={"items": [{"id": "a", "vector": vector}]}), 422)
        assert body["code"] == "invalid_input" and body["index"] == 0
    upsert(client, {"id": "huge", "vector": [1e308] * DIMENSIONS}, {"id": "tiny", "vector": [5e-324] * DIMENSIONS})
    huge = client.get("/items/huge", params={"include": "vector"}).json()["vector"]
    assert huge == pytest.approx([DIMENSIONS**-0.5] * DIMENSIONS, rel=1e-6)


def test_vectors_as_base64(client):
    vector = np.arange(1, DIMENSIONS + 1, dtype="<f4")
    upsert(client, {"id": "a", "vector": b64(vector.tobytes()), "modality": "image"}, {"id": "b", "vector": [2.0] * 16})
    held = client.get("/items/a", params={"include": "vector"}).json()["vector"]
    assert held == pytest.approx((vector / np.linalg.norm(vector)).tolist(), rel=1e-6)
    found = client.post("/search", json={"query": {"vector": b64(vector.tobytes())}, "top_k": 1}).json()["results"]
    assert found[0]["id"] == "a"
    for wrong, message in (
        ("%%%", "not valid base64"),
        (b64(b"12345"), "multiple of 4"),
        ("", "at least 1 item"),
        ([True] * DIMENSIONS, "numbers only"),
        ([[1.0]] * DIMENSIONS, "numbers only"),
        (7, "a list of numbers, or base64"),
    ):
        response = client.post("/items", json={"items": [{"id": "c", "vector": wrong}]})
        problem(response, 422)
        assert message in said(response)
    for wrong in ([np.nan] * DIMENSIONS, [np.inf] * DIMENSIONS, [0.0] * DIMENSIONS, [1.0]):
        vector = np.array(wrong, "<f4")
        problem(client.post("/items", json={"items": [{"id": "c", "vector": b64(vector.tobytes())}]}), 422)
    problem(client.get("/items/c"), 404)


def test_an_id_twice_in_one_request(client):
    items = [{"id": "a", "text": "1"}, {"id": "a", "text": "2", "collection": "other"}]
    upsert(client, *items)
    response = client.post("/items", json={"items": [*items, {"id": "a", "text": "3"}]})
    problem(response, 422)
    assert "'a' is there twice" in said(response)


def test_pages(client):
    upsert(client, *({"id": f"{number}", "text": f"{number}"} for number in range(5)))
    upsert(client, {"id": "photo", "image": b64(png())}, {"id": "far", "text": "x", "collection": "other"})
    seen, cursor = [], None
    while True:
        page = client.get("/items", params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
        seen.append([item["id"] for item in page["items"]])
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == [["0", "1", "2"], ["3", "4", "photo"], ["far"]]
    assert [item["id"] for item in client.get("/items", params={"modality": "image"}).json()["items"]] == ["photo"]
    assert [item["id"] for item in client.get("/items", params={"collection": "other"}).json()["items"]] == ["far"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"cursor": "made up"},
        {"cursor": "%%%"},
        {"cursor": "é"},
        {"cursor": ""},
        {"limit": 0},
        {"limit": 1_001},
        {"limit": "9" * 50},
        {"modality": "smell"},
        {"collection": "../x"},
    ],
)
def test_a_list_that_is_refused(client, parameters):
    problem(client.get("/items", params=parameters), 422)


def test_unknown_names(client):
    problem(client.get("/items/never"), 404)
    problem(client.delete("/items/never"), 404)
    problem(client.get("/items/a", params={"collection": "never"}), 404)
    problem(client.get("/items", params={"collection": "never"}), 404)
    problem(client.post("/items/delete", json={"ids": ["a"], "collection": "never"}), 404)
    problem(client.get("/collections/never"), 404)
    problem(client.delete("/collections/never"), 404)
    problem(client.get("/items/" + "x" * 300), 422)
    problem(client.get("/items/a%00b"), 422)


def test_deleting(client):
    upsert(client, *({"id": f"{n}", "text": f"{n}", "metadata": {"odd": n % 2 == 1, "n": n}} for n in range(8)))
    assert client.delete("/items/0").status_code == 204
    problem(client.get("/items/0"), 404)
    assert client.post("/items/delete", json={"ids": ["0", "2", "2"]}).json() == {"deleted": 1}
    assert client.post("/items/delete", json={"filter": {"odd": True, "n": [1, 3, 4]}}).json() == {"deleted": 2}
    filter = {"$or": [{"n": {"$gt": 6}}, {"$not": {"n": {"$gte": 5}}}]}
    assert client.post("/items/delete", json={"filter": filter}).json() == {"deleted": 2}
    assert [item["id"] for item in client.get("/items").json()["items"]] == ["5", "6"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"ids": ["a"], "filter": {"a": 1}},
        {"filter": {}},
        {"filter": {"$and": [{}]}},
        {"ids": []},
        {"ids": [1]},
    ],
)
def test_a_deletion_that_is_refused(client, body):
    upsert(client, {"id": "a", "text": "a"})
    problem(client.post("/items/delete", json=body), 422)
    assert client.get("/items/a").status_code == 200


@pytest.mark.parametrize(
    "moves",
    [
        [],
        [{"id": "a"}],
        [{"id": "a", "to": "a"}],
        [{"id": "a", "to": "b"}, {"id": "b", "to": "c"}],
        [{"id": "a", "to": "c"}, {"id": "b", "to": "c"}],
        [{"id": "a", "to": "line\nbreak"}],
        [{"id": f"{n}", "to": f"to {n}"} for n in range(1_001)],
    ],
)
def test_a_move_that_is_refused(client, moves):
    upsert(client, {"id": "a", "text": "a"})
    problem(client.post("/items/move", json={"moves": moves}), 422)
    problem(client.post("/items/move", json={"moves": [{"id": "a", "to": "b"}], "collection": "never"}), 404)
    assert client.get("/items/a").status_code == 200


def test_collections_are_listed_while_they_come_and_go(client):
    for number in range(20):
        assert client.put(f"/collections/stays{number}", json={"keywords": ["b", "a"]}).status_code == 201
    done = threading.Event()

    def come_and_go():
        with httpx.Client(base_url=client.base_url, trust_env=False, timeout=60) as another:
            while not done.is_set():
                another.put("/collections/vanishes")
                another.delete("/collections/vanishes")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        listed = [client.get("/collections") for _ in range(60)]
    finally:
        done.set()
        thread.join()
    for response in listed:
        assert response.status_code == 200, response.text
        staying = [each for each in response.json()["collections"] if each["name"].startswith("stays")]
        assert len(staying) == 20 and all(each["keywords"] == ["a", "b"] for each in staying)


def test_collections(client):
    created = client.put("/collections/photos")
    assert created.status_code == 201
    body = created.json()
    assert (body["name"], body["count"], body["dimensions"], body["index"]) == ("photos", 0, DIMENSIONS, "auto")
    assert body["parts"] == [] and body["precision"] is None
    assert len(body["space"]) == 16
    assert client.put("/collections/photos", json={}).status_code == 200
    for wrong, message in (
        ({"index": "tree"}, "'flat', 'hnsw', 'ivf_pq' or 'auto'"),
        ({"index": "ivf_opq"}, "'flat', 'hnsw', 'ivf_pq' or 'auto'"),
        ({"index": "ivf_pq", "precision": "int8"}, "codes of its own"),
        ({"index": "flat", "precision": "int8"}, "has float32 precision"),
        ({"precision": "int8"}, "given with index"),
    ):
        refused = client.put("/collections/photos", json=wrong)
        problem(refused, 422)
        assert message in said(refused)
    changed = client.put("/collections/photos", json={"index": "hnsw", "precision": "int8"}).json()
    assert (changed["index"], changed["precision"]) == ("hnsw", "int8")
    assert client.put("/collections/photos").json()["index"] == "hnsw"
    problem(client.put("/collections/..%2Fx"), 404)
    upsert(client, {"id": "a", "text": "a", "collection": "photos"})
    described = client.get("/collections/photos").json()
    part = {"modality": "text", "kind": "flat", "precision": "float32", "count": 1, "indexed": 0, "building": False}
    assert described["count"] == 1 and described["parts"] == [part]
    assert [each["name"] for each in client.get("/collections").json()["collections"]] == ["default", "photos"]
    assert client.delete("/collections/photos").status_code == 204
    problem(client.get("/items/a", params={"collection": "photos"}), 404)


def test_an_acknowledged_write_outlives_a_killed_process(bundle_dir, tmp_path):
    acknowledged, changed = [], threading.Condition()

    def write(client, writer):
        for turn in range(10_000):
            batch = [{"id": f"{writer} {turn} {part}", "text": f"a red dog {turn}"} for part in range(3)]
            try:
                response = client.post("/items", json={"items": batch})
            except httpx.TransportError:
                return
            with changed:
                acknowledged.append((response.status_code, [item["id"] for item in batch]))
                changed.notify()

    with server(bundle_dir, tmp_path) as (process, client):
        writers = [threading.Thread(target=write, args=(client, number)) for number in range(4)]
        for writer in writers:
            writer.start()
        with changed:
            assert changed.wait_for(lambda: len(acknowledged) >= 40, timeout=30)
        kill(process)
        for writer in writers:
            writer.join(30)
    assert {status for status, _ in acknowledged} == {200}
    with server(bundle_dir, tmp_path) as (_, client):
        held = set(stored(client))
        assert {id for _, ids in acknowledged for id in ids} <= held
        # What was not acknowledged is there whole or not at all, and all that is there can be found.
        batches = Counter(id.rpartition(" ")[0] for id in held)
        assert set(batches.values()) == {3}
        found = client.post("/search", json={"query": "a red dog", "top_k": min(1_000, len(held))}).json()["results"]
        assert {each["id"] for each in found} <= held and len(found) == min(1_000, len(held))


def test_integers_of_64_bits_are_told_apart_and_large_doubles_are_kept(client):
    near = [1234567890123456768, 1234567890123456769, 1234567890123456770, 1234567890123456768.0]
    large = [1e300, -1e300, 2.0**63, -(2.0**63), 1.5e19]
    items = [{"id": f"{n}", "text": "a", "metadata": {"n": value}} for n, value in enumerate([*near, *large])]
    assert client.post("/items", json={"items": items}).status_code == 200
    for n, value in enumerate([*near, *large]):
        held = client.get(f"/items/{n}").json()["metadata"]["n"]
        assert held == value and type(held) is type(value)

    def deleted(filter):
        answer = client.post("/items/delete", json={"filter": filter})
        return answer.json().get("deleted", answer.text)

    assert deleted({"n": {"$gt": near[1], "$lt": near[2]}}) == 0
    assert deleted({"n": near[1]}) == 1
    assert deleted({"n": {"$lte": near[0]}}) == 4  # an integer, the same as a double, and two far below zero
    assert deleted({"n": [2**62, 1e300]}) == 1
    assert deleted({"n": {"$gte": near[1]}}) == 3
    refused = client.post("/items/delete", content='{"filter": {"n": 123456789012345678901234567890}}')
    assert refused.status_code == 422 and "64 bits" in refused.text
