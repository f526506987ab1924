"""A sound file becomes a checked mono waveform at the tower's rate; `sounds` goes on from there.

libsndfile reads most sounds. PyAV, where it is installed, reads AAC, AMR, the containers of telephones and browsers,
and what else libsndfile has no codec for. A sound is decoded and resampled block by block, and is never held at its own
rate.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from service.contract import containers
from service.contract.containers import sound_demuxer_of
from service.contract.errors import BadMedia, InputError, MediaTooLarge, UnsupportedMedia, check_bytes
from service.contract.lengths import goes_on, is_ambisonic, is_disguised, late_start, mended
from service.contract.sounds import Waveform, gathered
from service.contract.structure import is_picture, is_sound

FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU"})
_NO_SOUND = "not a sound in a format that is read here (WAV, FLAC, OGG, MP3, AAC, M4A …)"
_CORRUPT = "the sound is truncated or corrupt"
_SAMPLING_RATES = range(1_000, 768_001)
_LOUDEST = 1e12  # far past any scale that a float file is written in, far below where a float32 spectrum overflows
_FAR_ABOVE_FULL = 16.0
"""Peak past which a float file is in the scale of integers, and not merely too loud."""
_INTEGER_SCALES = (2.0**7, 2.0**15, 2.0**23, 2.0**31)
_SILENT = 1e-4
"""Energy, as a part of the loudest channel's, below which a channel has no part in the mean: 40 dB."""
_MOST_DAMAGED = 0.1
"""Part of a file's packets that may be damaged for the others to be heard."""
_BLOCK_FRAMES = 65_536
_UNKNOWN_FRAMES = 2**62
"""A FLAC that was streamed states no length, and libsndfile gives more than this for it."""
T = TypeVar("T")


@dataclass(frozen=True)
class AudioLimits:
    max_bytes: int = 45_000_000
    max_seconds: float = 1_800.0
    max_decoded_bytes: int = 2**30
    """Of the decoded float32 samples, all channels together, at the file's own rate: work, for they are not held."""
    max_channels: int = 8

    def check_channels(self, count: int) -> None:
        """Raises MediaTooLarge."""
        if count > self.max_channels:
            raise MediaTooLarge(f"the sound has {count:,} channels, more than the {self.max_channels:,} that are read")

    def check_length(self, frames: int, rate: int, channels: int) -> None:
        """Raises MediaTooLarge."""
        if frames > self.max_seconds * rate:
            raise MediaTooLarge(f"the sound is longer than the {self.max_seconds:,g} s of ISTHMUS_MAX_AUDIO_SECONDS")
        if 4 * frames * channels > self.max_decoded_bytes:
            raise MediaTooLarge(
                f"the sound is too large decoded: more than the {self.max_decoded_bytes:,} bytes that are read"
            )


