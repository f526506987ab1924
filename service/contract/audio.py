"""bytes → checked mono waveform at the tower's rate → log-mel patches, float32 (patches, 1, frames, mels)."""

import functools
import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia

Waveform = NDArray[np.float32]

FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU"})
_SAMPLING_RATES = range(1_000, 768_001)
_BLOCK_FRAMES = 4096
_LOUDEST = 1e12  # far past any scale that a float file is written in, far below where a float32 spectrum overflows


class AudioPreprocessing(BaseModel):
    """The front end of an audio tower; complete, and carried by the bundle's manifest.

    The spectrum is the magnitude of a short-time Fourier transform (periodic Hann window, frames not centred),
    mapped through an HTK-scale triangular mel filter bank; the features are log(mel + log_offset), cut into patches
    of `patch_frames` frames every `patch_hop_frames`. This is the front end of YAMNet (Plakal & Ellis, 2020).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["log_mel_patches"] = "log_mel_patches"
    sampling_rate: int = Field(default=16_000, ge=1_000, le=192_000)
    window_length: int = Field(default=400, gt=0, le=16_384)
    hop_length: int = Field(default=160, gt=0, le=16_384)
    fft_length: int = Field(default=512, gt=0, le=16_384)
    n_mels: int = Field(default=64, gt=0, le=512)
    f_min: float = Field(default=125.0, ge=0)
    f_max: float = Field(default=7_500.0, gt=0)
    log_offset: float = Field(default=0.001, gt=0)
    patch_frames: int = Field(default=96, gt=0, le=4_096)
    patch_hop_frames: int = Field(default=48, gt=0, le=4_096)

    @model_validator(mode="after")
    def _consistent(self) -> "AudioPreprocessing":
        if self.fft_length < self.window_length:
            raise ValueError(f"fft_length {self.fft_length} is shorter than window_length {self.window_length}")
        if not self.f_min < self.f_max <= self.sampling_rate / 2:
            raise ValueError(f"f_min {self.f_min:g} and f_max {self.f_max:g} are not a band below half the rate")
        return self


@dataclass(frozen=True)
class AudioLimits:
    max_bytes: int = 25_000_000
    max_seconds: float = 600.0
    max_decoded_bytes: int = 256 * 2**20
    """Of the decoded float32 samples, all channels together, at the file's own rate."""
    max_channels: int = 8


def decode_audio(data: bytes, sampling_rate: int, limits: AudioLimits = AudioLimits()) -> Waveform:
    """Decode a sound file to a mono float32 waveform (samples,) at `sampling_rate` Hz, nominally in [-1, 1].

    Channels are averaged and the rate is converted by soxr (high quality). The header's claims are checked before
    memory is taken, and the samples are counted as they arrive, so a header that lies cannot get past a limit.

    Raises UnsupportedMedia, MediaTooLarge, or BadMedia (corrupt, no samples, not finite). A FLAC that ends early
    is corrupt; of a WAV, OGG or MP3 that does, what is there is decoded, as players do.
    """
    if len(data) > limits.max_bytes:
        raise MediaTooLarge(f"the sound is larger than {limits.max_bytes} bytes")
    try:
        source = soundfile.SoundFile(io.BytesIO(data))
    except Exception:
        raise UnsupportedMedia("not a sound in a format that is read here (WAV, FLAC, OGG, MP3 …)") from None
    with source:
        if source.format not in FORMATS:
            raise UnsupportedMedia("not a sound in a format that is read here (WAV, FLAC, OGG, MP3 …)")
        if source.channels > limits.max_channels:
            raise MediaTooLarge(f"the sound has more than {limits.max_channels} channels")
        if source.samplerate not in _SAMPLING_RATES:
            raise BadMedia("the sound states an impossible sampling rate")
        most_frames = min(
            int(limits.max_seconds * source.samplerate), limits.max_decoded_bytes // (4 * source.channels)
        )
        blocks, frames = [], 0
        try:
            while len(block := source.read(65_536, dtype="float32", always_2d=True)):
                frames += len(block)
                if frames > most_frames:
                    raise MediaTooLarge(f"the sound is longer than {limits.max_seconds:g} s, or too large decoded")
                if not np.all(np.abs(block) <= _LOUDEST):  # false for NaN too
                    raise BadMedia("the sound has samples that are not finite, or absurdly large")
                blocks.append(block.mean(axis=1))
        except soundfile.SoundFileError:
            raise BadMedia("the sound is truncated or corrupt") from None
        rate = source.samplerate
    if not frames:
        raise BadMedia("the sound has no samples")
    mono = np.concatenate(blocks)
    if rate != sampling_rate:
        mono = np.asarray(soxr.resample(mono, rate, sampling_rate, quality="HQ"), dtype=np.float32)
    return mono


def log_mel_patches(waveform: Waveform, spec: AudioPreprocessing) -> NDArray[np.float32]:
    """Waveform (samples,) at the spec's rate → float32 (patches, 1, patch_frames, n_mels), at least one patch.

    The end is padded with silence to a whole number of patch hops, so that no sample is left out.
    """
    patch = (spec.patch_frames - 1) * spec.hop_length + spec.window_length
    hop = spec.patch_hop_frames * spec.hop_length
    after_first = max(0, len(waveform) - patch)
    padded = patch + -(-after_first // hop) * hop
    waveform = np.pad(waveform, (0, padded - len(waveform)))
    frames = np.lib.stride_tricks.sliding_window_view(waveform, spec.window_length)[:: spec.hop_length]
    window, mel = _periodic_hann(spec.window_length), _htk_mel(spec)
    features = np.empty((len(frames), spec.n_mels), np.float32)
    for start in range(0, len(frames), _BLOCK_FRAMES):  # bounds the spectrum's memory for a ten-minute sound
        block = slice(start, start + _BLOCK_FRAMES)
        spectrum = np.abs(np.fft.rfft(frames[block] * window, n=spec.fft_length))
        features[block] = np.log(spectrum.astype(np.float32) @ mel + np.float32(spec.log_offset))
    patches = np.lib.stride_tricks.sliding_window_view(features, spec.patch_frames, axis=0)[:: spec.patch_hop_frames]
    return np.ascontiguousarray(patches.transpose(0, 2, 1)[:, None])


@functools.lru_cache(maxsize=8)
def _periodic_hann(length: int) -> NDArray[np.float32]:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _htk_mel(spec: AudioPreprocessing) -> NDArray[np.float32]:
    """(fft_length // 2 + 1, n_mels) triangular filters, linear on the HTK mel scale; the DC bin is left out."""

    def hertz_to_mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1127.0 * np.log1p(hertz / 700.0))

    bins = hertz_to_mel(np.linspace(0.0, spec.sampling_rate / 2, spec.fft_length // 2 + 1))[:, None]
    lowest, highest = hertz_to_mel(np.array([spec.f_min, spec.f_max]))
    edges = np.linspace(lowest, highest, spec.n_mels + 2)
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(rise, fall))
    filters[0] = 0.0
    return np.asarray(filters, dtype=np.float32)


def pack_patches(sounds: list[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sounds of (P_i, 1, frames, mels) → one batch without padding: patches (ΣP, 1, frames, mels), weights (B, ΣP).

    `weights @ features` is then each sound's mean over its own patches, so sounds of any length share a model call.
    """
    lengths = [len(sound) for sound in sounds]
    weights = np.zeros((len(sounds), sum(lengths)), np.float32)
    start = 0
    for row, length in enumerate(lengths):
        weights[row, start : start + length] = 1.0 / length
        start += length
    return np.concatenate(sounds), weights
