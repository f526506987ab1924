"""Videos, from the file to the second that a search names. The bundle's towers see colours and hear tones."""

import io
import struct
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from service.contract.audio import decode_audio
from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia
from service.contract.images import read_image
from service.contract.videos import VideoLimits, container_of, read_video
from service.store import Entry, Moment, VectorSearch, parse
from tests.conftest import serving
from tests.service.fakes import vector_of
from tests.service.films import colours, film, frame_of, silence_then_tone
from tests.service.media import b64
from tests.service.stores import both, on_a_store
from tests.tiny_bundle import AUDIO, IMAGE, tone

RATE = AUDIO.sampling_rate


def noise(seed=0, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def png_of(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def displayed(mp4: bytes, *matrix: int, width: int = 32) -> bytes:
    """An MP4 whose track says how it is to be shown: the first two rows of its matrix, 1 and 0 and -1."""
    place = mp4.index(b"tkhd") + 44
    a, b, c, d = (65_536 * number for number in matrix)
    return mp4[:place] + struct.pack(">9i", a, b, 0, c, d, 0, width << 16, 0, 1 << 30) + mp4[place + 36 :]


class TestReading:
    @pytest.mark.parametrize(
        ("matrix", "change"),
        [
            ((1, 0, 0, 1), lambda pixels: pixels),
            ((-1, 0, 0, 1), lambda pixels: pixels[:, :, ::-1]),
            ((1, 0, 0, -1), lambda pixels: pixels[:, ::-1]),
            ((-1, 0, 0, -1), lambda pixels: pixels[:, ::-1, ::-1]),
            ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1, (1, 2))),
            ((0, 1, 1, 0), lambda pixels: pixels.transpose(0, 2, 1)),
        ],
        ids=["as it is", "mirrored", "over", "half round", "a quarter", "transposed"],
    )
    def test_a_frame_is_turned_and_mirrored_as_its_track_says(self, matrix, change):
        corners = np.zeros((32, 32, 3), np.uint8)
        corners[:16, :16], corners[:16, 16:], corners[16:, :16] = 250, 160, 80
        plain = film([corners] * 2, format="mp4", codec="mpeg4", pixels="yuv420p")
        [upright], [shown] = (read_video(data, IMAGE, None).frames for data in (plain, displayed(plain, *matrix)))
        assert np.abs(shown.value - change(upright.value)).mean() < 0.02 * np.ptp(upright.value)

    def test_a_damaged_frame_stands_for_nothing(self):
        whole = film([noise(size=(96, 96))] * 3, format="mpegts", codec="libx264", pixels="yuv420p")
        [good] = read_video(whole, IMAGE, None).frames
        second = film([noise(1, (96, 96))] * 3, format="mpegts", codec="libx264", pixels="yuv420p")
        with pytest.raises(BadMedia, match="truncated or corrupt"):
            read_video(second[: len(second) // 3], IMAGE, None)
        [shown] = read_video(whole + second[: len(second) // 3], IMAGE, None, VideoLimits(frames=1)).frames
        assert np.abs(shown.value - good.value).mean() < 0.02 * np.ptp(good.value)

    def test_a_frame_is_read_as_the_image_is(self):
        clip = read_video(film([noise()]), IMAGE, None)
        assert len(clip.frames) == 1 and clip.sounds == []
        assert np.array_equal(clip.frames[0].value, read_image(png_of(noise()), IMAGE))

    def test_frames_are_from_the_middles_of_equal_stretches(self):
        frames = [noise(seed) for seed in range(40)]
        clip = read_video(film(frames, rate=4), IMAGE, None, VideoLimits(frames=5))
        assert clip.seconds == pytest.approx(10.0, abs=0.01)
        assert [(each.start, each.end) for each in clip.frames] == [
            (pytest.approx(2 * n, abs=0.01), pytest.approx(2 * n + 2, abs=0.01)) for n in range(5)
        ]
        for number, each in enumerate(clip.frames):
            assert np.array_equal(each.value, read_image(png_of(frames[4 + 8 * number]), IMAGE))

    def test_a_short_video_has_a_frame_a_second(self):
        for seconds, count in ((0.5, 1), (3.0, 3), (40.0, 16)):
            assert len(read_video(colours("red", seconds=seconds), IMAGE, None).frames) == count

    @pytest.mark.parametrize(
        ("format", "codec", "pixels"),
        [
            ("mp4", "libx264", "yuv420p"),
            ("mov", "mpeg4", "yuv420p"),
            ("webm", "libvpx-vp9", "yuv420p"),
            ("avi", "mjpeg", "yuvj420p"),
            ("mpegts", "libx264", "yuv420p"),
            ("vob", "mpeg2video", "yuv420p"),
            ("flv", "flv", "yuv420p"),
            ("matroska", "ffv1", "yuv444p"),
        ],
    )
    def test_containers(self, format, codec, pixels):
        data = colours("red", "blue", seconds=3, rate=8, format=format, codec=codec, pixels=pixels)
        assert container_of(data) is not None
        clip = read_video(data, IMAGE, RATE)
        assert len(clip.frames) == 6 and clip.sounds == []
        means = np.array([each.value.mean(axis=(1, 2)) for each in clip.frames])
        assert (means[:3, 0] > 0.5).all() and (means[:3, 2] < -0.5).all()
        assert (means[3:, 2] > 0.5).all() and (means[3:, 0] < -0.5).all()

    def test_the_sound_is_read_as_a_sound_file_is(self):
        samples = (np.random.default_rng(0).uniform(-0.5, 0.5, (2, 44_100 * 3)) * 32767).astype(np.int16)
        stream = io.BytesIO()
        soundfile.write(stream, samples.T, 44_100, format="WAV", subtype="PCM_16")
        data = film([frame_of("red")], sound=samples / 32767, sound_rate=44_100)
        [sound] = read_video(data, None, RATE).sounds
        expected = decode_audio(stream.getvalue(), RATE)
        assert sound.value.shape == expected.shape and np.abs(sound.value - expected).max() < 1e-4
        assert (sound.start, sound.end) == (pytest.approx(0, abs=0.05), pytest.approx(3, abs=0.05))

    def test_a_long_sound_is_cut_and_its_last_second_kept(self):
        data = film([frame_of("red")], sound=tone(440.0, 20.5))
        sounds = read_video(data, None, RATE).sounds
        assert [round(each.end - each.start, 2) for each in sounds] == [10.0, 10.5]
        data = film([], sound=tone(440.0, 21.5))
        assert [round(each.end - each.start, 1) for each in read_video(data, IMAGE, RATE).sounds] == [10.0, 10.0, 1.5]

    @pytest.mark.parametrize(
        ("limits", "said"),
        [
            (VideoLimits(max_bytes=100), "more than the 100 of ISTHMUS_MAX_BODY_BYTES"),
            (VideoLimits(max_seconds=3.0), "longer than the 3 s of"),
            (VideoLimits(max_pixels=1_000), "1,024 pixels, more than the 1,000 that are read"),
            (VideoLimits(max_channels=1), "more than 1 channels"),
        ],
    )
    def test_limits(self, limits, said):
        data = colours("red", seconds=4.0, sound=np.stack([tone(440.0, 4.0)] * 2))
        with pytest.raises(MediaTooLarge, match=said):
            read_video(data, IMAGE, RATE, limits)

    def test_frames_that_are_larger_than_the_header_says(self):
        """Matroska says the size, and H.264 says it again: here the two differ."""
        frames = [frame_of("red", (128, 128))] * 8
        data = film(frames, codec="libx264", pixels="yuv420p")
        assert data.count(b"\xb0\x81\x80\xba\x81\x80") == 1
        forged = data.replace(b"\xb0\x81\x80\xba\x81\x80", b"\xb0\x81\x20\xba\x81\x20")
        with pytest.raises(MediaTooLarge, match="pixels"):
            read_video(forged, IMAGE, None, VideoLimits(max_pixels=2_000))

    def test_a_long_video_is_sought_in(self, monkeypatch):
        data = colours("red", "green", "blue", seconds=4, format="mp4", codec="libx264", pixels="yuv420p")
        through = read_video(data, IMAGE, None)
        monkeypatch.setattr("service.contract.videos._THROUGH", 0)
        sought = read_video(data, IMAGE, None)
        assert len(sought.frames) == 12
        for one, other in zip(through.frames, sought.frames, strict=True):
            assert np.array_equal(one.value, other.value)

    @pytest.mark.parametrize("through", [0, 10_000])
    def test_no_more_is_decoded_than_ten_minutes_need(self, monkeypatch, through):
        monkeypatch.setattr("service.contract.videos._MOST_DECODED", 10)
        monkeypatch.setattr("service.contract.videos._THROUGH", through)
        with pytest.raises(MediaTooLarge, match="decoded"):
            read_video(colours("red", seconds=10), IMAGE, None)

    @pytest.mark.parametrize("cut", [40, 200, 600])
    def test_what_is_cut_off(self, cut):
        data = colours("red", seconds=2, format="mp4", codec="libx264", pixels="yuv420p")
        with pytest.raises(BadMedia):
            read_video(data[:cut], IMAGE, RATE)

    def test_what_is_no_video(self):
        for data in (
            b"",
            b"\x00" * 100,
            b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\n",
            png_of(noise()),
        ):
            assert container_of(data) is None
            said = "not a video in a format" if data.startswith(b"\x89PNG") else "nor a video"
            with pytest.raises(UnsupportedMedia, match=said):
                read_video(data, IMAGE, RATE)

    def test_any_bytes_after_a_true_beginning(self):
        rng = np.random.default_rng(0)
        whole = bytearray(colours("red", "blue", format="mp4", codec="libx264", pixels="yuv420p"))
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(8, len(data), 12):
                data[place] = rng.integers(0, 256)
            try:
                clip = read_video(bytes(data), IMAGE, RATE, VideoLimits(max_seconds=30, max_pixels=10_000))
            except (BadMedia, MediaTooLarge, UnsupportedMedia):
                continue
            assert all(np.isfinite(each.value).all() for each in clip.frames)


def embedded(client, *inputs):
    answer = client.post("/embed", json={"inputs": list(inputs)})
    assert answer.status_code == 200, answer.text
    return answer.json()["embeddings"]


class TestRoutes:
    def test_a_video_of_one_frame_is_that_image(self, shared_client):
        image, video = embedded(shared_client, {"image": b64(png_of(noise()))}, {"video": b64(film([noise()]))})
        assert video["modality"] == "video" and video["embedding"] == image["embedding"]

    def test_frames_are_pooled_by_their_mean(self, shared_client):
        video, red, blue = embedded(
            shared_client,
            {"video": b64(colours("red", "blue"))},
            *({"image": b64(png_of(frame_of(each)))} for each in ("red", "blue")),
        )
        mean = np.mean([red["embedding"], blue["embedding"]], axis=0)
        assert np.allclose(video["embedding"], mean / np.linalg.norm(mean), atol=1e-6)

    def test_a_search_says_which_second(self, settings):
        sound = silence_then_tone(11.0, 9.0)
        film_one = colours("red", "green", "blue", "red", seconds=5.0, sound=sound)
        with serving(settings) as client:
            files = [("file", ("a.mkv", film_one)), ("file", ("b.mkv", colours("red", seconds=4.0)))]
            stored = client.post("/items", files=files).json()
            assert [each["modality"] for each in stored["items"]] == ["video", "video"]
            client.post("/items", json={"items": [{"id": "t", "text": "green"}]})

            def search(query, **asked):
                answer = client.post("/search", json={"query": query, **asked})
                assert answer.status_code == 200, answer.text
                return answer.json()["results"]

            best, second = search("green", modalities=["video"])
            assert (best["id"], second["id"]) == ("a.mkv", "b.mkv") and best["score"] > 0.99
            assert best["moment"]["modality"] == "image" and 5 <= best["moment"]["start"] < best["moment"]["end"] <= 10
            assert second["moment"]["modality"] == "image"
            [heard] = search("tone", modalities=["video"], top_k=1)
            assert heard["id"] == "a.mkv" and heard["moment"] == {"start": 10.0, "end": 20.0, "modality": "audio"}
            everything = search("green", include=["metadata", "vector", "explain"])
            assert sorted(each["id"] for each in everything) == ["a.mkv", "b.mkv", "t"]
            assert [("moment" in each) for each in everything if each["id"] == "t"] == [False]
            composed = search({"compose": [{"text": "green"}, {"text": "red", "weight": 0.1}]}, include=["explain"])
            for each in composed:
                parts = each["explain"]["parts"]
                assert sum(part["contribution"] for part in parts) == pytest.approx(
                    each["explain"]["similarity"], abs=1e-5
                )
            assert [each["id"] for each in search({"id": "a.mkv"}, modalities=["video"])] == ["b.mkv"]
            assert search({"video": b64(colours("green"))}, modalities=["video"])[0]["moment"]["start"] >= 5
            # No moment shows anywhere but there.
            listed = client.get("/items").json()["items"]
            assert sorted(each["id"] for each in listed) == ["a.mkv", "b.mkv", "t"]
            collections = client.get("/collections").json()["collections"]
            assert [(each["name"], each["count"]) for each in collections] == [("default", 3)]
            # What replaces a video takes its moments away, and so does what deletes it.
            client.post("/items", json={"items": [{"id": "a.mkv", "text": "blue"}]})
            assert [each["id"] for each in search("green", modalities=["video"])] == ["b.mkv"]
            assert client.delete("/items/b.mkv").status_code == 204
            assert search("green", modalities=["video"]) == []

    def test_a_video_can_be_classified(self, shared_client):
        body = {"inputs": [{"video": b64(colours("green"))}], "labels": ["red", "green"]}
        [result] = shared_client.post("/classify", json=body).json()["results"]
        assert result["labels"][0]["label"] == "green"

    def test_a_bad_video_fails_alone(self, shared_client):
        body = {"inputs": ["red", {"video": b64(b"\x00\x00\x00\x18ftypisom" + bytes(99))}], "on_error": "null"}
        good, bad = shared_client.post("/embed", json=body).json()["embeddings"]
        assert good["embedding"] and bad["error"]["code"] == "undecodable_media"
        assert shared_client.post("/embed", json=body | {"on_error": "fail"}).status_code == 422

    def test_limits_are_settings(self, settings):
        with serving(settings.model_copy(update={"max_video_seconds": 2.0})) as client:
            answer = client.post("/embed", json={"inputs": [{"video": b64(colours("red", seconds=3.0))}]})
            assert (answer.status_code, answer.json()["code"]) == (413, "media_too_large")

    def test_without_pyav_it_is_said_what_to_install(self, shared_client, monkeypatch):
        data = colours("red")
        monkeypatch.setitem(sys.modules, "av", None)
        answer = shared_client.post("/embed", json={"inputs": [{"video": b64(data)}]})
        assert answer.status_code == 415 and "pip install 'isthmus[video]'" in answer.json()["detail"]
        answer = shared_client.post("/embed", files={"file": ("a.mkv", data)})
        assert answer.status_code == 415 and "isthmus[video]" in answer.json()["detail"]


def video(id, *of, metadata=None):
    found = tuple(Moment("image", n, n + 1.0, vector_of(each)) for n, each in enumerate(of))
    return Entry("default", id, "video", metadata or {}, vector_of(f"whole {id}"), moments=found)


@both
@on_a_store()
async def test_moments_in_either_store(store):
    many = [video(f"v{n}", *(f"{n}.{m}" for m in range(12)), metadata={"n": n}) for n in range(12)]
    await store.upsert([*many, Entry("default", "t", "text", {"n": 3}, vector_of("text"))])

    async def found(text, count=1, **asked):
        hits = (await store.search(VectorSearch("default", vector_of(text)[None], count, **asked)))[0]
        return [(hit.item.id, hit.moment and hit.moment.start) for hit in hits]

    assert await found("3.7") == [("v3", 7.0)]
    assert (await found("whole v5"))[0][0] == "v5" and (await found("whole v5"))[0][1] is not None
    assert await found("text") == [("t", None)]
    everything = await found("3.7", 50)
    assert len(everything) == 13 and len({id for id, _ in everything}) == 13
    assert {id for id, _ in await found("3.7", 50, filter=parse({"n": {"$lt": 3}}))} == {"v0", "v1", "v2"}
    assert await found("3.7", 1, filter=parse({"n": 3}), leave_out=["v3"]) == [("t", None)]
    assert await found("3.7", 50, modalities=["text"]) == [("t", None)]
    await store.upsert([video("v3", "new")])
    assert (await found("3.7"))[0] != ("v3", 7.0) and await found("new") == [("v3", 0.0)]
    assert await store.delete_matching("default", parse({"n": {"$gte": 6}})) == 6
    assert {id for id, _ in await found("9.1", 50)} == {"t", *(f"v{n}" for n in range(6))}
    assert await store.delete("default", ["v0", "v1", "never"]) == 2
    assert {id for id, _ in await found("0.1", 50)} == {"t", "v2", "v3", "v4", "v5"}
    items, _ = await store.page(None, None, None, 100)
    assert {item.id for item in items} == {"t", "v2", "v3", "v4", "v5"}
    await store.drop_collection("default")
    assert [each.name for each in await store.collections()] == []
