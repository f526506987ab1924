import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from service.api.app import open_parts
from service.contract.tokens import TextPreprocessing
from service.settings import Settings, SettingsError
from tests import tiny_bundle
from tests.conftest import serving

pytestmark = pytest.mark.client("httpx")


@pytest.fixture
def official(shared_client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_client.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def native(client: httpx.Client, text: str, **more: Any) -> np.ndarray:
    body = client.post("/embed", json={"inputs": [text], **more}).json()
    return np.array(body["embeddings"][0]["embedding"], np.float32)


@pytest.mark.client("openai")
def test_the_official_client_gets_the_same_vector_by_default_and_as_floats(
    official: openai.OpenAI, shared_client: httpx.Client
) -> None:
    expected = native(shared_client, "a photo of the dog")
    default = official.embeddings.create(model="tiny", input="a photo of the dog")  # base64 behind the scenes
    floats = official.embeddings.create(model="tiny", input="a photo of the dog", encoding_format="float")
    for response in (default, floats):
        assert np.allclose(response.data[0].embedding, expected, atol=1e-7)
        assert response.model == "tiny"
        assert response.usage.prompt_tokens == response.usage.total_tokens == 5
    again = official.embeddings.create(model="tiny", input="a photo of the dog")
    assert again.usage.prompt_tokens == 5, "from the cache too"


@pytest.mark.client("openai")
def test_lists_and_dimensions(official: openai.OpenAI, shared_client: httpx.Client) -> None:
    many = official.embeddings.create(model="tiny", input=["red", "blue"], dimensions=8)
    assert [each.index for each in many.data] == [0, 1]
    assert np.allclose(many.data[0].embedding, native(shared_client, "red", dimensions=8), atol=1e-6)


def test_images_and_sounds_are_inputs_too(
    shared_client: httpx.Client, png: Callable[..., bytes], wav: Callable[..., bytes]
) -> None:
    image = {"image": base64.b64encode(png("red")).decode()}
    inputs = ["red", image, {"audio": base64.b64encode(wav()).decode()}, {"text": "tone"}]
    body = shared_client.post("/v1/embeddings", json={"model": "tiny", "input": inputs, "user": "me", "extra": 1})
    assert body.status_code == 200, body.text
    red, image_vector, audio, tone = (np.array(each["embedding"]) for each in body.json()["data"])
    assert red @ image_vector > 0.99
    assert audio @ tone > 0.99
    alone = shared_client.post("/v1/embeddings", json={"model": "tiny", "input": image}).json()
    assert np.allclose(alone["data"][0]["embedding"], image_vector)


@pytest.mark.client("openai")
def test_models_are_listed(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").owned_by == "isthmus"
    with pytest.raises(openai.NotFoundError) as raised:
        official.models.retrieve("other")
    assert raised.value.code == "model_not_found"


@pytest.mark.client("openai")
def test_an_unknown_model_is_the_error_that_the_client_knows(official: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        official.embeddings.create(model="text-embedding-3-small", input="red")
    assert raised.value.code == "model_not_found"
    assert raised.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "tiny", "input": []}, 422, "invalid_request"),
        ({"model": "tiny", "input": [[]]}, 422, "invalid_request"),
        ({"model": "tiny", "input": [1, "red"]}, 422, "invalid_request"),
        ({"model": "tiny", "input": {"vector": [1]}}, 422, "invalid_request"),
        ({"model": "tiny"}, 422, "invalid_request"),
        ({"input": "red"}, 422, "invalid_request"),
        ({"model": "tiny", "input": "red", "encoding_format": "int8"}, 422, "invalid_request"),
        ({"model": "tiny", "input": "red", "dimensions": 99}, 422, "invalid_request"),
        ({"model": "tiny", "input": [True]}, 422, "invalid_request"),
        ({"model": "tiny", "input": ""}, 422, "invalid_input"),
        ({"model": "tiny", "input": [2]}, 422, "invalid_request"),
        ({"model": "tiny", "input": ["red", [2]]}, 422, "invalid_request"),
        ({"model": "tiny", "input": "日本語"}, 422, "invalid_input"),
        ({"model": "tiny", "input": "data:image/png;base64,!"}, 422, "undecodable_media"),
        ({"model": "tiny", "input": {"text": "data:image/png;base64,AAAA"}}, 422, "invalid_input"),
        ({"model": "tiny", "input": ["red"], "modality": "colour"}, 422, "invalid_request"),
        ({"model": "tiny", "input": [{"text": "red"}], "modality": "image"}, 422, "invalid_request"),
        ({"model": "tiny", "input": ["red"], "messages": [{"role": "user", "content": "red"}]}, 422, "invalid_request"),
        ({"model": "tiny", "input": [{"type": "image_url"}]}, 422, "invalid_request"),
        ({"model": "tiny", "input": [{"type": "image_pil", "image_pil": "x"}]}, 422, "invalid_request"),
        ({"model": "tiny", "input": [{"content": []}]}, 422, "invalid_request"),
        ({"model": "tiny", "messages": []}, 422, "invalid_request"),
        ({"model": "tiny", "input": [["red"]]}, 422, "invalid_request"),
        ({"model": "tiny", "input": ["red", ""]}, 422, "invalid_input"),
    ],
)
def test_bad_requests_get_openais_error_object(
    shared_client: httpx.Client, body: dict[str, Any], status: int, code: str
) -> None:
    response = shared_client.post("/v1/embeddings", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def test_routes_that_are_not_there_say_so_in_openais_way(shared_client: httpx.Client) -> None:
    assert shared_client.get("/v1/nothing").json()["error"]["code"] == "route_not_found"
    assert shared_client.get("/v1/embeddings").json()["error"]["code"] == "method_not_allowed"


def test_a_request_larger_than_the_queue_is_fed_through_in_pieces(settings: Settings) -> None:
    settings = settings.model_copy(update={"max_inputs": 500, "queue_inputs": 16, "batch_tokens": 8})
    words = tiny_bundle.WORDS[2:]
    inputs = [f"{words[index % len(words)]} {words[index // len(words) % len(words)]}" for index in range(450)]
    with serving(settings) as client:
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as official:
            answered = official.embeddings.create(model="tiny", input=inputs)
        assert [each.index for each in answered.data] == list(range(450))
        for index in (0, 7, 8, 449):
            assert np.allclose(answered.data[index].embedding, native(client, inputs[index]), atol=1e-6)
        assert answered.usage.prompt_tokens == 900


def test_jinas_objects_and_data_uris(shared_client: httpx.Client, png: Callable[..., bytes]) -> None:
    image = base64.b64encode(png("red")).decode()
    body = {
        "model": "tiny",
        "task": "retrieval.query",
        "normalized": True,
        "input": [{"text": "red"}, {"image": image}, {"image": f"data:image/png;base64,{image}"}],
    }
    data = shared_client.post("/v1/embeddings", json=body).json()["data"]
    text, plain, uri = (np.array(each["embedding"]) for each in data)
    assert text @ plain > 0.99
    assert np.array_equal(plain, uri)
    body["input"] = [{"text": "red"}, {"image": "https://example.com/red.png"}]
    refused = shared_client.post("/v1/embeddings", json=body)
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "url_fetch_disabled"
    assert "input[1]" in refused.json()["error"]["message"]


def test_as_many_inputs_as_openai_takes(shared_client: httpx.Client) -> None:
    words = tiny_bundle.WORDS[2:]
    inputs = [f"{words[at % len(words)]} {words[at // len(words) % len(words)]}" for at in range(2_049)]
    answered = shared_client.post("/v1/embeddings", json={"model": "tiny", "input": inputs[:-1]})
    assert [each["index"] for each in answered.json()["data"]] == list(range(2_048))
    assert shared_client.post("/v1/embeddings", json={"model": "tiny", "input": inputs}).status_code == 422


def test_null_means_absent(shared_client: httpx.Client) -> None:
    bare = {"model": "tiny", "input": "red"}
    nulls = dict.fromkeys(("encoding_format", "role", "dimensions", "user", "modality"))
    asked = [shared_client.post("/v1/embeddings", json=body) for body in (bare, bare | nulls)]
    assert [each.status_code for each in asked] == [200, 200] and asked[0].json() == asked[1].json()
    assert shared_client.post("/v1/embeddings", json={"model": None, "input": "red"}).status_code == 422


def test_a_model_may_have_other_names(settings: Settings) -> None:
    aliases = ("text-embedding-3-small=tiny", "clip=tiny")
    with serving(settings.model_copy(update={"model_aliases": aliases})) as client:
        named = ["tiny", "text-embedding-3-small", "clip"]
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == named
        assert client.get("/v1/models/clip").json()["id"] == "clip"
        answers = [client.post("/v1/embeddings", json={"model": name, "input": "red"}).json() for name in named]
        assert [each["model"] for each in answers] == named and answers[0]["data"] == answers[1]["data"]
        assert client.post("/embed", json={"model": "clip", "inputs": ["red"]}).status_code == 200
        assert client.post("/v1/embeddings", json={"model": "clap", "input": "red"}).status_code == 404
    for alias, said in (("a=b", "'b' is none of tiny"), ("tiny=tiny", "'tiny' is a model")):
        with pytest.raises(SettingsError, match=said):
            open_parts(settings.model_copy(update={"model_aliases": (alias,)}))


def ask(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "tiny"} | body)


