"""What a media file's header says of its size, without decoding it: what it costs a key that is limited in that."""

import io
from contextlib import suppress

import soundfile
from PIL import Image

from service.contract import images
from service.contract.structure import is_sound, look_over
from service.settings import Limits


def stated_pixels(data: bytes, limits: Limits) -> int:
    """0 for what is going to be refused: a forged header shall not use up a key's limit for years."""
    with suppress(Exception):  # Pillow raises many kinds; each means that decoding will say what is wrong
        look_over(data, limits.image_pixels)
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            pixels = image.width * image.height
        return pixels if pixels <= limits.image_pixels else 0
    return 0


def stated_seconds(data: bytes, limits: Limits) -> float:
    """0 for what is going to be refused."""
    if is_sound(data):
        with suppress(Exception), soundfile.SoundFile(io.BytesIO(data)) as sound:
            seconds = sound.frames / sound.samplerate
            return seconds if 0 < seconds <= limits.audio_seconds else 0.0
    return 0.0
