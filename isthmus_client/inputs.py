"""Inputs that a caller may give, and their form on the wire.

| given | is |
|---|---|
| `str` | a text |
| `pathlib.Path` | a file: an image, a sound, a video or an array (.npy), by its content |
| `bytes` | the content of such a file |
| `image(…)`, `audio(…)`, `video(…)` | a file or bytes, said to be an image, a sound or a video |
| `array(…, "points")` | a .npy file or its bytes, for a modality that the bundle has besides |
| `stored(id)`, `vector(numbers)`, `composed((part, weight), …)` | in queries: a stored item, a vector, a weighted sum |
| a mapping | the wire's own form, as it is: `{"text": "…"}`, `{"image": "<base64>"}` |
"""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Input = str | bytes | Path | Mapping[str, Any]

_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM|II[*+]\0|MM\0[*+]"
    rb"|....ftyp(?:avif|avis|hei[cmsx]|hev[cx]|mif1|mif2|msf1|miaf)",
    re.DOTALL,
)
"""First bytes of the image formats that the service reads. A file that begins otherwise is sent as a sound, unless
its name is that of an image: the service reads all of it, and then its error says what the file is not."""
_SOUND = re.compile(rb"RIFF....WAVE|RF64|fLaC|OggS|ID3|\xff[\xe0-\xff]|FORM", re.DOTALL)
_CONTAINER = re.compile(
    rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot|uuid|styp)|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|\x00\x00\x01\xba"
    rb"|OggS.{0,250}\x80theora|\x47.{187}\x47.{187}\x47|.{4}\x47.{191}\x47.{191}\x47|\x47.{203}\x47.{203}\x47",
    re.DOTALL,
)
"""First bytes of containers, which are sent as videos: the service turns one without moving pictures into a sound."""
_ARRAY = re.compile(rb"\x93NUMPY")
_IMAGES = ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .heic .heif .hif .avif"
IMAGE_SUFFIXES = frozenset(_IMAGES.split())


def image(source: Path | bytes) -> dict[str, Any]:
    return {"image": _encoded(source)}


def audio(source: Path | bytes) -> dict[str, Any]:
    return {"audio": _encoded(source)}


def video(source: Path | bytes) -> dict[str, Any]:
    return {"video": _encoded(source)}


def array(source: Path | bytes, modality: str | None = None) -> dict[str, Any]:
    """Return a .npy file as an input; without a modality, of the only one of the bundle that takes arrays."""
    return {"array": _encoded(source)} | ({} if modality is None else {"modality": modality})


def stored(item: str) -> dict[str, Any]:
    """Return a stored item as a query: more like this."""
    return {"id": item}


def vector(numbers: Sequence[float]) -> dict[str, Any]:
    return {"vector": list(numbers)}


def composed(*parts: tuple[Input, float]) -> dict[str, Any]:
    """Return a weighted sum of inputs as a query; weights may be negative."""
    return {"compose": [{**_as_object(part), "weight": weight} for part, weight in parts]}


def to_wire(value: Input) -> str | dict[str, Any]:
    """Return an input as JSON has it. Raises OSError where a file cannot be read, TypeError for what is no input."""
    if isinstance(value, str):
        return value
    if isinstance(value, Path):
        content = value.read_bytes()
        is_image_name = value.suffix.lower() in IMAGE_SUFFIXES and not _SOUND.match(content)
        return image(content) if is_image_name else _of_content(content)
    if isinstance(value, bytes):
        return _of_content(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"an input is a str, bytes, a pathlib.Path or a mapping, not {type(value).__name__}")


def file_of(value: Input) -> bytes | None:
    """Return the file of an input whose content says what it is; None for others. Raises OSError."""
    if isinstance(value, bytes | Path):
        content = value if isinstance(value, bytes) else value.read_bytes()
        return content if is_media(content) else None
    return None


def is_media(content: bytes) -> bool:
    """Return whether it begins as an image, a sound, a video or an array does."""
    return any(pattern.match(content) for pattern in (_IMAGE, _SOUND, _CONTAINER, _ARRAY))


def _of_content(content: bytes) -> dict[str, Any]:
    if _IMAGE.match(content):
        return image(content)
    if _ARRAY.match(content):
        return array(content)
    return video(content) if _CONTAINER.match(content) else audio(content)


def wire_size(value: str | Mapping[str, Any]) -> int:
    """Return about how many bytes an input takes in a request."""
    if isinstance(value, str):
        return len(value)
    return sum(map(_field_size, value.values()))


def _field_size(field: Any) -> int:
    if isinstance(field, str | bytes):
        return len(field)
    if not isinstance(field, Sequence):
        return 0
    parts = [part for part in field if isinstance(part, Mapping)]  # of a fused input; the others are numbers
    return 16 * len(field) + sum(map(wire_size, parts))


def _as_object(value: Input) -> dict[str, Any]:
    wire = to_wire(value)
    return {"text": wire} if isinstance(wire, str) else wire


def _encoded(source: Path | bytes) -> str:
    return base64.b64encode(source if isinstance(source, bytes) else source.read_bytes()).decode()
