"""Previews of images and sounds by which people can recognise them, where the operator allows it (`previews`).

Nothing of the client's file is kept: its pixels or samples are decoded within the limits of every input, made small,
and written anew by our own encoders. So a preview has no EXIF, no colour profile, no text and no script, and is one of
two kinds whatever was sent.
"""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import anyio
import numpy as np
import soundfile
from PIL import Image

from service.contract.audio import AudioLimits, hear
from service.contract.errors import InputError
from service.contract.images import SMALL_GAP, SMALL_RESAMPLE, SMALL_SIDE, ImageLimits, decode_image
from service.contract.sounds import Waveform
from service.engine.embedder import Embedder
from service.engine.inputs import Input, Media
from service.runtime.workers import WorkerDied
from service.settings import Limits

log = logging.getLogger(__name__)

_QUALITY = 75
"""The quality of a JPEG preview. A WebP like it is a fifth smaller and takes thirty times as long to write."""
SECONDS = 20.0
"""Length of a sound's preview, from its beginning, in seconds."""
_RATE = 24_000
PEAKS = 80
"""Number of bars of a waveform."""
_FADE = 0.05


@dataclass(frozen=True)
class Preview:
    """A small file of our own making that shows what an input is."""

    media_type: Literal["image/jpeg", "audio/mpeg"]
    data: bytes
    about: Mapping[str, Any]


def preview_image(data: bytes, limits: ImageLimits) -> Preview:
    """Turn an image file into a JPEG that fits into SMALL_SIDE × SMALL_SIDE. Raises InputError as decode_image does."""
    picture = decode_image(data, limits, enough=SMALL_SIDE)
    picture.thumbnail((SMALL_SIDE, SMALL_SIDE), SMALL_RESAMPLE, SMALL_GAP)
    return _of_picture(picture)


def _of_picture(picture: Image.Image) -> Preview:
    # Pillow copies a file's metadata from picture to picture, and its writers store some of it.
    plain = Image.frombytes("RGB", picture.size, picture.tobytes())
    buffer = io.BytesIO()
    plain.save(buffer, "JPEG", quality=_QUALITY)
    return Preview("image/jpeg", buffer.getvalue(), {"width": plain.width, "height": plain.height})


def preview_audio(data: bytes, limits: AudioLimits) -> Preview:
    """Turn a sound file into its first SECONDS as mono MP3, and its waveform. Raises InputError as decode_audio
    does."""
    (samples, count), _ = hear(data, _RATE, limits, _beginning)
    if len(samples) < count:
        fade = int(_FADE * _RATE)
        samples[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    samples /= max(1.0, float(np.abs(samples).max(initial=0.0)))  # float files may be louder than full scale
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, _RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.7)
    about = {"seconds": round(len(samples) / _RATE, 2), "whole_seconds": round(count / _RATE, 2)}
    return Preview("audio/mpeg", buffer.getvalue(), {**about, "peaks": peaks(samples)})


def _beginning(blocks: Iterable[Waveform], about: int) -> tuple[Waveform, int]:
    """Return the first SECONDS of a sound, and how many samples there are."""
    most, count = int(SECONDS * _RATE), 0
    pieces: list[Waveform] = []
    for block in blocks:
        if count < most:
            pieces.append(block[: most - count].copy())
        count += len(block)
    return np.concatenate([*pieces, np.zeros(0, np.float32)]), count


def peaks(samples: Waveform) -> list[int]:
    """Return the loudest sample of each of PEAKS stretches, 0 to 100: the loudest of all is 100, silence 0."""
    edges = np.linspace(0, len(samples), PEAKS + 1).astype(int).tolist()
    loudest = [float(np.abs(samples[start:end]).max(initial=0.0)) for start, end in pairwise(edges)]
    top = max(loudest)
    return [round(100 * peak / top) if top > 0 else 0 for peak in loudest]


class _Sketch:
    """The preview of a picture that is decoded to be embedded anyway."""

    preview: Preview | None = None

    def __call__(self, picture: Image.Image) -> None:
        try:
            self.preview = _of_picture(picture)
        except Exception:  # of an encoder: the item itself is fine
            log.exception("a preview could not be made")


class Previewer:
    """Makes previews in the decoding threads."""

    def __init__(self, embedder: Embedder, limits: Limits) -> None:
        self._embedder = embedder
        self._images, self._sounds = limits.of_images, limits.of_sounds

    def watched(self, inputs: Iterable[Input]) -> list[Input]:
        """Return the same inputs; of those that are decoded to be embedded, `previews` decodes no picture again."""
        return [
            replace(given, show=_Sketch()) if isinstance(given, Media) and given.kind == "image" else given
            for given in inputs
        ]

    async def previews(self, media: Sequence[Media]) -> list[Preview | None]:
        """Return a preview per medium, in order; None where it cannot be made, which is no reason to refuse an item."""
        previews: list[Preview | None] = [None] * len(media)

        async def make(place: int, given: Media) -> None:
            try:
                previews[place] = await self._embedder.in_worker(lambda: self._preview(given))
            except WorkerDied:
                log.error("a preview could not be made: its thread died")

        async with anyio.create_task_group() as group:
            for place, given in enumerate(media):
                if isinstance(given.show, _Sketch) and given.show.preview is not None:
                    previews[place] = given.show.preview
                else:
                    group.start_soon(make, place, given)
        return previews

    def _preview(self, media: Media) -> Preview | None:
        try:
            if media.kind == "image":
                return preview_image(media.data, self._images)
            return preview_audio(media.data, self._sounds)
        except InputError as error:
            log.warning("no preview of an item that is stored: %s", error)
        except Exception:  # of an encoder: the item itself is fine
            log.exception("a preview could not be made")
        return None
