"""The client asks again where that helps; its waiting is recorded, not done."""

import asyncio
import email.utils
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus_client import AsyncIsthmus, Isthmus, Overloaded, Retries, ServerFailed, Unreachable
from isthmus_client.retries import retry_after

PROBLEM = {"type": "about:blank", "title": "x", "status": 429, "code": "overloaded", "detail": "too much is waiting"}
FINE = {"models": []}
Answer = Callable[[], httpx2.Response]


def answering(*answers: Answer) -> httpx2.MockTransport:
    """One after the other; asked once more, it is an error of the test."""
    left: Iterator[Answer] = iter(answers)
    return httpx2.MockTransport(lambda request: next(left)())


def busy(**headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: httpx2.Response(429, json=PROBLEM, headers=named)


def fine() -> httpx2.Response:
    return httpx2.Response(200, json=FINE)


def broken() -> httpx2.Response:
    raise httpx2.RemoteProtocolError("the server went away")


def test_overload_and_restarts_are_waited_for() -> None:
    waited: list[float] = []
    restarting = lambda: httpx2.Response(503, json=PROBLEM | {"status": 503, "code": "not_ready"})  # noqa: E731
    transport = answering(busy(retry_after="7"), restarting, broken, fine)
    with Isthmus(transport=transport, sleep=waited.append) as space:
        assert space.models() == []
    assert 7 <= waited[0] <= 7.25
    assert waited[1] <= 0.5 and waited[2] <= 1.0


def test_the_asynchronous_client_waits_alike() -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def talk() -> None:
        async with AsyncIsthmus(transport=answering(busy(retry_after="3"), broken, fine), sleep=sleep) as space:
            assert await space.models() == []

    asyncio.run(talk())
    assert 3 <= waited[0] <= 3.25 and len(waited) == 2


def test_it_gives_up_after_so_many_tries_and_says_what_was_answered() -> None:
    waited: list[float] = []
    with (
        Isthmus(transport=answering(*[busy(retry_after="2")] * 3), retries=Retries(3), sleep=waited.append) as space,
        pytest.raises(Overloaded, match="too much is waiting") as raised,
    ):
        space.models()
    assert raised.value.retry_after_s == 2
    assert len(waited) == 2


def test_a_pause_beyond_all_patience_is_not_waited_for() -> None:
    with (
        Isthmus(transport=answering(busy(retry_after="3600")), sleep=lambda _: pytest.fail("it waited")) as space,
        pytest.raises(Overloaded),
    ):
        space.models()


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500, 504])
def test_other_errors_are_not_asked_again(status: int) -> None:
    transport = answering(lambda: httpx2.Response(status, text="<html>not a problem"))
    with (
        Isthmus(transport=transport, sleep=lambda _: pytest.fail("it waited")) as space,
        pytest.raises(Exception, match=f"{status} unknown") as raised,
    ):
        space.models()
    assert isinstance(raised.value, ServerFailed) == (status >= 500)


def test_a_timeout_is_not_asked_again() -> None:
    def slow() -> httpx2.Response:
        raise httpx2.ReadTimeout("no answer")

    with Isthmus(transport=answering(slow)) as space, pytest.raises(Unreachable, match="did not answer in time"):
        space.models()


def test_not_ready_is_an_answer_of_readyz() -> None:
    body = {"status": "not_ready", "checks": {"store": False}, "providers": {}}
    with Isthmus(transport=answering(lambda: httpx2.Response(503, json=body))) as space:
        assert space.ready().checks == {"store": False}


def test_retry_after_may_be_a_date_or_nonsense() -> None:
    def parsed(value: str) -> float | None:
        return retry_after(httpx2.Response(429, headers={"retry-after": value.encode("latin-1")}))

    soon = parsed(email.utils.formatdate(time.time() + 100, usegmt=True))
    assert soon is not None and 90 < soon <= 100
    assert parsed(email.utils.formatdate(time.time() - 100, usegmt=True)) == 0
    assert parsed("12") == 12
    assert parsed("soon") is None and parsed("²") is None
    assert retry_after(httpx2.Response(429)) is None


@given(
    failed=st.integers(1, 9),
    asked=st.none() | st.floats(0, 100),
    first=st.floats(0.01, 5),
    most=st.floats(0.01, 60),
)
def test_a_pause_is_between_what_was_asked_and_that_and_the_backoff(
    failed: int, asked: float | None, first: float, most: float
) -> None:
    pause = Retries(10, first, most).pause(failed, asked)
    assert pause is not None
    assert (asked or 0) <= pause <= (asked or 0) + min(most, first * 2 ** (failed - 1))


def test_clients_that_were_refused_together_do_not_come_back_together() -> None:
    pauses = {Retries().pause(3, 1.0) for _ in range(20)}
    assert len(pauses) > 10


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="attempts is 0"):
        Retries(attempts=0)
