"""A video → a vector for the whole, and one for each of its moments: frames and stretches of sound, through the towers.

Frames pooled by their mean are a video, as in All in One (arXiv 2203.07303); of one frame the mean is the image's own
vector. The sound does not go into the mean where there is a picture: it is found as moments of its own. A long sound
that is stored has moments too.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from service.contract.bundle import Modality
from service.contract.errors import InputError
from service.contract.sounds import STRETCH_S
from service.contract.vectors import l2_normalise
from service.contract.videos import Clip
from service.engine.inputs import Decoded, Embedded, Kind, Media, Moment, header_seconds
from service.settings import Limits


def decoded(clip: Clip) -> list[Decoded]:
    """Return a video's parts for the towers: its frames, then its sounds."""
    frames = [Decoded("image", frame.value, frame.cost) for frame in clip.frames]
    return frames + [Decoded("audio", sound.value, sound.cost) for sound in clip.sounds]


def pooled(clip: Clip, vectors: Sequence[Embedded | InputError]) -> Embedded | InputError:
    """Return a video of the vectors of what was `decoded`, or what is wrong with the first that has none."""
    moments = []
    for stretch, result in zip([*clip.frames, *clip.sounds], vectors, strict=True):
        if isinstance(result, InputError):
            return result
        kind: Kind = "image" if result.modality == "image" else "audio"
        moments.append(Moment(kind, round(stretch.start, 3), round(stretch.end, 3), result.vector))
    modality: Modality = "image" if clip.frames else "audio"
    parts = [moment.vector for moment in moments if moment.modality == modality]
    try:
        vector = parts[0] if len(parts) == 1 else l2_normalise(np.mean(parts, axis=0, dtype=np.float64))
    except ValueError:
        return InputError("the frames of the video cancel each other out")
    return Embedded(vector, modality, truncated=False, cached=False, moments=tuple(moments), video=True)


def perhaps_long(sounds: Mapping[int, Media], limits: Limits) -> list[int]:
    """Return the places of sounds whose headers do not say that they are no longer than one moment."""
    return [place for place, sound in sounds.items() if not 0 < header_seconds(sound.data, limits) <= STRETCH_S]
