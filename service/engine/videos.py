"""A video → a vector for the whole, and one for each of its moments: frames and stretches of sound, through the towers.

Frames pooled by their mean are a video, as in All in One (arXiv 2203.07303); of one frame the mean is the image's own
vector. The sound does not go into the mean where there is a picture: it is found as moments of its own. A long sound
that is stored has moments too.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from service.contract.audio import Recording
from service.contract.bundle import Modality
from service.contract.errors import InputError, UnsupportedMedia
from service.contract.images import ImagePreprocessing
from service.contract.sounds import STRETCH_S, AudioPreprocessing, stretches
from service.contract.vectors import l2_normalise
from service.contract.videos import Clip, read_video
from service.engine.embedder import Embedded, Embedder, Input, Media, Ready
from service.engine.header_sizes import stated_seconds
from service.errors import DeadlineExceeded
from service.runtime.quotas import metering
from service.settings import Limits
from service.store import Moment

_TOGETHER = 12
"""Moments of a long sound that are decoded and embedded at a time: two minutes."""


@dataclass(frozen=True)
class Video:
    """A video file, not yet decoded."""

    data: bytes


async def embed(
    embedder: Embedder, inputs: Sequence[Input | Video], *, background: bool = False, stored: bool = False
) -> list[Embedded | InputError]:
    """As Embedder.embed, of videos too. Of sounds that are going to be `stored`, long ones have their moments."""
    plain = [each for each in inputs if not isinstance(each, Video)]
    made = iter(await embedder.embed(plain, background=background)) if plain else iter(())
    results = [await _embed(embedder, each, background) if isinstance(each, Video) else next(made) for each in inputs]
    sounds = {
        place: each
        for place, (each, result) in enumerate(zip(inputs, results, strict=True))
        if stored and isinstance(each, Media) and each.modality == "audio" and isinstance(result, Embedded)
    }
    # Most sounds say that they are short, and are not decoded again.
    for place in await embedder.in_worker(lambda: _perhaps_long(sounds, embedder.limits)) if sounds else ():
        whole = results[place]
        assert isinstance(whole, Embedded)
        results[place] = await _with_moments(embedder, sounds[place], whole, background)
    return results


def _perhaps_long(sounds: Mapping[int, Media], limits: Limits) -> list[int]:
    """Those whose headers do not say that they are no longer than one moment."""
    return [place for place, each in sounds.items() if not 0 < stated_seconds(each.data, limits) <= STRETCH_S]


async def _with_moments(embedder: Embedder, sound: Media, whole: Embedded, background: bool) -> Embedded:
    """A sound's vector with those of its moments, where it is longer than one."""
    spec = embedder.manifest.towers["audio"].preprocessing
    assert isinstance(spec, AudioPreprocessing)
    paid = metering.set(None)  # for the whole
    try:
        async with asyncio.timeout(None if background else embedder.deadline_s), embedder.long_sounds[background]:
            limits = embedder.limits.of_sounds
            recording = await embedder.in_worker(lambda: Recording(sound.data, spec.sampling_rate, limits))
            mix = recording.mix
            moments = await _moments(embedder, recording, spec.sampling_rate, background)
            if recording.mix != mix:  # only the whole sound tells how its channels are to be mixed
                moments = await _moments(embedder, recording, spec.sampling_rate, background)
    except InputError:  # the whole is embedded; its moments are not worth its failing
        return whole
    except TimeoutError:
        raise DeadlineExceeded("the inputs were not embedded within the deadline") from None
    finally:
        metering.reset(paid)
    return replace(whole, moments=tuple(moments))


async def _moments(embedder: Embedder, recording: Recording, rate: int, background: bool) -> list[Moment]:
    """Those of a sound of more than one, of which _TOGETHER are in memory at a time."""
    parts, moments, samples = stretches(recording, rate), list[Moment](), 0
    while together := await embedder.in_worker(lambda: list(itertools.islice(parts, _TOGETHER))):
        if not samples and len(together) == 1:
            return []
        ready = [Ready("audio", part, len(part) / rate) for part in together]
        for part, made in zip(together, await embedder.embed(ready, background=background), strict=True):
            start, samples = samples, samples + len(part)
            if isinstance(made, Embedded):
                moments.append(Moment("audio", round(start / rate, 3), round(samples / rate, 3), made.vector))
    return moments


async def _embed(embedder: Embedder, video: Video, background: bool) -> Embedded | InputError:
    served = {name: embedder.manifest.towers[name].preprocessing for name in embedder.channels}
    picture, sound = served.get("image"), served.get("audio")
    spec = picture if isinstance(picture, ImagePreprocessing) else None
    rate = sound.sampling_rate if isinstance(sound, AudioPreprocessing) else None
    if spec is None and rate is None:
        return UnsupportedMedia("no tower is served here for the frames or the sound of a video")

    def read() -> Clip | InputError:
        try:
            return read_video(video.data, spec, rate, embedder.video_limits)
        except InputError as error:
            return error.without_frames()

    try:
        async with asyncio.timeout(None if background else embedder.deadline_s):
            clip = await embedder.in_worker(read)
            if isinstance(clip, InputError):
                return clip
            ready = [Ready("image", each.value, each.cost) for each in clip.frames]
            ready += [Ready("audio", each.value, each.cost) for each in clip.sounds]
            vectors = await embedder.embed(ready, background=background)
    except TimeoutError:
        raise DeadlineExceeded("the inputs were not embedded within the deadline") from None
    moments = []
    for each, made in zip([*clip.frames, *clip.sounds], vectors, strict=True):
        if isinstance(made, InputError):
            return made
        moments.append(Moment(made.modality, round(each.start, 3), round(each.end, 3), made.vector))
    of: Modality = "image" if clip.frames else "audio"
    pooled = [each.vector for each in moments if each.modality == of and each.vector is not None]
    try:
        vector = pooled[0] if len(pooled) == 1 else l2_normalise(np.mean(pooled, axis=0, dtype=np.float64))
    except ValueError:
        return InputError("the frames of the video cancel each other out")
    return Embedded(vector, of, truncated=False, cached=False, moments=tuple(moments), video=True)
