"""PyAV, which is optional, opens files of several streams, and sounds that libsndfile does not read.

A container without moving pictures is a sound; a picture that is attached to one, a song's cover, is no footage. The
demuxer is always named: FFmpeg's own guess would also read playlists, which name other files and addresses.
"""

import codecs
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.errors import BadMedia, InputError, UnsupportedMedia
from service.contract.structure import is_picture, is_sound, picture_format, sound_format

MISSING = (
    "videos, and sounds like AAC, M4A, 3GP and WebM, are read where PyAV is installed: pip install 'isthmus[video]'"
)
UNKNOWN = (
    "neither an image, a sound nor a video in a format that is read here: images are JPEG, PNG, WEBP, GIF, BMP, TIFF, "
    "AVIF or HEIC; sounds WAV, FLAC, OGG, MP3, AIFF, CAF, AU, AAC, AMR, M4A or WEBM; videos MP4, MOV, MKV, WEBM, AVI, "
    "MPEG, MPEG-TS or FLV; an array, where the model takes some, is a .npy file"
)
NO_CODEC = "the codec of the video or sound is not one that is read here"
CORRUPT = "the video or sound is truncated or corrupt"


_TRANSPORT = ((0, 188), (4, 192), (0, 204))
"""Where the mark of the first packet of an MPEG transport stream is, and how long a packet is: of a broadcast, of a
camcorder (with the time before each), and of a receiver (with a checksum after each)."""


def container_of(data: bytes) -> str | None:
    """Return FFmpeg's name of the container, by its first bytes; None where it is none of those that are read."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"uuid", b"styp"):
        return None if picture_format(data) else "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"FLV\x01":
        return "flv"
    if data[:4] == b"\0\0\1\xba":
        return "mpeg"
    if data[:4] == b"OggS" and b"\x80theora" in data[:256]:
        return "ogg"
    if any(data[first : first + 2 * size + 1 : size] == b"GGG" for first, size in _TRANSPORT):
        return "mpegts"
    return None


def sound_demuxer_of(data: bytes) -> str | None:
    """Return FFmpeg's name of what a file with a sound begins as; None where it is none of those that are read."""
    return sound_format(data) or container_of(data)


