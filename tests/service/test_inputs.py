import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from service.api.reading import append_inputs, documented
from service.contract.errors import BadMedia, InputError, UnsupportedMedia
from service.engine.inputs import Media, Text, Unreadable, Url, Video, media_bytes, sniff
from service.errors import BodyTooLarge, FetchDisabled
from service.schemas.classify import ClassifyRequest
from service.schemas.embed import EmbedRequest
from service.schemas.inputs import AnyInput, File, parse_json
from service.schemas.items import ItemInput
from service.schemas.search import SearchRequest
from service.settings import Limits

ANY_INPUT: TypeAdapter[Any] = TypeAdapter(AnyInput)


@given(st.binary(min_size=1, max_size=300), st.booleans(), st.integers(1, 100), st.booleans())
def test_base64_is_read_however_it_is_written(data: bytes, url_safe: bool, width: int, as_uri: bool) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    wrapped = "\n".join(text[start : start + width] for start in range(0, len(text), width))
    assert media_bytes(f"data:image/png;base64,{wrapped}" if as_uri else f" {wrapped}\r\n") == data


def test_what_is_null_is_absent() -> None:
    text = ANY_INPUT.validate_python({"text": "a", "image": None, "audio": None})
    assert text == Text("a")
    request = EmbedRequest.model_validate({"inputs": [{"image": "YQ==", "text": None}], "role": None, "on_error": None})
    assert request == EmbedRequest.model_validate({"inputs": [{"image": "YQ=="}]})
    classify = {"inputs": ["a"], "labels": [{"name": "a", "prompts": None}], "top_k": None, "abstain": None}
    assert ClassifyRequest.model_validate(classify).top_k == 5
    item = {"id": "a", "text": "b", "collection": None, "metadata": {"kept": None}}
    read = ItemInput.model_validate(item)
    assert read.collection == "default" and read.metadata == {"kept": None}
    search = {"query": {"id": "a", "text": None}, "include": None, "effort": None, "filter": None}
    assert SearchRequest.model_validate(search) == SearchRequest.model_validate({"query": {"id": "a"}})
    for wrong in (
        {"inputs": None},
        {"inputs": [None]},
        {"inputs": ["a"], "colour": None},
        {"inputs": [{"text": None}]},
    ):
        with pytest.raises(ValidationError):
            EmbedRequest.model_validate(wrong)


def test_what_is_null_in_a_form_is_absent(shared_client: httpx.Client, png: Callable[..., bytes]) -> None:
    def sent(path: str, body: dict[str, Any]) -> httpx.Response:
        return shared_client.post(path, files={"file": ("a.png", png())}, data={"request": json.dumps(body)})

    assert sent("/embed", {"inputs": None, "role": None}).status_code == 200
    assert sent("/items", {"items": [{"id": "a", "text": None, "image": None}]}).json()["items"][0]["id"] == "a"
    assert sent("/search", {"query": None, "top_k": None}).status_code == 200
    assert sent("/score", {"pairs": [{"a": "red", "b": None}]}).status_code == 200


@given(st.text(max_size=200))
def test_any_other_text_is_an_input_error_or_bytes(text: str) -> None:
    try:
        data = media_bytes(text)
    except InputError:
        return
    assert data


@pytest.mark.parametrize("url", ["http://x", "https://x/y.png", "HTTPS://X", "http:x"])
def test_a_url_is_told_from_base64(url: str) -> None:
    assert ANY_INPUT.validate_python({"image": url}) == Url("image", url)
    video = ANY_INPUT.validate_python({"video": url})
    assert isinstance(video, Unreadable) and isinstance(video.error, FetchDisabled)


@pytest.mark.parametrize("text", ["", "  ", "data:,", "data:image/png;base64,", "abc", "=", "äöü=", "ab\0="])
def test_what_is_not_base64_is_bad_media(text: str) -> None:
    with pytest.raises(BadMedia):
        media_bytes(text)


def test_a_file_is_what_its_content_says(png: Callable[..., bytes], wav: Callable[..., bytes]) -> None:
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert sniff(png(format=image_format)) == "image", image_format
    for sound_format in ("WAV", "FLAC", "OGG", "MP3"):
        assert sniff(wav(format=sound_format)) == "audio", sound_format
    assert sniff(bytes(900) + wav(format="MP3")) == "audio"
    for neither in (b"RIFF", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0" * 4000):
        with pytest.raises(UnsupportedMedia):
            sniff(neither)
    with pytest.raises(BadMedia, match="the data is empty"):
        sniff(b"")
    assert ANY_INPUT.validate_python(File("a.wav", png())) == Media("image", png())


def test_json_cannot_make_a_file() -> None:
    for value in ({"name": "a", "data": "b"}, {"file": "b"}):
        with pytest.raises(ValidationError):
            ANY_INPUT.validate_python(value)
    assert "File" not in str(ANY_INPUT.json_schema())


def test_each_way_to_write_an_input() -> None:
    for written, read in (
        ("a", Text("a")),
        ({"text": "a"}, Text("a")),
        ({"image": "YQ=="}, Media("image", b"a")),
        ({"audio": "YQ=="}, Media("audio", b"a")),
        ({"video": "YQ=="}, Video(b"a")),
        ("data:image/png;base64,YQ==", Media("image", b"a")),
        ({"image": "https://x/y.png"}, Url("image", "https://x/y.png")),
        ("https://x/y.png", Text("https://x/y.png")),
    ):
        assert ANY_INPUT.validate_python(written) == read


def test_a_limit_is_the_settings_and_is_checked_before_the_members() -> None:
    assert len(EmbedRequest.model_validate({"inputs": ["a"] * 3}, context=Limits(inputs=3)).inputs) == 3
    with pytest.raises(ValidationError) as raised:
        EmbedRequest.model_validate({"inputs": [0] * 4}, context=Limits(inputs=3))
    (only,) = raised.value.errors()
    assert "at most 3 inputs" in only["msg"]


def test_files_do_not_hide_that_the_inputs_are_no_list() -> None:
    body: dict[str, Any] = {"inputs": "red"}
    append_inputs(body, [File("a", b"")])
    assert body == {"inputs": "red"}


def test_a_documented_body_brings_its_definitions() -> None:
    extra = documented(EmbedRequest, {"inputs": ["red"]}, files=True)
    assert {"EmbedRequest", "TextInput", "ImageInput", "AudioInput", "VideoInput"} <= set(extra["x-definitions"])
    assert set(extra["requestBody"]["content"]) == {"application/json", "multipart/form-data"}


def test_a_body_of_too_many_values_is_refused_before_it_is_read() -> None:
    for part in (b"{},", b"[],", b'"",', b'{"a":0},', b"0,"):
        with pytest.raises(BodyTooLarge):
            parse_json(b"[" + part * (19_000_000 // len(part)) + b"0]")


def test_what_is_inside_of_texts_is_not_counted() -> None:
    texts = [b"{[,:" * 1_000_000, b'\\"' * 2_000_000, b"\\\\" * 2_000_000, b'\\\\\\"{' * 1_000_000]
    for text in texts:
        assert parse_json(b'["' + text + b'",{}]')[1] == {}


def test_honest_bodies_of_every_kind_are_read() -> None:
    vectors = orjson.dumps([[0.123456] * 1_024] * 256)
    metadata = orjson.dumps([{"metadata": {f"key {n}": f"value {n}" for n in range(600)}}] * 256)
    assert len(parse_json(vectors)) == len(parse_json(metadata)) == 256