class _File(io.BytesIO):
    """Stays where it is when a damaged file sends its decoder to before its start: what a callback of a C
    library raises reaches nobody, and is printed."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def decode_audio(data: bytes, sampling_rate: int, limits: AudioLimits = AudioLimits()) -> Waveform:
    """Decode a sound file to a mono float32 waveform (samples,) at `sampling_rate` Hz, nominally in [-1, 1].

    The rate is converted by soxr (high quality). Channels are averaged, but for silent ones; of channels that cancel
    each other out the loudest is heard, of an ambisonic file its W. Floats in the scale of integers are scaled. The
    header's claims are checked before memory is taken, and the samples are counted as they arrive, so a header that
    lies cannot get past a limit.

    Raises UnsupportedMedia, MediaTooLarge, or BadMedia (corrupt, no samples, not finite). A FLAC that ends early
    is corrupt; of other sounds that do, what is there is decoded, as players do.
    """
    return hear(data, sampling_rate, limits, gathered)[0]


def hear(
    data: bytes, sampling_rate: int, limits: AudioLimits, take: Callable[[Iterable[Waveform], int], T]
) -> tuple[T, bool]:
    """Give a sound to `take`, block by block as it is decoded. Return what `take` makes of it, and whether the file
    ends before the sound does or a part of it is damaged.

    `take` gets the blocks, mono at `sampling_rate`, all of which it has to go through, as often as it likes, and about
    how many samples they have, by the header. It is called again, and its first answer dropped, where only the whole
    sound tells how its channels are to be mixed. Raises as decode_audio does.
    """
    recording = Recording(data, sampling_rate, limits)
    mix = recording.mix
    value = take(recording, recording.about)
    if recording.mix != mix:
        del value  # its memory is needed
        value = take(recording, recording.about)
    return value, recording.cut


class Recording:
    """Iterates over a sound file's blocks, mono at `sampling_rate`: they are decoded anew each time.

    Raises as decode_audio does, here and in going through them.
    """

    def __init__(self, data: bytes, sampling_rate: int, limits: AudioLimits = AudioLimits()) -> None:
        check_bytes("sound", len(data), limits.max_bytes, "ISTHMUS_MAX_BODY_BYTES")
        self._data, self._rate, self._limits = data, sampling_rate, limits
        self.mix = Mix()
        """How the channels become one; another one from the end of the first time on, where only that tells."""
        self.cut = False
        """Whether the file ends early, or a part of it is damaged; known once they have been gone through."""
        self.about = 0
        """How many samples there are, about, by the header."""
        self._begun: Iterator[Waveform] | None = self._begin()

    def __iter__(self) -> Iterator[Waveform]:
        blocks, self._begun = self._begun or self._begin(), None
        return blocks

    def _begin(self) -> Iterator[Waveform]:
        blocks = self._blocks()
        next(blocks)
        return blocks

    def _blocks(self) -> Iterator[Waveform]:
        """Yield nothing, once the file is open, and then its blocks."""
        with _opened(self._data, self._limits) as stream:
            if stream.first_channel_only:
                self.mix = Mix((0,))
            frames = max(0, min(stream.frames, self._limits.max_seconds * stream.rate))
            self.about = int(frames * self._rate / stream.rate)
            stream.measure = Measure(stream.channels)
            yield np.zeros(0, np.float32)
            yield from resampled(_mono(stream, self.mix, self._limits), stream.rate, self._rate)
            if not stream.measure.frames:
                raise BadMedia("the sound has no samples")
            self.cut = stream.cut
            if not stream.first_channel_only:
                self.mix = stream.measure.mix(stream.floating)


def seconds_of(data: bytes, limits: AudioLimits = AudioLimits()) -> float:
    """Return how long a sound is by its header; 0 where it does not say. Raises as decode_audio does."""
    with _opened(data, limits) as stream:
        return stream.frames / stream.rate if 0 < stream.frames < _UNKNOWN_FRAMES else 0.0


@dataclass(frozen=True)
class Mix:
    """Says how channels become one."""

    channels: tuple[int, ...] | None = None
    """Those that are averaged; None: all."""
    full: float = 1.0
    """The sample that is full scale."""

    def apply(self, block: NDArray[np.float32], mean: Waveform) -> Waveform:
        """Return a block (frames, channels), whose mean over the channels is given, as one channel."""
        channel = mean
        if self.channels is not None:
            chosen_channels = block[:, list(self.channels)]
            channel = chosen_channels[:, 0] if len(self.channels) == 1 else chosen_channels.mean(axis=1)
        return channel if self.full == 1.0 else channel / np.float32(self.full)


class Measure:
    """Collects what is known of a sound's channels once all of it has been heard."""

    def __init__(self, channels: int) -> None:
        self.frames, self.peak = 0, 0.0
        self._energies, self._of_mean = np.zeros(channels), 0.0

    def take(self, block: NDArray[np.float32]) -> Waveform:
        """Note a block, and return its mean over the channels."""
        self.frames += len(block)
        peak = float(max(block.max(initial=0.0), -block.min(initial=0.0)))  # NaN where there is one
        if not peak <= _LOUDEST:  # true for NaN too
            raise BadMedia("the sound has samples that are not finite, or absurdly large")
        self.peak = max(self.peak, peak)
        if block.shape[1] == 1:
            return block[:, 0]
        # Products of matrices: NumPy's sums over a few channels at a time are eight times slower.
        self._energies += np.ones(len(block), np.float32) @ np.square(block)
        mean: Waveform = block @ np.full(block.shape[1], 1 / block.shape[1], np.float32)
        self._of_mean += float(np.einsum("i,i->", mean, mean, dtype=np.float64))
        return mean

    def mix(self, floating: bool) -> Mix:
        full = 1.0
        if floating and self.peak > _FAR_ABOVE_FULL:
            full = next((scale for scale in _INTEGER_SCALES if self.peak <= 1.5 * scale), self.peak)
        count, loudest = len(self._energies), float(self._energies.max(initial=0.0))
        if not loudest:
            return Mix(None, full)
        heard = np.flatnonzero(self._energies >= _SILENT * loudest)
        # Channels that have nothing to do with each other leave a mean of 1 / n of their energy: less is a loss.
        of_mean = self._of_mean * (count / len(heard)) ** 2
        if len(heard) > 1 and of_mean < 0.5 * float(self._energies[heard].mean()) / len(heard):
            return Mix((int(self._energies.argmax()),), full)
        return Mix(None if len(heard) == count else tuple(heard.tolist()), full)


