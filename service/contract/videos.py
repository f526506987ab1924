"""A video file becomes sampled frames as the image tower takes them, and a sound as the audio tower hears it.

Needs PyAV, which is optional (`pip install 'isthmus[video]'`). A frame goes the way of an image from its RGB on, so
that a video of one frame is that image; the sound goes the way of a sound file from its samples on.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract.audio import Measure, Mix, resampled
from service.contract.colours import PQ, Curve
from service.contract.containers import (
    CORRUPT,
    NO_CODEC,
    container_of,
    decoding,
    moving_pictures,
    opened,
    planar,
    refusal,
    sound_tracks,
)
from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia, check_bytes
from service.contract.images import ImagePreprocessing, preprocess_image
from service.contract.sounds import STRETCH_S, Waveform, stretches

NO_VIDEO = "not a video in a format that is read here (MP4, MOV, MKV, WebM, AVI, MPEG, MPEG-TS, FLV)"
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
    """Holds a part of a video, from one second to another, and what stands for it."""

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
    """Holds what a file says of itself."""

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
        with opened(av, data, container) as source:
            extent = _extent(source, limits)
        if spec is not None:
            with opened(av, data, container) as source:
                frames = list(_frames(source, spec, extent, limits)) if moving_pictures(source) else []
        mix = Mix()
        for _ in range(2 if sampling_rate is not None else 0):
            with opened(av, data, container) as source:
                measure = Measure(0)
                if source.streams.audio:
                    sounds = []  # their memory is needed
                    sounds, measure = _sounds(av, source, sampling_rate or 0, extent, limits, mix)
            if (better := measure.mix(floating=True)) == mix:
                break
            mix = better  # only the whole sound tells how its channels are to be mixed
    if not frames and not sounds:
        raise BadMedia("the video has neither a picture nor a sound")
    return Clip(extent.seconds, frames, sounds)


def claims_of(data: bytes, limits: VideoLimits = VideoLimits()) -> Claims:
    """Return what `read_video` will come to, without decoding anything. Raises as it does."""
    with _read(data, limits) as (av, container), opened(av, data, container) as source:
        extent = _extent(source, limits)
        pictures = [stream.codec_context for stream in moving_pictures(source)[:1]]
        seconds = extent.seconds if source.streams.audio else 0.0
        return Claims(
            frames=_frame_count(extent, limits) if pictures else 0,
            pixels=sum(codec.width * codec.height for codec in pictures),
            sounds=max(1, math.ceil(seconds / STRETCH_S)) if source.streams.audio else 0,
            seconds=seconds,
        )


@contextmanager
def _read(data: bytes, limits: VideoLimits) -> Iterator[tuple[Any, str]]:
    """Yield PyAV and the name of the file's container, while `decoding`."""
    check_bytes("video", len(data), limits.max_bytes, "ISTHMUS_MAX_BODY_BYTES")
    container = container_of(data)
    if container is None:
        raise refusal(data, NO_VIDEO)
    with decoding() as av:
        yield av, container


def _frame_count(extent: _Extent, limits: VideoLimits) -> int:
    return max(1, min(limits.frames, round(extent.seconds)))


def _extent(source: Any, limits: VideoLimits) -> _Extent:
    """Return from when to when the packets say that there is something; nothing is decoded."""
    pictures = moving_pictures(source)[:1]
    streams = [*pictures, *sound_tracks(source)[:1]]
    if not streams:
        raise BadMedia("the video has neither a picture nor a sound")
    if any(stream.codec_context is None for stream in streams):
        raise UnsupportedMedia(NO_CODEC)
    for stream in pictures:
        _check_size(stream.codec_context.width, stream.codec_context.height, limits)
    for stream in sound_tracks(source)[:1]:
        if stream.codec_context.channels > limits.max_channels:
            raise MediaTooLarge(f"the video's sound has more than {limits.max_channels} channels")
    start, end, count = np.inf, -np.inf, 0
    for count, packet in enumerate(source.demux(streams)):
        if packet.pts is not None:
            at = float(packet.pts * packet.time_base)
            start, end = min(start, at), max(end, at + float((packet.duration or 0) * packet.time_base))
        if end - start > limits.max_seconds or count > _MOST_PACKETS:
            raise MediaTooLarge(f"the video is longer than the {limits.max_seconds:,g} s of ISTHMUS_MAX_VIDEO_SECONDS")
    if not np.isfinite(start):
        raise BadMedia(CORRUPT)
    return _Extent(start, max(end - start, 0.0), count)