def message(client: httpx.Client, body: dict[str, Any]) -> str:
    answer = ask(client, body)
    assert answer.status_code == 422, answer.text
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("embedding_type", "binary", "POST /embed has int8 and binary"),
        ("embedding_types", ["int8"], "POST /embed has int8 and binary"),
        ("output_dtype", "ubinary", "POST /embed has int8 and binary"),
        ("output_dimension", 8, "say dimensions"),
        ("normalized", False, "unit length"),
        ("late_chunking", True, "by itself"),
        ("truncate_prompt_tokens", 4, "cut"),
        ("instruction", "Represent the colour", "say role"),
        ("add_special_tokens", False, "special tokens"),
        ("images", ["iVBORw0KGgo="], "inputs are in input"),
        ("input_type", "colour", "say role"),
        ("task", 7, "say role"),
        ("truncate", "START", "truncate"),
    ],
)
def test_a_field_that_would_change_the_answer_and_is_not_read_is_refused(
    shared_client: httpx.Client, field: str, value: Any, advice: str
) -> None:
    said = message(shared_client, {"input": "red", field: value})
    assert field in said and advice in said


def test_fields_that_ask_for_what_is_answered_anyhow_are_no_error(shared_client: httpx.Client) -> None:
    neutral = {"embedding_type": "float", "normalized": True, "late_chunking": False, "truncate": "END", "images": []}
    absent = {"task": None, "embedding_types": None, "input_type": None, "modality": None, "output_dimension": None}
    answer = ask(shared_client, {"input": "red", **neutral, **absent, "priority": 3})
    assert answer.status_code == 200, answer.text


