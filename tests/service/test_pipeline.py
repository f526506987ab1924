import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.contract.bundle import read_bundle
from service.contract.errors import BadMedia, InputError, UnsupportedMedia
from service.engine.cache import MemoryCache
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Media, Text, TokenIds
from service.engine.towers import Arrays, open_towers
from service.errors import DeadlineExceeded, InferenceFailed, NotReady
from service.runtime.metrics import Metrics
from service.runtime.timings import stages
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import CORES, on_a_loop
from tests.service.slow import WAIT_S, Slow


@asynccontextmanager
async def opened(
    bundle_dir: Path, *, held: bool = False, **more: Any
) -> AsyncIterator[tuple[Embedder, dict[str, Slow]]]:
    settings = Settings(bundle=bundle_dir, threads=CORES, **more)
    bundle = read_bundle(bundle_dir)
    towers = {name: Slow(tower, held=held) for name, tower in open_towers(bundle, "cpu", 1).items()}
    embedder = Embedder(bundle, towers, MemoryCache(2**20), settings, Metrics())
    try:
        yield embedder, towers
    finally:
        for tower in towers.values():
            tower.released.set()
        await embedder.close()


def embedded(result: Embedded | InputError) -> Embedded:
    assert isinstance(result, Embedded), result
    return result


@on_a_loop
async def test_results_stand_where_their_inputs_stood(bundle_dir: Path, png: Callable[..., bytes]) -> None:
    async with opened(bundle_dir) as (embedder, _):
        results = await embedder.embed(
            [Text("red"), Media("image", b"no image"), Media("image", png("red")), Text(""), TokenIds((2,))]
        )
        red, bad, image, empty, ids = results
        assert isinstance(bad, UnsupportedMedia)
        assert isinstance(empty, InputError)
        assert embedded(red).vector @ embedded(image).vector > 0.99
        assert np.array_equal(embedded(ids).vector, embedded(red).vector)
        assert not embedded(red).vector.flags.writeable
        assert await embedder.embed([]) == []


@on_a_loop
async def test_the_cache_answers_the_second_time_and_errors_are_not_kept(bundle_dir: Path) -> None:
    async with opened(bundle_dir) as (embedder, towers):
        (first, bad) = await embedder.embed([Text("the dog barks"), Text("")])
        (again, bad_again) = await embedder.embed([Text("the dog barks"), Text("")])
        assert (embedded(first).cached, embedded(again).cached) == (False, True)
        assert embedded(first).tokens == embedded(again).tokens == 3
        assert np.array_equal(embedded(first).vector, embedded(again).vector)
        assert isinstance(bad, InputError)
        assert isinstance(bad_again, InputError)
        assert towers["text"].rows == 1


@on_a_loop
async def test_identical_inputs_under_way_are_embedded_once(bundle_dir: Path) -> None:
    async with opened(bundle_dir, held=True) as (embedder, towers):
        one = asyncio.create_task(embedder.embed([Text("dog"), Text("dog")]))
        await asyncio.to_thread(towers["text"].entered.wait, WAIT_S)
        two = asyncio.create_task(embedder.embed([Text("dog")]))
        await asyncio.sleep(0)
        towers["text"].released.set()
        results = [*await one, *await two]
        assert len({embedded(result).vector.tobytes() for result in results}) == 1
        assert towers["text"].rows == 1


@on_a_loop
async def test_one_of_two_who_wait_for_the_same_may_go_away(bundle_dir: Path) -> None:
    async with opened(bundle_dir, held=True) as (embedder, towers):
        one = asyncio.create_task(embedder.embed([Text("dog")]))
        await asyncio.to_thread(towers["text"].entered.wait, WAIT_S)
        two = asyncio.create_task(embedder.embed([Text("dog")]))
        await asyncio.sleep(0)
        one.cancel()
        towers["text"].released.set()
        (result,) = await two
        assert embedded(result).modality == "text"
        with pytest.raises(asyncio.CancelledError):
            await one


