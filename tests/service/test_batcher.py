import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.batcher import Batcher, Budget, Prepared
from service.errors import InferenceFailed, NotReady
from tests.conftest import DEADLINE_S as WAIT_S
from tests.conftest import on_a_loop

DIMENSIONS = 2


class Model:
    """Doubles its items; fails on those it is told to; can be held until released."""

    def __init__(self, bad: Sequence[float] = (), *, held: bool = False) -> None:
        self.bad = bad
        self.calls: list[list[float]] = []
        self.entered, self.released = threading.Event(), threading.Event()
        if not held:
            self.released.set()

    def run(self, items: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.released.wait(WAIT_S)
        self.calls.append([float(item) for item in items])
        if any(item in self.bad for item in items):
            raise RuntimeError("cannot embed that")
        return np.stack([2 * items, -items], axis=1).astype(np.float32)


class Seen:
    def __init__(self) -> None:
        self.batches: list[int] = []
        self.failures = self.restarts = 0

    def batch(self, waits: Sequence[float], seconds: float) -> None:
        assert seconds >= 0 and all(wait >= 0 for wait in waits)
        self.batches.append(len(waits))

    def failed(self, items: int) -> None:
        self.failures += items

    def restarted(self) -> None:
        self.restarts += 1


@asynccontextmanager
async def opened(
    run: Callable[[Any], Any],
    collate: Callable[[Any], Any] = np.array,
    *,
    limit: int = 4,
    padded: bool = False,
    near: int | None = None,
    budget: Budget | None = None,
    **more: Any,
) -> AsyncIterator[Batcher]:
    """A batcher, which is closed in the end."""
    options = {"observer": Seen()} | more
    budget = budget or Budget(limit, padded, near)
    batcher = Batcher("test", collate, run, dimensions=DIMENSIONS, budget=budget, **options)
    try:
        yield batcher
    finally:
        await batcher.close()


@asynccontextmanager
async def occupied(model: Model, *more: Any, **options: Any) -> AsyncIterator[tuple[Batcher, "asyncio.Task[Any]"]]:
    """A batcher whose model is held with the item 0, and the task of that item."""
    async with opened(model.run, *more, **options) as batcher:
        first = submit(batcher, 0)
        await entered(model)
        try:
            yield batcher, first
        finally:
            model.released.set()


async def entered(model: Model) -> None:
    assert await asyncio.to_thread(model.entered.wait, WAIT_S)


async def enqueue(batcher: Batcher, item: float, size: int = 1, **how: bool) -> "asyncio.Future[Any]":
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    await batcher.enqueue(Prepared(item, size), answer, **how)
    return answer


def submit(batcher: Batcher, item: float, size: int = 1, **how: bool) -> "asyncio.Task[Any]":
    async def answered() -> Any:
        return await (await enqueue(batcher, item, size, **how))

    return asyncio.create_task(answered())


@on_a_loop
async def test_a_lone_item_is_answered_and_timed() -> None:
    async with opened(Model().run) as batcher:
        answer = await submit(batcher, 3.0, 1)
        assert answer.vector.tolist() == [6.0, -3.0]
        assert answer.queue_s >= 0
        assert answer.model_s >= 0


@on_a_loop
async def test_what_waits_while_the_model_runs_shares_the_next_call() -> None:
    model, seen = Model(held=True), Seen()
    async with occupied(model, limit=4, observer=seen) as (batcher, first):
        tasks = [first, *[submit(batcher, item) for item in range(1, 7)]]
        model.released.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.vector[0] for answer in answers] == [2 * item for item in range(7)]
        assert seen.batches == [1, 4, 2]


@on_a_loop
async def test_a_full_batch_is_collated_while_the_model_runs() -> None:
    model = Model(held=True)
    collated: list[int] = []
    twice = asyncio.Event()
    loop = asyncio.get_running_loop()

    def collate(items: Sequence[float]) -> np.ndarray:
        collated.append(len(items))
        if len(collated) == 2:
            loop.call_soon_threadsafe(twice.set)
        return np.array(items)

    async with occupied(model, collate, limit=2) as (batcher, first):
        tasks = [first, submit(batcher, 1), submit(batcher, 2)]
        await twice.wait()  # only the first call has begun, and it is held
        assert collated == [1, 2]
        model.released.set()
        await asyncio.gather(*tasks)