@dataclass(eq=False)
class _Stream:
    """Holds an open sound: what it says of itself, and its blocks (frames, channels) at its own rate."""

    rate: int
    channels: int
    frames: int
    """By the header; 0, or very many, where that is not known."""
    blocks: Iterator[NDArray[np.float32]]
    floating: bool = False
    """Whether samples may lie far outside [-1, 1]."""
    first_channel_only: bool = False
    cut: bool = False
    measure: Measure = field(default_factory=lambda: Measure(1))


def _mono(stream: _Stream, mix: Mix, limits: AudioLimits) -> Iterator[Waveform]:
    for block in stream.blocks:
        limits.check_length(stream.measure.frames + len(block), stream.rate, stream.channels)
        yield mix.apply(block, stream.measure.take(block))


def resampled(blocks: Iterator[Waveform], rate: int, new_rate: int) -> Iterator[Waveform]:
    """Resample block by block, to the same bits as all at once."""
    if rate == new_rate:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate, new_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


@contextmanager
def _opened(data: bytes, limits: AudioLimits) -> Iterator[_Stream]:
    demuxer = sound_demuxer_of(data)
    if containers.is_known(data):
        with _opened_by_pyav(data, demuxer or "", limits) as stream:
            stream.cut = mended(data)[1]
            yield stream
        return
    if not is_sound(data):
        start = None if is_picture(data) else late_start(data)
        if start is None:
            raise containers.refusal(data, _NO_SOUND)
        data, demuxer = data[start:], "mp3"
    complete, cut = mended(data)
    source = None
    if not (goes_on(data) or is_disguised(data)):
        with suppress(Exception):  # what libsndfile cannot open, FFmpeg perhaps can
            source = _Forward(_File(complete))
    if source is None:
        with _opened_after_all(complete, demuxer, limits) as stream:
            stream.cut = cut
            yield stream
        return
    with source:
        if source.format not in FORMATS:
            raise UnsupportedMedia(_NO_SOUND)
        limits.check_channels(source.channels)
        if source.samplerate not in _SAMPLING_RATES:
            raise BadMedia("the sound states an impossible sampling rate")
        if source.format.startswith("WAV"):  # where the length is that of the bytes
            limits.check_length(source.frames, source.samplerate, source.channels)
        yield _Stream(
            source.samplerate,
            source.channels,
            source.frames,
            _read(source),
            floating=source.subtype in ("FLOAT", "DOUBLE"),
            first_channel_only=is_ambisonic(data),
            cut=cut,
        )


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """Read from its beginning to its end: where the length is not known, nothing can be sought."""

    def seekable(self) -> bool:
        return bool(self.frames < _UNKNOWN_FRAMES and super().seekable())


