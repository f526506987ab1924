"""A channel admits or refuses inputs, and says how its tower is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.contract.bundle import read_bundle
from service.engine.cache import MemoryCache
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Text
from service.engine.towers import open_towers
from service.errors import NotReady, Overloaded
from service.runtime.metrics import Metrics
from service.settings import Settings
from tests.conftest import CORES, on_a_loop
from tests.service.slow import WAIT_S, Slow


@asynccontextmanager
async def text_only(bundle_dir: Path, **more: Any) -> AsyncIterator[tuple[Embedder, Slow]]:
    bundle = read_bundle(bundle_dir)
    tower = Slow(open_towers(bundle, "cpu", 1, ["text"])["text"])
    embedder = Embedder(bundle, {"text": tower}, MemoryCache(0), Settings(**more), Metrics())
    try:
        yield embedder, tower
    finally:
        await embedder.close()


def vector(results: list[Any]) -> np.ndarray:
    (result,) = results
    assert isinstance(result, Embedded), result
    return result.vector


@on_a_loop
async def test_admission_is_refused_once_full_says_when_to_come_again_and_is_granted_then(bundle_dir: Path) -> None:
    async with text_only(bundle_dir, max_inputs=3, queue_inputs=3) as (embedder, tower):
        channel = embedder.channels["text"]
        with channel.admit(2):
            with pytest.raises(Overloaded) as raised, channel.admit(2):
                pytest.fail("admitted past the capacity")
            assert 1 <= raised.value.retry_after_s <= 60
            with channel.admit(1):
                assert channel.depth() == 3
        assert channel.depth() == 0
        assert tower.rows == 0
        await embedder.close()
        with pytest.raises(NotReady), channel.admit(1):
            pytest.fail("admitted after close")


@on_a_loop
async def test_a_call_that_hangs_is_noticed_and_new_inputs_are_refused_until_it_ends(bundle_dir: Path) -> None:
    async with text_only(bundle_dir, request_deadline_s=WAIT_S) as (embedder, tower):
        channel = embedder.channels["text"]
        assert channel.hang_s == 60
        channel.hang_s = 0.05
        assert not channel.hangs and embedder.workers_alive()
        tower.released.clear()
        waiting = asyncio.create_task(embedder.embed([Text("red")]))
        await asyncio.to_thread(tower.entered.wait, WAIT_S)
        late = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, late.set)
        await late.wait()
        assert channel.hangs and not embedder.workers_alive()
        with pytest.raises(NotReady, match="does not answer"):
            await embedder.embed([Text("green")])
        with pytest.raises(NotReady, match="does not answer"):
            await embedder.canary("text")
        tower.released.set()
        vector(await waiting)
        assert not channel.hangs and embedder.workers_alive()
        vector(await embedder.embed([Text("green")]))


@on_a_loop
async def test_no_more_waits_than_the_tower_does_in_its_time(bundle_dir: Path) -> None:
    async with text_only(bundle_dir, queue_s=1.0, threads=CORES) as (embedder, _):
        channel = embedder.channels["text"]
        channel.batcher._item_s = 0.4  # as if items took so long
        # Whatever it takes, where nothing else waits.
        with channel.admit(100), pytest.raises(Overloaded) as raised, channel.admit(1):
            pytest.fail("admitted past what it does in its time")
        assert raised.value.retry_after_s == 39, "then a second's work is left"
        with channel.admit(1), channel.admit(1), channel.admit(1), pytest.raises(Overloaded), channel.admit(1):
            pytest.fail("admitted past what it does in its time")
        channel.batcher._item_s = 0.001
        with channel.admit(500), channel.admit(500):
            pass