@on_a_loop
async def test_what_is_wrong_with_an_input_does_not_hold_what_was_decoded_of_it(
    bundle_dir: Path, png: Callable[..., bytes]
) -> None:
    async with opened(bundle_dir) as (embedder, _):
        whole = png((255, 0, 0))
        (refused,) = await embedder.embed([Media("image", whole[: len(whole) // 2])])
        assert isinstance(refused, InputError)
        assert refused.__context__ is None and refused.__traceback__ is None


@on_a_loop
async def test_past_the_deadline(bundle_dir: Path) -> None:
    async with opened(bundle_dir, held=True, request_deadline_s=0.05) as (embedder, towers):
        with pytest.raises(DeadlineExceeded):
            await embedder.embed([Text("red")])
        towers["text"].released.set()


@on_a_loop
async def test_close_answers_who_waits_and_refuses_who_comes(bundle_dir: Path, png: Callable[..., bytes]) -> None:
    async with opened(bundle_dir, held=True, batch_images=1) as (embedder, towers):
        images = [Media("image", png((shade, 0, 0))) for shade in range(6)]
        waiting = [asyncio.create_task(embedder.embed([image])) for image in images]
        await asyncio.to_thread(towers["image"].entered.wait, WAIT_S)
        closing = asyncio.create_task(embedder.close())
        await asyncio.sleep(0)
        for tower in towers.values():
            tower.released.set()
        await closing
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, list | NotReady) for outcome in outcomes), outcomes
        assert any(isinstance(outcome, NotReady) for outcome in outcomes)
        with pytest.raises(NotReady):
            await embedder.embed([Text("red")])
        assert not embedder.workers_alive()


@on_a_loop
async def test_a_zero_vector_from_the_model_is_that_inputs_failure(bundle_dir: Path) -> None:
    class Zero:
        provider = "none"
        precision = "fp32"
        choice = None

        def run(self, arrays: Arrays) -> np.ndarray:
            return np.zeros((len(arrays["input_ids"]), tiny_bundle.DIMENSIONS), np.float32)

    bundle = read_bundle(bundle_dir)
    embedder = Embedder(bundle, {"text": Zero()}, MemoryCache(0), Settings(), Metrics())
    text, image = await embedder.embed([Text("red"), Media("image", b"x")])
    assert isinstance(text, InferenceFailed)
    assert isinstance(image, UnsupportedMedia), "a bundle without that tower"
    with pytest.raises(ValueError, match="no direction"):
        await embedder.canary("text")
    await embedder.close()


@on_a_loop
async def test_the_canary_goes_through_every_tower(bundle_dir: Path) -> None:
    async with opened(bundle_dir) as (embedder, towers):
        for modality in embedder.manifest.towers:
            await embedder.canary(modality)
            await embedder.canary(modality)
        assert [tower.rows for tower in towers.values()] == [2, 2, 2]


@on_a_loop
async def test_media_of_the_wrong_kind(bundle_dir: Path, wav: Callable[..., bytes]) -> None:
    async with opened(bundle_dir) as (embedder, _):
        sound, cut = await embedder.embed([Media("image", wav()), Media("audio", wav()[:44])])
        assert isinstance(sound, UnsupportedMedia)
        assert isinstance(cut, BadMedia)


@on_a_loop
async def test_stages_are_noted_for_the_request(bundle_dir: Path) -> None:
    async with opened(bundle_dir) as (embedder, _):
        spent: dict[str, float] = {}
        stages.set(spent)
        await embedder.embed([Text("red"), Text("blue")])
        assert set(spent) == {"cache", "decode", "queue", "model"}


@on_a_loop
async def test_texts_that_are_read_in_a_thread_in_chunks_come_back_in_order(bundle_dir: Path) -> None:
    async with opened(bundle_dir) as (embedder, towers):
        words = tiny_bundle.WORDS[2:]
        long = [Text(f"{words[index % len(words)]} {'dog ' * index}") for index in range(120)]
        assert sum(len(each.text) for each in long) > 3 * 8_192, "several chunks"
        texts = [*long, Text(" "), Text("red")]
        together = await embedder.embed(texts)
        assert isinstance(together[120], InputError)
        rows = towers["text"].rows
        assert rows == 121
        alone = [(await embedder.embed([each]))[0] for each in texts[:5]]
        for one, many in zip(alone, together, strict=False):
            assert embedded(one).cached
            assert np.array_equal(embedded(one).vector, embedded(many).vector)
        assert towers["text"].rows == rows


@on_a_loop
async def test_of_a_cancelled_request_only_what_another_waits_for_is_made(bundle_dir: Path) -> None:
    async with opened(bundle_dir, held=True, batch_tokens=1) as (embedder, towers):
        first = asyncio.create_task(embedder.embed([Text("a")]))
        await asyncio.to_thread(towers["text"].entered.wait, WAIT_S)
        many = asyncio.create_task(embedder.embed([Text("red"), Text("green"), Text("blue")]))
        one = asyncio.create_task(embedder.embed([Text("green")]))
        await asyncio.sleep(0)
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        towers["text"].released.set()
        await first
        (green,) = await one
        assert embedded(green).tokens == 1
        assert towers["text"].rows == 2, "the first, and green"


@on_a_loop
async def test_an_input_that_the_model_fails_on_fails_alone(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, png: Callable[..., bytes]
) -> None:
    async with opened(bundle_dir) as (embedder, towers):
        run = towers["text"].run

        def fails_on_two_tokens(arrays: Arrays) -> np.ndarray:
            if arrays["input_ids"].shape[1] == 2:
                raise RuntimeError("a surprise")
            return run(arrays)

        monkeypatch.setattr(embedder.channels["text"].batcher, "_run_model", fails_on_two_tokens)
        bad, red, image = await embedder.embed([Text("dog barks"), Text("red"), Media("image", png("red"))])
        assert isinstance(bad, InferenceFailed)
        assert embedded(red).vector @ embedded(image).vector > 0.99


@on_a_loop
async def test_a_preparation_that_breaks_fails_that_input_alone(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a surprise")

    async with opened(bundle_dir) as (embedder, _):
        monkeypatch.setattr("service.contract.tokens.TextTokenizer.encode", broken)
        bad, ids = await embedder.embed([Text("red"), TokenIds((2,))])
        assert isinstance(bad, InferenceFailed)
        assert "surprise" not in str(bad)
        assert embedded(ids).tokens == 1
