"""A video file → sampled frames as the image tower takes them, and its sound track as the audio tower hears it.

Needs PyAV, which is optional (`pip install 'isthmus[video]'`). A frame goes the way of an image from its RGB on, so
that a video of one frame is that image; the sound goes the way of a sound file from its samples on.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray
from PIL import Image

from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia
from service.contract.images import ImagePreprocessing, preprocess_image
from service.contract.sounds import STRETCH_S, Waveform, stretches

MISSING = "videos are read where PyAV is installed: pip install 'isthmus[video]'"
NO_VIDEO = "not a video in a format that is read here (MP4, MOV, MKV, WebM, AVI, MPEG-TS, FLV)"
NO_CODEC = "the video's codec is not one that is read here"
_MOST_PACKETS = 2_000_000
_THROUGH = 3_000
"""Packets up to which a video is decoded from its beginning to its end."""
_MOST_DECODED = 20_000
"""Frames that are decoded to come to those that are wanted: far past what ten minutes need, short of an attack."""


@dataclass(frozen=True)
class VideoLimits:
    max_bytes: int = 100_000_000
    max_seconds: float = 600.0
    max_pixels: int = 9_000_000
    """Of a frame."""
    max_channels: int = 8
    frames: int = 16
    """That are sampled, at most; of a video of fewer seconds, one a second."""


@dataclass(frozen=True)
class Stretch:
    """A part of a video, from one second to another, and what stands for it."""

    start: float
    end: float
    value: NDArray[np.float32]
    """Pixels (3, H, W) of a frame from its middle, or samples."""
    cost: float
    """Pixels that were decoded for it, or seconds."""


@dataclass(frozen=True)
class Clip:
    seconds: float
    frames: list[Stretch]
    sounds: list[Stretch]


@dataclass(frozen=True)
class Claims:
    """What a file says of itself."""

    frames: int
    """That are sampled."""
    pixels: int
    """Of each."""
    sounds: int
    """Stretches."""
    seconds: float
    """Of sound."""


@dataclass(frozen=True)
class _Extent:
    start: float
    seconds: float
    packets: int


def container_of(data: bytes) -> str | None:
    """FFmpeg's name of the container, by its first bytes; None where it is none of those that are read.

    The demuxer is always named: FFmpeg's own guess would also read playlists, which name other files and addresses.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"FLV\x01":
        return "flv"
    if len(data) > 376 and data[0] == data[188] == data[376] == 0x47:
        return "mpegts"
    return None


def read_video(
    data: bytes, spec: ImagePreprocessing | None, sampling_rate: int | None, limits: VideoLimits = VideoLimits()
) -> Clip:
    """Sample frames, one from the middle of each of equally long stretches, and cut up the sound.

    Without `spec` the frames are left out, without `sampling_rate` the sound. What the file claims of itself is checked
    first, and each frame and block of sound again before memory is taken for it: one frame is held at a time.

    Raises UnsupportedMedia (no PyAV, no such container, a codec that is not known), MediaTooLarge, BadMedia.
    """
    frames: list[Stretch] = []
    sounds: list[Stretch] = []
    with _read(data, limits) as (av, container):
        with _opened(av, data, container) as source:
            extent = _extent(source, limits)
        if spec is not None:
            with _opened(av, data, container) as source:
                frames = list(_frames(source, spec, extent, limits)) if source.streams.video else []
        if sampling_rate is not None:
            with _opened(av, data, container) as source:
                sounds = _sounds(av, source, sampling_rate, extent, limits) if source.streams.audio else []
    if not frames and not sounds:
        raise BadMedia("the video has neither a picture nor a sound")
    return Clip(extent.seconds, frames, sounds)


def claims_of(data: bytes, limits: VideoLimits = VideoLimits()) -> Claims:
    """What `read_video` will come to, without decoding anything. Raises as it does."""
    with _read(data, limits) as (av, container), _opened(av, data, container) as source:
        extent = _extent(source, limits)
        pictures = [stream.codec_context for stream in source.streams.video[:1]]
        seconds = extent.seconds if source.streams.audio else 0.0
        return Claims(
            frames=_frame_count(extent, limits) if pictures else 0,
            pixels=sum(each.width * each.height for each in pictures),
            sounds=max(1, math.ceil(seconds / STRETCH_S)) if source.streams.audio else 0,
            seconds=seconds,
        )


@contextmanager
def _read(data: bytes, limits: VideoLimits) -> Iterator[tuple[Any, str]]:
    """PyAV and the name of the file's container; what PyAV raises within is raised as an InputError."""
    if len(data) > limits.max_bytes:
        raise MediaTooLarge(f"the video is larger than {limits.max_bytes} bytes")
    try:
        import av
    except ImportError:
        raise UnsupportedMedia(MISSING) from None
    container = container_of(data)
    if container is None:
        raise UnsupportedMedia(NO_VIDEO)
    try:
        yield av, container
    except av.error.DecoderNotFoundError:
        raise UnsupportedMedia(NO_CODEC) from None
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, BadMedia | MediaTooLarge | UnsupportedMedia):
            raise
        raise BadMedia("the video is truncated or corrupt") from None


def _frame_count(extent: _Extent, limits: VideoLimits) -> int:
    return max(1, min(limits.frames, round(extent.seconds)))


