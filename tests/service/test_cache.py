import asyncio
import io
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.api.app import open_parts
from service.contract.bundle import MODALITIES, Modality
from service.contract.vectors import l2_normalise
from service.engine.cache import MemoryCache, RedisCache, check_redis, decode, encode, keys_of
from service.engine.inputs import Embedded, Input, Media, Text, TokenIds
from service.settings import Settings, SettingsError
from tests.conftest import on_a_loop, redis_server

DIMENSIONS = 8


class Errors:
    def __init__(self) -> None:
        self.seen = 0

    def count(self) -> None:
        self.seen += 1


def entry(seed: int = 0, truncated: bool = False, tokens: int = 0) -> Embedded:
    vector = l2_normalise(np.random.default_rng(seed).standard_normal(DIMENSIONS))
    return Embedded(vector, "text", truncated, cached=False, tokens=tokens)


def asked(keys: str) -> dict[str, Modality]:
    return dict.fromkeys(keys, "text")


def make(url: str, errors: Errors | None = None, **more: Any) -> RedisCache:
    options: dict[str, Any] = {"ttl_s": 60, "timeout_s": 5.0, "pause_s": 0.0} | more
    return RedisCache(url, dimensions=DIMENSIONS, failed=(errors or Errors()).count, **options)


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=DIMENSIONS, max_size=DIMENSIONS).filter(any),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_an_entry_is_read_as_it_was_written(numbers: list[float], truncated: bool, tokens: int) -> None:
    written = Embedded(l2_normalise(np.array(numbers)), "image", truncated, cached=False, tokens=tokens)
    read = decode(encode(written), DIMENSIONS, "image")
    assert read is not None
    assert np.array_equal(read.vector, written.vector)
    assert (read.modality, read.truncated, read.tokens, read.cached) == ("image", truncated, tokens, True)
    assert not read.vector.flags.writeable


@given(st.binary(max_size=200))
def test_garbage_is_no_entry_or_a_unit_vector(value: bytes) -> None:
    read = decode(value, DIMENSIONS, "text")
    assert read is None or abs(float(np.linalg.norm(read.vector)) - 1) < 1e-2


IMAGES = st.builds(
    lambda size, colour: Media("image", a_png(size, colour)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(*[st.integers(0, 255)] * 3),
)
INPUTS = st.one_of(
    st.builds(Text, st.text(max_size=8)),
    st.builds(lambda ids: TokenIds(tuple(ids)), st.lists(st.integers(0, 99), max_size=4)),
    st.builds(Media, st.sampled_from(["image", "audio"]), st.binary(max_size=8)),
    IMAGES,
)


def a_png(size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@given(IMAGES, IMAGES)
def test_two_images_share_a_key_only_if_they_are_one(one: Media, other: Media) -> None:
    keys = keys_of("a" * 16, {"image": "fp32"}, [one, other])
    assert (keys[0] == keys[1]) == (one.data == other.data)


SPACES, PRECISIONS = st.sampled_from(["0" * 16, "1" * 16]), st.sampled_from(["fp32", "int8"])


@given(st.lists(st.tuples(SPACES, PRECISIONS, INPUTS), min_size=2, max_size=12))
def test_no_two_inputs_of_any_kind_precision_or_space_share_a_key(placed: list[tuple[str, str, Input]]) -> None:
    keys = {keys_of(space, dict.fromkeys(MODALITIES, precision), [given])[0] for space, precision, given in placed}
    assert len(keys) == len(set(placed))


@on_a_loop
async def test_memory_keeps_the_most_recently_used_within_its_bytes() -> None:
    room_for_two = 2 * (entry().vector.nbytes + 256)
    cache = MemoryCache(room_for_two)
    await cache.put_many({"a": entry(0), "b": entry(1)})
    await cache.get_many(asked("a"))
    await cache.put_many({"c": entry(2)})
    assert [*await cache.get_many(asked("abc"))] == ["a", "c"]
    await cache.put_many({"a": entry(3)})  # replaced, not counted twice
    assert [*await cache.get_many(asked("ac"))] == ["a", "c"]


@on_a_loop
async def test_memory_of_no_bytes_keeps_nothing() -> None:
    cache = MemoryCache(0)
    await cache.put_many({"a": entry()})
    assert await cache.get_many(asked("a")) == {}


@on_a_loop
async def test_redis_gives_back_what_was_put_and_forgets_in_time(redis_url: str) -> None:
    cache = make(redis_url)
    written = entry(truncated=True, tokens=7)
    await cache.put_many({"a": written})
    [read] = (await cache.get_many(asked("ab"))).values()
    assert np.array_equal(read.vector, written.vector)
    assert (read.truncated, read.tokens, read.cached) == (True, 7, True)
    await cache.close()

    with redis.Redis.from_url(redis_url) as connection:
        assert 0 < connection.ttl("a") <= 60


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"short",
        encode(entry())[:-1],
        encode(entry()) + b"\0",
        np.full(DIMENSIONS, np.nan, "<f4").tobytes() + bytes(4),
        np.full(DIMENSIONS, 3, "<f4").tobytes() + bytes(4),
        np.zeros(DIMENSIONS, "<f4").tobytes() + bytes(4),
    ],
    ids=["empty", "short", "cut", "long", "nan", "not unit", "zero"],
)
@on_a_loop
async def test_garbage_in_redis_is_a_miss_and_counted(redis_url: str, garbage: bytes) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        connection.set("a", garbage)
        connection.lpush("list", "of another type")

    errors = Errors()
    cache = make(redis_url, errors)
    assert await cache.get_many({"a": "text", "list": "text"}) == {}
    assert errors.seen == 1
    await cache.close()


