import asyncio

import pytest

from service.retrieval.single_flight import Shared, SingleFlight
from tests.conftest import on_a_loop


@on_a_loop
async def test_who_asks_meanwhile_gets_the_same_and_who_asks_later_another() -> None:
    shared: SingleFlight[int] = SingleFlight()
    goes, runs = asyncio.Event(), 0

    async def work() -> int:
        nonlocal runs
        runs += 1
        await goes.wait()
        return runs

    first, gone, third = (asyncio.create_task(shared(work)) for _ in range(3))
    await asyncio.sleep(0)
    gone.cancel()
    goes.set()
    assert await asyncio.gather(first, third) == [1, 1]
    assert gone.cancelled()
    assert await shared(work) == 2


@on_a_loop
async def test_a_failure_is_everybodys_and_is_not_kept() -> None:
    shared: SingleFlight[str] = SingleFlight()

    async def fail() -> str:
        raise OSError

    async def work() -> str:
        return "done"

    failures = await asyncio.gather(shared(fail), shared(work), return_exceptions=True)
    assert [type(each) for each in failures] == [OSError, OSError]
    assert await shared(work) == "done"


@pytest.mark.parametrize("count", [1, 50])
def test_many_probes_cost_as_much_as_one(count: int) -> None:
    async def main() -> int:
        shared: SingleFlight[None] = SingleFlight()
        runs = 0

        async def work() -> None:
            nonlocal runs
            runs += 1

        await asyncio.gather(*(shared(work) for _ in range(count)))
        return runs

    assert asyncio.run(main()) == 1


@on_a_loop
async def test_work_is_given_up_when_the_last_who_waits_goes_away() -> None:
    goes = asyncio.Event()
    shared = Shared(goes.wait())
    first, second = (asyncio.create_task(shared.outcome()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    assert not shared.given_up
    second.cancel()
    await asyncio.wait([second])
    assert shared.given_up
    await asyncio.wait([shared.task])
    assert shared.task.cancelled()