@on_a_loop
async def test_only_the_culprit_of_a_failed_batch_fails() -> None:
    model, seen = Model(bad=[2.0], held=True), Seen()
    async with occupied(model, observer=seen) as (batcher, first):
        tasks = [submit(batcher, item) for item in (1, 2, 3)]
        model.released.set()
        await first
        one, two, three = await asyncio.gather(*tasks, return_exceptions=True)
        assert one.vector[0] == 2
        assert isinstance(two, InferenceFailed)
        assert three.vector[0] == 6
        assert "cannot embed that" not in str(two)
        assert seen.failures == 1
        assert (await submit(batcher, 5, 1)).vector[0] == 10, "the worker lives on"


@on_a_loop
async def test_a_culprit_that_goes_away_during_the_call_takes_nobody_along() -> None:
    model = Model(bad=[2.0], held=True)
    async with opened(model.run) as batcher:
        good, bad = await enqueue(batcher, 1), await enqueue(batcher, 2)
        await entered(model)
        bad.cancel()
        model.released.set()
        assert (await good).vector[0] == 2
        assert model.calls == [[1, 2], [1]]


@on_a_loop
async def test_an_item_that_cannot_be_collated_fails_alone() -> None:
    model = Model(held=True)

    def collate(items: Sequence[float]) -> np.ndarray:
        if -1.0 in items:
            raise ValueError("no")
        return np.array(items)

    async with occupied(model, collate, limit=4) as (batcher, first):
        tasks = [submit(batcher, item) for item in (1.0, -1.0)]
        model.released.set()
        await first
        good, bad = await asyncio.gather(*tasks, return_exceptions=True)
        assert good.vector[0] == 2
        assert isinstance(bad, InferenceFailed)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda items: np.zeros((len(items) + 1, DIMENSIONS), np.float32),
        lambda items: np.zeros((len(items), DIMENSIONS + 1), np.float32),
        lambda items: np.full((len(items), DIMENSIONS), np.nan, np.float32),
        lambda items: np.full((len(items), DIMENSIONS), np.inf, np.float32),
    ],
    ids=["too many rows", "too many dimensions", "nan", "infinite"],
)
@on_a_loop
async def test_a_wrong_output_is_a_failure(wrong: Callable[[Any], Any]) -> None:
    async with opened(wrong) as batcher:
        with pytest.raises(InferenceFailed):
            await submit(batcher, 1, 1)
        assert batcher.alive


@on_a_loop
async def test_a_cancelled_item_is_dropped_before_the_model_sees_it() -> None:
    model = Model(held=True)
    async with occupied(model, limit=2) as (batcher, first):
        gone, ahead, later = submit(batcher, 1), submit(batcher, 2), submit(batcher, 3)
        await asyncio.sleep(0)  # let them enqueue
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        model.released.set()
        await asyncio.gather(first, ahead, later)
        assert 1.0 not in [item for call in model.calls for item in call]


@on_a_loop
async def test_enqueue_waits_while_two_full_batches_wait() -> None:
    model = Model(held=True)
    # 1 × 2, then 2 × 2 in wait, is more than 2 × the limit of 2
    async with opened(model.run, limit=2, padded=True) as batcher:
        first = await enqueue(batcher, 0, 1)
        await entered(model)
        # With the model held, one full batch goes ahead and one waits; the next has to stay outside.
        inside = [await enqueue(batcher, item, 2) for item in (1, 2)]
        outside = [asyncio.create_task(enqueue(batcher, item, 2)) for item in (3, 4, 5, 6)]
        for _ in range(100):
            await asyncio.sleep(0)
        assert not outside[-1].done()
        model.released.set()
        answers = await asyncio.gather(*[await task for task in outside])
        assert [answer.vector[0] for answer in answers] == [6, 8, 10, 12]
        await asyncio.gather(first, *inside)