def _read(source: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    try:
        while len(block := source.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            yield block
    except soundfile.SoundFileError:
        raise BadMedia(_CORRUPT) from None


@contextmanager
def _opened_after_all(data: bytes, demuxer: str | None, limits: AudioLimits) -> Iterator[_Stream]:
    """Open what begins as a sound and libsndfile cannot open: a damaged file, or one of a codec that it has not."""
    weak = data[:1] == b"\xff"  # a mark that many other files begin with
    try:
        with _opened_by_pyav(data, demuxer or "", limits) as stream:
            yield stream
    except MediaTooLarge:
        raise
    except UnsupportedMedia as error:
        # Where PyAV is missing a damaged file cannot be told from one that it could read.
        raise (_unlike_a_sound(data) if weak else error) from None
    except InputError:
        raise (_unlike_a_sound(data) if weak else BadMedia(_CORRUPT)) from None


def _unlike_a_sound(data: bytes) -> UnsupportedMedia:
    name = containers.name_of_other(data)
    return UnsupportedMedia(_NO_SOUND if name is None else f"{_NO_SOUND}. This is {name}")


@contextmanager
def _opened_by_pyav(data: bytes, demuxer: str, limits: AudioLimits) -> Iterator[_Stream]:
    with containers.reading(data, demuxer) as source:
        if not source.streams.audio:
            raise UnsupportedMedia("there is no sound in it")
        track = containers.sound_tracks(source)[0]
        if track.codec_context is None:
            raise UnsupportedMedia(containers.NO_CODEC)
        limits.check_channels(track.codec_context.channels)
        length = track.duration * track.time_base if track.duration and track.time_base else 0
        frames = _Frames(source, track, limits)
        if frames.rate not in _SAMPLING_RATES:
            raise BadMedia("the sound states an impossible sampling rate")
        # A raw stream of AAC guesses its length by its first frames.
        stated_frames = 0 if demuxer == "aac" else int(length * frames.rate)
        stream = _Stream(frames.rate, frames.channels, stated_frames, iter(()))
        stream.blocks = frames.blocks(stream)
        yield stream


class _Frames:
    """Decodes a track's frames, from the first that can be decoded on, as blocks of the layout and rate of that one."""

    def __init__(self, source: Any, track: Any, limits: AudioLimits) -> None:
        import av

        self._limits, self._packets, self._damaged, self._error = limits, 0, 0, av.error.FFmpegError
        self._frames = self._decoded(source, track)
        self._first = next(self._frames, None)
        if self._first is None:
            raise BadMedia(containers.CORRUPT)
        self.rate, self.channels = int(self._first.sample_rate), int(self._first.layout.nb_channels)
        limits.check_channels(self.channels)
        self._av = av

    def blocks(self, stream: _Stream) -> Iterator[NDArray[np.float32]]:
        assert self._first is not None
        yield from containers.planar(self._av, self._checked(), self._first.layout, self.rate)
        if self._damaged > max(1, _MOST_DAMAGED * self._packets):
            raise BadMedia(containers.CORRUPT)
        stream.cut = stream.cut or self._damaged > 0

    def _checked(self) -> Iterator[Any]:
        yield self._first
        for frame in self._frames:
            self._limits.check_channels(frame.layout.nb_channels)
            yield frame

    def _decoded(self, source: Any, track: Any) -> Iterator[Any]:
        packets = source.demux(track)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except self._error:  # the file breaks off in the middle of a packet
                self._damaged += 1
                return
            self._packets += 1
            try:
                yield from packet.decode()
            except self._error:
                self._damaged += 1
