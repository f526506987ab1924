"""Sounds of more than ten seconds: silence has no part in their vector, and they are found by their moments."""

import asyncio
import base64
import io
import itertools
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from service.api.keys import create_key
from service.contract.audio import Recording
from service.contract.patches import LogMelPatches
from service.contract.waveforms import Waveforms
from service.contract.windows import LogMelWindows
from service.engine.caller import PROCESS
from service.engine.embedder import Embedder
from service.engine.inputs import Decoded, Embedded
from service.runtime.quotas import Limit
from service.settings import Settings
from service.store import Entry, Moment, VectorSearch
from tests.conftest import serving
from tests.service.fakes import vector_of
from tests.service.films import colours, silence_then_tone
from tests.service.jobs.processes import ended, submitted
from tests.service.stores import both, on_a_store
from tests.service.test_serving import metric
from tests.tiny_bundle import AUDIO, tone

RATE = AUDIO.sampling_rate


def wav_of(samples: np.ndarray) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype="FLOAT")
    return base64.b64encode(buffer.getvalue()).decode()


def noise(seconds: float, loudness: float = 0.1) -> np.ndarray:
    samples = np.random.default_rng(0).normal(0, loudness, round(seconds * RATE))
    return samples.astype(np.float32)


def embedded(client: httpx.Client, *sounds: np.ndarray) -> list[np.ndarray]:
    answer = client.post("/embed", json={"inputs": [{"audio": wav_of(each)} for each in sounds]})
    assert answer.status_code == 200, answer.text
    return [np.array(each["embedding"]) for each in answer.json()["embeddings"]]


class TestVectors:
    def test_silence_before_between_and_after_is_no_part_of_a_long_sound(self, shared_client: httpx.Client) -> None:
        hiss = noise(20, 1e-4)
        offset = np.full(20 * RATE, 0.3, np.float32)  # a microphone that is off by a constant
        sound, silent, *others = embedded(
            shared_client,
            tone(440.0, 5.0),
            np.zeros(20 * RATE, np.float32),
            silence_then_tone(20.0, 5.0),
            np.concatenate([tone(440.0, 2.0), hiss, tone(440.0, 3.0), hiss]),
            np.concatenate([offset, tone(440.0, 5.0)]),
        )
        assert sound @ silent < 0.97
        for vector in others:
            assert vector @ sound > 0.999

    @pytest.mark.parametrize("spec", [LogMelPatches(), LogMelWindows(), Waveforms(max_samples=160_000)])
    def test_other_sounds_keep_their_vectors_to_the_bit(self, spec: Any) -> None:
        quiet = np.concatenate([np.zeros(7 * RATE, np.float32), tone(440.0, 3.0)])
        mixed = np.concatenate([noise(10, 0.01), noise(5, 0.5)])
        loud = np.full(15 * RATE, np.float32(1e12))
        loud[::2] *= -1
        for samples in (quiet, mixed, loud, noise(25), np.zeros(25 * RATE, np.float32), noise(0), noise(0.01)):
            assert np.array_equal(spec.prepare(samples).rows, spec.rows_of_blocks((samples,), len(samples)).rows)
        sound = silence_then_tone(60.0, 5.0)
        assert len(spec.prepare(sound)) < len(spec.rows_of_blocks((sound,), len(sound)))


def test_a_long_sound_is_found_by_its_moments(settings: Settings) -> None:
    with serving(settings) as client:

        def store(*items: dict[str, Any]) -> None:
            answer = client.post("/items", json={"items": list(items)})
            assert answer.status_code == 200, answer.text

        def search(query: Any, **asked: Any) -> list[dict[str, Any]]:
            answer = client.post("/search", json={"query": query, **asked})
            assert answer.status_code == 200, answer.text
            return list(answer.json()["results"])

        lecture = np.concatenate([noise(30), tone(440.0, 10.0), noise(15)])
        store(
            {"id": "lecture", "audio": wav_of(lecture), "metadata": {"year": 2026}},
            {"id": "short", "audio": wav_of(noise(4))},
            {"id": "film", "video": base64.b64encode(colours("red", seconds=2.0, sound=tone(440.0, 2.0))).decode()},
            {"id": "text", "text": "green"},
        )
        listed = {each["id"]: each["modality"] for each in client.get("/items").json()["items"]}
        assert listed == {"lecture": "audio", "short": "audio", "film": "video", "text": "text"}

        best, second = search("tone", modalities=["audio"])
        assert best["id"] == "lecture" and best["score"] > 0.99 and best["modality"] == "audio"
        assert best["moment"] == {"start": 30.0, "end": 40.0, "modality": "audio"}
        assert second["id"] == "short" and "moment" not in second
        [film] = search("tone", modalities=["video"])
        assert film["id"] == "film", "a sound's moments are no videos"
        assert [each["id"] for each in search("tone", filter={"year": 2026})] == ["lecture"]
        assert {each["id"] for each in search("tone")} == set(listed)
        # What is most like the whole says which second, too.
        [whole] = search({"audio": wav_of(lecture)}, top_k=1)
        assert whole["id"] == "lecture" and whole["score"] > 0.99 and whole["moment"]["modality"] == "audio"
        # A query is its own vector, and is not cut into moments.
        assert search({"audio": wav_of(silence_then_tone(20.0, 5.0))}, modalities=["audio"])[0]["id"] == "lecture"

        # Nor are the parts of a fused item, whose moments nobody could find.
        embedded_before = metric(client, "isthmus_batch_items_sum", modality="audio", model="tiny")
        store({"id": "fused", "compose": [{"text": "green"}, {"audio": wav_of(noise(33))}]})
        assert metric(client, "isthmus_batch_items_sum", modality="audio", model="tiny") == embedded_before + 1
        assert client.delete("/items/fused").status_code == 204

        store({"id": "lecture", "audio": wav_of(noise(3))})
        assert all("moment" not in each for each in search("tone", modalities=["audio"]))


