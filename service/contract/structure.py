"""The first bytes say what a file is; what an image file says of itself is checked before a decoder acts on it.

A decoder takes memory for what a header claims, and time for every part that a file is cut into. What is checked here
is what Pillow does not bound itself: the canvas of a WebP (for which memory is taken on opening), the parts before the
pixels (each costs a step of Python), and the work that a JPEG of many scans, or a BMP of runs, asks for. A file that
passes may still be corrupt.
"""

import re
import struct

from PIL.JpegImagePlugin import MARKER

from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia

LONGEST_SIDE = 65_535
"""Pixels: what JPEG and GIF can say at most; pictures of one long row are not worth the code."""
MAX_PARTS = 20_000
"""Chunks, segments or blocks. A PNG of 10 MB in pieces of 8 KB, as libpng writes them, has 1,200."""
MAX_LOOSE = 65_536
"""Bytes between the parts, which belong to none."""
MAX_TAGS = 4_096
"""Of the directory of a TIFF; of that of EXIF no more are read."""
MAX_COEFFICIENTS = 100_000_000
"""Of a JPEG that has to be held whole, 2 bytes each: 40 megapixels, or 33 where no colour is subsampled."""
MAX_SCANNED = 2**32
"""Coefficients × scans. A progressive photograph has about ten scans."""
MAX_RUN_BYTES, MAX_RUN_PIXELS = 1_000_000, 4_000_000
"""Of a BMP that is packed in runs, which Pillow unpacks in Python."""
SPARSE_PIXELS, PIXELS_PER_BYTE = 2**24, 64
"""A WebP, HEIC or AVIF of more pixels than the first must have a byte for so many of them. Pillow's decoder holds a
WebP four times, 16 bytes a pixel; a photograph has a byte for every 5 to 20 pixels, and one colour all over 34 in all.
"""

_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_LOSSLESS = (0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF)
_UNKNOWN_JPEG = "the JPEG is lossless, or has 12 bits a sample: that is not read here, save it as a plain JPEG"
TOO_MANY = "the image is cut into too many parts"


_SOUND = re.compile(
    rb"(?P<wav>(?:RIFF|RIFX|RF64)....WAVE)|(?P<aiff>FORM....AIF[FC])|(?P<w64>riff\x2e\x91\xcf\x11)|(?P<flac>fLaC)"
    rb"|(?P<ogg>OggS(?!.{0,245}\x80theora))|(?P<caf>caff)|(?P<au>\.snd)|(?P<au_swapped>dns\.)|(?P<amr>#!AMR)"
    rb"|(?P<aac>\xff[\xf0\xf1\xf8\xf9])|(?P<mp3>\xff[\xe0-\xfd\xff])",
    re.DOTALL,
)
"""Beginnings of sounds, by FFmpeg's names; it has none of AU in the other order of bytes. An Ogg with Theora is a film,
and 0xFFFE begins UTF-16."""
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
"""Lengths that the second header of a BMP has: two letters alone would take any text that begins with them."""
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"mif2", b"msf1", b"miaf")


def picture_format(data: bytes) -> str | None:
    """Return the format that an image begins as, JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or HEIC; None for other
    files."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if data[4:8] == b"ftyp":
        major, size = data[8:12], min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[place : place + 4] for place in range(16, size, 4)}
        if major in _AVIF_BRANDS or (major in _HEIF_BRANDS and brands.intersection(_AVIF_BRANDS)):
            return "AVIF"
        if major in _HEIF_BRANDS:
            return "HEIC"
    return None


def is_picture(data: bytes) -> bool:
    """Return whether a file begins as an image that is read does."""
    return picture_format(data) is not None


def sound_format(data: bytes) -> str | None:
    """Return FFmpeg's name of the sound that a file begins as; None for other files."""
    if start := after_id3(data):
        return "aac" if sound_format(data[start : start + 2]) == "aac" else "mp3"
    match = _SOUND.match(data)
    return None if match is None else match.lastgroup


