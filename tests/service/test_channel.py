"""A tower's life: closed while idle, opened by the next input, replaced under load, never pulled from under anyone."""

import asyncio
import shutil
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.contract.bundle import Bundle, Modality, read_bundle
from service.engine.cache import MemoryCache
from service.engine.channel import Runs
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Text
from service.engine.towers import Arrays, TowerError, open_towers
from service.errors import NotReady, Overloaded
from service.runtime.metrics import Metrics
from service.settings import Settings
from tests import tiny_bundle
from tests.service.slow import WAIT_S, Slow
from tests.service.test_pipeline import run


class Opened:
    """Opens text towers. Holds none of them, so that `gone` says when one is let go."""

    def __init__(self) -> None:
        self.count = 0
        self.failing = False
        self.loop: asyncio.AbstractEventLoop
        self._last: weakref.ref[Slow] | None = None
        self.gone = asyncio.Event()
        """Set when the one opened last is let go."""

    @property
    def last(self) -> Slow:
        assert self._last is not None
        tower = self._last()
        assert tower is not None
        return tower

    def __call__(self, bundle: Bundle, modality: Modality) -> Runs:
        if self.failing:
            raise TowerError("no memory for it")
        tower = Slow(open_towers(bundle, "cpu", 1, [modality])[modality])
        self.count += 1
        self._last = weakref.ref(tower)
        self.gone = gone = asyncio.Event()
        weakref.finalize(tower, _tell, self.loop, gone)
        return tower


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)


@asynccontextmanager
async def text_only(bundle: Bundle, opened: Opened, **more: Any) -> AsyncIterator[Embedder]:
    settings = Settings(**more)
    opened.loop = asyncio.get_running_loop()
    embedder = Embedder(bundle, {"text": opened(bundle, "text")}, MemoryCache(0), settings, Metrics(), opened)
    try:
        yield embedder
    finally:
        await embedder.close()


def vector(results: list[Any]) -> np.ndarray:
    (result,) = results
    assert isinstance(result, Embedded), result
    return result.vector


def test_an_idle_tower_is_closed_and_comes_back(bundle_dir: Path) -> None:
    async def main() -> None:
        opened = Opened()
        async with text_only(read_bundle(bundle_dir), opened, unload_idle_s=0.02) as embedder:
            channel = embedder.channels["text"]
            first = vector(await embedder.embed([Text("red")]))
            await opened.gone.wait()
            assert not channel.loaded
            assert channel.alive, "closed for want of work is not dead"
            await embedder.canary("text")
            assert not channel.loaded, "a canary does not open it"
            assert np.array_equal(vector(await embedder.embed([Text("red")])), first)
            assert opened.count == 2
            await opened.gone.wait()

    run(main())


def test_a_tower_at_work_is_not_idle(bundle_dir: Path) -> None:
    async def main() -> None:
        opened = Opened()
        async with text_only(read_bundle(bundle_dir), opened, unload_idle_s=0.02) as embedder:
            tower = opened.last
            tower.released.clear()
            waiting = asyncio.create_task(embedder.embed([Text("red")]))
            await asyncio.to_thread(tower.entered.wait, WAIT_S)
            fired = asyncio.Event()
            asyncio.get_running_loop().call_later(0.1, fired.set)  # the tower's own timer was due before this one
            await fired.wait()
            assert embedder.channels["text"].loaded
            tower.released.set()
            vector(await waiting)
            assert opened.count == 1

    run(main())


def test_many_who_come_to_a_closed_tower_open_it_once(bundle_dir: Path) -> None:
    async def main() -> None:
        opened = Opened()
        async with text_only(read_bundle(bundle_dir), opened, unload_idle_s=0.02) as embedder:
            await opened.gone.wait()
            words = ["red", "green", "blue", "dog", "cat"]
            await asyncio.gather(*(embedder.embed([Text(word)]) for word in words))
            assert opened.count == 2

    run(main())


