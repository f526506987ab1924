"""Inputs that can be embedded, as they are read once at every entrance, and their results.

Base64 is decoded, a file is told by its content, and an input that cannot be read is `Unreadable`, so that it fails
alone and in its own place. `Embedder.read` looks into three: a `Url` is fetched, of a `Video` only its container's
index says whether it has moving pictures, and an array that names no modality goes to the only tower of arrays.
"""

import base64
import binascii
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract import audio, images
from service.contract.arrays import NPY
from service.contract.bundle import FrontEnd, Modality
from service.contract.containers import container_of, is_footage, refusal
from service.contract.errors import BadMedia, InputError, UnsupportedMedia
from service.contract.lengths import late_start
from service.contract.structure import is_picture, is_sound
from service.contract.tokens import Role
from service.contract.vectors import Vectors, l2_normalise
from service.errors import FetchDisabled, InputFailed
from service.runtime.quotas import Costs, Unit
from service.settings import Limits

T = TypeVar("T")
Kind = Literal["image", "audio"]
StoredModality = Modality
"""Source of an item: the name of a tower, `video`, or `vector` where the client gave the vector and no modality."""

_WHITESPACE = str.maketrans("", "", " \t\r\n")
_URL_SAFE = str.maketrans("-_", "+/")
_CANCELLED = 1e-6
"""Length of a sum of unit vectors (the largest weight scaled to 1) below which its direction is rounding noise."""
_LONGEST_URI_HEADER = 256
"""Largest number of characters before the comma of a data: URI."""
UNKNOWN_TEXT = (
    "the model's tokenizer knows no word of the text, so that its vector would be that of every such text: use a "
    "bundle whose text encoder knows this language"
)
_NO_TEXT = (
    "the text is a data: URI: send the file that it holds as an image, audio or video, for the vector of its letters "
    "says nothing"
)
NOT_FETCHED = "fetching of URLs is off on this server: send the data itself as base64"


@dataclass(frozen=True)
class Text:
    text: str
    role: Role = "query"
    """Role that selects the encoder's instructions: query or stored document."""
    modality: Modality = "text"


@dataclass(frozen=True)
class TokenIds:
    """Token ids that the client made with the bundle's own tokenizer, special tokens included."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """A file of an image, a sound or an array, not yet decoded."""

    modality: Modality
    """Tower that embeds it; `array` stands for the only tower that takes arrays (`Embedder.read`)."""
    data: bytes
    show: Callable[[Image.Image], None] | None = field(default=None, compare=False)
    """Called with a thumbnail of the picture, as `see_image` makes it, if the picture is decoded to be embedded."""
    front_end: FrontEnd | None = None
    """How it is read; None: as its modality is named."""

    @property
    def kind(self) -> FrontEnd:
        """Return how the file is read: image, audio or array."""
        return self.front_end or cast("FrontEnd", self.modality)


@dataclass(frozen=True)
class Video:
    """A file that was sent as a video, or a container that videos come in."""

    data: bytes
    opened: bool = False
    """Whether the container was opened and found to hold more than a sound."""
    modality: Modality = "video"
    """Tower that its sender named for it: only a sound can be another than `video`."""


@dataclass(frozen=True)
class Url:
    """The URL of an image or a sound."""

    modality: Modality
    url: str
    front_end: FrontEnd | None = None

    @property
    def kind(self) -> Kind:
        return "image" if (self.front_end or self.modality) == "image" else "audio"

    def holding(self, data: bytes) -> Media:
        """Return the file that lies there."""
        return Media(self.modality, data, front_end=self.front_end)


@dataclass(frozen=True)
class Unreadable:
    error: InputError


Part = Text | TokenIds | Media | Video | Url | Unreadable


@dataclass(frozen=True)
class Fused:
    """Inputs that share one vector: the weighted sum of their unit vectors, at unit length."""

    parts: tuple[tuple[Part, float], ...]
    """The parts with their weights."""

    def with_parts(self, parts: Iterable[Part]) -> "Fused":
        """Return the same with other parts, in order, in the weights of those before."""
        return Fused(tuple(zip(parts, (weight for _, weight in self.parts), strict=True)))


Input = Part | Fused


@dataclass(frozen=True, eq=False)
class Decoded:
    """A decoded part of a video: pixels for the image tower, or samples at the audio tower's rate."""

    modality: Kind
    value: NDArray[np.float32]
    cost: float
    """Cost of decoding: pixels, or seconds."""


Single = Text | TokenIds | Media | Decoded
"""An input that one call of one tower turns into a vector."""


@dataclass(frozen=True)
class Moment:
    """A part of a video or of a long sound."""

    modality: Kind
    """Modality of the moment: image is a frame from its middle, audio its sound."""
    start: float
    end: float
    """End of the moment, in seconds."""
    vector: NDArray[np.float32]
    """Unit vector (D,)."""