def after_id3(data: bytes) -> int:
    """Return where the frames of an MP3 or AAC begin that has a tag before them; 0 where it has none."""
    if not data.startswith(b"ID3"):
        return 0
    return 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))


def is_sound(data: bytes) -> bool:
    """Return whether a file begins as a sound that is read does."""
    return sound_format(data) is not None


def check_structure(data: bytes, max_pixels: int) -> None:
    """Raises MediaTooLarge or BadMedia for a JPEG, BMP or WebP that would cost too much to open, UnsupportedMedia for
    a JPEG of a kind that is not read. Other formats pass: `metadata` and `tiffs` bound those that they walk through."""
    if data.startswith(b"\xff\xd8\xff"):
        _jpeg(data)
    elif data.startswith(b"BM"):
        _bmp(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _webp(data, max_pixels)


def _jpeg(data: bytes) -> None:
    """Check the segments before the first scan, as Pillow walks through them, and how many scans there are."""
    place, loose, parts = 2, 0, 0
    coefficients, is_progressive = 0, False
    while (at := data.find(b"\xff", place)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        loose += at - place
        if marker in (0x00, 0xFF):
            loose += 1
            place = at + (2 if marker == 0x00 else 1)
        elif 0xFF00 | marker not in MARKER:
            return  # Pillow goes no further
        elif MARKER[0xFF00 | marker][2] is None:  # stands alone
            loose += 2
            place = at + 2
        else:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            body = data[at + 4 : at + 2 + length]
            parts += 1
            place = at + 2 + length
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if marker in _LOSSLESS or body[:1] not in (b"", b"\x08"):
                    raise UnsupportedMedia(_UNKNOWN_JPEG)
                coefficients, is_progressive = _coefficients(body), marker in _PROGRESSIVE
            elif marker == 0xDA:
                break
        if parts > MAX_PARTS or loose > MAX_LOOSE:
            raise BadMedia(TOO_MANY)
    # 0xFF in a scan's data is always followed by something else: this counts scans, and those of thumbnails after it.
    scans = 1 + data.count(b"\xff\xda", place)
    if (is_progressive or scans > 1) and coefficients > MAX_COEFFICIENTS:
        raise MediaTooLarge("the image takes too much memory to decode")
    if scans * coefficients > MAX_SCANNED:
        raise MediaTooLarge("the image has too many scans for its size")


def _coefficients(frame: bytes) -> int:
    """Return how many coefficients a frame's components have together."""
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        return 0
    height, width = struct.unpack(">HH", frame[1:5])
    factors = [(byte >> 4, byte & 15) for byte in frame[7 : 6 + 3 * frame[5] : 3]]
    most = max((across for across, _ in factors), default=0) * max((down for _, down in factors), default=0)
    return sum(across * down for across, down in factors) * width * height // most if most else 0


def _bmp(data: bytes) -> None:
    if len(data) < 34 or data[14] < 40 or int.from_bytes(data[30:34], "little") not in (1, 2):
        return
    width, height = struct.unpack_from("<ii", data, 18)
    if len(data) > MAX_RUN_BYTES or abs(width * height) > MAX_RUN_PIXELS:
        raise MediaTooLarge(f"the image is packed in runs: more than {MAX_RUN_BYTES} bytes or {MAX_RUN_PIXELS} pixels")


def _webp(data: bytes, max_pixels: int) -> None:
    if data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[place : place + 3], "little") for place in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[place : place + 2], "little") & 0x3FFF for place in (26, 28))
    if width * height > max_pixels:
        raise MediaTooLarge(
            f"the image has {width * height:,} pixels, more than the {max_pixels:,} of ISTHMUS_MAX_IMAGE_PIXELS"
        )
    check_sparse(width, height, len(data))


def check_sparse(width: int, height: int, count: int) -> None:
    """Raises MediaTooLarge for a picture of more pixels than a file of so many bytes has room for."""
    if width * height > max(SPARSE_PIXELS, PIXELS_PER_BYTE * count):
        raise MediaTooLarge("the image has many more pixels than its file has room for")
