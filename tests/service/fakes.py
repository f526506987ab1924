"""A manifest without files, and an embedder that hashes instead of running towers."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from service.contract.bundle import Encoder, Manifest, Modality, Projector, Tower, space_id
from service.contract.errors import BadMedia, InputError
from service.contract.images import ImagePreprocessing
from service.contract.tokens import TextPreprocessing
from service.contract.vectors import Vectors, l2_normalise
from service.engine.caller import PROCESS, Caller
from service.engine.inputs import Embedded, Input, Media, Text, Unreadable

DIMENSIONS = 8


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fake_manifest(
    name: str = "fake",
    dimensions: int = DIMENSIONS,
    admits: tuple[str, ...] = (),
    templates: dict[Modality, list[str]] | None = None,
    temperature: float = 0.1,
) -> Manifest:
    """A manifest whose space follows from its name."""
    towers: dict[Modality, Tower] = {
        "text": Tower(
            file="text.onnx",
            sha256=digest(name),
            encoder=Encoder(source="fake", weights_sha256=digest(name)),
            projector=Projector(kind="linear", features=4, weights_sha256=digest(name)),
            preprocessing=TextPreprocessing(tokenizer="tokenizer.json", max_length=16),
        ),
        "image": Tower(
            file="image.onnx",
            sha256=digest(name),
            encoder=Encoder(source="fake", weights_sha256=digest(name)),
            projector=Projector(kind="linear", features=4, weights_sha256=digest(name)),
            preprocessing=ImagePreprocessing(height=8, width=8),
        ),
    }
    return Manifest(
        name=name,
        created="2026-01-01",
        space=space_id(dimensions, towers),
        admits=admits,
        dimensions=dimensions,
        towers=towers,
        temperature=temperature,
        templates={"image": ["a photo of a {}", "a picture of {}"]} if templates is None else templates,
        files={"tokenizer.json": digest("tokenizer")},
    )


def vector_of(text: str | bytes) -> Vectors:
    """The unit vector (DIMENSIONS,) that the fake embedder gives to a text, or to a medium's bytes."""
    data = text.encode() if isinstance(text, str) else text
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8])
    return l2_normalise(np.random.default_rng(seed).standard_normal(DIMENSIONS))


class FakeEmbedder:
    """Equal inputs get equal vectors; media with the bytes `bad` fail. Remembers what it was asked for."""

    def __init__(self, manifest: Manifest | None = None) -> None:
        self.manifest = manifest or fake_manifest()
        self.asked: list[int] = []

    async def embed(
        self, inputs: Sequence[Input], caller: Caller = PROCESS, **options: bool
    ) -> list[Embedded | InputError]:
        self.asked.append(len(inputs))
        return [self._embed(each) for each in inputs]

    async def read(self, inputs: Sequence[Input], caller: Caller = PROCESS) -> list[Input]:
        return list(inputs)

    async def in_worker(self, function: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(function)

    def _embed(self, value: Input) -> Embedded | InputError:
        match value:
            case Text(text):
                return Embedded(vector_of(text), "text", truncated=False, cached=False)
            case Media(modality, data):
                if data == b"bad":
                    return BadMedia("the file is corrupt")
                return Embedded(vector_of(data), modality, truncated=False, cached=False)
            case Unreadable(error):
                return error
        raise AssertionError(value)
