"""The differences between images, sounds, texts and arrays: how to prepare an input, its cost, and how inputs make up a
call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract.arrays import ArrayPreprocessing
from service.contract.audio import hear
from service.contract.bundle import Bundle, BundleError, Modality
from service.contract.endpoint import EndpointPreprocessing
from service.contract.errors import InputError, UnsupportedMedia
from service.contract.images import ImagePreprocessing, preprocess_image, see_image
from service.contract.sounds import AudioPreprocessing, Sound
from service.contract.tokens import TextPreprocessing, TextTokenizer, Tokens, pad_tokens
from service.engine.batcher import Budget, Prepared
from service.engine.endpoint import CANARY
from service.engine.inputs import Decoded, Media, Single, Text, TokenIds, length_of
from service.engine.towers import AUDIO_CALL_S, Arrays
from service.settings import Settings

_NEAR_TOKENS, _NEAR_MS = 16, 2_000
"""Texts (tokens) and sounds (ms) up to this size share a call at any length; longer ones go into buckets (see
Budget)."""
_SLACK_TOKENS = 16
"""Tokens of padding up to which the CPU is faster than with another call: a call of MiniLM costs as much as 8
tokens."""


_SENT_AS = "inputs of this modality are sent as: {}"
_TEXTS_OF_A_CALL = 31
"""Number of texts in one request to an embedding API."""
_NUMBERS_OF_A_CALL = 4_000_000
"""Largest number of numbers of the arrays in one call, where it has several."""
_NO_DIRECTION = "the model gives this array no direction: its numbers are all alike, or too large"


@dataclass(frozen=True)
class Handling:
    prepare: Callable[[Single], Prepared]
    """Decodes and preprocesses an input; slow, for a worker thread. Raises InputError."""
    collate: Callable[[Sequence[Any]], Arrays]
    """Combines `Prepared.value`s into the graph's inputs."""
    budget: Callable[[bool, int | None], Budget]
    """Budget of a call; the arguments say whether it runs on the CPU, and the limit that was measured to be best."""
    canary: Prepared
    """A small input that says whether the tower works."""
    refusal: str | None = None
    """What is said of an input whose vector is not finite or is zero: its own fault. None: it is the tower's."""


def handling(bundle: Bundle, modality: Modality, settings: Settings) -> Handling:
    """Return the bundle's handling of a modality. Raises BundleError where its tokenizer does not fit."""
    preprocessing = bundle.manifest.towers[modality].preprocessing
    match preprocessing:
        case ImagePreprocessing():
            return _images(preprocessing, settings)
        case AudioPreprocessing():
            return _sounds(preprocessing, settings)
        case TextPreprocessing():
            with bundle.checked(preprocessing.tokenizer) as path:
                try:
                    tokenizer = TextTokenizer(path, preprocessing)
                except ValueError as error:
                    raise BundleError(f"{bundle.path / preprocessing.tokenizer}: {error}") from None
            return _texts(tokenizer, preprocessing, settings)
        case EndpointPreprocessing():
            return _plain_texts(preprocessing, settings)
        case ArrayPreprocessing():
            return _arrays(preprocessing, settings)


def _images(spec: ImagePreprocessing, settings: Settings) -> Handling:
    limits = settings.limits.of_images

    def prepare(given: Single) -> Prepared:
        if isinstance(given, Decoded):
            return Prepared(given.value, size=1)
        if not isinstance(given, Media) or given.kind != "image":
            raise UnsupportedMedia(_SENT_AS.format("image"))
        pixels, cut = see_image(given.data, spec, limits, given.show)
        return Prepared(pixels, size=1, truncated=cut)

    def collate(pixels: Sequence[NDArray[np.float32]]) -> Arrays:
        return dict(zip(spec.inputs, (np.stack(pixels),), strict=True))

    gradient = Image.linear_gradient("L").convert("RGB")
    canary = Prepared(preprocess_image(gradient, spec), size=1)

    def budget(on_cpu: bool, best: int | None) -> Budget:
        # More at once are slower on a CPU: what is between two layers leaves its caches (docs/LOG.md).
        return Budget(settings.batch_images or best or (2 if on_cpu else 32))

    return Handling(prepare, collate, budget, canary)


