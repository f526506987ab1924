"""What a media file's header says of its size, without decoding it: what it costs a key that is limited in that."""

from contextlib import suppress

from service.contract import audio, images
from service.settings import Limits


def stated_pixels(data: bytes, limits: Limits) -> int:
    """0 for what is going to be refused: a forged header shall not use up a key's limit for years."""
    with suppress(Exception):  # Pillow raises many kinds; each means that decoding will say what is wrong
        return images.stated_pixels(data, limits.of_images)
    return 0


def stated_seconds(data: bytes, limits: Limits) -> float:
    """0 for what is going to be refused, or does not say."""
    with suppress(Exception):
        seconds = audio.seconds_of(data, limits.of_sounds)
        return seconds if 0 < seconds <= limits.audio_seconds else 0.0
    return 0.0