@on_a_loop
async def test_close_in_the_middle_of_a_batch_answers_everyone() -> None:
    model = Model(held=True)
    async with occupied(model, limit=2) as (batcher, first):
        waiting = [submit(batcher, item) for item in range(1, 12)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        model.released.set()
        await closing
        assert (await first).vector[0] == 0
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, NotReady) for outcome in outcomes)
        assert not batcher.alive


@on_a_loop
async def test_an_input_is_not_at_fault_where_the_tower_goes_away_after_a_failed_batch() -> None:
    def run(items: np.ndarray) -> np.ndarray:
        raise ValueError("one of these is refused") if len(items) > 1 else NotReady("what the tower asks is gone")

    async with opened(run, limit=3) as batcher:
        waiting = [submit(batcher, item, 3) for item in range(3)]
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, NotReady) for outcome in outcomes), outcomes


@on_a_loop
async def test_submit_after_close_is_refused_at_once() -> None:
    async with opened(Model().run) as batcher:
        await batcher.close()
        for first in (False, True):
            with pytest.raises(NotReady):
                await submit(batcher, 1, first=first)


@pytest.mark.parametrize("padded", [True, False], ids=["texts", "sounds"])
@on_a_loop
async def test_inputs_are_taken_by_likeness_of_length(padded: bool) -> None:
    model = Model(held=True)
    async with opened(model.run, limit=600, padded=padded, near=16) as batcher:
        tasks = [submit(batcher, 0)]
        await entered(model)
        sizes = [10, 200, 12, 180, 16]
        tasks += [submit(batcher, size, size) for size in sizes]
        model.released.set()
        await asyncio.gather(*tasks)
        assert [sorted(call) for call in model.calls[1:]] == [[10, 12, 16], [180, 200]]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    limit=st.integers(1, 60),
    padded=st.booleans(),
    near=st.none() | st.integers(1, 20),
    bad=st.sets(st.integers(0, 39), max_size=3),
    pauses=st.lists(st.booleans(), min_size=40, max_size=40),
)
@settings(max_examples=60, deadline=None)
@on_a_loop
async def test_every_item_gets_its_own_answer_in_any_order_of_arrival(
    sizes: list[int], limit: int, padded: bool, near: int | None, bad: set[int], pauses: list[bool]
) -> None:
    model = Model(bad=[float(each) for each in bad])
    async with opened(model.run, limit=limit, padded=padded, near=near) as batcher:
        tasks = []
        for item, size in enumerate(sizes):
            tasks.append(submit(batcher, item, size))
            if pauses[item]:
                await asyncio.sleep(0)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for item, outcome in enumerate(outcomes):
            if item in bad:
                assert isinstance(outcome, InferenceFailed)
            else:
                assert outcome.vector.tolist() == [2 * item, -item]
        by_item = dict(enumerate(sizes))
        for call in model.calls:
            held = [by_item[int(item)] for item in call]
            cost = len(held) * max(held) if padded else sum(held)
            assert cost <= limit or len(held) == 1
            assert near is None or max(held) <= max(2 * min(held), near)


@on_a_loop
async def test_lanes_run_side_by_side_and_share_what_waits() -> None:
    model = Model(held=True)
    both = threading.Barrier(2)
    collated: list[list[float]] = []

    def call(items: np.ndarray) -> np.ndarray:
        both.wait(WAIT_S)  # passes only if two calls are in the model at one time
        return model.run(items)

    def collate(items: Sequence[float]) -> np.ndarray:
        collated.append(list(items))
        return np.array(items)

    async with opened(call, collate, limit=8, lanes=2) as batcher:
        futures = [await enqueue(batcher, float(item), 1) for item in range(5)]
        model.released.set()
        answers = await asyncio.gather(*futures)
        assert [answer.vector[0] for answer in answers] == [0, 2, 4, 6, 8]
        assert sorted(map(len, collated)) == [2, 3], "half each, though one call could have held all"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 64))
