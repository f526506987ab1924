"""No answer with the vector of something else, at every door: data: URIs that come as texts, and texts that the
tokenizer does not know."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from isthmus_client.command import cli
from service.engine.inputs import uri_kind
from service.settings import Settings
from tests.conftest import serving
from tests.service.jobs.processes import ended, errors, submitted

CHINESE = "一只狗在海滩上"
NO_WORD = "knows no word of"


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    answer = client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    return str(problem["detail"]) + "".join(each["msg"] for each in problem.get("errors", []))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("data:image/png;base64,AAAA", "image"),
        ("DATA:Image/JPEG;BASE64,AAAA", "image"),
        ("\n data:audio/x-wav; codecs=1; base64 ,AAAA", "audio"),
        ("data:video/mp4;base64,AAAA", "video"),
        ("data:image/svg+xml,%3Csvg%3E", "image"),
        ("data:image/png", "image"),
        ("data:application/octet-stream;base64,AAAA", "file"),
        ("data:;base64,AAAA", "file"),
        ("data:image/png is what a URI of a picture begins with", None),
        ("data: image/png, audio/wav", None),
        ("data:text/plain,hello", None),
        ("a photo, data:image/png;base64,AAAA", None),
        ("https://example.org/a.png", None),
        ("", None),
    ],
)
def test_what_a_string_holds(text: str, kind: str | None) -> None:
    assert uri_kind(text) == kind


def test_a_string_that_is_a_data_uri_is_that_file(shared_client: httpx.Client, picture: str, sound: str) -> None:
    media = [{"image": picture}, {"audio": sound}]
    unnamed = picture.replace("image/png", "application/octet-stream")
    rows = post(shared_client, "/embed", {"inputs": [*media, picture, sound, unnamed]})["embeddings"]
    vectors = [np.array(row["embedding"]) for row in rows]
    assert [row["modality"] for row in rows] == ["image", "audio", "image", "audio", "image"]
    for place, same in ((2, 0), (3, 1), (4, 0)):
        assert np.allclose(vectors[place], vectors[same], atol=1e-6)
    [score] = post(shared_client, "/score", {"pairs": [{"a": picture, "b": media[0]}]})["scores"]
    assert score > 0.9999
    body = {"inputs": [picture], "labels": ["red", "blue"]}
    assert post(shared_client, "/classify", body)["results"][0]["labels"][0]["label"] == "red"


def test_a_data_uri_that_is_said_to_be_a_text_is_refused_with_advice(
    shared_client: httpx.Client, picture: str, sound: str
) -> None:
    advice = "send the file that it holds as an image"
    for path, body in (
        ("/embed", {"inputs": [{"text": picture}]}),
        ("/score", {"pairs": [{"a": "red", "b": {"text": sound}}]}),
        ("/classify", {"inputs": [{"text": picture}], "labels": ["red"]}),
        ("/items", {"items": [{"id": "a", "text": picture}]}),
    ):
        assert advice in refused(shared_client, path, body)
    assert "is no label" in refused(shared_client, "/classify", {"inputs": ["red"], "labels": ["blue", picture]})
    assert "undecodable" in shared_client.post("/embed", json={"inputs": ["data:image/png;base64,!"]}).json()["code"]
    assert refused(shared_client, "/embed", {"inputs": ["data:image/svg+xml,%3Csvg%3E"]}) == (
        "inputs[0]: the data: URI is not base64"
    )


def test_unknown_texts_are_told_of_or_refused(shared_client: httpx.Client) -> None:
    rows = post(shared_client, "/embed", {"inputs": ["red dog", f"red {CHINESE}", "red dog 🎉"]})["embeddings"]
    assert [row["unknown"] for row in rows] == [0, 0.5, 0.3333]
    again = post(shared_client, "/embed", {"inputs": ["red dog 🎉"]})["embeddings"]
    assert again[0]["unknown"] == 0.3333, "from the cache too"
    assert refused(shared_client, "/embed", {"inputs": ["red", CHINESE]}).startswith("inputs[1]: the model's tokenizer")
    good, bad = post(shared_client, "/embed", {"inputs": ["red", "🎉"], "on_error": "null"})["embeddings"]
    assert good["embedding"] and NO_WORD in bad["error"]["detail"]
    assert NO_WORD in refused(shared_client, "/score", {"pairs": [{"a": CHINESE, "b": "红色"}]})


def test_a_classification_of_unknown_words_warns(shared_client: httpx.Client) -> None:
    labels = ["red", "blue"]
    assert "warnings" not in post(shared_client, "/classify", {"inputs": ["red"], "labels": labels})
    answer = post(shared_client, "/classify", {"inputs": ["red", CHINESE, f"红 蓝 绿 red {CHINESE}"], "labels": labels})
    first, second = answer["warnings"]
    assert first.startswith("inputs[1]: the model's tokenizer knows no word") and len(answer["results"]) == 3
    assert second == "inputs[2]: the model's tokenizer does not know 80% of the text, which says little about it"
    given = [{"name": "蓝", "prompts": ["blue"]}, {"name": "x", "prompts": ["绿", "红"]}]
    for _ in range(2):  # encoded, and remembered
        answer = post(shared_client, "/classify", {"inputs": ["red"], "labels": [*labels, "红色", "红 dog", *given]})
        [warning] = answer["warnings"]
        assert warning.startswith("labels: the model's tokenizer knows no word of '红色', 'x', whose scores")
    answer = shared_client.put("/label-sets/unknown", json={"labels": [*labels, "红色"]})
    assert answer.status_code == 422 and answer.json()["index"] == 2 and NO_WORD in answer.json()["detail"]


def test_searches_items_jobs_and_folders(settings: Settings, tmp_path: Path, picture: str, sound: str) -> None:
    with serving(settings) as client:
        items = [{"id": "photo", "image": picture}, {"id": "tone", "audio": sound}, {"id": "text", "text": "blue"}]
        post(client, "/items", {"items": items})
        for query, id in ((picture, "photo"), (sound, "tone")):
            answer = post(client, "/search", {"query": query})
            assert answer["results"][0]["id"] == id and answer["results"][0]["score"] > 0.9999
            assert "warnings" not in answer
        assert "keywords.query is needed" in refused(client, "/search", {"query": picture, "keywords": {}})
        assert "as an image" in refused(client, "/search", {"query": {"compose": [{"text": picture}]}})
        answer = post(client, "/search/batch", {"queries": ["red", CHINESE, "🎉🎉 !! red 🎉"], "top_k": 1})
        assert [len(each) for each in answer["results"]] == [1, 1, 1]
        assert [each.partition(":")[0] for each in answer["warnings"]] == ["queries[1]", "queries[2]"]
        [warning] = post(client, "/search", {"query": CHINESE})["warnings"]
        assert warning.startswith("query: the model's tokenizer knows no word")

        assert NO_WORD in refused(client, "/items", {"items": [{"id": "c", "text": CHINESE}]})
        bad = [{"id": "c", "text": CHINESE}, {"id": "u", "text": picture}, {"id": "fine", "text": "green"}]
        answer = post(client, "/items", {"items": bad, "on_error": "null"})
        assert answer["upserted"] == 1
        assert NO_WORD in answer["items"][0]["error"]["detail"] and "data: URI" in answer["items"][1]["error"]["detail"]
        job = ended(client, submitted(client, bad))
        assert (job["done"], job["failed"]) == (1, 2)
        assert [each["id"] for each in errors(client, job["id"])] == ["c", "u"]

        folder = tmp_path / "texts"
        folder.mkdir()
        (folder / "chinese.txt").write_text(CHINESE)
        (folder / "uri.txt").write_text(picture)
        (folder / "fine.txt").write_text("green")
        indexed = CliRunner().invoke(cli, ["--url", str(client.base_url), "index", str(folder)])
        assert indexed.exit_code == 1, indexed.output
        assert NO_WORD in indexed.stderr and "data: URI" in indexed.stderr and "fine.txt" not in indexed.stderr
        assert json.loads(client.get("/items/fine.txt").content)["modality"] == "text"
