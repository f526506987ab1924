from pathlib import Path

import numpy as np
import pytest

from examples.sounds import RATE, SECONDS, SOUNDS, synthesise, write_sounds
from service.contract.audio import AudioLimits, decode_audio
from service.contract.patches import LogMelPatches, log_mel_patches

# What YAMNet must say among its five best of 521 names. Of an engine it may say in what.
NAMES = {
    "siren": {"Siren"},
    "rain": {"Rain"},
    "clock": {"Clock", "Tick", "Tick-tock"},
    "church_bell": {"Church bell"},
    "sea_waves": {"Waves, surf"},
    "thunder": {"Thunder"},
    "crickets": {"Cricket"},
    "engine": {"Motor vehicle (road)", "Motorcycle", "Car"},
    "birds": {"Bird vocalization, bird call, bird song"},
    "alarm_clock": {"Alarm"},
    "cat": {"Cat", "Meow"},
}


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_is_well_formed_and_the_same_every_time(name: str) -> None:
    samples = synthesise(name)
    assert samples.dtype == np.float32
    assert samples.shape == (int(RATE * SECONDS),)
    assert np.abs(samples).max() == pytest.approx(0.8)
    assert abs(float(samples.mean())) < 0.05, "a sound has no constant part"
    np.testing.assert_array_equal(samples, synthesise(name))


def test_the_sounds_differ() -> None:
    sounds = np.stack([synthesise(name) for name in SOUNDS])
    similarity = np.abs(np.corrcoef(sounds) - np.eye(len(sounds)))
    assert similarity.max() < 0.2


def test_the_files_are_what_the_service_reads(tmp_path: Path) -> None:
    files = write_sounds(tmp_path / "sounds")
    assert set(files) == set(SOUNDS)
    for name, file in files.items():
        decoded = decode_audio(file.read_bytes(), RATE, AudioLimits())
        np.testing.assert_allclose(decoded, synthesise(name), atol=2 / 32_768)


@pytest.fixture(scope="module")
def top_names(data_root: Path):
    """A function: waveform → the five names that YAMNet finds likeliest."""
    import torch
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(data_root / "encoders/yamnet").float().eval()

    def classify(waveform: np.ndarray) -> list[str]:
        patches = torch.from_numpy(log_mel_patches(waveform, LogMelPatches()))
        with torch.inference_mode():
            scores = torch.sigmoid(model(patches).logits).mean(0)
        return [model.config.id2label[index] for index in scores.topk(5).indices.tolist()]

    return classify


@pytest.mark.parametrize("name", SOUNDS)
def test_a_classifier_of_real_sounds_names_it(name: str, top_names) -> None:
    assert NAMES[name] & set(top_names(synthesise(name)))