def _arrays(spec: ArrayPreprocessing, settings: Settings) -> Handling:
    def prepare(given: Single) -> Prepared:
        if not isinstance(given, Media) or given.kind != "array":
            raise UnsupportedMedia(_SENT_AS.format("array"))
        return Prepared(spec.read(given.data), size=spec.size)

    def collate(arrays: Sequence[NDArray[np.float32]]) -> Arrays:
        return dict(zip(spec.inputs, (np.stack(arrays),), strict=True))

    def budget(on_cpu: bool, best: int | None) -> Budget:
        inputs = settings.batch_images or (8 if on_cpu else 32)
        numbers = best if best and not settings.batch_images else inputs * spec.size
        return Budget(max(spec.size, min(numbers, _NUMBERS_OF_A_CALL)))

    ramp = np.linspace(-1.0, 1.0, spec.size).reshape(spec.prepared_shape)
    canary = Prepared(spec.prepare(ramp), size=spec.size)
    return Handling(prepare, collate, budget, canary, refusal=_NO_DIRECTION)


def _sounds(spec: AudioPreprocessing, settings: Settings) -> Handling:
    limits = settings.limits.of_sounds

    def prepared(sound: Sound, cut: bool = False) -> Prepared:
        return Prepared(sound, size=spec.milliseconds(sound), truncated=cut)

    def prepare(given: Single) -> Prepared:
        if isinstance(given, Decoded):
            return prepared(spec.prepare(given.value))
        if not isinstance(given, Media) or given.kind != "audio":
            raise UnsupportedMedia(_SENT_AS.format("audio"))
        return prepared(*hear(given.data, spec.sampling_rate, limits, spec.prepare_blocks))

    def collate(sounds: Sequence[Sound]) -> Arrays:
        return dict(zip(spec.inputs, spec.collate(sounds), strict=True))

    seconds = np.arange(spec.sampling_rate // 2) / spec.sampling_rate
    tone = (0.1 * np.sin(2 * np.pi * 440.0 * seconds)).astype(np.float32)
    budget = Budget(round(1_000 * AUDIO_CALL_S), spec.padded, near=_NEAR_MS)
    return Handling(prepare, collate, lambda *_: budget, prepared(spec.prepare(tone)))


def _plain_texts(spec: EndpointPreprocessing, settings: Settings) -> Handling:
    """Return the handling of texts that go elsewhere as they are."""

    def prepare(given: Single) -> Prepared:
        if not isinstance(given, Text | TokenIds):
            raise UnsupportedMedia(_SENT_AS.format("text"))
        if isinstance(given, TokenIds):
            raise InputError("token ids are not read here: another server has this model's tokenizer")
        if len(given.text) > settings.limits.text_chars:
            raise InputError(f"the text is longer than {settings.limits.text_chars} characters")
        if not given.text.strip():
            raise InputError("the text has no words")
        return Prepared(spec.prefixed(given.text, given.role), size=1)

    def collate(texts: Sequence[str]) -> Arrays:
        return {"texts": np.array(texts, object)}

    return Handling(prepare, collate, lambda *_: Budget(_TEXTS_OF_A_CALL), Prepared(CANARY, size=1))


def _texts(tokenizer: TextTokenizer, spec: TextPreprocessing, settings: Settings) -> Handling:
    most = settings.limits.text_chars

    def prepare(given: Single) -> Prepared:
        if not isinstance(given, Text | TokenIds):
            raise UnsupportedMedia(_SENT_AS.format("text"))
        if length_of(given) > most:
            unit = "characters" if isinstance(given, Text) else "token ids"
            raise InputError(f"the text is longer than {most} {unit}")
        if isinstance(given, Text):
            tokens = tokenizer.encode(given.text, spec.prefix(given.role))
        else:
            tokens = tokenizer.accept(given.ids)
        length = len(tokens.ids)
        return Prepared(tokens, size=length, tokens=length, truncated=tokens.truncated, unknown=tokens.unknown)

    def collate(texts: Sequence[Tokens]) -> Arrays:
        return dict(zip(spec.inputs, pad_tokens(texts, spec.pad_id), strict=True))

    def budget(on_cpu: bool, best: int | None) -> Budget:
        if on_cpu:
            # Many inputs may wait, so that inputs of one length meet in a call.
            limit = settings.batch_tokens or best or 512
            return Budget(limit, padded=True, slack=_SLACK_TOKENS, waiting=16 * limit)
        return Budget(settings.batch_tokens or 8_192, padded=True, near=_NEAR_TOKENS)

    return Handling(prepare, collate, budget, prepare(Text("a dog barks")))