@settings(deadline=None, max_examples=50)
@on_a_loop
async def test_no_call_computes_more_padding_than_the_slack(sizes: list[int], slack: int) -> None:
    calls: list[list[float]] = []

    def call(items: np.ndarray) -> np.ndarray:
        calls.append([float(item) for item in items])
        return np.stack([items, items], axis=1).astype(np.float32)

    budget = Budget(512, padded=True, slack=slack, waiting=10**6)
    async with opened(call, budget=budget) as batcher:
        futures = [await enqueue(batcher, float(size), size) for size in sizes]
        answers = await asyncio.gather(*futures)
        assert [answer.vector[0] for answer in answers] == sizes
    for batch in calls:
        assert len(batch) * max(batch) - sum(batch) <= slack
        assert len(batch) * max(batch) <= 512
    assert len(calls) <= len(sizes)


async def kill(name: str) -> None:
    """Cancel the batcher's task of that name, and let it be replaced."""
    (task,) = (task for task in asyncio.all_tasks() if task.get_name() == name)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)


@pytest.mark.parametrize("which", ["test-running", "test-collating"])
@on_a_loop
async def test_a_task_that_is_killed_is_replaced_and_loses_nothing(which: str) -> None:
    model, seen = Model(held=True), Seen()
    async with occupied(model, limit=2, observer=seen) as (batcher, first):
        tasks = [first, *[submit(batcher, item) for item in range(1, 8)]]
        await asyncio.sleep(0)
        await kill(which)
        assert batcher.alive, "it was replaced at once"
        model.released.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.vector[0] for answer in answers] == [2 * item for item in range(8)]
        assert seen.restarts == 1


@on_a_loop
async def test_a_batch_that_kills_its_worker_twice_is_answered() -> None:
    model, seen = Model(held=True), Seen()
    async with opened(model.run, observer=seen) as batcher:
        item = submit(batcher, 1)
        for _ in range(2):
            await entered(model)
            await kill("test-running")
        with pytest.raises(InferenceFailed):
            await item
        model.released.set()
        assert (await submit(batcher, 2, 1)).vector[0] == 4
        assert seen.restarts == 2


@on_a_loop
async def test_a_worker_that_dies_again_and_again_is_dead_for_a_while_and_comes_back() -> None:
    async with opened(Model().run) as batcher:
        deaths = 0
        while batcher.alive:  # the first restarts come at once, the later ones after a pause
            await kill("test-running")
            deaths += 1
        assert deaths == 2
        assert (await submit(batcher, 1)).vector[0] == 2
        assert batcher.alive


@pytest.mark.parametrize("thread", ["model", "collate"])
@on_a_loop
async def test_a_thread_that_dies_costs_only_the_input_that_killed_it(
    thread: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Deadly(Model):
        def run(self, items: np.ndarray) -> np.ndarray:
            if thread == "model" and 2.0 in items:
                raise SystemExit
            return super().run(items)

    def collate(items: Sequence[float]) -> np.ndarray:
        if thread == "collate" and 2.0 in items:
            raise SystemExit
        return np.array(items)

    model, seen = Deadly(held=True), Seen()
    async with occupied(model, collate, limit=3, observer=seen) as (batcher, first):
        tasks = [first, *[submit(batcher, item) for item in (1, 2, 3)]]
        await asyncio.sleep(0)
        model.released.set()
        zero, one, two, three = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answer.vector[0] for answer in (zero, one, three)] == [0, 2, 6]
        assert isinstance(two, InferenceFailed)
        assert seen.restarts >= 2, "with the others, and alone"
        assert batcher.alive