def test_a_tower_that_cannot_be_opened_again_is_an_answer_and_not_ready(
    bundle_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        opened = Opened()
        async with text_only(read_bundle(bundle_dir), opened, unload_idle_s=0.02) as embedder:
            await opened.gone.wait()
            opened.failing = True
            with pytest.raises(NotReady):
                await embedder.embed([Text("red")])
            assert not embedder.workers_alive()
            with pytest.raises(NotReady):
                await embedder.canary("text")
            opened.failing = False
            await embedder.canary("text")  # readiness finds out by itself that it works again
            assert embedder.workers_alive()
            vector(await embedder.embed([Text("red")]))

    run(main())
    assert "no memory for it" in caplog.text


def test_another_bundle_in_the_folder_is_not_opened_by_accident(
    bundle_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        shutil.copytree(bundle_dir, tmp_path / "b")
        opened = Opened()
        async with text_only(read_bundle(tmp_path / "b"), opened, unload_idle_s=0.02) as embedder:
            await opened.gone.wait()
            tiny_bundle.build(tmp_path / "b", seed=1)
            with pytest.raises(NotReady):
                await embedder.embed([Text("red")])

    run(main())
    assert "holds another bundle now" in caplog.text


def test_a_replaced_tower_finishes_what_it_has(bundle_dir: Path) -> None:
    async def main() -> None:
        opened = Opened()
        bundle = read_bundle(bundle_dir)
        async with text_only(bundle, opened, batch_tokens=1) as embedder:
            old = opened.last
            old.released.clear()
            running = asyncio.create_task(embedder.embed([Text("red")]))
            await asyncio.to_thread(old.entered.wait, WAIT_S)
            queued = [asyncio.create_task(embedder.embed([Text(word)])) for word in ("green", "blue", "dog")]
            await asyncio.sleep(0)
            assert embedder.channels["text"].depth == 4
            await embedder.replace(bundle)
            fresh = vector(await embedder.embed([Text("red dog")]))
            assert np.isfinite(fresh).all()
            assert opened.last.rows == 2, "the canary and the new request"
            old.released.set()
            for each in (running, *queued):
                vector(await each)
            assert old.rows == 4

    run(main())


def test_a_bundle_whose_tower_fails_is_not_taken(bundle_dir: Path) -> None:
    class Failing(Opened):
        def __call__(self, bundle: Bundle, modality: Modality) -> Runs:
            tower = super().__call__(bundle, modality)
            return tower if self.count == 1 else Nan()

    class Nan:
        provider = "none"
        precision = "fp32"

        def run(self, arrays: Arrays) -> np.ndarray:
            return np.full((len(arrays["input_ids"]), tiny_bundle.DIMENSIONS), np.nan, np.float32)

    async def main() -> None:
        bundle = read_bundle(bundle_dir)
        async with text_only(bundle, Failing()) as embedder:
            with pytest.raises(TowerError, match="does not embed a small input"):
                await embedder.replace(bundle)
            vector(await embedder.embed([Text("red")]))

    run(main())


def test_admission_is_refused_once_full_says_when_to_come_again_and_is_granted_then(bundle_dir: Path) -> None:
    async def main() -> None:
        opened = Opened()
        async with text_only(read_bundle(bundle_dir), opened, max_inputs=3, queue_inputs=3) as embedder:
            channel = embedder.channels["text"]
            with channel.admit(2):
                with pytest.raises(Overloaded) as raised, channel.admit(2):
                    pytest.fail("admitted past the capacity")
                assert 1 <= raised.value.retry_after_s <= 60
                with channel.admit(1):
                    assert channel.depth == 3
            assert channel.depth == 0
            assert opened.last.rows == 0
            await embedder.close()
            with pytest.raises(NotReady), channel.admit(1):
                pytest.fail("admitted after close")

    run(main())


def test_a_call_that_hangs_is_noticed_and_new_inputs_are_refused_until_it_ends(bundle_dir: Path) -> None:
    async def main() -> None:
        opened = Opened()
        async with text_only(read_bundle(bundle_dir), opened, hang_s=0.05, request_deadline_s=WAIT_S) as embedder:
            channel, tower = embedder.channels["text"], opened.last
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

    run(main())


def test_no_more_waits_than_the_tower_does_in_its_time(bundle_dir: Path) -> None:
    async def main() -> None:
        opened = Opened()
        async with text_only(read_bundle(bundle_dir), opened, queue_s=1.0, lanes=1) as embedder:
            channel = embedder.channels["text"]
            assert channel._engine is not None
            channel._engine.batcher._item_s = 0.4  # as if items took so long
            # Whatever it takes, where nothing else waits.
            with channel.admit(100), pytest.raises(Overloaded) as raised, channel.admit(1):
                pytest.fail("admitted past what it does in its time")
            assert raised.value.retry_after_s == 40
            with channel.admit(1), channel.admit(1), channel.admit(1), pytest.raises(Overloaded), channel.admit(1):
                pytest.fail("admitted past what it does in its time")
            channel._engine.batcher._item_s = 0.001
            with channel.admit(500), channel.admit(500):
                pass

    run(main())
