"""Token buckets, in the process and in a real Redis: the same requests get the same answers from both."""

import asyncio
import time
from collections.abc import Iterator, Sequence

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import RateLimited
from service.runtime.quotas import Costs, Limit, Limiter, MemoryLimiter, Meter, RedisLimiter, Verdict
from tests.conftest import on_a_loop

ITEMS = Limit.parse("items=10/month")
PIXELS = Limit.parse("pixels=1000/month")


class Errors:
    def __init__(self) -> None:
        self.seen = 0

    def limiter_error(self) -> None:
        self.seen += 1


def take_all(limiter: Limiter, limits: Sequence[Limit], asked: Sequence[Costs], key: str = "k") -> list[Verdict]:
    async def run() -> list[Verdict]:
        try:
            return [await limiter.take(key, limits, each) for each in asked]
        finally:
            await limiter.close()

    return asyncio.run(run())


@pytest.fixture(params=["memory", "redis"])
def limiter(request: pytest.FixtureRequest) -> Iterator[Limiter]:
    if request.param == "memory":
        yield MemoryLimiter()
        return
    errors = Errors()
    yield RedisLimiter(request.getfixturevalue("redis_url"), timeout_s=5.0, failed=errors.limiter_error)
    assert errors.seen == 0


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("items=1000/minute", Limit("items", 1000, 60)),
        ("seconds=5/day", Limit("seconds", 5, 86_400)),
        ("requests=1/second", Limit("requests", 1, 1)),
    ],
)
def test_a_limit_is_read_and_written(text: str, limit: Limit) -> None:
    assert Limit.parse(text) == limit
    assert str(limit) == text


@pytest.mark.parametrize(
    "text", ["", "items", "items=0/minute", "items=-1/day", "cats=1/day", "items=1/year", "items=1e3/day"]
)
def test_what_is_no_limit_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no limit: write UNIT=AMOUNT/PERIOD"):
        Limit.parse(text)


def test_what_a_bucket_holds_is_taken_and_no_more(limiter: Limiter) -> None:
    verdicts = take_all(limiter, [ITEMS], [{"items": 6}, {"items": 5}, {"items": 4}, {"items": 1}])
    assert [each.wait_s == 0 for each in verdicts] == [True, False, True, False]
    month = 30 * 86_400
    assert verdicts[1].wait_s == pytest.approx(month / 10, rel=1e-3)
    assert [round(each.balances[0]) for each in verdicts] == [4, 4, 0, 0]


def test_all_limits_must_allow_it_or_nothing_is_taken(limiter: Limiter) -> None:
    verdicts = take_all(
        limiter, [ITEMS, PIXELS], [{"items": 1, "pixels": 900}, {"items": 1, "pixels": 200}, {"items": 9}]
    )
    assert [each.wait_s == 0 for each in verdicts] == [True, False, True]
    assert [tuple(map(round, each.balances)) for each in verdicts] == [(9, 100), (9, 100), (0, 100)]


def test_more_than_the_whole_amount_is_let_through_once_and_owed(limiter: Limiter) -> None:
    verdicts = take_all(limiter, [ITEMS], [{"items": 25}, {"items": 1}, {"requests": 1}])
    assert [each.wait_s == 0 for each in verdicts] == [True, False, True]
    assert round(verdicts[0].balances[0]) == -15
    assert verdicts[1].wait_s == pytest.approx(16 * 30 * 86_400 / 10, rel=1e-3)


@on_a_loop
async def test_a_bucket_fills_again(limiter: Limiter) -> None:
    limit = Limit("items", 1_000, 1)
    assert (await limiter.take("k", [limit], {"items": 1_000})).wait_s == 0
    deadline = time.monotonic() + 20
    while (verdict := await limiter.take("k", [limit], {"items": 200})).wait_s:
        assert verdict.wait_s <= 0.2
        assert time.monotonic() < deadline
    await limiter.close()