_OTHERS = (
    (0, b"%PDF", "a PDF"),
    (0, b"8BPS", "a picture of Photoshop"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II\xbc\x01", "JPEG XR"),
    (0, b"IIRO", "a camera's raw file"),
    (0, b"IIU\0", "a camera's raw file"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (4, b"ftypcrx ", "a camera's raw file"),
    (0, b"\0\0\1\0", "an icon (ICO)"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"gimp xcf", "a picture of GIMP"),
    (0, b"%!PS", "PostScript"),
    (0, b"\x30\x26\xb2\x75", "Windows Media (WMA, WMV)"),
    (0, b"\0\0\1\xb3", "a bare MPEG video"),
    (0, b"\0\0\0\1", "a bare stream of H.264 or HEVC without a container"),
    (0, b"MThd", "MIDI, which holds notes and no sound"),
    (0, b"DSD ", "DSD"),
    (0, b"FRM8", "DSD"),
    (0, b"wvpk", "WavPack"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"TTA1", "True Audio"),
    (0, b"MPCK", "Musepack"),
    (0, b"\x0b\x77", "a bare stream of AC-3"),
    (0, b"\x7f\xfe\x80\x01", "a bare stream of DTS"),
    (0, b"Creative Voice", "Creative Voice"),
    (0, b"\2#!SILK", "SILK, as chat programs record it"),
    (0, b"#!SILK", "SILK, as chat programs record it"),
    (0, b"PK\3\4", "a ZIP archive, as those of office programs are"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (257, b"ustar", "a tar archive: send it as a job"),
    (0, b"\xd0\xcf\x11\xe0", "a file of an old office program"),
    (0, b"SQLite format 3", "a database of SQLite"),
    (0, b"\0\5\x16\7", "the notes that macOS keeps beside a file (AppleDouble), and not that file"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, and not the file that it stands for: run git lfs pull"),
    (0, b"\xff\xfe", "a text in UTF-16"),
    (0, b"\xfe\xff", "a text in UTF-16"),
    (0, b"\x89PNG", "a PNG whose line ends were changed on its way: send it as binary"),
)
"""Marks, and where they stand, of other files that people have."""
_MOST_SHOWN = 1_024


def name_of_other(data: bytes) -> str | None:
    """Return what a file that is not read here is, as far as its beginning says so."""
    for place, mark, name in _OTHERS:
        if data.startswith(mark, place):
            return name
    beginning = data[:_MOST_SHOWN]
    if data.count(0) == len(data):
        return "nothing but zeros, as where a copy was broken off"
    start = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if b"<svg" in start and start.startswith(b"<"):
        return "a drawing (SVG)"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return None
    return "a text" if all(letter.isprintable() or letter.isspace() for letter in text) else None


def refusal(data: bytes, otherwise: str = UNKNOWN) -> UnsupportedMedia:
    """Return why a file is none of what it was sent as, in the same words wherever it is nothing that is read here."""
    if is_picture(data) or is_sound(data) or container_of(data) is not None:
        return UnsupportedMedia(otherwise)
    name = name_of_other(data)
    return UnsupportedMedia(UNKNOWN if name is None else f"{UNKNOWN}. This is {name}")


def is_known(data: bytes) -> bool:
    """Return whether only PyAV reads a file: a container, AAC or AMR."""
    return container_of(data) is not None or sound_demuxer_of(data) in ("aac", "amr")


@contextmanager
def decoding() -> Iterator[Any]:
    """Yield PyAV. What it raises within is raised as an InputError: UnsupportedMedia (no PyAV, a codec that is not
    known) or BadMedia."""
    try:
        import av
    except ImportError:
        raise UnsupportedMedia(MISSING) from None
    try:
        yield av
    except (av.error.DecoderNotFoundError, av.error.PatchWelcomeError):
        raise UnsupportedMedia(NO_CODEC) from None
    except InputError:
        raise
    except (av.error.FFmpegError, ValueError):
        raise BadMedia(CORRUPT) from None


@contextmanager
def reading(data: bytes, demuxer: str) -> Iterator[Any]:
    """Yield the opened file, while `decoding`."""
    with decoding() as av, opened(av, data, demuxer) as source:
        yield source


def opened(av: Any, data: bytes, demuxer: str) -> Any:
    """Return the file as PyAV has it, to be closed. Raises what PyAV raises."""
    source = av.open(io.BytesIO(data), format=demuxer, metadata_errors="replace")
    for stream in source.streams.video:
        # The lanes of the towers have the cores.
        if stream.codec_context is not None:
            stream.codec_context.thread_count = 1
    return source


def moving_pictures(source: Any) -> list[Any]:
    """Return the streams of moving pictures, those that are not attached pictures, in the order of `_chosen_first`."""
    import av

    attached = av.stream.Disposition.attached_pic
    return _chosen_first([stream for stream in source.streams.video if not stream.disposition & attached])


def sound_tracks(source: Any) -> list[Any]:
    """Return the streams of sound, in the order of `_chosen_first`."""
    return _chosen_first(source.streams.audio)


def _chosen_first(streams: Iterable[Any]) -> list[Any]:
    """Put the stream first that a player plays: of those whose codec is known the default one, else the first."""
    import av

    default = av.stream.Disposition.default
    return sorted(streams, key=lambda stream: (stream.codec_context is None, not stream.disposition & default))


def planar(av: Any, frames: Iterable[Any], layout: Any, rate: int) -> Iterator[NDArray[np.float32]]:
    """Yield decoded frames as blocks (samples, channels) of one layout and rate.

    A recording of a broadcast, or several files in a row, may change both; PyAV's resampler takes every frame for one
    like the first.
    """
    resampler, kind = None, None
    for frame in frames:
        frame_kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or frame_kind != kind:
            if resampler is not None:
                yield from map(_block, resampler.resample(None))
            resampler, kind = av.AudioResampler(format="fltp", layout=layout, rate=rate), frame_kind
        yield from map(_block, resampler.resample(frame))
    if resampler is not None:
        yield from map(_block, resampler.resample(None))


def _block(plane: Any) -> NDArray[np.float32]:
    return np.ascontiguousarray(plane.to_ndarray().T)


def is_footage(data: bytes) -> bool:
    """Return whether a container holds moving pictures. Raises InputError where that cannot be found out."""
    with reading(data, container_of(data) or "") as source:
        return bool(moving_pictures(source) or not source.streams.audio)