@dataclass(frozen=True)
class Embedded:
    vector: NDArray[np.float32]
    """Unit vector (D,), not writeable."""
    modality: Modality
    truncated: bool
    cached: bool
    tokens: int = 0
    """Number of tokens of a text, special tokens included; 0 for media."""
    unknown: float = 0.0
    """The share of a text's tokens that the tokenizer does not know (contract.tokens.Tokens)."""
    moments: tuple[Moment, ...] = ()
    """Moments of a video, or of a long sound that is going to be stored."""
    video: bool = False
    """True for a video: it is handled like images, or like sounds where it has no picture."""

    @property
    def kind(self) -> StoredModality:
        return "video" if self.video else self.modality


# Reading


def read(
    kind: Literal["string", "text", "image", "audio", "video", "array", "file"],
    given: str | bytes,
) -> Part:
    """Read a client's value as an input; `Unreadable` where it is not valid.

    A string is a text, or the file that it holds where it is a data: URI of an image, a sound or a video; a text is a
    text. The other kinds are files: base64, a data: URI or bytes, and of an image or a sound perhaps its URL. What a
    `file` is, only its content says.
    """
    try:
        if isinstance(given, str):
            uri = uri_kind(given) if kind in ("string", "text") else None
            if kind == "text" and uri is not None:
                raise InputError(_NO_TEXT)
            if kind in ("string", "text") and uri is None:
                return Text(given)
            kind = uri or kind
            if given[:8].lower().startswith(("http:", "https:")):
                if kind == "image" or kind == "audio":
                    return Url(kind, given)
                raise FetchDisabled(NOT_FETCHED)
            given = media_bytes(given)
        match kind:
            case "image" | "audio" | "array":
                return Media(kind, given)
            case "video":
                return Video(given)
        return of_file(given)
    except InputError as error:
        return Unreadable(error.without_frames())


def sent_to(part: Part, modality: Modality) -> Part:
    """Return an input for the tower of a modality."""
    match part:
        case Text() | Video():
            return replace(part, modality=modality)
        case Media() | Url():
            return replace(part, modality=modality, front_end=None if modality == part.kind else part.kind)
    return part


def of_file(data: bytes) -> Media | Video:
    """Return a file of which only the content says what it is. Raises UnsupportedMedia, BadMedia for an empty one."""
    if not data:
        raise BadMedia("the data is empty")
    if is_picture(data):
        return Media("image", data)
    if is_sound(data):
        return Media("audio", data)
    if data.startswith(NPY):
        return Media("array", data)
    if container_of(data) is not None:
        return Video(data)
    if late_start(data) is not None:
        return Media("audio", data)
    raise refusal(data)


def opened(video: Video) -> Part:
    """Return a container without moving pictures as a sound, for the tower that was named; with them it is a video.

    It opens the file: call it in a thread.
    """
    modality = video.modality
    try:
        if container_of(video.data) is not None and not is_footage(video.data):
            sound = Media("audio", video.data)
            return sound if modality == "video" else sent_to(sound, modality)
        if modality != "video":
            raise UnsupportedMedia(f"the file is a video, which the modality {modality} does not take")
    except InputError as error:
        if modality != "video":
            return Unreadable(error.without_frames())
    return replace(video, opened=True)  # where it cannot be opened, reading it says why


def in_role(inputs: Iterable[Input], role: Role) -> list[Input]:
    """Return the inputs, with texts in another role than that of a query."""
    return [_in_role(input, role) for input in inputs]


def _in_role(input: Input, role: Role) -> Input:
    if isinstance(input, Fused):
        return input.with_parts(
            replace(part, role=role) if isinstance(part, Text) else part for part in parts_of(input)
        )
    return replace(input, role=role) if isinstance(input, Text) else input


def parts_of(input: Input) -> Sequence[Part]:
    """Return the parts of a fused input; of any other, the input itself."""
    return [part for part, _ in input.parts] if isinstance(input, Fused) else [input]


def by_input(inputs: Sequence[Input], values: Iterable[T]) -> Iterator[tuple[Input, list[T]]]:
    """Yield each input with the values of its parts."""
    iterator = iter(values)
    for input in inputs:
        yield input, list(islice(iterator, len(parts_of(input))))


def sniff(data: bytes) -> str:
    """Return the kind of a file by its content. Opens containers, so call it in a thread. Raises as `of_file` does."""
    media: Part = of_file(data)
    media = opened(media) if isinstance(media, Video) else media
    return media.modality if isinstance(media, Media) else "video"


def uri_kind(text: str) -> Literal["image", "audio", "video", "file"] | None:
    """Return the kind of media in a string that is a data: URI from its first word on; a file of an unnamed kind
    counts too, where it is base64. Returns None for every other string, and for a sentence about such URIs."""
    header = text[:_LONGEST_URI_HEADER].lstrip().partition(",")[0].lower().replace("; ", ";").rstrip()
    if not header.startswith("data:") or any(map(str.isspace, header)):
        return None
    for kind in ("image", "audio", "video"):
        if header.startswith(f"data:{kind}/"):
            return kind
    return "file" if header.endswith(";base64") else None


