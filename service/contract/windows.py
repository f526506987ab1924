"""The front ends of AST, CLAP and Whisper turn a waveform into log-mel windows of one fixed size.

A window is what the transformers feature extractor of the same model makes of the same stretch of sound. A sound that
is longer than the model's window is cut into windows, whose vectors are averaged by how much of the sound each holds.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from service.contract.sounds import AudioPreprocessing, Growing, Sound, Waveform, cut, shares_of

_BLOCK_FRAMES = 1024

Doubles = NDArray[np.float64]


class LogMelWindows(AudioPreprocessing):
    """Cuts a log-mel spectrum into long windows, each a row of the tower: float32 (windows, channels, frames, n_mels).

    Each frame of `window_length` samples, every `hop_length`, is freed of its mean (`remove_dc`), pre-emphasised,
    multiplied by a Hann window and zero-padded to `fft_length`; its power spectrum goes through `n_mels` triangular
    filters and is not less than `floor`. The logarithm is cut off at `dynamic_range` below the window's loudest value,
    and (x - mean) / std is taken. The defaults are those of Whisper (arXiv 2212.04356).
    """

    kind: Literal["log_mel_windows"] = "log_mel_windows"
    samples: int = Field(default=480_000, gt=0, le=4_000_000)
    """Of one window."""
    frames: int = Field(default=3_000, gt=0, le=16_384)
    """That the tower takes of a window: the first of those that its samples give."""
    window_length: int = Field(default=400, gt=1, le=16_384)
    hop_length: int = Field(default=160, gt=0, le=16_384)
    fft_length: int = Field(default=400, gt=0, le=16_384)
    window: Literal["hann", "hann_symmetric"] = "hann"
    centred: bool = True
    """Frames are centred on multiples of the hop, both ends mirrored; else the first begins at the first sample."""
    remove_dc: bool = False
    preemphasis: float = Field(default=0.0, ge=0.0, lt=1.0)
    preemphasis_of: Literal["frame", "sound"] = "frame"
    """sound: each sample takes that share of the one before it off once, before frames are cut; the first is left
    out."""
    n_mels: int = Field(default=80, gt=0, le=512)
    f_min: float = Field(default=0.0, ge=0)
    f_max: float = Field(default=8_000.0, gt=0)
    mel_scale: Literal["htk", "slaney", "kaldi"] = "slaney"
    """kaldi: HTK's scale, with filters that are triangles on it and not in hertz."""
    mel_norm: Literal["none", "slaney"] = "slaney"
    logarithm: Literal["ln", "log10", "db"] = "log10"
    floor: float = Field(default=1e-10, gt=0)
    floor_by: Literal["maximum", "sum"] = "maximum"
    """sum: the floor is added to the power, which is then not less than it either."""
    dynamic_range: float | None = Field(default=8.0, gt=0)
    mean: float = -4.0
    std: float = Field(default=4.0, gt=0)
    short: Literal["silence", "repeat", "repeat_whole", "zeros"] = "silence"
    """What fills the window of a shorter sound: silence; the sound again, cut off at the end or as often as it fits
    whole; or, in the features before they are scaled, zeros."""
    long: Literal["windows", "fusion"] = "windows"
    """fusion: a sound of more than one window is one row of four channels: all of it, shrunk to a window, and the
    window in the middle of its first, second and last third. That of a shorter sound is four times the same."""
    lengths: bool = True
    """Whether the tower is told how many frames of a window are the sound's own."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_spectrum(self.fft_length, self.window_length, self.f_min, self.f_max, self.sampling_rate)
        if self.samples < self.window_length:
            raise ValueError(f"samples {self.samples} are fewer than window_length {self.window_length}")
        samples = self.samples - (self.preemphasis_of == "sound")
        most = 1 + (samples - (0 if self.centred else self.window_length)) // self.hop_length
        if self.frames > most:
            raise ValueError(f"frames {self.frames} are more than the {most} that {self.samples} samples give")
        if self.long == "fusion" and self.lengths:
            raise ValueError("a fusion of a whole sound has no length of its own: lengths must be false")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("patches", "lengths", "weights") if self.lengths else ("patches", "weights")

    @property
    def channels(self) -> int:
        return 4 if self.long == "fusion" else 1

    def rows_of_blocks(self, blocks: Iterable[Waveform], about: int) -> Sound:
        # Frames that are not centred reach into the next window by what they overlap.
        hop = self.samples - (0 if self.centred else max(0, self.window_length - self.hop_length))
        if self.long == "fusion":
            blocks, longer = _peeked(blocks, self.samples)
            if longer:
                fused = self._scaled(_fused(_whole_spectrum(blocks, about, self), self))
                return Sound(fused[None], shares_of([1]), np.array([self.frames], np.int64))
        rows = Growing(about // hop + 2, self.channels, self.frames, self.n_mels)
        lengths = []
        for stretch in cut(blocks, self.samples, hop, self.window_length):
            rows.append(self._scaled(self._window(stretch))[None, None])
            lengths.append(len(stretch))
        heard = [min(max(-(-length // self.hop_length), 1), self.frames) for length in lengths]
        return Sound(rows.whole, shares_of([min(length, hop) for length in lengths]), np.asarray(heard, np.int64))

    def heard(self, rows: NDArray[np.float32]) -> int:
        return self.samples

    def _window(self, stretch: Waveform) -> NDArray[np.float32]:
        """Return (frames, n_mels) of at most a window's samples, not yet scaled."""
        if self.short == "zeros":
            length = max(len(stretch), self.window_length)
            mel = log_mel(np.pad(stretch, (0, length - len(stretch))), self)[: self.frames]
            return np.pad(mel, ((0, self.frames - len(mel)), (0, 0)))
        if self.short != "silence" and 0 < len(stretch) < self.samples:
            stretch = np.tile(stretch, self.samples // len(stretch) + (self.short == "repeat"))[: self.samples]
        # What follows is silence, of which no spectrum need be taken: half a minute for a bark, of Whisper.
        length = min(self.samples, len(stretch) + self.window_length + self.hop_length)
        mel = log_mel(np.pad(stretch, (0, length - len(stretch))), self)[: self.frames]
        silence = _logarithm(np.array([self.floor]), self.logarithm).astype(np.float32)[0]
        mel = np.pad(mel, ((0, self.frames - len(mel)), (0, 0)), constant_values=silence)
        return np.maximum(mel, mel.max() - np.float32(self.dynamic_range)) if self.dynamic_range else mel

    def _scaled(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return (rows - np.float32(self.mean)) / np.float32(self.std)


def log_mel(waveform: Waveform, spec: LogMelWindows) -> NDArray[np.float32]:
    """Return the logarithm of the mel powers (frames, n_mels) of a waveform (samples,) of at least a frame, in float64
    on the way."""
    if spec.preemphasis_of == "sound":
        waveform = waveform[1:] - np.float32(spec.preemphasis) * waveform[:-1]
    if spec.centred:
        waveform = np.pad(waveform, spec.window_length // 2, mode="reflect")
    features = list(_features((waveform,), spec))
    return features[0] if len(features) == 1 else np.concatenate(features)


def _features(blocks: Iterable[Waveform], spec: LogMelWindows) -> Iterator[NDArray[np.float32]]:
    """Yield the features of a waveform in blocks, ready to be cut into frames: (_BLOCK_FRAMES, n_mels) at a time."""
    for frames in framed(blocks, spec.window_length, spec.hop_length):
        yield _mels(frames, spec)


def _mels(frames: NDArray[np.float32], spec: LogMelWindows) -> NDArray[np.float32]:
    """Turn samples (n, window_length) into features (n, n_mels)."""
    window = hann(spec.window_length, spec.window == "hann")
    mel = mel_filters(
        spec.n_mels, spec.f_min, spec.f_max, spec.fft_length, spec.sampling_rate, spec.mel_scale, spec.mel_norm
    )
    block = frames.astype(np.float64)
    if spec.remove_dc:
        block -= block.mean(axis=1, keepdims=True)
    if spec.preemphasis and spec.preemphasis_of == "frame":
        block[:, 1:] -= spec.preemphasis * block[:, :-1]
        block[:, 0] *= 1 - spec.preemphasis
    spectrum = np.fft.rfft(block * window, n=spec.fft_length)
    power = spectrum.real**2 + spectrum.imag**2
    mels = power @ mel
    mels = mels + spec.floor if spec.floor_by == "sum" else np.maximum(mels, spec.floor)
    return _logarithm(mels, spec.logarithm).astype(np.float32)


def _logarithm(power: Doubles, kind: str) -> Doubles:
    if kind == "ln":
        return np.asarray(np.log(power))
    return np.asarray(np.log10(power) * (10.0 if kind == "db" else 1.0))


def _peeked(blocks: Iterable[Waveform], samples: int) -> tuple[Iterator[Waveform], bool]:
    """Return the blocks, and whether there are more than so many samples in them."""
    following, first, count = iter(blocks), list[Waveform](), 0
    for block in following:
        first.append(block)
        count += len(block)
        if count > samples:
            break
    return itertools.chain(first, following), count > samples


def _whole_spectrum(blocks: Iterable[Waveform], about: int, spec: LogMelWindows) -> NDArray[np.float32]:
    """Do as `log_mel` with a sound of more than a window in blocks: the waveform is not held."""
    if spec.preemphasis_of == "sound":
        blocks = _emphasised(blocks, np.float32(spec.preemphasis))
    if spec.centred:
        blocks = _mirrored(blocks, spec.window_length // 2)
    mel = Growing(about // spec.hop_length + 2, spec.n_mels)
    for features in _features(blocks, spec):
        mel.append(features)
    return mel.whole


def _emphasised(blocks: Iterable[Waveform], share: np.float32) -> Iterator[Waveform]:
    before = np.zeros(0, np.float32)
    for block in filter(len, blocks):
        samples = np.concatenate([before, block])
        before = samples[-1:]
        yield samples[1:] - share * samples[:-1]


def _mirrored(blocks: Iterable[Waveform], edge: int) -> Iterator[Waveform]:
    """Yield more than `edge` samples, with so many mirrored at both ends."""
    samples, is_started = np.zeros(0, np.float32), False
    for block in blocks:
        samples = np.concatenate([samples, block])
        if len(samples) > edge and not is_started:
            yield samples[edge:0:-1]
            is_started = True
        if len(samples) > edge + 1:
            yield samples[: -edge - 1]
            samples = samples[-edge - 1 :]
    yield samples
    yield samples[-2::-1]


def _fused(mel: NDArray[np.float32], spec: LogMelWindows) -> NDArray[np.float32]:
    """Return (4, frames, n_mels) of a longer spectrum: the fusion of CLAP (arXiv 2211.06687).

    CLAP draws the place of each window from a third of the places at random; here it is the middle one.
    """
    if len(mel) <= spec.frames:
        return np.stack([mel] * 4)
    thirds = np.array_split(np.arange(len(mel) - spec.frames + 1), 3)
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
    # Linear interpolation between the centres of frames, in torch's own float32: bilinear, corners not aligned.
    half, scale = np.float32(0.5), np.float32(len(mel)) / np.float32(spec.frames)
    at = np.maximum((np.arange(spec.frames, dtype=np.float32) + half) * scale - half, 0)
    low = np.minimum(at.astype(np.int64), len(mel) - 1)
    high, part = np.minimum(low + 1, len(mel) - 1), (at - low.astype(np.float32))[:, None]
    shrunk = mel[low] * (1 - part) + mel[high] * part
    return np.stack([shrunk, *(mel[start : start + spec.frames] for start in starts)])


def check_spectrum(fft_length: int, window_length: int, f_min: float, f_max: float, sampling_rate: int) -> None:
    """Check that a window fits into the transform, and the filters below half the rate. Raises ValueError."""
    if fft_length < window_length:
        raise ValueError(f"fft_length {fft_length} is shorter than window_length {window_length}")
    if not f_min < f_max <= sampling_rate / 2:
        raise ValueError(f"f_min {f_min:g} and f_max {f_max:g} are not a band below half the rate")


def framed(blocks: Iterable[Waveform], length: int, hop: int) -> Iterator[NDArray[np.float32]]:
    """Yield the frames of a waveform that comes in blocks, _BLOCK_FRAMES at a time: (n, length) samples, a view."""
    overlap, step = max(0, length - hop), _BLOCK_FRAMES * hop
    for stretch in cut(blocks, overlap + step, step, length - overlap):
        yield np.lib.stride_tricks.sliding_window_view(stretch, length)[::hop]


@functools.lru_cache(maxsize=8)
def hann(length: int, periodic: bool = True) -> Doubles:
    """Return a Hann window (length,)."""
    return np.asarray(np.hanning(length + 1)[:-1] if periodic else np.hanning(length))


@functools.lru_cache(maxsize=8)
def mel_filters(
    n_mels: int, f_min: float, f_max: float, fft_length: int, sampling_rate: int, scale: str, norm: str = "none"
) -> Doubles:
    """Return triangular filters (fft_length // 2 + 1, n_mels)."""
    lowest, highest = _to_mel(np.array([f_min, f_max], np.float64), scale)
    edges = np.linspace(lowest, highest, n_mels + 2)
    bins = np.linspace(0.0, sampling_rate / 2, fft_length // 2 + 1)
    hertz = _to_hertz(edges, scale)
    places, corners = (_to_mel(bins, "kaldi"), edges) if scale == "kaldi" else (bins, hertz)
    slopes = corners - places[:, None]
    widths = np.diff(corners)
    filters = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    if norm == "slaney":  # of one area each
        filters *= 2.0 / (hertz[2:] - hertz[:-2])
    return np.asarray(filters)


def _to_mel(hertz: Doubles, scale: str) -> Doubles:
    if scale == "htk":
        return np.asarray(2595.0 * np.log10(1.0 + hertz / 700.0))
    if scale == "kaldi":
        return np.asarray(1127.0 * np.log(1.0 + hertz / 700.0))
    # Linear below 1 kHz, logarithmic above (Slaney's Auditory Toolbox, 1998).
    above = 15.0 + np.log(np.maximum(hertz, 1000.0) / 1000.0) * (27.0 / np.log(6.4))
    return np.where(hertz >= 1000.0, above, 3.0 * hertz / 200.0)


def _to_hertz(mel: Doubles, scale: str) -> Doubles:
    if scale == "htk":
        return np.asarray(700.0 * (10.0 ** (mel / 2595.0) - 1.0))
    if scale == "kaldi":
        return np.asarray(700.0 * (np.exp(mel / 1127.0) - 1.0))
    above = 1000.0 * np.exp(np.log(6.4) / 27.0 * (np.maximum(mel, 15.0) - 15.0))
    return np.where(mel >= 15.0, above, 200.0 * mel / 3.0)
