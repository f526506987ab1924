"""bytes → checked mono waveform at the tower's rate; `sounds` goes on from there."""

import io
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia
from service.contract.sounds import Waveform
from service.contract.structure import is_sound

FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU"})
_NO_SOUND = "not a sound in a format that is read here (WAV, FLAC, OGG, MP3 …)"
_SAMPLING_RATES = range(1_000, 768_001)
_LOUDEST = 1e12  # far past any scale that a float file is written in, far below where a float32 spectrum overflows


_SPARE = 4_096
"""Samples of room beside those that a header states: a resampler rounds, and has a delay."""


@dataclass(frozen=True)
class AudioLimits:
    max_bytes: int = 25_000_000
    max_seconds: float = 600.0
    max_decoded_bytes: int = 256 * 2**20
    """Of the decoded float32 samples, all channels together, at the file's own rate."""
    max_channels: int = 8


class _File(io.BytesIO):
    """One that stays where it is when a damaged file sends its decoder to before its start: what a callback of a C
    library raises reaches nobody, and is printed."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


class _Growing:
    """Samples that arrive in blocks, held once: there is room for what a header states, and more where it lies."""

    def __init__(self, room: int) -> None:
        self._samples, self._held = np.empty(room, np.float32), 0

    def append(self, block: Waveform) -> None:
        after = self._held + len(block)
        if after > len(self._samples):
            self._samples = np.concatenate([self._samples[: self._held], np.empty(max(after, self._held), np.float32)])
        self._samples[self._held : after] = block
        self._held = after

    @property
    def whole(self) -> Waveform:
        """A view would hold what a header states and the file has not."""
        samples = self._samples[: self._held]
        return samples if 2 * self._held > len(self._samples) else samples.copy()


def decode_audio(data: bytes, sampling_rate: int, limits: AudioLimits = AudioLimits()) -> Waveform:
    """Decode a sound file to a mono float32 waveform (samples,) at `sampling_rate` Hz, nominally in [-1, 1].

    Channels are averaged and the rate is converted by soxr (high quality). The header's claims are checked before
    memory is taken, and the samples are counted as they arrive, so a header that lies cannot get past a limit.

    Raises UnsupportedMedia, MediaTooLarge, or BadMedia (corrupt, no samples, not finite). A FLAC that ends early
    is corrupt; of a WAV, OGG or MP3 that does, what is there is decoded, as players do.
    """
    if len(data) > limits.max_bytes:
        raise MediaTooLarge(f"the sound is larger than {limits.max_bytes} bytes")
    if not is_sound(data):
        raise UnsupportedMedia(_NO_SOUND)
    try:
        source = soundfile.SoundFile(_File(data))
    except Exception:
        raise UnsupportedMedia(_NO_SOUND) from None
    with source:
        if source.format not in FORMATS:
            raise UnsupportedMedia(_NO_SOUND)
        if source.channels > limits.max_channels:
            raise MediaTooLarge(f"the sound has more than {limits.max_channels} channels")
        if source.samplerate not in _SAMPLING_RATES:
            raise BadMedia("the sound states an impossible sampling rate")
        most_frames = min(
            int(limits.max_seconds * source.samplerate), limits.max_decoded_bytes // (4 * source.channels)
        )
        frames = 0
        mono = _Growing(int(max(0, min(source.frames, most_frames)) * sampling_rate / source.samplerate) + _SPARE)
        # Block by block, to the same bits as all at once: a long sound is never held at its own rate.
        rates = (source.samplerate, sampling_rate)
        resampler = soxr.ResampleStream(*rates, 1, dtype="float32", quality="HQ") if rates[0] != rates[1] else None
        try:
            while len(block := source.read(65_536, dtype="float32", always_2d=True)):
                frames += len(block)
                if frames > most_frames:
                    raise MediaTooLarge(f"the sound is longer than {limits.max_seconds:g} s, or too large decoded")
                if not np.all(np.abs(block) <= _LOUDEST):  # false for NaN too
                    raise BadMedia("the sound has samples that are not finite, or absurdly large")
                one = block[:, 0] if source.channels == 1 else block.mean(axis=1)
                mono.append(one if resampler is None else resampler.resample_chunk(one))
        except soundfile.SoundFileError:
            raise BadMedia("the sound is truncated or corrupt") from None
    if not frames:
        raise BadMedia("the sound has no samples")
    if resampler is not None:
        mono.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return mono.whole
