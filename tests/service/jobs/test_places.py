"""A chunk that may end the process is embedded alone."""

import asyncio

from service.jobs.run import Places


def test_who_is_alone_has_no_neighbour_and_waits_for_no_later_one() -> None:
    async def run() -> list[str]:
        places, log = Places(), []
        leave = {name: asyncio.Event() for name in ("first", "alone", "also alone", "later")}
        moved = asyncio.Event()

        async def embed(name: str) -> None:
            async with places.take(alone="alone" in name):
                log.append(f"+{name}")
                moved.set()
                await leave[name].wait()
                log.append(f"-{name}")

        tasks = []
        for name in leave:
            tasks.append(asyncio.create_task(embed(name)))
            await asyncio.sleep(0)
        for name in leave:
            while f"+{name}" not in log:
                moved.clear()
                await moved.wait()
            leave[name].set()
        await asyncio.gather(*tasks)
        return log

    order = ["first", "alone", "also alone", "later"]
    assert asyncio.run(asyncio.wait_for(run(), 20)) == [f"{sign}{name}" for name in order for sign in "+-"]


def test_some_are_embedded_at_once_and_one_that_gives_up_leaves_its_place() -> None:
    async def run() -> None:
        places = Places()
        async with places.take(alone=False), places.take(alone=False):
            waiting = asyncio.create_task(places.take(alone=True).__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
        async with places.take(alone=True):
            pass

    asyncio.run(asyncio.wait_for(run(), 20))
