import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.service.media import b64, png, wav
from tests.service.test_items_routes import problem, said

LABELS = ["dog", "cat", {"name": "bell", "prompts": ["the sound of a bell", "ding dong"]}]


def classify(client, **body):
    response = client.post("/classify", json=body)
    assert response.status_code == 200, response.text
    return response.json()["results"]


def test_text_an_image_and_a_sound(client):
    results = classify(client, inputs=["a dog", {"image": b64(png())}, {"audio": b64(wav())}], labels=LABELS)
    assert len(results) == 3
    for result in results:
        assert sorted(each["label"] for each in result["labels"]) == ["bell", "cat", "dog"]
        scores = [each["score"] for each in result["labels"]]
        assert sum(scores) == pytest.approx(1) and scores == sorted(scores, reverse=True)
        assert result["abstained"] is False


def test_top_k_and_threshold(client):
    [result] = classify(client, inputs=["x"], labels=LABELS, top_k=1, threshold=1.0)
    assert len(result["labels"]) == 1 and result["abstained"] is True


def test_files(client):
    response = client.post(
        "/classify", files=[("file", ("a", png())), ("file", ("b", wav()))], data={"request": '{"labels": ["a", "b"]}'}
    )
    assert response.status_code == 200, response.text
    assert len(response.json()["results"]) == 2


def test_label_sets(client):
    put = client.put("/label-sets/animals", json={"labels": LABELS, "templates": ["a {}"]})
    assert put.status_code == 200, put.text
    held = client.get("/label-sets/animals").json()
    assert held == put.json() and held["labels"] == LABELS and held["templates"] == ["a {}"]
    client.put("/label-sets/zoo", json={"labels": LABELS})
    times = {key: held[key] for key in ("created", "updated")}
    assert client.get("/label-sets?limit=1").json() == {"label_sets": [{"name": "animals", **times}]}
    assert [each["name"] for each in client.get("/label-sets?after=animals").json()["label_sets"]] == ["zoo"]
    problem(client.get("/label-sets?after=a b"), 422)
    by_set = classify(client, inputs=[{"image": b64(png())}], label_set="animals")
    spelt_out = classify(client, inputs=[{"image": b64(png())}], labels=LABELS, templates=["a {}"])
    for one, other in zip(by_set[0]["labels"], spelt_out[0]["labels"], strict=True):
        assert one["label"] == other["label"] and one["score"] == pytest.approx(other["score"], rel=1e-6)
    assert client.put("/label-sets/animals", json={"labels": ["new"]}).json()["labels"] == ["new"]
    assert client.delete("/label-sets/animals").status_code == 204
    for response in (
        client.get("/label-sets/animals"),
        client.delete("/label-sets/animals"),
        client.post("/classify", json={"inputs": ["x"], "label_set": "animals"}),
    ):
        problem(response, 404)


@pytest.mark.parametrize(
    ("body", "message"),
    [({"labels": ["a"], "inputs": [""]}, "inputs[0]"), ({}, "exactly one of: labels, label_set")],
)
def test_a_request_that_is_refused(client, body, message):
    """Requests that a schema refuses are in tests/service/test_classify.py."""
    response = client.post("/classify", json={"inputs": ["x"]} | body)
    problem(response, 422)
    assert message in said(response)
    assert len(classify(client, inputs=["x"], labels=["a"])) == 1


def test_a_bad_image_among_good_inputs_is_named(client):
    body = {"inputs": ["x", {"image": b64(png()[:50])}], "labels": ["a"]}
    assert problem(client.post("/classify", json=body), 422)["index"] == 1


def test_ten_thousand_labels(client):
    [result] = classify(client, inputs=["label 77"], labels=[f"label {n}" for n in range(10_000)], top_k=1)
    assert 0 < result["labels"][0]["score"] <= 1


def test_a_planted_object_tops_its_cell(client):
    """Four plain quarters, and one cell of another colour: the labels name the colours."""
    pixels = np.full((60, 90, 3), (0, 0, 255), np.uint8)
    pixels[20:40, 60:90] = (255, 0, 0)  # row 1, column 2 of three by three
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    inputs = [{"image": base64.b64encode(file.getvalue()).decode()}]
    body = {"labels": ["red", "green", "blue"], "grid": {"rows": 3, "columns": 3}, "top_k": 3}
    [result] = classify(client, inputs=inputs, **body)
    assert result["labels"][0]["label"] == "blue"
    tops = [[cell["labels"][0]["label"] for cell in row] for row in result["cells"]]
    assert tops == [["blue"] * 3, ["blue", "blue", "red"], ["blue"] * 3]
    red = {
        (row, column): next(each["score"] for each in cell["labels"] if each["label"] == "red")
        for row, cells in enumerate(result["cells"])
        for column, cell in enumerate(cells)
    }
    assert max(red, key=red.__getitem__) == (1, 2)
    refused = client.post("/classify", json={"inputs": ["x"], "labels": ["a"], "grid": {"rows": 1, "columns": 2}})
    assert problem(refused, 422)["index"] == 0 and "only an image has a grid" in said(refused)


def test_a_label_set_learns_from_examples(client):
    labels = [{"name": "red", "examples": [{"image": b64(png(1))}, {"image": b64(png(2))}]}, "cat"]
    body = {"labels": labels, "off_topic": [{"image": b64(png(5))}, {"image": b64(png(6))}]}
    put = client.put("/label-sets/taught", json=body)
    assert put.status_code == 200, put.text
    assert put.json()["labels"] == [{"name": "red", "examples": 2}, "cat"]
    assert set(put.json()["abstention"]) == {"image"} and 0 <= put.json()["abstention"]["image"]["auroc"] <= 1
    [result] = classify(client, inputs=[{"image": b64(png(1))}], label_set="taught", abstain=True)
    assert 0 <= result["on_topic"] <= 1 and result["abstained"] is (result["on_topic"] < 0.5)
    refused = client.post("/classify", json={"inputs": ["x"], "label_set": "taught", "abstain": True})
    assert problem(refused, 422) and "which text inputs are off topic" in said(refused)


def test_one_bad_input_fails_alone_where_that_is_asked_for(client):
    inputs = ["a dog", {"image": b64(b"no picture")}, {"image": b64(png())}]
    assert problem(client.post("/classify", json={"inputs": inputs, "labels": LABELS}), 415)["index"] == 1
    for grid in (None, {"rows": 2, "columns": 1}):
        asked = inputs if grid is None else inputs[1:]
        results = classify(client, inputs=asked, labels=LABELS, on_error="null", grid=grid)
        bad = results[asked.index(inputs[1])]
        assert bad == {"labels": [], "abstained": False, "error": bad["error"]}
        assert bad["error"]["code"] == "unsupported_media" and bad["error"]["detail"]
        assert len(results) == len(asked) and all("error" not in each for each in results if each is not bad)
        assert len(results[-1]["labels"]) == 3 and len(results[-1].get("cells", [])) == (0 if grid is None else 2)
    results = classify(client, inputs=["red"], labels=LABELS, on_error="null", grid={"rows": 1, "columns": 1})
    assert "grid" in results[0]["error"]["detail"]
