"""Small videos, made with PyAV."""

import io
from collections.abc import Sequence

import av
import numpy as np

from tests.tiny_bundle import COLOURS, tone


def frame_of(colour, size=(32, 32)):
    return np.full((*size, 3), COLOURS[colour] if isinstance(colour, str) else colour, np.uint8)


def film(
    frames: Sequence[np.ndarray],
    *,
    rate: int = 4,
    sound: np.ndarray | None = None,
    sound_rate: int = 16_000,
    format: str = "matroska",
    codec: str = "ffv1",
    pixels: str = "bgr0",
    sound_codec: str = "pcm_s16le",
) -> bytes:
    """A file of frames (H, W, 3), `rate` a second, and of samples (N,) or (channels, N). FFV1 loses nothing."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as target:
        if len(frames):
            picture = target.add_stream(codec, rate=rate)
            picture.height, picture.width = frames[0].shape[:2]
            picture.pix_fmt = pixels
        if sound is not None:
            sound = np.atleast_2d(sound)
            layout = {1: "mono", 2: "stereo"}[len(sound)]
            heard = target.add_stream(sound_codec, rate=sound_rate, layout=layout)
        for pixel in frames:
            target.mux(picture.encode(av.VideoFrame.from_ndarray(pixel, format="rgb24")))
        if len(frames):
            target.mux(picture.encode(None))
        if sound is not None:
            for start in range(0, sound.shape[1], 1024):
                block = np.ascontiguousarray((sound[:, start : start + 1024].T * 32767).astype(np.int16).reshape(1, -1))
                samples = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
                samples.sample_rate, samples.pts = sound_rate, start
                target.mux(heard.encode(samples))
            target.mux(heard.encode(None))
    return buffer.getvalue()


def colours(*named: str, seconds: float = 1.0, rate: int = 4, **options: object) -> bytes:
    """So many seconds of each colour."""
    return film([frame_of(each) for each in named for _ in range(round(seconds * rate))], rate=rate, **options)


def silence_then_tone(silent: float, sounding: float) -> np.ndarray:
    return np.concatenate([np.zeros(int(16_000 * silent), np.float32), tone(440.0, sounding)])