def test_a_text_that_is_not_to_be_cut(shared_client: httpx.Client) -> None:
    for kept in (False, "NONE"):
        assert ask(shared_client, {"input": "dog " * 31, "truncate": kept}).status_code == 200
        assert "input[1]: the text is longer" in message(
            shared_client, {"input": ["red", "dog " * 33], "truncate": kept}
        )
    [row] = ask(shared_client, {"input": "dog " * 33}).json()["data"]
    assert row["truncated"] is True


def test_a_part_holds_one_thing(shared_client: httpx.Client) -> None:
    text = {"type": "text", "text": "red"}
    others: list[dict[str, Any]] = [{"image_url": "x"}, {"image_url": ""}, {"input_audio": {"data": "x"}}]
    for more in (*others, {"image": "x"}, {"weight": 0}):
        bodies: list[dict[str, Any]] = [
            {"input": {**text, **more}},
            {"input": ["blue", {**text, **more}]},
            {"input": [{"content": [{**text, **more}]}]},
            {"input": [{"content": [text], **more}]},
            {"messages": [{"role": "user", "content": [{**text, **more}]}]},
            {"messages": [{"role": "user", "content": [text], **more}]},
        ]
        for body in bodies:
            assert next(iter(more)) in message(shared_client, body), body
    unread = {"detail": "low", "uuid": "a", "cache_control": {"type": "ephemeral"}, "image_url": None, "refusal": None}
    assert ask(shared_client, {"input": [{**text, **unread}]}).status_code == 200
    assert ask(shared_client, {"messages": [{"role": "user", "name": "a", "content": [text]}]}).status_code == 200


