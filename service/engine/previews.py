"""What is kept of an image or a sound so that people can recognise it, where the operator says so (`previews`).

Nothing of the client's file is kept: its pixels or samples are decoded within the limits of every input, made small,
and written anew by our own encoders. So a preview has no EXIF, no colour profile, no text and no script, and is one of
two kinds whatever was sent.
"""

import io
import logging
from collections.abc import Iterable, Sequence
from itertools import pairwise

import anyio
import numpy as np
import soundfile
from PIL import Image

from service.contract.audio import AudioLimits, hear
from service.contract.errors import InputError
from service.contract.images import ImageLimits, decode_image
from service.contract.sounds import Waveform
from service.engine.embedder import Embedder, Media
from service.runtime.workers import WorkerDied
from service.settings import Limits
from service.store import Preview

log = logging.getLogger(__name__)

SIDE = 480
"""Pixels that neither side of a kept picture exceeds."""
_QUALITY = 80
SECONDS = 20.0
"""Of a sound that are kept: its first."""
_RATE = 24_000
PEAKS = 80
"""Bars of a waveform."""
_FADE = 0.05


def preview_image(data: bytes, limits: ImageLimits) -> Preview:
    """An image file → a WebP that fits into SIDE × SIDE. Raises InputError as decode_image does."""
    picture = decode_image(data, limits, enough=2 * SIDE)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    # Pillow carries what it has read of a file from picture to picture, and its writers put some of it into theirs.
    plain = Image.frombytes("RGB", picture.size, picture.tobytes())
    written = io.BytesIO()
    plain.save(written, "WEBP", quality=_QUALITY)
    return Preview("image/webp", written.getvalue(), {"width": plain.width, "height": plain.height})


def preview_audio(data: bytes, limits: AudioLimits) -> Preview:
    """A sound file → its first SECONDS as a mono MP3, and its waveform. Raises InputError as decode_audio does."""
    kept, whole = hear(data, _RATE, limits, _beginning).value
    if len(kept) < whole:
        fade = int(_FADE * _RATE)
        kept[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    kept /= max(1.0, float(np.abs(kept).max(initial=0.0)))  # float files may be louder than full scale
    written = io.BytesIO()
    soundfile.write(written, kept, _RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.7)
    about = {"seconds": round(len(kept) / _RATE, 2), "whole_seconds": round(whole / _RATE, 2)}
    return Preview("audio/mpeg", written.getvalue(), {**about, "peaks": peaks(kept)})


def _beginning(blocks: Iterable[Waveform], about: int) -> tuple[Waveform, int]:
    """The first SECONDS of a sound, and how many samples there are."""
    most, whole = int(SECONDS * _RATE), 0
    kept: list[Waveform] = []
    for block in blocks:
        if whole < most:
            kept.append(block[: most - whole].copy())
        whole += len(block)
    return np.concatenate([*kept, np.zeros(0, np.float32)]), whole


def peaks(samples: Waveform) -> list[int]:
    """The loudest sample of each of PEAKS stretches, 0 to 100; the loudest of all is 100, unless there is silence."""
    edges = np.linspace(0, len(samples), PEAKS + 1).astype(int).tolist()
    loudest = [float(np.abs(samples[start:end]).max(initial=0.0)) for start, end in pairwise(edges)]
    top = max(loudest)
    return [round(100 * each / top) if top > 0 else 0 for each in loudest]


class Previewer:
    """Makes previews in the threads that decode."""

    def __init__(self, embedder: Embedder, limits: Limits) -> None:
        self._embedder = embedder
        self._images, self._sounds = limits.of_images, limits.of_sounds

    async def previews(self, media: Sequence[Media]) -> list[Preview | None]:
        """One for each, in order; None for what could not be made, which is no reason to refuse an item."""
        made: list[Preview | None] = [None] * len(media)

        async def make(place: int, each: Media) -> None:
            try:
                made[place] = await self._embedder.in_worker(lambda: self._preview(each))
            except WorkerDied:
                log.error("a preview could not be made: its thread died")

        async with anyio.create_task_group() as group:
            for place, each in enumerate(media):
                group.start_soon(make, place, each)
        return made

    def _preview(self, media: Media) -> Preview | None:
        try:
            if media.modality == "image":
                return preview_image(media.data, self._images)
            return preview_audio(media.data, self._sounds)
        except InputError as error:
            log.warning("no preview of an item that is stored: %s", error)
        except Exception:  # of an encoder: the item itself is fine
            log.exception("a preview could not be made")
        return None
