"""Previews: what is kept of media, and that nothing else is."""

import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.contract import images
from service.contract.audio import AudioLimits
from service.contract.errors import InputError
from service.contract.images import SMALL_SIDE as SIDE
from service.contract.images import ImageLimits
from service.engine.previews import PEAKS, SECONDS, peaks, preview_audio, preview_image
from service.store import schema, upkeep
from tests.conftest import serving
from tests.service.fakes import fake_manifest
from tests.service.media import b64, png, wav

PIXELS = ImageLimits()
SAMPLES = AudioLimits()
GPS = 0x8825


@pytest.fixture
def keeping(settings) -> Iterator[httpx.Client]:
    with serving(settings.model_copy(update={"previews": True})) as client:
        yield client


def upsert(client, *items):
    response = client.post("/items", json={"items": list(items)})
    assert response.status_code == 200, response.text


def photograph(size=(1600, 900), orientation=6) -> bytes:
    """A JPEG as a telephone writes it: where it was taken, by what, and lying on its side."""
    picture = Image.new("RGB", size, (200, 40, 20))
    picture.paste((10, 60, 220), (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "SECRETPHONE"
    exif.get_ifd(GPS)[1] = "N"
    exif.get_ifd(GPS)[2] = (52.0, 31.0, 12.0)
    written = io.BytesIO()
    picture.save(written, "JPEG", exif=exif, comment=b"SECRETCOMMENT", icc_profile=b"SECRETPROFILE" * 20)
    return written.getvalue()


def test_a_picture_is_small_upright_and_says_nothing_of_its_origin():
    original = photograph()
    assert b"SECRETPHONE" in original and b"SECRETCOMMENT" in original and b"SECRETPROFILE" in original
    kept = preview_image(original, PIXELS)
    assert kept.media_type == "image/jpeg"
    assert kept.about == {"width": SIDE * 9 // 16, "height": SIDE}
    with Image.open(io.BytesIO(kept.data)) as picture:
        assert picture.format == "JPEG" and picture.size == (270, 480)
        assert not picture.getexif() and not {"exif", "icc_profile", "xmp", "comment"} & picture.info.keys()
        assert picture.getpixel((135, 10))[2] > 150, "what was on the left is on top"
    assert b"SECRET" not in kept.data and len(kept.data) < 20_000


def test_text_chunks_and_transparency_of_a_png_are_gone():
    written, notes = io.BytesIO(), PngInfo()
    notes.add_text("Author", "SECRETAUTHOR")
    notes.add_itxt("XML:com.adobe.xmp", "<x:SECRETXMP/>")
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(written, "PNG", pnginfo=notes)
    kept = preview_image(written.getvalue(), PIXELS)
    assert b"SECRET" not in kept.data
    assert kept.about == {"width": 30, "height": 20}, "nothing is made larger than it was"
    with Image.open(io.BytesIO(kept.data)) as picture:
        assert picture.mode == "RGB" and min(picture.getpixel((5, 5))) > 250


def test_only_the_first_frame_of_an_animation_is_kept():
    written = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    frames[0].save(written, "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(preview_image(written.getvalue(), PIXELS).data)) as picture:
        assert getattr(picture, "n_frames", 1) == 1


@pytest.mark.parametrize(
    "data",
    [b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", b"<html></html>", b"", b"GIF89a"],
)
def test_what_is_no_picture_makes_no_preview(data):
    with pytest.raises(InputError):
        preview_image(data, PIXELS)


def test_a_sound_is_mono_short_and_says_nothing_of_its_origin():
    rate, seconds = 44_100, 31.0
    t = np.arange(int(rate * seconds)) / rate
    written = io.BytesIO()
    with soundfile.SoundFile(written, "w", rate, 2, format="WAV") as file:
        file.title, file.artist = "SECRETTITLE", "SECRETARTIST"
        file.write(np.stack([0.4 * np.sin(2 * np.pi * 440 * t), np.zeros_like(t)], axis=1))
    assert b"SECRETTITLE" in written.getvalue()
    kept = preview_audio(written.getvalue(), SAMPLES)
    assert kept.media_type == "audio/mpeg" and b"SECRET" not in kept.data and len(kept.data) < 200_000
    assert kept.about["seconds"] == SECONDS and kept.about["whole_seconds"] == seconds
    samples, rate = soundfile.read(io.BytesIO(kept.data))
    assert samples.ndim == 1 and abs(len(samples) / rate - SECONDS) < 0.2
    middle = np.abs(np.fft.rfft(samples[rate : 2 * rate]))
    assert abs(int(middle.argmax()) - 440) <= 1, "it is the same sound"
    assert np.abs(samples[-100:]).max() < 0.1 * np.abs(samples).max(), "it fades out where it was cut"


@pytest.mark.parametrize("samples", [np.zeros(8_000), np.full(8_000, 40.0), np.array([0.1])])
def test_silence_noise_past_full_scale_and_one_sample(samples):
    written = io.BytesIO()
    soundfile.write(written, samples, 16_000, format="WAV", subtype="FLOAT")
    kept = preview_audio(written.getvalue(), SAMPLES)
    heard, _ = soundfile.read(io.BytesIO(kept.data))
    assert np.isfinite(heard).all() and np.abs(heard).max(initial=0) < 1.5
    assert len(kept.about["peaks"]) == PEAKS and all(0 <= each <= 100 for each in kept.about["peaks"])


def test_peaks_are_those_of_the_waveform():
    found = peaks(np.concatenate([np.full(4_000, 0.25), np.full(4_000, -0.5)]).astype(np.float32))
    assert found == [50] * (PEAKS // 2) + [100] * (PEAKS // 2)
    assert peaks(np.zeros(100, np.float32)) == [0] * PEAKS


def test_previews_are_kept_where_only_this_machine_can_ask_unless_the_operator_says_otherwise(settings):
    for given, kept in (
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "192.0.2.1"}, False),
        ({"store": Path("milvus")}, False),
        ({"host": "0.0.0.0", "previews": True}, True),
        ({"previews": False}, False),
    ):
        assert settings.model_copy(update=given).keeps_previews is kept, given


def test_without_previews_nothing_of_a_picture_is_kept(settings):
    with serving(settings.model_copy(update={"previews": False})) as client:
        _nothing_is_kept(client, settings)
        assert client.get("/models").json()["previews"] is False


def _nothing_is_kept(client, settings):
    upsert(client, {"id": "photo", "image": b64(png())}, {"id": "words", "text": "a dog"})
    assert client.get("/previews/photo").status_code == 404
    [found] = client.post("/search", json={"query": {"id": "words"}, "include": ["preview"]}).json()["results"]
    assert found["preview"] is None
    with closing(schema.connect(settings.store / schema.FILE, read_only=True)) as connection:
        assert connection.execute("SELECT count(*) FROM previews").fetchone() == (0,)


def test_a_picture_is_decoded_once_for_its_vector_and_its_preview(keeping, monkeypatch):
    decoded = []
    decode = images._decoded
    monkeypatch.setattr(images, "_decoded", lambda data, *rest: decoded.append(data) or decode(data, *rest))
    picture = png(size=(500, 700))
    upsert(keeping, {"id": "photo", "image": b64(picture)})
    assert decoded == [picture]
    upsert(keeping, {"id": "again", "image": b64(picture)})  # its vector is in the cache
    assert decoded == [picture] * 2
    kept = [keeping.get(f"/previews/{id}").content for id in ("photo", "again")]
    assert kept[0] == kept[1] == preview_image(picture, PIXELS).data
    small = photograph(size=(4_000, 3_000))  # of which the tower needs fewer pixels than people do
    upsert(keeping, {"id": "large", "image": b64(small)})
    assert Image.open(io.BytesIO(keeping.get("/previews/large").content)).size == (SIDE * 3 // 4, SIDE)


def test_what_is_served_is_what_was_made(keeping):
    upsert(
        keeping,
        {"id": "a/b c.png", "image": b64(png(size=(40, 60)))},
        {"id": "sound", "audio": b64(wav(seconds=2.0)), "collection": "sounds"},
        {"id": "words", "text": "red " * 800},
        {"id": "given", "vector": [1.0] * keeping.get("/models").json()["models"][0]["dimensions"]},
    )
    response = keeping.get("/previews/a%2Fb%20c.png")
    assert response.status_code == 200 and response.headers["content-type"] == "image/jpeg"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "private, no-cache"
    assert Image.open(io.BytesIO(response.content)).size == (60, 40)
    again = keeping.get("/previews/a%2Fb%20c.png", headers={"if-none-match": response.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    heard = keeping.get("/previews/sound", params={"collection": "sounds"})
    assert heard.headers["content-type"] == "audio/mpeg"
    assert soundfile.info(io.BytesIO(heard.content)).channels == 1
    for id, collection in (("words", "default"), ("given", "default"), ("nobody", "default"), ("sound", "nowhere")):
        problem = keeping.get(f"/previews/{id}", params={"collection": collection})
        assert (problem.status_code, problem.json()["code"]) == (404, "not_found")

    listed = {item["id"]: item for item in keeping.get("/items", params={"include": "preview"}).json()["items"]}
    assert listed["a/b c.png"]["preview"] == {"media_type": "image/jpeg", "width": 60, "height": 40}
    assert listed["sound"]["preview"]["seconds"] == 2.0 and len(listed["sound"]["preview"]["peaks"]) == PEAKS
    assert listed["words"]["preview"] == {"text": "red " * 250}
    assert listed["given"]["preview"] is None
    whole = keeping.get("/items/words", params={"include": ["preview", "vector"]}).json()
    assert whole["preview"] == {"text": "red " * 250} and "vector" in whole
    answer = keeping.post("/search/batch", json={"queries": ["a", "b"], "include": ["preview"], "top_k": 4}).json()
    for found in answer["results"]:
        assert {each["id"]: each["preview"] for each in found}["words"] == {"text": "red " * 250}


def test_files_of_a_form_are_previewed_and_a_bad_one_is_not(keeping):
    request = {"items": [{"id": "one"}, {"id": "two"}, {"id": "three"}], "on_error": "null"}
    files = [("file", ("a.png", png())), ("file", ("b.png", png()[:60])), ("file", ("c.wav", wav()))]
    response = keeping.post("/items", data={"request": json.dumps(request)}, files=files)
    assert response.json()["upserted"] == 2
    assert [keeping.get(f"/previews/{id}").status_code for id in ("one", "two", "three")] == [200, 404, 200]


def test_a_preview_goes_with_its_item(keeping, settings):
    def kept() -> int:
        with closing(schema.connect(settings.store / schema.FILE, read_only=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM previews").fetchone()[0])

    items = [{"id": f"i{n}", "image": b64(png(n)), "metadata": {"n": n}} for n in range(4)]
    upsert(keeping, *items, {"id": "other", "image": b64(png(9)), "collection": "more"})
    assert kept() == 5
    before = keeping.get("/previews/i0").content
    upsert(keeping, {"id": "i0", "image": b64(png(7, size=(30, 30)))}, {"id": "i1", "text": "words now"})
    assert kept() == 4 and keeping.get("/previews/i0").content != before
    assert keeping.get("/previews/i1").status_code == 404
    assert keeping.delete("/items/i0").status_code == 204
    keeping.post("/items/delete", json={"filter": {"n": {"$gte": 2}}})
    assert kept() == 1 and keeping.get("/previews/i2").status_code == 404
    keeping.delete("/collections/more")
    assert kept() == 0


def test_a_preview_and_the_words_of_a_text_move_with_their_item(keeping):
    upsert(keeping, {"id": "a.png", "image": b64(png())}, {"id": "t", "text": "a blue heron"})
    before = keeping.get("/previews/a.png").content
    moves = {"moves": [{"id": "a.png", "to": "b/c.png"}, {"id": "t", "to": "u"}, {"id": "none", "to": "other"}]}
    assert keeping.post("/items/move", json=moves).json() == {"moved": 2}
    assert keeping.get("/previews/b/c.png").content == before
    assert keeping.get("/previews/a.png").status_code == 404
    assert keeping.get("/items/u", params={"include": "preview"}).json()["preview"]["text"] == "a blue heron"
    found = keeping.post("/search", json={"query": "heron", "keywords": {"weight": 1.0}}).json()["results"]
    assert found[0]["id"] == "u"
    assert keeping.get("/models").json()["previews"] is True


def test_a_backup_holds_previews(keeping, settings, tmp_path):
    upsert(keeping, {"id": "photo", "image": b64(png())})
    upkeep.backup(settings.store, tmp_path / "saved")
    upkeep.restore(tmp_path / "saved", tmp_path / "restored")
    before = keeping.get("/previews/photo").content
    with serving(settings.model_copy(update={"store": tmp_path / "restored"})) as restored:
        assert restored.get("/previews/photo").content == before, "also where no more are made"


def test_a_store_whose_pictures_were_all_webp_takes_jpeg_as_well(tmp_path):
    with closing(schema.connect(tmp_path / schema.FILE)) as connection:
        schema.prepare(connection, tmp_path, fake_manifest())
        connection.execute(
            "INSERT INTO items VALUES (1, 1, 'a', 'image', 1, '', '', '{}'), (2, 1, 'b', 'image', 2, '', '', '{}')"
        )
        connection.executescript("DROP TABLE previews;" + schema._PREVIEWS.replace("'image/jpeg', ", ""))
        added = "INSERT INTO previews (item, media_type, about, data) VALUES (?, ?, '{}', x'00')"
        connection.execute(added, (1, "image/webp"))
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(added, (2, "image/jpeg"))
        for _ in range(2):
            schema.prepare(connection, tmp_path, fake_manifest())
        connection.execute(added, (2, "image/jpeg"))
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(added, (3, "text/html"))
        kinds = connection.execute("SELECT media_type FROM previews ORDER BY item").fetchall()
        assert kinds == [("image/webp",), ("image/jpeg",)]
        connection.execute("DELETE FROM items")
        assert not connection.execute("SELECT * FROM previews").fetchall()