def test_moments_are_paid_for_once_and_a_long_job_stores_them(settings: Settings) -> None:
    path = settings.store.parent / "keys"
    _, key = create_key(path, "writer", ["write"], [Limit.parse("seconds=40/minute")])
    with serving(settings.model_copy(update={"keys": path})) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        sound = {"id": "a", "audio": wav_of(np.concatenate([noise(15), tone(440.0, 15.0)]))}
        assert client.post("/items", json={"items": [sound]}).status_code == 200, "30 s of 40"
        assert client.post("/items", json={"items": [sound | {"audio": wav_of(noise(15))}]}).status_code == 429
    with serving(settings) as client:
        assert ended(client, submitted(client, [sound | {"id": "b"}]))["done"] == 1
        found = client.post("/search", json={"query": "tone", "modalities": ["audio"]}).json()["results"]
        assert {each["id"]: each["moment"]["start"] for each in found} == {"a": 20.0, "b": 20.0}


class OneByOne:
    """Stands in for an embedder: notes how many moments it is given at a time, and their samples."""

    def __init__(self) -> None:
        self.given: list[list[np.ndarray]] = []

    async def in_worker(self, function: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(function)

    async def _embed(self, parts: list[Decoded], _: Any) -> list[Embedded]:
        self.given.append([part.value for part in parts])
        return [Embedded(vector_of(str(part.cost)), "audio", False, False) for part in parts]


def test_no_more_than_two_minutes_of_a_long_sound_are_held_for_its_moments() -> None:
    samples = noise(305)
    recording = Recording(base64.b64decode(wav_of(samples)), RATE)
    embedder = OneByOne()
    moments = asyncio.run(Embedder._moments_of(embedder, recording, RATE, PROCESS))  # type: ignore[arg-type]
    assert [len(each) for each in embedder.given] == [12, 12, 7]
    assert [(each.start, each.end) for each in moments] == [(10.0 * n, min(305.0, 10.0 * n + 10)) for n in range(31)]
    assert np.array_equal(np.concatenate(list(itertools.chain(*embedder.given))), samples)
    short = Recording(base64.b64decode(wav_of(noise(10.5))), RATE)
    assert asyncio.run(Embedder._moments_of(embedder, short, RATE, PROCESS)) == []  # type: ignore[arg-type]


def sound(id: str, *of: str) -> Entry:
    parts = tuple(Moment("audio", 10.0 * n, 10.0 * n + 10, vector_of(each)) for n, each in enumerate(of))
    return Entry("default", id, "audio", {}, vector_of(f"whole {id}"), moments=parts)


@both
@on_a_store()
async def test_many_sounds_in_either_store(store) -> None:
    short = [Entry("default", f"s{n}", "audio", {}, vector_of(f"s{n}")) for n in range(20)]
    film = Entry("default", "v", "video", {}, vector_of("v"), moments=(Moment("image", 0.0, 1.0, vector_of("frame")),))
    await store.upsert([sound("a", "1", "2", "3"), sound("b", "4"), *short, film])

    async def found(text: str, count: int = 1, **asked: Any) -> list[tuple[str, float | None]]:
        hits = (await store.search(VectorSearch("default", vector_of(text)[None], count, **asked)))[0]
        return [(hit.item.id, hit.moment and hit.moment.start) for hit in hits]

    assert await found("2") == [("a", 10.0)]
    assert await found("frame") == [("v", 0.0)]
    assert (await found("frame", modalities=["audio"]))[0][0] != "v"
    assert "a" not in {id for id, _ in await found("2", 30, modalities=["video"])}
    everything = dict(await found("s3", 50))
    assert len(everything) == 23 and everything["s3"] is None
    [best] = await store.search(VectorSearch("default", vector_of("2")[None], 1, by_modality=True))
    assert best[0].item.id == "a" and {hit.item.id for hit in best if hit.moment} >= {"a", "v"}
    assert everything["a"] is not None and everything["b"] == 0.0
    assert (await found("whole a"))[0][0] == "a" and (await found("whole a"))[0][1] is not None
    await store.delete("default", ["a"])
    assert "a" not in dict(await found("2", 50))