def _opened(av: Any, data: bytes, container: str) -> Any:
    source = av.open(io.BytesIO(data), format=container, metadata_errors="replace")
    for stream in source.streams.video:
        # The lanes of the towers have the cores.
        if stream.codec_context is not None:
            stream.codec_context.thread_count = 1
    return source


def _extent(source: Any, limits: VideoLimits) -> _Extent:
    """From when to when the packets say that there is something; nothing is decoded."""
    streams = [*source.streams.video[:1], *source.streams.audio[:1]]
    if not streams:
        raise BadMedia("the video has neither a picture nor a sound")
    if any(stream.codec_context is None for stream in streams):
        raise UnsupportedMedia(NO_CODEC)
    for stream in source.streams.video[:1]:
        _check_size(stream.codec_context.width, stream.codec_context.height, limits)
    for stream in source.streams.audio[:1]:
        if stream.codec_context.channels > limits.max_channels:
            raise MediaTooLarge(f"the video's sound has more than {limits.max_channels} channels")
    start, end, count = np.inf, -np.inf, 0
    for count, packet in enumerate(source.demux(streams)):
        if packet.pts is not None:
            at = float(packet.pts * packet.time_base)
            start, end = min(start, at), max(end, at + float((packet.duration or 0) * packet.time_base))
        if end - start > limits.max_seconds or count > _MOST_PACKETS:
            raise MediaTooLarge(f"the video is longer than {limits.max_seconds:g} s")
    if not np.isfinite(start):
        raise BadMedia("the video is truncated or corrupt")
    return _Extent(start, max(end - start, 0.0), count)


def _check_size(width: int, height: int, limits: VideoLimits) -> None:
    if width * height > limits.max_pixels:
        raise MediaTooLarge(f"the video's frames have more than {limits.max_pixels} pixels")


def _frames(source: Any, spec: ImagePreprocessing, extent: _Extent, limits: VideoLimits) -> Iterator[Stretch]:
    count = _frame_count(extent, limits)
    length = extent.seconds / count
    middles = [extent.start + (number + 0.5) * length for number in range(count)]
    # MPEG-TS has no index to seek by; and a short video is sooner gone through than sought in.
    through = extent.packets <= _THROUGH or source.format.name == "mpegts"
    for number, frame in enumerate(_gone_through(source, middles) if through else _sought(source, middles)):
        _check_size(frame.width, frame.height, limits)
        pixels = preprocess_image(_upright(frame), spec)
        yield Stretch(number * length, (number + 1) * length, pixels, frame.width * frame.height)


def _gone_through(source: Any, middles: list[float]) -> Iterator[Any]:
    """The frame that is seen at each of these moments."""
    seen, waiting = None, list(reversed(middles))
    for count, frame in enumerate(source.decode(video=0)):
        if count > _MOST_DECODED:
            raise MediaTooLarge("too much of the video would have to be decoded")
        while waiting and seen is not None and frame.time is not None and frame.time > waiting[-1]:
            yield seen
            waiting.pop()
        if not waiting:
            return
        seen = frame
    for _ in waiting if seen is not None else ():
        yield seen


def _sought(source: Any, middles: list[float]) -> Iterator[Any]:
    """The same, from the key frame before each of them on."""
    stream, decoded = source.streams.video[0], 0
    for middle in middles:
        source.seek(max(int(middle / stream.time_base), 0), stream=stream)
        seen = None
        for frame in source.decode(stream):
            decoded += 1
            if decoded > _MOST_DECODED:
                raise MediaTooLarge("too much of the video would have to be decoded")
            if seen is not None and frame.time is not None and frame.time > middle:
                break
            seen = frame
        if seen is not None:
            yield seen


def _upright(frame: Any) -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    # A telephone writes how it was held; FFmpeg counts against the clock, as Pillow does.
    turned = round(frame.rotation / 90) % 4
    return image.rotate(90 * turned, expand=True) if turned else image


def _sounds(av: Any, source: Any, sampling_rate: int, extent: _Extent, limits: VideoLimits) -> list[Stretch]:
    planes = av.AudioResampler(format="fltp")
    resampler: Any = None
    blocks: list[Waveform] = []
    began, frames, most = 0.0, 0, 0.0
    for frame in source.decode(source.streams.audio[0]):
        if resampler is None:
            began = max(0.0, (frame.time or 0.0) - extent.start)
            most = limits.max_seconds * frame.sample_rate
            resampler = soxr.ResampleStream(frame.sample_rate, sampling_rate, 1, dtype="float32", quality="HQ")
        frames += frame.samples
        if frame.layout.nb_channels > limits.max_channels or frames > most:
            raise MediaTooLarge(f"the video's sound is longer than {limits.max_seconds:g} s, or has too many channels")
        for plane in planes.resample(frame):
            samples = plane.to_ndarray()
            if not np.isfinite(samples).all():
                raise BadMedia("the video's sound has samples that are not finite")
            blocks.append(resampler.resample_chunk(samples.mean(axis=0, dtype=np.float32)))
    if resampler is None:
        return []
    blocks.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    waveform = np.concatenate(blocks)
    return [
        Stretch(
            began + first / sampling_rate,
            began + last / sampling_rate,
            waveform[first:last],
            (last - first) / sampling_rate,
        )
        for first, last in stretches(len(waveform), sampling_rate)
    ]