def test_a_part_by_itself_is_a_vector_and_several_are_refused(shared_client: httpx.Client) -> None:
    text = {"type": "text", "text": "a photo of the dog"}
    empty = {"type": "text", "text": ""}
    expected = native(shared_client, "a photo of the dog")
    for body in (
        {"input": text},
        {"input": [text]},
        {"input": {"content": [text, empty]}},
        {"input": [{"content": "a photo of the dog"}]},
        {"messages": [{"role": "user", "content": "a photo of the dog"}]},
        {"messages": [{"role": "user", "content": [empty, text]}, {"role": "assistant", "content": ""}]},
    ):
        [row] = ask(shared_client, body).json()["data"]
        assert np.allclose(row["embedding"], expected, atol=1e-6)
        assert set(row) == {"object", "index", "embedding"}
    several = [{"role": "user", "content": [text, text]}]
    assert "POST /search, compose" in message(shared_client, {"messages": several})
    assert "input[1]" in message(shared_client, {"input": ["red", {"content": [text, text]}]})
    told = [{"role": "system", "content": "Represent the colour."}, {"role": "user", "content": "red"}]
    assert "instruction" in message(shared_client, {"messages": told})


def test_an_unknown_part_of_a_text_is_told(shared_client: httpx.Client) -> None:
    known, half = ask(shared_client, {"input": ["red dog", "red 日本語"]}).json()["data"]
    assert "unknown" not in known and half["unknown"] == 0.5
    assert "input[1]: the model's tokenizer knows no word" in message(shared_client, {"input": ["red", "🎉🎉"]})


def test_the_role_is_read_by_other_servers_names_of_it(settings: Settings, tmp_path: Path) -> None:
    bundle = tiny_bundle.build(tmp_path / "instructed", text=TextPreprocessing(max_length=32, passage_prefix="blue "))
    with serving(settings.model_copy(update={"bundle": bundle.path})) as client:
        query, passage = (native(client, "red", role=role) for role in ("query", "passage"))
        assert not np.allclose(query, passage, atol=0.1)
        for field, asked, stored in (
            ("input_type", "query", "passage"),
            ("input_type", "search_query", "search_document"),
            ("task", "retrieval.query", "retrieval.passage"),
            ("task_type", "RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"),
            ("prompt_name", "query", "document"),
        ):
            for value, expected in ((asked, query), (stored, passage)):
                [row] = ask(client, {"input": "red", field: value}).json()["data"]
                assert np.allclose(row["embedding"], expected, atol=1e-6), (field, value)
        assert "different things" in message(client, {"input": "red", "role": "query", "task": "retrieval.passage"})
        # What an instruction holds is known, and the text is not.
        assert "no word" in message(client, {"input": "日本語", "role": "passage"})


def test_token_ids_of_the_bundles_own_tokenizer_where_the_operator_admits_them(settings: Settings) -> None:
    red, unknown = tiny_bundle.WORDS.index("red"), tiny_bundle.WORDS.index("[UNK]")
    with serving(settings.model_copy(update={"token_ids": True})) as client:
        for given in ([red], [[red]], [[red, red]]):
            [row] = ask(client, {"input": given}).json()["data"]
            assert np.allclose(row["embedding"], native(client, "red"), atol=1e-6)
        assert "no word" in message(client, {"input": [unknown, unknown]})
        assert "vocabulary" in message(client, {"input": [10**12]})
        assert "vocabulary" in message(client, {"input": [-1]})
        assert "another kind" in message(client, {"input": [red], "modality": "image"})
