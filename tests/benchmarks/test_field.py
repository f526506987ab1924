"""A part of `make field`: small files of every kind, through every door of a server with a tiny bundle."""

from pathlib import Path

import pytest

from benchmarks import field
from benchmarks.field import Answer, faults
from benchmarks.field_media import BAD, MAKERS, Sample, samples

QUICK = (
    *("tiles.heic", "photo.avif", "half.webp", "start.heic", "10_bytes_short.jpg", "bad_checksum.png"),
    *("white_star_RGBA.png", "black_first.gif", "12_bit.tif", "unknown.jpg"),
    *("song_with_cover.m4a", "browser.webm", "half.m4a", "streamed.flac", "antiphase.wav", "short.wav", "a.wma"),
)


def test_files_of_every_kind_are_read_alike_at_every_door(
    bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [each for make in MAKERS[:2] for each in make(0) if each.name in QUICK]
    assert len(every) == len(QUICK)
    findings = field.try_all(bundle_dir, every, tmp_path / "store", tmp_path)
    assert (findings.tried, findings.wrong) == (len(QUICK), 0), capsys.readouterr().out


RIGHT = Answer("ok", "", "image", (1.0, 0.0), False)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (RIGHT, {}),
        (Answer("ok", "", "video", (1.0, 0.0), False), {"form": "silent: it is a video"}),
        (Answer("ok", "", "image", (0.6, 0.8), False), {"form": "silent: cosine 0.6000"}),
        (Answer("ok", "", "image", (1.0, 0.0), True), {"form": "silent: truncated is True"}),
        (Answer(BAD, "no"), {"form": f"refused: {BAD}, no"}),
    ],
)
def test_what_is_wrong_with_an_answer_is_told(answer: Answer, said: dict[str, str]) -> None:
    sample = Sample("a.png", b"", "image", b"", 0.99)
    assert faults(sample, {"json": RIGHT, "form": answer}, RIGHT, None) == said


def test_refusals_have_to_be_the_right_ones_and_alike() -> None:
    sample = Sample("a.png", b"", "image", refused=BAD)
    assert faults(sample, {"json": Answer(BAD, "no"), "job": Answer("", "no")}, None, None) == {}
    assert faults(sample, {"json": RIGHT}, None, None) == {"json": "silent: it is embedded"}
    assert faults(sample, {"json": Answer("not_found", "no")}, None, None) == {"json": "unclear: not_found, no"}
    two = {"json": Answer(BAD, "no"), "form": Answer(BAD, "never")}
    assert set(faults(sample, two, None, None)) == {"json", "form"}


@pytest.mark.full
def test_the_same_seed_makes_the_same_files() -> None:
    first, second = ({each.name: each.data for each in MAKERS[0](3) if ".tif" in each.name} for _ in range(2))
    assert first == second


@pytest.mark.full
def test_there_are_enough_files_and_each_has_a_name_of_its_own() -> None:
    names = [each.name for make in MAKERS[:2] for each in make(0)]
    assert len(set(names)) == len(names) > 100
    assert next(samples(0)).name == names[0]