@on_a_loop
async def test_a_redis_that_is_not_there_is_a_miss_and_is_left_alone_for_a_while(free_port: int) -> None:
    errors = Errors()
    cache = make(f"redis://127.0.0.1:{free_port}/0", errors, pause_s=60.0)
    await cache.put_many({"a": entry()})
    assert await cache.get_many(asked("a")) == {}
    assert errors.seen == 1
    await cache.close()


@on_a_loop
async def test_a_redis_that_does_not_answer_is_a_miss() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and never says a word
        errors = Errors()
        cache = make(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", errors, timeout_s=0.05)
        assert await cache.get_many(asked("a")) == {}
        assert errors.seen == 1
        await cache.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"*what\r\n",
        b":7\r\n",
        b"*1\r\n$-1\r\n",
        b"*3\r\n$-1\r\n$-1\r\n$-1\r\n",
        b"*2\r\n$40\r\nhalf of it, and then nothing",
        b"*2\r\n$-9\r\n$1000000000000\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        bytes(range(256)),
        b"",
    ],
)
@on_a_loop
async def test_what_is_no_redis_is_a_miss_whatever_it_answers(answer: bytes) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.read(65_536):
                writer.write(answer)
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        errors = Errors()
        port = server.sockets[0].getsockname()[1]
        cache = make(f"redis://127.0.0.1:{port}/0", errors, timeout_s=0.2)
        assert await cache.get_many(asked("ab")) == {}
        await cache.put_many({"a": entry()})
        assert errors.seen >= 1
        await cache.close()


@on_a_loop
async def test_a_redis_that_was_slow_once_does_not_answer_the_next_question_with_the_last_answer(
    redis_url: str,
) -> None:
    address = urlsplit(redis_url)
    held, passing = asyncio.Event(), asyncio.Event()
    passing.set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, held_back: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                if held_back and not passing.is_set():
                    held.set()
                    await passing.wait()
                writer.write(data)
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(address.hostname, address.port)
        await asyncio.gather(relay(reader, ours, held_back=False), relay(theirs, writer, held_back=True))

    async with await asyncio.start_server(between, "127.0.0.1", 0) as server:
        errors = Errors()
        cache = make(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", errors, timeout_s=2.0)
        await cache.put_many({"a": entry(1), "b": entry(2)})
        assert errors.seen == 0
        passing.clear()
        assert await cache.get_many(asked("a")) == {}, "too slow"
        assert held.is_set()
        assert errors.seen == 1
        passing.set()
        [b] = (await cache.get_many(asked("b"))).values()
        assert np.array_equal(b.vector, entry(2).vector)
        await cache.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda url: url.replace("redis://", "redis://nobody:wrong@"), "refused by Redis"),
        (lambda url: url.replace("/0", "/99"), "refused by Redis"),
        (lambda url: url.replace("/0", "/first"), "no URL"),
        (lambda url: url.replace("/0", "/0?patience=7"), "no URL"),
        (lambda url: "redis://127.0.0.1:port/0", "no URL"),
        (lambda url: "redis://127.0.0.1:99999/0", "no URL"),
        (lambda url: "redis://:6379/0", "no URL"),
    ],
)
def test_a_redis_url_that_is_wrong_stops_the_start(
    redis_url: str, change: Callable[[str], str], said: str, settings: Settings
) -> None:
    check_redis(redis_url)
    with pytest.raises(SettingsError, match=f"ISTHMUS_REDIS_URL.*{said}"):
        open_parts(settings.model_copy(update={"redis_url": change(redis_url)}))


def test_what_is_no_redis_stops_the_start_and_one_that_is_away_does_not(
    shared_client: httpx.Client, free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SettingsError, match="no Redis"):
        check_redis(f"redis://127.0.0.1:{shared_client.base_url.port}/0")
    check_redis(f"redis://127.0.0.1:{free_port}/0")
    assert "Redis does not answer" in caplog.text


@on_a_loop
async def test_a_redis_that_comes_back_is_used_again(tmp_path: Path, free_port: int) -> None:
    cache = make(f"redis://127.0.0.1:{free_port}/0")
    with redis_server(tmp_path, free_port):
        await cache.put_many({"a": entry()})
        assert await cache.get_many(asked("a"))
    assert await cache.get_many(asked("a")) == {}
    with redis_server(tmp_path, free_port):
        await cache.put_many({"a": entry()})
        assert await cache.get_many(asked("a"))
    await cache.close()
