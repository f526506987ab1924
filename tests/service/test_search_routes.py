import json

import numpy as np
import pytest

from tests.service.media import b64, png, wav
from tests.service.test_items_routes import problem, said, upsert


@pytest.fixture
def stocked(client):
    upsert(
        client,
        {"id": "photo", "image": b64(png(1)), "metadata": {"year": 2020}},
        {"id": "photo 2", "image": b64(png(2)), "metadata": {"year": 2021}},
        {"id": "sound", "audio": b64(wav(1)), "metadata": {"year": 2020}},
        {"id": "words", "text": "a dog in the rain", "metadata": {"year": None}},
    )
    return client


def find(client, **body):
    response = client.post("/search/batch" if body.get("queries") else "/search", json=body)
    assert response.status_code == 200, response.text
    return response.json()["results"]


def ids(results):
    return [each["id"] for each in results]


def test_each_item_is_found_by_what_it_was_made_from(stocked):
    for query, id in (
        ("a dog in the rain", "words"),
        ({"text": "a dog in the rain"}, "words"),
        ({"image": b64(png(2))}, "photo 2"),
        ({"audio": b64(wav(1))}, "sound"),
    ):
        results = find(stocked, query=query)
        assert results[0]["id"] == id and results[0]["score"] == pytest.approx(1, abs=1e-5)
        assert sorted(ids(results)) == ["photo", "photo 2", "sound", "words"]
        scores = [each["score"] for each in results]
        assert scores == sorted(scores, reverse=True)


def test_what_a_result_holds(stocked):
    response = stocked.post("/search", json={"query": {"image": b64(png(1))}, "top_k": 1}).json()
    assert response["took_ms"] > 0
    [result] = response["results"]
    assert set(result) == {"id", "score", "modality", "metadata"}
    assert (result["modality"], result["metadata"]) == ("image", {"year": 2020})
    [result] = find(stocked, query="x", top_k=1, include=[])
    assert set(result) == {"id", "score", "modality"}
    [result] = find(stocked, query="x", top_k=1, include=["vector"])
    assert set(result) == {"id", "score", "modality", "vector"}
    assert float(np.linalg.norm(result["vector"])) == pytest.approx(1, abs=1e-6)


def test_a_vector_that_went_out_finds_its_item(stocked):
    vector = stocked.get("/items/sound", params={"include": "vector"}).json()["vector"]
    assert find(stocked, query={"vector": vector})[0]["id"] == "sound"


def test_filters(stocked):
    assert sorted(ids(find(stocked, query="x", filter={"year": 2020}))) == ["photo", "sound"]
    assert sorted(ids(find(stocked, query="x", filter={"year": [2021.0, None]}))) == ["photo 2", "words"]
    assert ids(find(stocked, query="x", filter={"year": 2020}, modalities=["audio"])) == ["sound"]
    assert find(stocked, query="x", filter={"year": "2020"}) == []
    assert len(find(stocked, query="x", modalities=["image", "audio"], top_k=2)) == 2


def test_many_queries(stocked):
    results = find(stocked, queries=["a dog in the rain", {"id": "photo"}, {"image": b64(png(1))}], top_k=3)
    assert [len(each) for each in results] == [3, 3, 3]
    assert results[0][0]["id"] == "words" and results[2][0]["id"] == "photo"
    assert "photo" not in ids(results[1])


def test_a_null_for_the_field_of_the_other_route_is_no_field(stocked):
    assert find(stocked, query="x", queries=None, top_k=1)
    assert stocked.post("/search/batch", json={"queries": ["x"], "query": None}).status_code == 200


def test_files_as_queries(stocked):
    one = stocked.post("/search", files={"file": ("x", png(2))}, data={"request": json.dumps({"top_k": 1})})
    assert ids(one.json()["results"]) == ["photo 2"]
    files = [("file", ("x", png(2))), ("file", ("y", wav(1)))]
    two = stocked.post("/search/batch", files=files)
    assert [each[0]["id"] for each in two.json()["results"]] == ["photo 2", "sound"]
    refused = stocked.post("/search", files=files)
    assert problem(refused, 422) and "POST /search/batch" in said(refused)


