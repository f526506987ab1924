import asyncio
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from service.cache import Entry, MemoryCache, RedisCache, decode, encode, key_of
from service.contract.vectors import l2_normalise
from tests.conftest import redis_server

DIMENSIONS = 8


class Errors:
    def __init__(self) -> None:
        self.seen = 0

    def cache_error(self) -> None:
        self.seen += 1


def entry(seed: int = 0, **more: Any) -> Entry:
    return Entry(l2_normalise(np.random.default_rng(seed).standard_normal(DIMENSIONS)), **more)


def make(url: str, errors: Errors | None = None, **more: Any) -> RedisCache:
    options: dict[str, Any] = {"ttl_s": 60, "timeout_s": 5.0, "pause_s": 0.0} | more
    return RedisCache(url, dimensions=DIMENSIONS, observer=errors or Errors(), **options)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=DIMENSIONS, max_size=DIMENSIONS).filter(any),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_an_entry_is_read_as_it_was_written(numbers: list[float], truncated: bool, tokens: int) -> None:
    written = Entry(l2_normalise(np.array(numbers)), truncated, tokens)
    read = decode(encode(written), DIMENSIONS)
    assert read is not None
    assert np.array_equal(read.vector, written.vector)
    assert (read.truncated, read.tokens) == (truncated, tokens)
    assert not read.vector.flags.writeable


@given(st.binary(max_size=200))
def test_garbage_is_no_entry_or_a_unit_vector(value: bytes) -> None:
    read = decode(value, DIMENSIONS)
    assert read is None or abs(float(np.linalg.norm(read.vector)) - 1) < 1e-2


def test_keys_tell_spaces_kinds_and_contents_apart() -> None:
    keys = {key_of(space, kind, content) for space in "ab" for kind in ("text", "image") for content in (b"", b"x")}
    assert len(keys) == 8


def test_memory_keeps_the_most_recently_used_within_its_bytes() -> None:
    async def main() -> None:
        room_for_two = 2 * (entry().vector.nbytes + 256)
        cache = MemoryCache(room_for_two)
        await cache.put_many({"a": entry(0), "b": entry(1)})
        await cache.get_many(["a"])
        await cache.put_many({"c": entry(2)})
        a, b, c = await cache.get_many(["a", "b", "c"])
        assert a is not None
        assert b is None
        assert c is not None
        await cache.put_many({"a": entry(3)})  # replaced, not counted twice
        assert None not in await cache.get_many(["a", "c"])

    run(main())


def test_memory_of_no_bytes_keeps_nothing() -> None:
    async def main() -> None:
        cache = MemoryCache(0)
        await cache.put_many({"a": entry()})
        assert await cache.get_many(["a"]) == [None]

    run(main())


def test_redis_gives_back_what_was_put_and_forgets_in_time(redis_url: str) -> None:
    async def main() -> None:
        cache = make(redis_url)
        written = entry(truncated=True, tokens=7)
        await cache.put_many({"a": written})
        read, absent = await cache.get_many(["a", "b"])
        assert read is not None
        assert np.array_equal(read.vector, written.vector)
        assert (read.truncated, read.tokens, absent) == (True, 7, None)
        await cache.close()

    run(main())
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
def test_garbage_in_redis_is_a_miss_and_counted(redis_url: str, garbage: bytes) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        connection.set("a", garbage)
        connection.lpush("list", "of another type")

    async def main() -> None:
        errors = Errors()
        cache = make(redis_url, errors)
        assert await cache.get_many(["a", "list"]) == [None, None]
        assert errors.seen == 1
        await cache.close()

    run(main())


def test_a_redis_that_is_not_there_is_a_miss_and_is_left_alone_for_a_while(free_port: int) -> None:
    async def main() -> None:
        errors = Errors()
        cache = make(f"redis://127.0.0.1:{free_port}/0", errors, pause_s=60.0)
        await cache.put_many({"a": entry()})
        assert await cache.get_many(["a"]) == [None]
        assert errors.seen == 1
        await cache.close()

    run(main())


def test_a_redis_that_does_not_answer_is_a_miss() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and never says a word
            errors = Errors()
            cache = make(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", errors, timeout_s=0.05)
            assert await cache.get_many(["a"]) == [None]
            assert errors.seen == 1
            await cache.close()

    run(main())


def test_a_redis_that_comes_back_is_used_again(tmp_path: Path, free_port: int) -> None:
    async def main() -> None:
        cache = make(f"redis://127.0.0.1:{free_port}/0")
        with redis_server(tmp_path, free_port):
            await cache.put_many({"a": entry()})
            assert None not in await cache.get_many(["a"])
        assert await cache.get_many(["a"]) == [None]
        with redis_server(tmp_path, free_port):
            await cache.put_many({"a": entry()})
            assert None not in await cache.get_many(["a"])
        await cache.close()

    run(main())
