"""One caller's flood takes neither threads, decoding slots nor a queue from the others."""

import asyncio
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.contract.bundle import read_bundle
from service.engine.cache import MemoryCache
from service.engine.channel import _SHARES
from service.engine.embedder import Embedder
from service.engine.towers import open_towers
from service.errors import Overloaded
from service.runtime.fair import FairSemaphore
from service.runtime.logs import caller
from service.runtime.metrics import Metrics
from service.runtime.workers import Workers, abandoned
from service.settings import Settings
from tests.conftest import DEADLINE_S as WAIT_S
from tests.conftest import on_a_loop


def as_caller(name: str | None, coroutine):
    """A task of a request of this caller's."""
    caller.set(name)
    try:
        return asyncio.create_task(coroutine)
    finally:
        caller.set(None)


@on_a_loop
async def test_lines_are_served_in_turn():
    places, served = FairSemaphore(1), []

    async def take(name: str) -> None:
        async with places:
            served.append(name)
            await asyncio.sleep(0)

    await places.acquire()
    flood = [as_caller("a", take(f"a{number}")) for number in range(5)]
    await asyncio.sleep(0)
    others = [as_caller(name, take(name)) for name in "bc"]
    await asyncio.sleep(0)
    places.release(None)
    await asyncio.gather(*flood, *others)
    assert served == ["a0", "b", "c", "a1", "a2", "a3", "a4"]


@on_a_loop
async def test_who_leaves_the_line_takes_no_place_along():
    places = FairSemaphore(1)
    await places.acquire()
    waiting = [as_caller(name, places.acquire()) for name in "aab"]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    places.release(None)
    waiting[1].cancel()  # its turn has come, and it does not know yet
    await asyncio.wait(waiting)
    assert [each.cancelled() for each in waiting] == [True, True, False]
    places.release("b")
    assert not places._lines and not places._taken
    async with asyncio.timeout(WAIT_S), places:
        pass


@on_a_loop
async def test_a_line_has_an_end():
    places = FairSemaphore(1, most_waiting=2)
    await places.acquire()
    waiting = [as_caller("a", places.acquire()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await as_caller("a", places.acquire())
    other = as_caller("b", places.acquire())
    for name in (None, "a", "b", "a"):
        await asyncio.sleep(0)
        places.release(name)
    assert await asyncio.gather(*waiting, other) == ["a", "a", "b"]
    assert not places._taken


@pytest.mark.parametrize("flooding", ["a", None])
@on_a_loop
async def test_a_caller_that_has_as_many_places_as_it_may_leaves_the_others_free(flooding: str | None) -> None:
    places = FairSemaphore(3, per_caller=2)
    flood = [as_caller(flooding, places.acquire()) for _ in range(4)]
    await asyncio.sleep(0)
    assert [each.done() for each in flood] == [True, True, False, False]
    async with asyncio.timeout(WAIT_S):
        await as_caller("b", places.acquire())  # at once
        places.release("b")
        await asyncio.sleep(0)
        assert not flood[2].done(), "the place is not for the flood, whose line it is"
        places.release(flooding)
        await flood[2]
        await asyncio.sleep(0)
        assert not flood[3].done()
        places.release(flooding)
        await flood[3]


@on_a_loop
async def test_what_one_caller_keeps_all_its_threads_with_is_not_waited_for_by_another():
    workers, begun, goes = Workers("fair", 2, spare=1), threading.Semaphore(0), threading.Event()

    def long() -> None:
        begun.release()
        assert goes.wait(WAIT_S)

    flood = [as_caller("a", workers.run(long)) for _ in range(5)]
    for _ in range(2):
        await asyncio.to_thread(begun.acquire, timeout=WAIT_S)
    async with asyncio.timeout(WAIT_S):
        assert await as_caller("b", workers.run(lambda: "answered")) == "answered"
    assert not any(each.done() for each in flood) and not begun.acquire(blocking=False)
    goes.set()
    await asyncio.gather(*flood)
    workers.close()


def test_threads_are_had_in_turn_and_one_whose_client_left_says_when_it_is_free():
    async def scenario() -> None:
        workers, entered, goes, seen, done = Workers("fair"), threading.Event(), threading.Event(), [], []

        def held() -> None:
            entered.set()
            assert goes.wait(WAIT_S)
            seen.append(abandoned())

        first = as_caller("a", workers.run(held))
        await asyncio.to_thread(entered.wait, WAIT_S)
        first.cancel()  # its thread goes on
        flood = [as_caller("a", workers.run(lambda n=n: done.append(n))) for n in range(100)]
        await asyncio.sleep(0)
        other = as_caller("b", workers.run(lambda: done.append("b")))
        await asyncio.sleep(0)
        goes.set()
        await asyncio.gather(*flood, other)
        assert seen == [True]
        assert done.index("b") <= 3 and [each for each in done if each != "b"] == list(range(100))
        workers.close()

    asyncio.run(scenario())
    assert not abandoned(), "in a thread of no workers"


@pytest.mark.parametrize("slowly", ["model", "decode"])
@on_a_loop
async def test_a_queue_that_one_caller_fills_has_room_for_a_request_of_another(bundle_dir: Path, slowly: str) -> None:
    settings = Settings(queue_inputs=64, queue_s=1.0)
    bundle = read_bundle(bundle_dir)
    tower = open_towers(bundle, "cpu", 1, ["text"])["text"]
    embedder = Embedder(bundle, {"text": tower}, MemoryCache(0), settings, Metrics())
    channel = embedder.channels["text"]
    with ExitStack() as admitted:

        def admit(name: str, items: int) -> None:
            caller.set(name)
            admitted.enter_context(channel.admit(items))

        if slowly == "decode":  # a fifth of a second for each, with all threads at it
            for _ in range(50):
                channel.decoded(0.2 * settings.decode_workers, 1)
        admit("a", 8 if slowly == "decode" else 64)
        with pytest.raises(Overloaded) as refused:
            admit("a", 1)
        assert refused.value.retry_after_s == 1
        admit("b", 32)
        with pytest.raises(Overloaded):
            admit("b", 1)
        admit("c", 2 if slowly == "decode" else 64 // _SHARES - 1)
        with pytest.raises(Overloaded):
            admit("c", 2)
        assert channel.has_room(1) == (slowly == "model")
    caller.set("a")
    assert channel.has_room(1) and channel.depth() == 0
    await embedder.close()
