import asyncio
import ctypes
import threading
import time
from contextlib import suppress

import pytest

from service.errors import NotReady
from service.runtime.workers import WorkerDied, Workers
from tests.conftest import DEADLINE_S as WAIT_S
from tests.conftest import on_a_loop


def kill(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread, as soon as it runs Python code."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def end() -> None:
    raise SystemExit


@on_a_loop
async def test_results_and_failures_come_back() -> None:
    workers = Workers("w-plain", 2)
    assert await asyncio.gather(*(workers.run(lambda n=n: n * n) for n in range(20))) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        await workers.run(lambda: 1 // 0)
    assert workers.alive
    workers.close()
    assert not workers.alive
    assert threads("w-plain") == []
    with pytest.raises(NotReady):
        await workers.run(int)


@on_a_loop
async def test_a_call_that_ends_its_thread_is_answered_and_the_thread_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    deaths: list[int] = []
    workers = Workers("w-ended", 1, died=lambda: deaths.append(1))
    (first,) = threads("w-ended")
    with pytest.raises(WorkerDied):
        await workers.run(end)
    assert await workers.run(lambda: "on") == "on"
    first.join(WAIT_S)
    assert (len(deaths), workers.alive, len(threads("w-ended"))) == (1, True, 1)
    workers.close()

    assert "a thread of w-ended died" in caplog.text


@on_a_loop
async def test_a_thread_that_is_ended_again_while_it_is_replaced_loses_no_call() -> None:
    deaths: list[int] = []

    def died() -> None:
        deaths.append(1)
        if len(deaths) == 1:
            end()

    workers = Workers("w-again", 1, died=died)
    (first,) = threads("w-again")
    with pytest.raises(WorkerDied):
        await workers.run(end)
    assert await workers.run(lambda: "on") == "on"
    first.join(WAIT_S)
    assert (len(deaths), workers.alive, len(threads("w-again"))) == (2, True, 1)
    workers.close()


@on_a_loop
async def test_threads_that_are_killed_while_idle_lose_no_call() -> None:
    workers = Workers("w-killed", 3)
    killed = threads("w-killed")
    for thread in killed:
        kill(thread)
    # Each thread notices when it is woken. A call it may have taken by then is answered too.
    outcomes = await asyncio.gather(*(workers.run(lambda n=n: n) for n in range(30)), return_exceptions=True)
    assert all(outcome == n or isinstance(outcome, WorkerDied) for n, outcome in enumerate(outcomes))
    while any(thread.is_alive() for thread in killed):  # one that was not woken yet notices later
        with suppress(WorkerDied):
            await workers.run(lambda: None)
    assert await workers.run(lambda: "on") == "on"
    assert workers.alive
    workers.close()
    assert threads("w-killed") == []


@on_a_loop
async def test_a_thread_that_is_killed_in_a_call_answers_it() -> None:
    workers = Workers("w-busy")
    entered = threading.Event()

    def busy() -> None:
        entered.set()
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:  # runs Python code all the time, so that it can be killed
            pass

    call = asyncio.create_task(workers.run(busy))
    await asyncio.to_thread(entered.wait, WAIT_S)
    kill(threads("w-busy")[0])
    with pytest.raises(WorkerDied):
        await call
    assert await workers.run(lambda: "on") == "on"
    workers.close()


@on_a_loop
async def test_a_cancelled_call_is_not_begun() -> None:
    workers = Workers("w-cancelled")
    release, begun = threading.Event(), []
    first = asyncio.create_task(workers.run(lambda: release.wait(WAIT_S)))
    gone = asyncio.create_task(workers.run(lambda: begun.append(1)))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    release.set()
    assert await first
    assert begun == []
    workers.close()


@on_a_loop
async def test_a_call_that_raises_what_no_future_takes_is_answered() -> None:
    workers = Workers("w-stopped")
    with pytest.raises(RuntimeError, match="StopIteration"):
        await workers.run(lambda: next(iter(())))
    assert await workers.run(lambda: "on") == "on"
    workers.close()


def test_a_thread_outlives_the_event_loop_whose_call_it_has() -> None:
    workers, release, entered = Workers("w-loopless"), threading.Event(), threading.Event()

    def held() -> None:
        entered.set()
        release.wait(WAIT_S)

    async def left() -> None:
        call = asyncio.create_task(workers.run(held))
        await asyncio.to_thread(entered.wait, WAIT_S)
        call.cancel()

    asyncio.run(left())
    release.set()  # its loop is closed by now

    async def later() -> None:
        assert await workers.run(lambda: "on") == "on"
        assert workers.alive
        workers.close()

    asyncio.run(later())


@on_a_loop
async def test_close_runs_what_was_given() -> None:
    workers = Workers("w-closed")
    release = threading.Event()
    calls = [asyncio.create_task(workers.run(lambda: release.wait(WAIT_S))) for _ in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(workers.close))
    release.set()
    assert await asyncio.gather(*calls) == [True, True, True]
    await closing