def media_bytes(text: str) -> bytes:
    """Decode base64 (standard or URL-safe, white space allowed) or a base64 data: URI. Raises BadMedia."""
    text = text.lstrip()
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().rstrip().endswith(";base64"):
            raise BadMedia("the data: URI is not base64")
    with suppress(ValueError):  # most is plain base64, which needs no second look at each letter
        if plain := binascii.a2b_base64(text, strict_mode=True):
            return plain
    try:
        data = base64.b64decode(text.translate(_WHITESPACE).translate(_URL_SAFE), validate=True)
    except (binascii.Error, ValueError):
        raise BadMedia("the data is not valid base64") from None
    if not data:
        raise BadMedia("the data is empty")
    return data


# Properties of inputs


def modality_of(given: Single) -> Modality:
    return "text" if isinstance(given, TokenIds) else given.modality


def length_of(given: Single) -> float:
    """Return the length of a text in characters or token ids; media are endless."""
    match given:
        case Text():
            return len(given.text)
        case TokenIds():
            return len(given.ids)
        case Media() | Decoded():
            return math.inf


def costs_of(inputs: Sequence[Single], limits: Limits | None) -> Costs:
    """Return the costs of inputs in the units of keys' limits: media by their headers, or nothing without `limits`."""
    costs: dict[Unit, float] = {"items": len(inputs), "characters": 0, "pixels": 0, "seconds": 0}
    for given in inputs:
        if isinstance(given, Decoded):
            costs["pixels" if given.modality == "image" else "seconds"] += given.cost
        elif not isinstance(given, Media):
            costs["characters"] += length_of(given)
        elif limits is not None and given.kind == "image":
            costs["pixels"] += header_pixels(given.data, limits)
        elif limits is not None and given.kind == "audio":
            costs["seconds"] += header_seconds(given.data, limits)
    return costs


def header_pixels(data: bytes, limits: Limits) -> int:
    """Return the pixels that an image's header states, without decoding. Returns 0 for an image that is going to be
    refused: a forged header must not use up a key's limit for years."""
    with suppress(Exception):  # Pillow raises many kinds; each means that decoding will say what is wrong
        return images.header_pixels(data, limits.of_images)
    return 0


def header_seconds(data: bytes, limits: Limits) -> float:
    """Return the seconds that a sound's header states; 0 where it is going to be refused or states none."""
    with suppress(Exception):
        seconds = audio.seconds_of(data, limits.of_sounds)
        return seconds if 0 < seconds <= limits.audio_seconds else 0.0
    return 0.0


# Results


def weighted_sum(vectors: Sequence[Vectors], weights: Sequence[float]) -> Vectors:
    """Return the sum of unit vectors (D,) with finite weights, at unit length. Raises InputError where nothing but
    rounding noise is left."""
    largest = max(abs(weight) for weight in weights)
    if largest > 0:
        # Scaled first: weights may be as large or as small as a double can be.
        total = (np.array(weights) / largest) @ np.stack(vectors).astype(np.float64)
        if np.sqrt(total @ total) > _CANCELLED:
            return l2_normalise(total)
    raise InputError("the weighted parts cancel each other out: nothing is left")


def fused(input: Fused, part_results: Sequence[Embedded | InputError]) -> Embedded | InputError:
    """Return the one result of a fused input from those of its parts, or the error of the first that has one.

    It counts as an input of the kind of its first part that is no text: a picture with a caption is an image, whichever
    tower the caption is for.
    """
    results = [result for result in part_results if isinstance(result, Embedded)]
    if len(results) < len(part_results):
        return next(result for result in part_results if isinstance(result, InputError))
    try:
        vector = weighted_sum([result.vector for result in results], [weight for _, weight in input.parts])
    except InputError as error:
        return error.without_frames()
    parts = zip(parts_of(input), results, strict=True)
    first = next((result for part, result in parts if not isinstance(part, Text | TokenIds)), results[0])
    return Embedded(
        vector,
        first.modality,
        truncated=any(result.truncated for result in results),
        cached=all(result.cached for result in results),
        tokens=sum(result.tokens for result in results),
        unknown=max(result.unknown for result in results),
        video=first.video,
    )


def raise_first(results: Iterable[Embedded | InputError], *, field: str = "inputs") -> None:
    """Raises InputFailed for the first of the results that is an error, with its index in `field`."""
    for index, result in enumerate(results):
        if isinstance(result, InputError):
            raise InputFailed(index, result, field=field)


def unknown_warning(where: str, result: Embedded | InputError) -> list[str]:
    """Return a warning for a text of which the tokenizer knows less than half; nothing for other inputs."""
    if not isinstance(result, Embedded) or result.unknown <= 0.5:
        return []
    if result.unknown == 1:
        return [f"{where}: {UNKNOWN_TEXT}"]
    return [
        f"{where}: the model's tokenizer does not know {result.unknown:.0%} of the text, which says little about it"
    ]