@on_a_loop
async def test_keys_do_not_share(limiter: Limiter) -> None:
    assert (await limiter.take("a", [ITEMS], {"items": 10})).wait_s == 0
    assert (await limiter.take("a", [ITEMS], {"items": 1})).wait_s > 0
    assert (await limiter.take("b", [ITEMS], {"items": 10})).wait_s == 0
    await limiter.close()


@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"items": st.integers(0, 30), "pixels": st.integers(0, 3_000)}), max_size=12
    )
)
@settings(deadline=None, max_examples=60)
def test_a_bucket_is_never_taken_from_beyond_its_amount_but_by_one(asked: list[Costs]) -> None:
    taken = {"items": 0.0, "pixels": 0.0}
    for costs, verdict in zip(asked, take_all(MemoryLimiter(), [ITEMS, PIXELS], asked), strict=True):
        if verdict.wait_s == 0:
            for unit, limit in (("items", ITEMS), ("pixels", PIXELS)):
                cost = costs.get(unit, 0)
                assert not cost or taken[unit] + min(cost, limit.amount) <= limit.amount * (1 + 1e-6)
                taken[unit] += cost
        else:
            assert any(taken[unit] + cost > 0 for unit, cost in costs.items())


def test_redis_answers_as_the_process_does(redis_url: str) -> None:
    asked: list[Costs] = [
        {"items": 3},
        {"items": 3, "pixels": 2_500},
        {"pixels": 1},
        {"items": 4},
        {"items": 1},
        {"items": 20},
    ]
    own = take_all(MemoryLimiter(), [ITEMS, PIXELS], asked)
    shared = take_all(RedisLimiter(redis_url, timeout_s=5.0, failed=Errors().limiter_error), [ITEMS, PIXELS], asked)
    for one, other in zip(own, shared, strict=True):
        assert one.balances == pytest.approx(other.balances, abs=0.01)
        assert one.wait_s == pytest.approx(other.wait_s, rel=1e-3)


def test_replicas_share_what_is_in_redis_to_the_last_item(redis_url: str) -> None:
    limit = Limit.parse("items=100/month")

    async def run() -> int:
        replicas = [RedisLimiter(redis_url, timeout_s=10.0, failed=Errors().limiter_error) for _ in range(4)]
        verdicts = await asyncio.gather(*(replicas[n % 4].take("k", [limit], {"items": 3}) for n in range(80)))
        for each in replicas:
            await each.close()
        return sum(each.wait_s == 0 for each in verdicts)

    assert asyncio.run(run()) == 33
    with redis.Redis.from_url(redis_url) as connection:
        kept = connection.pttl("isthmus:limits:k")
    assert 0.9 * 30 * 86_400_000 < kept < 1.1 * 30 * 86_400_000  # forgotten once the bucket is full again


def test_without_redis_each_replica_counts_for_itself(free_port: int) -> None:
    errors = Errors()
    limiter = RedisLimiter(f"redis://127.0.0.1:{free_port}/0", timeout_s=1.0, failed=errors.limiter_error, pause_s=60.0)
    verdicts = take_all(limiter, [ITEMS], [{"items": 8}, {"items": 8}, {"items": 2}])
    assert [each.wait_s == 0 for each in verdicts] == [True, False, True]
    assert errors.seen == 1  # and then it is left alone for a while


@on_a_loop
async def test_a_meter_says_what_is_left() -> None:
    meter = Meter(MemoryLimiter(), "k", [Limit.parse("requests=5/minute"), Limit.parse("items=10/minute")])
    assert meter.headers() == {}
    await meter.take({"characters": 10})
    assert meter.headers() == {}
    await meter.take({"requests": 1})
    await meter.take({"items": 9})
    headers = meter.headers()
    assert headers["RateLimit-Policy"] == '"requests/60";q=5;w=60, "items/60";q=10;w=60'
    assert headers["RateLimit"] == '"requests/60";r=4;t=12, "items/60";r=1;t=54'
    assert (headers["RateLimit-Limit"], headers["RateLimit-Remaining"], headers["RateLimit-Reset"]) == (
        "10",
        "1",
        "54",
    )
    with pytest.raises(RateLimited) as refused:
        await meter.take({"items": 2})
    assert refused.value.retry_after_s == 6