def _check_size(width: int, height: int, limits: VideoLimits) -> None:
    if width * height > limits.max_pixels:
        raise MediaTooLarge(
            f"the video's frames have {width * height:,} pixels, more than the {limits.max_pixels:,} that are read"
        )


def _frames(source: Any, spec: ImagePreprocessing, extent: _Extent, limits: VideoLimits) -> Iterator[Stretch]:
    count = _frame_count(extent, limits)
    length = extent.seconds / count
    middles = [extent.start + (number + 0.5) * length for number in range(count)]
    # MPEG and MPEG-TS have no index to seek by; and a short video is sooner gone through than sought in.
    through = extent.packets <= _THROUGH or source.format.name in ("mpegts", "mpeg")
    yielded = False
    for number, frame in enumerate(_gone_through(source, middles) if through else _sought(source, middles)):
        _check_size(frame.width, frame.height, limits)
        pixels = preprocess_image(_upright(frame), spec)
        yielded = True
        yield Stretch(number * length, (number + 1) * length, pixels, frame.width * frame.height)
    if not yielded:
        raise BadMedia(CORRUPT)


def _gone_through(source: Any, middles: list[float]) -> Iterator[Any]:
    """Yield the frame that is seen at each of these moments, or the one before it where that is damaged."""
    last_frame, moments = None, list(reversed(middles))
    for count, frame in enumerate(source.decode(moving_pictures(source)[0])):
        if count > _MOST_DECODED:
            raise MediaTooLarge("too much of the video would have to be decoded")
        while moments and last_frame is not None and frame.time is not None and frame.time > moments[-1]:
            yield last_frame
            moments.pop()
        if not moments:
            return
        last_frame = last_frame if frame.is_corrupt else frame
    for _ in moments if last_frame is not None else ():
        yield last_frame


def _sought(source: Any, middles: list[float]) -> Iterator[Any]:
    """Yield the same, from the key frame before each of them on."""
    stream, decoded = moving_pictures(source)[0], 0
    for middle in middles:
        source.seek(max(int(middle / stream.time_base), 0), stream=stream)
        last_frame = None
        for frame in source.decode(stream):
            decoded += 1
            if decoded > _MOST_DECODED:
                raise MediaTooLarge("too much of the video would have to be decoded")
            if last_frame is not None and frame.time is not None and frame.time > middle:
                break
            last_frame = last_frame if frame.is_corrupt else frame
        if last_frame is not None:
            yield last_frame


def _is_mirrored(frame: Any) -> bool:
    """Return whether the frame's display matrix, (3, 3) in fixed-point numbers, turns it over."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.float64)
    return bool(a * d - b * c < 0)


def _upright(frame: Any) -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if frame.color_trc == PQ:
        image = Curve(is_pq=True).to_srgb(image)
    # A telephone writes how it was held; FFmpeg counts against the clock, as Pillow does. A mirrored picture, as of a
    # camera that looks at whoever films, counts as turned by half of the circle more.
    turned = round(frame.rotation / 90) % 4
    if _is_mirrored(frame):
        image, turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (turned + 2) % 4
    return image.rotate(90 * turned, expand=True) if turned else image


def _sounds(
    av: Any, source: Any, sampling_rate: int, extent: _Extent, limits: VideoLimits, mix: Mix
) -> tuple[list[Stretch], Measure]:
    frames = source.decode(sound_tracks(source)[0])
    first = next(frames, None)
    if first is None:
        return [], Measure(0)
    measure = Measure(first.layout.nb_channels)

    def blocks() -> Iterator[Waveform]:
        for block in planar(av, checked(), first.layout, first.sample_rate):
            yield mix.apply(block, measure.take(block))

    def checked() -> Iterator[Any]:
        seconds = 0.0
        for frame in itertools.chain([first], frames):
            seconds += frame.samples / frame.sample_rate
            if frame.layout.nb_channels > limits.max_channels or seconds > limits.max_seconds:
                raise MediaTooLarge(
                    f"the video's sound is longer than {limits.max_seconds:g} s, or has too many channels"
                )
            yield frame

    at = max(0.0, (first.time or 0.0) - extent.start)
    parts = []
    for samples in stretches(resampled(blocks(), first.sample_rate, sampling_rate), sampling_rate):
        seconds = len(samples) / sampling_rate
        parts.append(Stretch(at, at + seconds, samples, seconds))
        at += seconds
    return parts, measure
