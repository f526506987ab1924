"""The service makes of a sound what the transformers feature extractor of the same model makes of it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ClapAudioConfig,
    ClapFeatureExtractor,
    HubertConfig,
    MobileNetV1Config,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from examples import sounds as examples
from service.contract.audio import decode_audio
from service.contract.sounds import AudioPreprocessing, Sound
from service.contract.waveforms import Waveforms
from service.contract.windows import LogMelWindows
from training.preprocessors import EncoderError, audio_preprocessing

Floats = NDArray[np.float32]
RECORDED = ("101_1-100032-A.ogg", "201_5-188655-A.ogg")


def rows_of(spec: AudioPreprocessing, waveform: np.ndarray) -> Sound:
    """The rows of a waveform, silence included."""
    return spec.rows_of_blocks((waveform,), len(waveform))


@pytest.fixture(scope="module", params=["synthesised", "recorded"])
def files(request: pytest.FixtureRequest) -> list[bytes]:
    """Sounds of five seconds: of examples/sounds.py, and of ESC-50."""
    if request.param == "recorded":
        root = request.getfixturevalue("data_root") / "data/esc50/audio"
        return [(root / name).read_bytes() for name in RECORDED]
    buffers = [io.BytesIO() for _ in range(2)]
    for name, buffer in zip(("cat", "thunder"), buffers, strict=True):
        soundfile.write(buffer, examples.synthesise(name), examples.RATE, format="WAV")
    return [buffer.getvalue() for buffer in buffers]


def lengths(files: list[bytes], rate: int, *seconds: float) -> list[Floats]:
    """The sounds one after the other, as often as it takes, cut to each of the lengths."""
    whole = np.concatenate([decode_audio(data, rate) for data in files])
    longest = np.tile(whole, 1 + int(max(seconds) * rate / len(whole)))
    return [longest[: int(length * rate)] for length in seconds]


def saved(folder: Path, extractor: Any, config: Any) -> Any:
    """Return what training reads of the folder that the extractor was saved to."""
    extractor.save_pretrained(folder)
    return audio_preprocessing(folder, config)


def test_whisper(tmp_path: Path, files: list[bytes]) -> None:
    extractor = WhisperFeatureExtractor()
    spec = saved(tmp_path, extractor, WhisperConfig())
    assert spec == LogMelWindows()  # its defaults
    for waveform in lengths(files, 16_000, 0.01, 5, 30):
        theirs = extractor(waveform, sampling_rate=16_000, return_attention_mask=True)
        sound = rows_of(spec, waveform)
        assert sound.rows.shape == (1, 1, 3000, 80) and sound.shares.tolist() == [1.0]
        np.testing.assert_allclose(sound.rows[0, 0].T, theirs["input_features"][0], atol=5e-4)
        assert sound.lengths[0] == theirs["attention_mask"].sum()
    (long,) = lengths(files, 16_000, 70)
    sound = rows_of(spec, long)
    parts = [extractor(long[start : start + 480_000], sampling_rate=16_000) for start in (0, 480_000, 960_000)]
    for row, part in zip(sound.rows, parts, strict=True):
        np.testing.assert_allclose(row[0].T, part["input_features"][0], atol=5e-4)
    np.testing.assert_allclose(sound.shares, [3 / 7, 3 / 7, 1 / 7], atol=1e-6)
    assert sound.lengths.tolist() == [3000, 3000, 1000]
    assert spec.milliseconds(sound) == 90_000


# Of 128 filters the lowest are narrower than a bin, as in the published model.
@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")
@pytest.mark.parametrize(
    "changes", [{}, {"do_normalize": False}, {"max_length": 300, "num_mel_bins": 64, "mean": -5.0}]
)
def test_ast(tmp_path: Path, files: list[bytes], changes: dict[str, Any]) -> None:
    extractor = ASTFeatureExtractor(**changes)
    frames = extractor.max_length
    spec = saved(tmp_path, extractor, ASTConfig(max_length=frames))
    for waveform in lengths(files, 16_000, 0.025, 0.5, 2.9, 5):
        theirs = extractor(waveform[: spec.samples], sampling_rate=16_000)["input_values"][0]
        sound = rows_of(spec, waveform)
        np.testing.assert_allclose(sound.rows[0, 0], theirs, atol=2e-5)
    (long,) = lengths(files, 16_000, 23)
    sound, hop = rows_of(spec, long), frames * 160
    assert len(sound) == -(-(len(long) - spec.samples) // hop) + 1
    for index, row in enumerate(sound.rows):
        theirs = extractor(long[index * hop : index * hop + spec.samples], sampling_rate=16_000)["input_values"][0]
        np.testing.assert_allclose(row[0], theirs, atol=2e-5)
    # Windows side by side hold the very frames of the whole.
    whole = ASTFeatureExtractor(**changes | {"max_length": frames * len(sound)})(long, sampling_rate=16_000)
    own = len(long) // 160 - 2
    np.testing.assert_allclose(np.concatenate(sound.rows[:, 0])[:own], whole["input_values"][0][:own], atol=2e-5)
    assert sound.shares.sum() == pytest.approx(1) and sound.shares[0] > sound.shares[-1]


def test_a_blink_of_sound_is_a_window() -> None:
    for spec in (LogMelWindows(), LogMelWindows(centred=False, frames=2998, short="zeros", lengths=False)):
        for samples in (0, 1, 399):
            sound = rows_of(spec, np.full(samples, 0.1, np.float32))
            assert len(sound) == 1 and np.isfinite(sound.rows).all() and sound.shares.tolist() == [1.0]


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_clap(tmp_path: Path, files: list[bytes], padding: str, truncation: str) -> None:
    extractor = ClapFeatureExtractor(padding=padding, truncation=truncation)
    fused = truncation == "fusion"
    spec = saved(tmp_path, extractor, ClapAudioConfig(enable_fusion=fused))
    channels = 4 if fused else 1
    for waveform in lengths(files, 48_000, 0.3, 5, 7, 10):
        theirs = extractor(waveform, sampling_rate=48_000)["input_features"][0]
        sound = rows_of(spec, waveform)
        assert sound.rows.shape == (1, channels, 1001, 64)
        np.testing.assert_allclose(sound.rows[0], theirs, atol=1e-4)
        if fused:
            np.testing.assert_array_equal(sound.rows[0, 0], sound.rows[0, 3])  # which says: not a longer sound


def test_clap_cuts_where_it_would_draw_at_random(tmp_path: Path, files: list[bytes]) -> None:
    extractor = ClapFeatureExtractor(truncation="rand_trunc")
    spec = saved(tmp_path, extractor, ClapAudioConfig())
    (long,) = lengths(files, 48_000, 23)
    sound = rows_of(spec, long)
    for index, row in enumerate(sound.rows):
        part = long[index * 480_000 : (index + 1) * 480_000]
        np.testing.assert_allclose(row, extractor(part, sampling_rate=48_000)["input_features"][0], atol=1e-4)
    np.testing.assert_allclose(sound.shares, [10 / 23, 10 / 23, 3 / 23], atol=1e-6)
    assert len(rows_of(spec, long[:480_100])) == 1  # two milliseconds more than a window are no window


def test_clap_fuses_a_longer_sound_with_its_middle_thirds(
    tmp_path: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = ClapFeatureExtractor()
    spec = saved(tmp_path, extractor, ClapAudioConfig(enable_fusion=True))
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    for waveform in lengths(files, 48_000, 10.005, 10.03, 17, 61):
        theirs = extractor([waveform], sampling_rate=48_000)
        sound = rows_of(spec, waveform)
        # Decibels; torch multiplies and adds in one rounding where it shrinks the whole.
        np.testing.assert_allclose(sound.rows[0], theirs["input_features"][0], atol=1e-3)
        np.testing.assert_allclose(sound.rows[0, 1:], theirs["input_features"][0][1:], atol=1e-4)
        assert len(sound) == 1


@pytest.mark.parametrize("config", [Wav2Vec2Config, HubertConfig, WavLMConfig])
@pytest.mark.parametrize("normalise", [True, False])
def test_wav2vec2(tmp_path: Path, files: list[bytes], config: Any, normalise: bool) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalise)
    spec = saved(tmp_path, extractor, config())
    assert spec == Waveforms(normalise=normalise)  # 400 samples are its first frame
    waveforms = lengths(files, 16_000, 0.5, 5, 29)
    theirs = extractor(waveforms, sampling_rate=16_000, padding=True, return_attention_mask=True)
    rows, own, weights = spec.collate([rows_of(spec, waveform) for waveform in waveforms])
    np.testing.assert_allclose(rows, np.stack(theirs["input_values"]), atol=1e-5)
    np.testing.assert_array_equal(own, np.stack(theirs["attention_mask"]).sum(1))
    np.testing.assert_array_equal(weights, np.eye(3))
    (long,) = lengths(files, 16_000, 70)
    sound = rows_of(spec, long)
    assert sound.lengths.tolist() == [480_000, 480_000, 160_000]
    last = extractor(long[960_000:], sampling_rate=16_000)["input_values"][0]
    np.testing.assert_allclose(sound.rows[2, :160_000], last, atol=1e-5)
    assert not sound.rows[2, 160_000:].any()
    np.testing.assert_allclose(sound.shares, [3 / 7, 3 / 7, 1 / 7], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "stated", "said"),
    [
        (ClapAudioConfig(), {"truncation": "fusion"}, "clap_audio_model.*truncation fusion.*enable_fusion False"),
        (ClapAudioConfig(), {"truncation": "rand_trunc", "padding": "mirror"}, "padding mirror"),
        (ClapAudioConfig(), {"truncation": "rand_trunc", "top_db": 80}, "top_db"),
        (ASTConfig(), {"max_length": 512}, "audio-spectrogram-transformer.*max_length 512 is not the model's 1024"),
        (WhisperConfig(), {"chunk_length": 10}, "whisper.*chunk_length gives 1000 frames; the model takes 3000"),
        (WhisperConfig(), {"dither": 0.1}, "whisper.*dither 0.1"),
        (Wav2Vec2Config(), {"padding_value": 1.0}, "wav2vec2.*padding_value 1.0"),
        (Wav2Vec2Config(), {"sampling_rate": 8}, "wav2vec2.*sampling_rate"),
        (Wav2Vec2Config(), {}, "wav2vec2: there is no preprocessor_config.json"),
        (MobileNetV1Config(), {"sampling_rate": 16_000}, "mobilenet_v1 has no audio front end here.*whisper"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    tmp_path: Path, config: Any, stated: dict[str, Any], said: str
) -> None:
    if stated:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with pytest.raises(EncoderError, match=said):
        audio_preprocessing(tmp_path, config)