def test_a_fresh_server_finds_nothing(client):
    assert find(client, query="x") == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"queries": ["x"]}, 422, "send several to POST /search/batch"),
        ({"query": ""}, 422, "query"),
        ({"query": 7}, 422, "expected a string"),
        ({"query": "x", "top_k": 10**30}, 422, ""),
        ({"query": "x", "filter": {"n": 2**64}}, 422, "64 bits"),
        ({"query": "x", "filter": {"n": [[1]]}}, 422, "filter.n[0]: a text, a number, true, false or null"),
        ({"query": "x", "filter": {"n": {"$gte": True}}}, 422, "filter.n.$gte: a number or a text is expected"),
        ({"query": "x", "filter": {"$nor": [{"n": 1}]}}, 422, "filter.$nor: no such operator here"),
        ({"query": "x", "collection": "never"}, 404, "no collection 'never'"),
        ({"query": {"vector": [1.0]}}, 422, "the vector has 1 numbers"),
        ({"query": {"image": "http://localhost/x.png"}}, 422, "fetching of URLs is off"),
    ],
)
def test_a_search_that_is_refused(stocked, body, status, message):
    response = stocked.post("/search", json=body)
    problem(response, status)
    assert message in said(response)
    assert len(find(stocked, query="x")) == 4


def test_the_bad_one_of_many_queries_is_named(stocked):
    body = problem(stocked.post("/search/batch", json={"queries": ["x", {"image": b64(png()[:50])}]}), 422)
    assert body["index"] == 1 and body["code"] == "undecodable_media"


def test_numbers_that_are_not_finite(stocked):
    for vector in ("[NaN]", "[1e999]", "[-Infinity]"):
        body = '{"query": {"vector": ' + vector + "}}"
        problem(stocked.post("/search", content=body, headers={"content-type": "application/json"}), 400)


def test_words_are_found_beside_meaning(stocked):
    results = find(stocked, query="bells", keywords={"query": "rain"}, include=["explain"])
    assert ids(results)[0] == "words" and results[0]["explain"]["keyword_rank"] == 1
    assert results[0]["score"] == results[0]["explain"]["fused"]
    assert find(stocked, query="rain", keywords={"match": "all"}, top_k=1)[0]["id"] == "words"
    put = stocked.put("/collections/default", json={"keywords": ["title"]})
    assert put.status_code == 200 and put.json()["keywords"] == ["title"]
    upsert(stocked, {"id": "titled", "image": b64(png(9)), "metadata": {"title": "Thunder over the sea"}})
    only = {"query": "thunder", "field": "title", "weight": 1}
    assert find(stocked, query="x", keywords=only)[0]["id"] == "titled"
    assert stocked.put("/collections/default").json()["keywords"] == ["title"]
    response = stocked.post("/search", json={"query": "x", "keywords": {"field": "year"}})
    assert problem(response, 422) and "it has text, title" in said(response)


def test_the_same_file_under_another_id_is_one_result(stocked):
    upsert(stocked, *({"id": f"again {n}", "image": b64(png(1))} for n in range(12)))
    results = find(stocked, query={"image": b64(png(1))}, top_k=4, deduplicate=1)
    assert len(results) == 4 and sum(each["score"] > 0.9999 for each in results) == 1


def test_explained_and_diverse(stocked):
    query = {"compose": [{"text": "a dog in the rain"}, {"id": "photo", "weight": -0.5}]}
    for result in find(stocked, query=query, include=["explain"], diversity={"lambda": 0.5, "pool": 4}):
        assert set(result) == {"id", "score", "modality", "explain"}
        parts = result["explain"]["parts"]
        assert sum(part["contribution"] for part in parts) == pytest.approx(result["score"], abs=1e-5)


def test_what_this_bundle_cannot_do(stocked):
    response = stocked.post("/search", json={"query": "x", "correction": 1})
    assert problem(response, 422) and "no means of its modalities" in said(response)