@on_a_loop
async def test_the_head_of_the_queue_is_open_to_a_canary() -> None:
    model = Model(held=True)
    async with occupied(model, limit=1) as (batcher, first):
        tasks = [first, *[submit(batcher, item) for item in (1, 2, 3)]]
        for _ in range(10):
            await asyncio.sleep(0)
        canary = submit(batcher, 9, 1, first=True)
        await asyncio.sleep(0)
        model.released.set()
        await asyncio.gather(canary, *tasks)
        assert model.calls.index([9.0]) <= 2, "after what ran and what was collated ahead"
        assert batcher.pace > 0


def in_background(batcher: Batcher, item: float, size: int = 1) -> "asyncio.Task[Any]":
    return submit(batcher, item, size, background=True)


async def settled() -> None:
    """Wait until every task has gone as far as it can without a thread's help."""
    for _ in range(20):
        await asyncio.sleep(0)


@on_a_loop
async def test_what_is_in_the_background_runs_when_nothing_else_waits() -> None:
    model = Model(held=True)
    async with occupied(model, limit=4) as (batcher, first):
        later = [in_background(batcher, item) for item in (10, 11, 12)]
        await settled()
        sooner = [submit(batcher, item) for item in (1, 2, 3)]
        await settled()
        model.released.set()
        answers = await asyncio.gather(first, *sooner, *later)
        assert [answer.vector[0] for answer in answers] == [0, 2, 4, 6, 20, 22, 24]
        # A request's items are not mixed with a job's, which are few at a time while requests come.
        assert model.calls == [[0], [1, 2, 3], [10], [11], [12]]


@on_a_loop
async def test_alone_a_job_has_whole_calls_on_every_lane() -> None:
    model = Model(held=True)
    async with opened(model.run, limit=4, lanes=2) as batcher:
        tasks = [in_background(batcher, item) for item in range(8)]
        await settled()
        assert batcher._busy == 2  # type: ignore[attr-defined]
        model.released.set()
        await asyncio.gather(*tasks)
        assert sorted(map(len, model.calls)) == [4, 4]


@on_a_loop
async def test_while_requests_come_a_lane_is_left_to_them() -> None:
    model = Model()
    async with opened(model.run, limit=4, lanes=2) as batcher:
        await submit(batcher, 0)
        model.released.clear()
        later = [in_background(batcher, item) for item in range(10, 16)]
        await settled()
        assert batcher._busy == 1, "one lane of two"  # type: ignore[attr-defined]
        model.entered.clear()
        sooner = submit(batcher, 1)
        await entered(model)  # it is in the model at once, whatever waits
        model.released.set()
        await asyncio.gather(sooner, *later)


@on_a_loop
async def test_a_busy_server_s_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.batcher._PATIENCE_S", 0.0)

    model = Model(held=True)
    async with occupied(model, limit=2) as (batcher, first):
        waiting = [submit(batcher, item) for item in range(1, 9)]
        later = in_background(batcher, 10)
        await settled()
        model.released.set()
        await asyncio.gather(first, *waiting, later)
        assert model.calls.index([10.0]) < len(model.calls) - 1, "before the last of the requests"


@on_a_loop
async def test_what_waits_in_the_background_keeps_no_request_out_of_the_queue() -> None:
    model = Model(held=True)
    async with occupied(model, limit=1) as (batcher, first):
        later = [in_background(batcher, item) for item in range(10, 20)]
        await settled()
        answer = await enqueue(batcher, 1, 1)  # does not wait for room, although two calls' worth wait already
        model.released.set()
        assert (await answer).vector[0] == 2
        await asyncio.gather(first, *later)


@on_a_loop
async def test_an_item_in_the_background_is_withdrawn_and_answered_at_the_end() -> None:
    model = Model(held=True)
    async with occupied(model, limit=1) as (batcher, first):
        gone, left = await enqueue(batcher, 10, 1, background=True), await enqueue(batcher, 11, 1, background=True)
        gone.cancel()
        await settled()
        closing = asyncio.create_task(batcher.close())
        await settled()
        model.released.set()
        await closing
        with pytest.raises(NotReady):
            await left
        assert (await first).vector[0] == 0
        assert model.calls == [[0]]
