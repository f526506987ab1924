"""Image and sound files that are made to hurt whoever opens them. Small ones: a file of a few bytes asks for gigabytes.

Each function returns {name: (what is right, the file)}; everything is made from a seed, so that a finding can be made
again. What is right is the code of the problem that refuses the file, or `ok`: files that a decoder reads for good
reasons, because what is forged is what nobody looks at, or players put up with it (a WAV or an MP3 that ends early), or
there is nothing wrong with them but their size. What begins as a format that is read here and cannot be is damaged, and
so is an empty file; unsupported is what begins otherwise, or with a mark so short that others begin with it too, and a
coding that nobody here knows. What an honest sound takes goes by its length: LONG_S says how long those are that last.
"""

import io
import random
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import soundfile
from PIL import Image

Files = dict[str, tuple[str, bytes]]
OK, LARGE, UNSUPPORTED, BAD = "ok", "media_too_large", "unsupported_media", "undecodable_media"
LONG_S: Mapping[str, float] = {"wav of 1,800 s": 1_800.0, "flac of 300 MB decoded": 8 * 98.0}
"""Seconds of sound, those of every channel together."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BODY = 9_900_000
"""Bytes of a file that is just within the limit of an image's size."""


def picture(format: str = "PNG", size: tuple[int, int] = (48, 40), mode: str = "RGB", **options: object) -> bytes:
    """An honest picture of noise that is alike everywhere."""
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, format, **options)
    return stream.getvalue()


def tone(format: str = "WAV", seconds: float = 0.5, rate: int = 16_000, channels: int = 1, **options: str) -> bytes:
    """An honest sound."""
    time = np.arange(int(seconds * rate)) / rate
    samples = np.tile((0.4 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)[:, None], (1, channels))
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=format, **options)
    return _settled(stream.getvalue()) if format == "OGG" else stream.getvalue()


def _settled(ogg: bytes) -> bytes:
    """The file with 1 for its serial number, which the library draws at random, and its pages' checksums after that."""
    pages, place = [], 0
    while place < len(ogg):
        head = 27 + ogg[place + 26]
        size = head + sum(ogg[place + 27 : place + head])
        page = bytearray(ogg[place : place + size])
        page[14:18], page[22:26] = (1).to_bytes(4, "little"), bytes(4)
        checksum = 0
        for byte in page:
            checksum ^= byte << 24
            for _ in range(8):
                checksum = (checksum << 1 ^ (0x04C11DB7 if checksum & 0x80000000 else 0)) & 0xFFFFFFFF
        page[22:26] = checksum.to_bytes(4, "little")
        pages.append(bytes(page))
        place += size
    return b"".join(pages)


# PNG


def chunk(kind: bytes, body: bytes = b"", *, length: int | None = None, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body) if length is None else length) + kind + body + struct.pack(">I", checksum)


def png(*chunks: bytes) -> bytes:
    return PNG_SIGNATURE + b"".join(chunks)


def ihdr(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def _zeros(count: int) -> bytes:
    """Deflates so many zeros without holding them."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count & 0xFFFFF)), packer.flush()])


def plain_png(
    width: int, height: int, colour: int = 2, depth: int = 8, extra: bytes = b"", interlaced: int = 0
) -> bytes:
    """One that is black all over, whatever its size: as small as a file of so many pixels can be."""
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    rows = _zeros(height * (1 + -(-width * bits // 8)))
    return png(ihdr(width, height, depth, colour, interlaced), extra, chunk(b"IDAT", rows), chunk(b"IEND"))


def pngs() -> Files:
    body = picture("PNG")[8:]  # after the signature
    head, rest, end = body[:25], body[25:], chunk(b"IEND")
    idat = chunk(b"IDAT", zlib.compress(bytes(40 * 145)))
    most = 2**31 - 1

    def inside(*added: bytes) -> bytes:
        return png(head, *added, rest)

    sizes = [(100_000, 100_000), (most, most), (most, 1), (1, most), (6_326, 6_326)]
    return {
        **{f"png of {width} x {height}": (LARGE, png(ihdr(width, height), rest)) for width, height in sizes},
        "png of no width": (BAD, png(ihdr(0, 40), rest)),
        "png of a width of 2**32 - 1": (LARGE, png(ihdr(2**32 - 1, 40), rest)),
        "png of a depth of 255": (BAD, png(ihdr(48, 40, depth=255), rest)),
        "png of a colour of 255": (BAD, png(ihdr(48, 40, colour=255), rest)),
        "png that inflates past its size": (OK, png(ihdr(48, 40), chunk(b"IDAT", _zeros(2**30)), end)),
        "png that inflates to too little": (
            BAD,
            png(ihdr(4_000, 4_000), chunk(b"IDAT", zlib.compress(bytes(100))), end),
        ),
        "png whose text inflates": (OK, inside(chunk(b"zTXt", b"a\0\0" + _zeros(2**30)))),
        "png of a thousand texts that inflate": (OK, inside(chunk(b"zTXt", b"a\0\0" + _zeros(1_000_000)) * 1_000)),
        "png whose international text inflates": (OK, inside(chunk(b"iTXt", b"a\0\1\0\0\0" + _zeros(2**30)))),
        "png whose profile inflates": (OK, inside(chunk(b"iCCP", b"a\0\0" + _zeros(2**30)))),
        "png of 800,000 empty chunks": (BAD, inside(chunk(b"prVt") * 800_000)),
        "png of 700,000 pieces": (BAD, png(head, chunk(b"IDAT", b"x") * 700_000, end)),
        "png of a chunk of 2**31 bytes": (BAD, inside(chunk(b"prVt", b"abc", length=2**31))),
        "png of a chunk of a negative length": (BAD, inside(chunk(b"IDAT", b"abc", length=2**32 - 1))),
        "png with a wrong checksum": (BAD, inside(chunk(b"IDAT", b"abc", crc=1))),
        "png without a picture": (BAD, png(head, end)),
        "png without a header": (BAD, png(rest)),
        "png of a signature": (BAD, PNG_SIGNATURE),
        "png of two headers": (LARGE, png(head, ihdr(60_000, 60_000), idat, end)),
        "png of palette without palette": (OK, png(ihdr(48, 40, 8, 3), idat, end)),
        "png of a palette of 1,000 bytes": (
            BAD,
            png(ihdr(48, 40, 8, 3), chunk(b"PLTE", bytes(1_000)), idat, end),
        ),
        "png of 2**31 frames": (OK, inside(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))),
        "png of a frame outside it": (
            OK,
            inside(
                chunk(b"acTL", struct.pack(">II", 2, 0)),
                chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, most, most, most, 1, 1, 1, 0, 0)),
            ),
        ),
        "png of an interlacing of 9": (BAD, png(ihdr(48, 40, interlaced=9), rest)),
        "png whose exif overlaps itself": (OK, inside(chunk(b"eXIf", overlapping(9_000_000)))),
        "png whose exif holds itself": (OK, inside(chunk(b"eXIf", circular()))),
        "png whose exif is hex of noise": (
            OK,
            inside(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  99999999\n" + b"zz" * 1_000)),
        ),
    }


def large() -> Files:
    """Files of as many pixels as are allowed, in every kind of sample: honest, and of a few kilobytes."""
    clear = chunk(b"PLTE", bytes(range(30))) + chunk(b"tRNS", bytes(10))
    return {
        "png of 40 megapixels, rgb": (OK, plain_png(8_000, 5_000)),
        "png of 40 megapixels, rgba": (OK, plain_png(8_000, 5_000, 6)),
        "png of 40 megapixels, grey of 16 bits": (OK, plain_png(8_000, 5_000, 0, 16)),
        "png of 40 megapixels, rgba of 16 bits": (OK, plain_png(8_000, 5_000, 6, 16)),
        "png of 40 megapixels, a palette with a clear colour": (OK, plain_png(8_000, 5_000, 3, extra=clear)),
        "png of 40 megapixels, one bit": (OK, plain_png(8_000, 5_000, 0, 1)),
        "png of 40 megapixels, grey and alpha": (OK, plain_png(8_000, 5_000, 4)),
        "png of 40 megapixels, interlaced": (BAD, plain_png(8_000, 5_000, 2, interlaced=1)),
        "png of 40 megapixels in a row": (LARGE, plain_png(40_000_000, 1)),
        "png of 40 megapixels in a column": (LARGE, plain_png(1, 40_000_000)),
        "webp of 40 megapixels": (LARGE, picture_of_zeros("WEBP", "RGB", lossless=True, method=0)),
        "jpeg of 40 megapixels": (OK, picture_of_zeros("JPEG", "RGB")),
        "jpeg of 40 megapixels, progressive": (LARGE, picture_of_zeros("JPEG", "RGB", progressive=True, subsampling=0)),
        "jpeg of 40 megapixels, four colours, progressive": (LARGE, picture_of_zeros("JPEG", "CMYK", progressive=True)),
        "tiff of 40 megapixels, deflated": (OK, picture_of_zeros("TIFF", "RGB", compression="tiff_adobe_deflate")),
        "tiff of 40 megapixels, lzw": (OK, picture_of_zeros("TIFF", "RGB", compression="tiff_lzw")),
        "tiff of 40 megapixels, packbits": (OK, picture_of_zeros("TIFF", "RGB", compression="packbits")),
        "tiff of 40 megapixels, rgba": (OK, picture_of_zeros("TIFF", "RGBA", compression="tiff_lzw")),
    }


# EXIF and TIFF


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value & 0xFFFFFFFF)


def directory(entries: Sequence[bytes], after: int = 0) -> bytes:
    return struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", after)


def tiff(entries: Sequence[bytes], data: bytes = b"", after: int = 0) -> bytes:
    """Little-endian, the directory first; `data` begins at 14 + 12 × entries."""
    return b"II*\0" + struct.pack("<I", 8) + directory(entries, after) + data


def overlapping(size: int) -> bytes:
    """Tags that each hold all of the file."""
    entries = [entry(tag, 7, size, 8) for tag in range(1, 60_000)]
    return tiff(entries, bytes(max(0, size + 8 - 14 - 12 * len(entries))))


def circular() -> bytes:
    """A directory whose sub-directories, and whose next one, are itself."""
    return tiff([entry(tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005, 0x014A)], after=8)


def _tags(width: int, height: int, **given: int) -> list[bytes]:
    """Return what a grey picture of one strip needs, by tag; `given` as t259=5 takes a value's place."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: width * height}
    tags |= {int(name[1:]): value for name, value in given.items()}
    start = 14 + 12 * len(tags)
    tags[273] = tags[273] or start
    return [entry(tag, 4, 1, value) for tag, value in sorted(tags.items())]


def tiffs() -> Files:
    data = bytes(range(256)) * 8
    deflated = zlib.compress(bytes(2**28), 9)
    sizes = [(2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (70_000, 70_000), (0, 0), (1, 2**31 - 1)]
    files = {f"tiff of {w} x {h}": (LARGE if w else UNSUPPORTED, tiff(_tags(w, h), data)) for w, h in sizes}

    def grey(**given: int) -> bytes:
        return tiff(_tags(40, 40, **given), data)

    tiles = [entry(*fields) for fields in [(256, 4, 1, 32), (257, 4, 1, 32), (258, 3, 1, 8), (262, 3, 1, 1)]]
    for compression in (1, 5, 8, 7):
        for side in (65_520, 2**31 - 16, 0, 7):
            described = [*tiles, entry(259, 3, 1, compression), entry(322, 4, 1, side), entry(323, 4, 1, side)]
            described += [entry(324, 4, 1, 400), entry(325, 4, 1, 1_000), entry(277, 3, 1, 1)]
            right = OK if (side, compression) == (7, 1) else BAD
            name = f"tiff of tiles of {side}, compression {compression}"
            files[name] = (right, tiff(sorted(described), bytes(400) + data))
    strips = [tag for tag in _tags(40, 40) if tag[:2] != struct.pack("<H", 273)]
    files |= {
        "tiff whose strips are outside": (BAD, grey(t273=2**31)),
        "tiff whose strip is its header": (OK, grey(t273=1)),
        "tiff whose strip inflates": (OK, tiff(_tags(40, 40, t259=8, t279=len(deflated)), deflated)),
        "tiff of a strip of 2**32 - 1 rows": (OK, grey(t278=2**32 - 1)),
        "tiff of strips of no rows": (BAD, grey(t278=0)),
        "tiff of 65,535 samples": (UNSUPPORTED, grey(t277=65_535)),
        "tiff of samples of 65,535 bits": (UNSUPPORTED, grey(t258=65_535)),
        "tiff of an unknown compression": (UNSUPPORTED, grey(t259=60_000)),
        "tiff of an unknown photometry": (UNSUPPORTED, grey(t262=60_000)),
        "tiff whose next directory is itself": (OK, tiff(_tags(40, 40), data, after=8)),
        "tiff whose tags overlap": (BAD, overlapping(9_000_000)),
        "tiff whose directories are itself": (BAD, circular()),
        "tiff of a tag of 2**32 - 1 values": (OK, tiff([*_tags(40, 40), entry(700, 4, 2**32 - 1, 8)], data)),
        "tiff of 2,400,000 strips": (BAD, tiff([*strips, entry(273, 4, 2_400_000, 200)], bytes(9_700_000))),
        "tiff whose directory is outside": (BAD, b"II*\0" + struct.pack("<I", 2**31)),
        "tiff of big tags, outside": (BAD, b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63)),
        "tiff of big tags, of 2**60 tags": (BAD, b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60)),
        "tiff of no tags": (BAD, tiff([])),
    }
    for compression in (2, 3, 4, 5, 6, 7, 8, 32773, 34925, 50000, 50001, 34676):
        tags = _tags(400, 400, t259=compression, t279=len(data))
        code = UNSUPPORTED if compression == 50001 else BAD
        files[f"tiff of noise, compression {compression}"] = (code, tiff(tags, data))
    return files


def picture_of_zeros(format: str, mode: str, size: tuple[int, int] = (8_000, 5_000), **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format, **options)
    return stream.getvalue()


# JPEG


def segment(marker: int, body: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _resized(jpeg: bytes, width: int, height: int) -> bytes:
    """Returns the same file, claiming another size."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        place = jpeg.find(marker)
        if place >= 0:
            return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]
    raise ValueError("no frame")


def progressive(width: int, height: int, scans: int) -> bytes:
    """A picture that is one colour, whose every scan says nothing about all of its blocks."""
    start = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    frame = segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0]))
    table = segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\0")
    table += segment(0xC4, b"\x10" + bytes([0, 2] + [0] * 14) + b"\xe0\x00")
    blocks = -(-width // 8) * -(-height // 8)
    dc = segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0x00])) + bytes(-(-blocks // 8))
    # A run of 2**14 + up to 2**14 - 1 blocks without coefficients: two bits of code, fourteen of length.
    runs = -(-blocks // (2**15 - 1))
    ac = segment(0xDA, bytes([1, 1, 0x10, 1, 63, 0x00])) + _runs(runs)
    return start + frame + table + dc + ac * scans + b"\xff\xd9"


def frame_of(marker: int, width: int, height: int, colours: int) -> bytes:
    """A JPEG as far as its first scan, which is empty."""
    parts = b"".join(bytes([number + 1, 0x11, 0]) for number in range(colours))
    frame = segment(marker, struct.pack(">BHHB", 8, height, width, colours) + parts)
    return b"\xff\xd8" + frame + segment(0xDA, bytes([1, 1, 0, 0, 63, 0])) + b"\xff\xd9"


def _runs(count: int) -> bytes:
    bits = ("00" + "1" * 14) * count
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))
    return data.replace(b"\xff", b"\xff\x00")


def jpegs() -> Files:
    small = picture("JPEG")
    scan = small.find(b"\xff\xda")
    tags = overlapping(65_000)[:65_000]
    exif = segment(0xE1, b"Exif\0\0" + tags)
    second = tiff([entry(0xB000, 7, 4, 0x30303130), entry(0xB001, 4, 1, 2**31), entry(0xB002, 7, 2**31, 8)])
    profiles = (segment(0xE2, b"ICC_PROFILE\0" + bytes([n + 1, 150]) + bytes(65_000)) for n in range(150))
    resource = b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0" + struct.pack(">I", 2**32 - 1)
    sizes = [(LARGE, 65_500, 65_500), (BAD, 65_535, 1), (BAD, 0, 40), (BAD, 48, 0), (OK, 6_330, 6_330)]

    def within(added: bytes) -> bytes:
        """The honest picture with this after its start."""
        return small[:2] + added + small[2:]

    return {
        **{f"jpeg of {w} x {h}": (right, _resized(small, w, h)) for right, w, h in sizes},
        "jpeg of 2,400,000 comments": (BAD, within(segment(0xFE) * 2_400_000)),
        "jpeg of 2,400,000 application segments": (BAD, within(segment(0xE5) * 2_400_000)),
        "jpeg of 9 MB of padding": (BAD, within(b"\xff" * _BODY)),
        "jpeg of 9 MB of junk": (UNSUPPORTED, within(b"\0" * _BODY)),
        "jpeg of 9 MB of escaped junk": (BAD, within(b"\xff\0" * (_BODY // 2))),
        "jpeg of 9 MB after its end": (OK, small + b"\0" * _BODY),
        "jpeg of 9 MB of zeros in its scan": (OK, small[:scan] + small[scan : scan + 14] + b"\0" * _BODY),
        "jpeg whose exif overlaps itself": (OK, within(exif)),
        "jpeg whose exif overlaps itself, 100 times": (OK, within(exif * 100)),
        "jpeg whose exif holds itself": (OK, within(segment(0xE1, b"Exif\0\0" + circular()))),
        "jpeg whose second pictures overlap": (OK, within(segment(0xE2, b"MPF\0" + tags))),
        "jpeg of a second picture that is outside": (OK, within(segment(0xE2, b"MPF\0" + second))),
        "jpeg of 150 profiles": (OK, within(b"".join(profiles))),
        "jpeg of a resource of a negative length": (OK, within(segment(0xED, resource))),
        "jpeg of 10,000 scans of 33 megapixels": (LARGE, progressive(8_000, 4_096, 10_000)),
        "jpeg of 1,000 scans of 33 megapixels": (LARGE, progressive(8_000, 4_096, 1_000)),
        "jpeg of a segment of no length": (OK, within(b"\xff\xe5\0\0")),
        "jpeg without an end": (OK, small[:-2]),
        "jpeg without a scan": (BAD, small[:scan] + b"\xff\xd9"),
        "jpeg of a start": (BAD, b"\xff\xd8\xff"),
        "jpeg of arithmetic code, which it is not": (OK, small.replace(b"\xff\xc0", b"\xff\xc9")),
        "jpeg without loss, which it is not": (UNSUPPORTED, small.replace(b"\xff\xc0", b"\xff\xc3")),
        "jpeg of 12 bits, which it is not": (
            UNSUPPORTED,
            small.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        ),
        "jpeg without tables": (BAD, small[:2] + small[small.find(b"\xff\xc0") :].replace(b"\xff\xc4", b"\xff\xe7")),
    }


# GIF, BMP, WebP


def gif(frame: bytes, width: int = 48, height: int = 40) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def gif_frame(x: int, y: int, width: int, height: int, body: bytes = b"\x02\x02\x44\x01\x00") -> bytes:
    return b"," + struct.pack("<HHHHB", x, y, width, height, 0) + body


def gifs() -> Files:
    small = picture("GIF", mode="P")
    image, frame = small.find(b",", 13 + 768), gif_frame(0, 0, 8, 8)
    huge = gif_frame(0, 0, 6_000, 6_000, b"\x02" + (b"\xff" + bytes(255)) * 30_000 + b"\0")
    return {
        "gif of 65,535 x 65,535": (LARGE, gif(gif_frame(0, 0, 1, 1) + b";", 65_535, 65_535)),
        "gif of a frame of 65,535 x 65,535": (LARGE, gif(gif_frame(0, 0, 65_535, 65_535) + b";")),
        "gif of a frame far outside": (LARGE, gif(gif_frame(65_535, 65_535, 10, 10) + b";")),
        "gif of no size": (BAD, gif(gif_frame(0, 0, 0, 0) + b";", 0, 0)),
        "gif of a frame of no size": (BAD, gif(gif_frame(0, 0, 0, 0) + b";")),
        "gif of a comment of 4,900,000 blocks": (BAD, gif(b"!\xfe" + b"\x01a" * 4_900_000 + b"\0" + frame + b";")),
        "gif of 2,400,000 comments": (BAD, gif(b"!\xfe\x01a\0" * 1_900_000 + frame + b";")),
        "gif of 9 MB of junk": (BAD, gif(b"\x55" * _BODY + frame + b";")),
        "gif of codes of 255 bits": (BAD, gif(gif_frame(0, 0, 8, 8, b"\xff\x02\x44\x01\0") + b";")),
        "gif of codes of no bits": (BAD, gif(gif_frame(0, 0, 8, 8, b"\0\x02\x44\x01\0") + b";")),
        "gif without data": (BAD, gif(gif_frame(0, 0, 8, 8, b"\x02\0") + b";")),
        "gif without a frame": (BAD, gif(b";")),
        "gif of a header": (BAD, b"GIF89a"),
        "gif of 100,000 frames": (BAD, gif(frame * 100_000 + b";")),
        "gif of an extension that does not end": (BAD, small[:image] + b"!\xff\x0bNETSCAPE2.0\xff" + bytes(10)),
        "gif of a huge data block": (BAD, gif(huge + b";")),
        "gif that ends within its frame": (BAD, small[: len(small) // 2]),
    }


def bmp(
    width: int, height: int, bits: int = 24, compression: int = 0, colours: int = 0, data: bytes = b"", size: int = 40
) -> bytes:
    palette = bytes(4 * 256) if bits <= 8 else b""
    offset = 14 + 40 + len(palette)
    head = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + head + palette + data


def bmps() -> Files:
    return {
        "bmp of 2**31 - 1 x 2**31 - 1": (LARGE, bmp(2**31 - 1, 2**31 - 1)),
        "bmp of a negative width": (LARGE, bmp(-48, 40, data=bytes(6_000))),
        "bmp of the most negative height": (LARGE, bmp(48, -(2**31), data=bytes(6_000))),
        "bmp of no size": (BAD, bmp(0, 0)),
        "bmp of 70,000 x 70,000": (LARGE, bmp(70_000, 70_000)),
        "bmp of runs that jump": (LARGE, bmp(40_000_000, 1, 8, 1, data=b"\0\2\xff\xff" * 100)),
        "bmp of runs that jump within it": (LARGE, bmp(8_000, 5_000, 8, 1, data=b"\0\2\xff\xff" * 100)),
        "bmp of 4,900,000 runs": (LARGE, bmp(8_000, 5_000, 8, 1, data=b"\1\1" * 4_900_000)),
        "bmp of 4,900,000 short runs of 4 bits": (LARGE, bmp(8_000, 5_000, 4, 2, data=b"\2\1" * 4_900_000)),
        "bmp of 160,000 long runs of 4 bits": (LARGE, bmp(8_000, 5_000, 4, 2, data=b"\xfe\1" * 160_000)),
        "bmp of 4,900,000 ends of lines": (LARGE, bmp(6_000, 5_000, 8, 1, data=b"\0\0" * 4_900_000)),
        "bmp of ends of a line of 40 megapixels": (LARGE, bmp(40_000_000, 1, 8, 1, data=b"\1\1\0\0" * 10)),
        "bmp of 2**31 colours": (BAD, bmp(48, 40, 8, colours=2**31 - 1, data=bytes(2_000))),
        "bmp of 255 bits": (BAD, bmp(48, 40, 255, data=bytes(6_000))),
        "bmp of an unknown compression": (BAD, bmp(48, 40, compression=99, data=bytes(6_000))),
        "bmp with a jpeg inside": (BAD, bmp(48, 40, 0, 4, data=picture("JPEG"))),
        "bmp of a header of 2**32 - 1 bytes": (UNSUPPORTED, bmp(48, 40, data=bytes(6_000), size=2**32 - 1)),
        "bmp of a header of 3 bytes": (UNSUPPORTED, bmp(48, 40, data=bytes(6_000), size=3)),
        "bmp that ends": (BAD, bmp(48, 40, data=bytes(100))),
        "bmp of two letters": (UNSUPPORTED, b"BM"),
        "bmp of 3.3 megapixels": (OK, bmp(2_048, 1_600, data=bytes(3 * 2_048 * 1_600))),
    }


def riff_of(kind: bytes, body: bytes, length: int | None = None) -> bytes:
    inside = kind + body
    return b"RIFF" + struct.pack("<I", len(inside) if length is None else length) + inside


def riff_chunk(kind: bytes, body: bytes, length: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(body) if length is None else length) + body + b"\0" * (len(body) % 2)


def _canvas(width: int, height: int, flags: int = 0x02) -> bytes:
    return riff_chunk(
        b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )


def webps() -> Files:
    small = picture("WEBP")
    lossless = picture("WEBP", lossless=True)
    inside = small[12:]
    anim = riff_chunk(b"ANIM", bytes(6))

    def framed(x: int, y: int, width: int, height: int) -> bytes:
        numbers = b"".join(value.to_bytes(3, "little") for value in (x, y, width - 1, height - 1, 10))
        return riff_chunk(b"ANMF", numbers + b"\0" + inside)

    def animated(width: int, height: int, frames: bytes) -> bytes:
        return riff_of(b"WEBP", _canvas(width, height) + anim + frames)

    honest = framed(0, 0, 48, 40)
    return {
        "webp of a canvas of 2**24 x 250": (LARGE, animated(2**24, 250, honest)),
        "webp of a canvas of 16,384 x 16,384": (LARGE, animated(16_384, 16_384, honest)),
        "webp of a canvas of 65,535 x 65,535": (LARGE, animated(65_535, 65_535, honest)),
        "webp of a canvas of 2**24 x 2**24": (LARGE, animated(2**24, 2**24, honest)),
        "webp of a still canvas of 16,384 x 16,384": (LARGE, riff_of(b"WEBP", _canvas(16_384, 16_384, 0) + inside)),
        "webp of a frame outside": (BAD, animated(48, 40, framed(2**23, 2**23, 48, 40))),
        "webp of a frame of another size": (OK, animated(48, 40, framed(0, 0, 2_000, 2_000))),
        "webp of 20,000 frames": (OK, animated(48, 40, honest * 2_000)),
        "webp of a lossless 16,384 x 16,384": (LARGE, lossless[:21] + b"\xff\xff\xff\x0f" + lossless[25:]),
        "webp of a lossy 16,383 x 16,383": (LARGE, small[:26] + b"\xff\x3f\xff\x3f" + small[30:]),
        "webp of a chunk of 2**32 - 1 bytes": (BAD, riff_of(b"WEBP", riff_chunk(b"VP8 ", inside[8:], 2**32 - 1))),
        "webp of a length of 2**32 - 1": (BAD, riff_of(b"WEBP", inside, 2**32 - 1)),
        "webp of a length of 0": (BAD, riff_of(b"WEBP", inside, 0)),
        "webp of a canvas alone": (BAD, riff_of(b"WEBP", _canvas(48, 40))),
        "webp of 1,000,000 unknown chunks": (
            OK,
            riff_of(b"WEBP", _canvas(48, 40, 0) + riff_chunk(b"ABCD", b"") * 1_000_000 + inside),
        ),
        "webp whose exif overlaps itself": (
            OK,
            riff_of(b"WEBP", _canvas(48, 40, 8) + inside + riff_chunk(b"EXIF", overlapping(9_000_000))),
        ),
        "webp of a header": (BAD, b"RIFF\0\0\0\0WEBP"),
    }


# Whatever is not read here


def strangers() -> Files:
    """Other formats that the libraries know, or that are something else altogether."""
    pictures = ("PPM", "TGA", "ICO", "PCX", "SGI", "PDF", "EPS", "DIB", "JPEG2000")
    unread = {f"{format.lower()} picture": picture(format) for format in pictures}
    for format in ("VOC", "SDS", "PAF", "SVX", "NIST", "IRCAM", "MAT4", "MAT5", "PVF", "HTK", "AVR", "MPC2K"):
        unread[f"{format.lower()} sound"] = tone(format, subtype="PCM_16")
    unread |= {
        "icns picture": picture("ICNS", (64, 64)),
        "xi sound": tone("XI", subtype="DPCM_16"),
        "wve sound": tone("WVE", rate=8_000, subtype="ALAW"),
        "svg": (
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
        ),
        "svg of entities": (b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><svg>&b;</svg>'),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\nshowpage\n"),
        "web page": b"<html><script>alert(1)</script></html>",
        "program": b"\x7fELF\x02\x01\x01" + bytes(500),
        "script": b"#!/bin/sh\nrm -rf /\n",
        "archive": b"PK\x03\x04" + bytes(400),
        "gzip": zlib.compress(bytes(10_000), wbits=31),
        "gzip that inflates": zlib.compress(bytes(2**28), wbits=31),
        "pickle": (
            b"\x80\x04\x95\x1e" + bytes(7) + b"\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
        ),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 300_000, 300_000, 8, 3) + bytes(100),
        "jpeg 2000 of 2**31 x 2**31": (
            b"\xff\x4f\xff\x51\0\x29\0\0"
            + struct.pack(">IIIIIIII", *(2**31 - 1,) * 2, 0, 0, *(2**31 - 1,) * 2, 0, 0)
            + b"\0\1\7\1\1"
        ),
        "one byte": b"\0",
        "zeros": bytes(1_000_000),
        "ones": b"\xff" * 1_000_000,
        "a text": b"hello, I am a text. " * 50,
    }
    damaged = {
        "avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(200),
        "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200),
        "matroska": b"\x1aE\xdf\xa3" + bytes(200),
        "nothing": b"",
    }
    return {
        **{name: (UNSUPPORTED, data) for name, data in unread.items()},
        **{name: (BAD, data) for name, data in damaged.items()},
    }


def polyglots() -> Files:
    """Two things at once. What the first bytes say is what is read, or nothing is."""
    png, jpeg, gif_, wav = picture("PNG"), picture("JPEG"), picture("GIF", mode="P"), tone()
    return {
        "png and archive": (OK, png + b"PK\x03\x04" + bytes(400)),
        "jpeg and archive": (OK, jpeg + b"PK\x03\x04" + bytes(400)),
        "jpeg and web page": (OK, jpeg[:2] + segment(0xFE, b"<script>alert(1)</script>") + jpeg[2:]),
        "gif and script": (OK, gif_[:6] + gif_[6:] + b"*/=1;alert(1)"),
        "wav and png": (OK, wav + png),
        "png and wav": (OK, png + wav),
        "web page and png": (UNSUPPORTED, b"<html>" + png),
        "pdf and jpeg": (UNSUPPORTED, b"%PDF-1.4\n" + jpeg),
        "zeros and png": (UNSUPPORTED, bytes(16) + png),
        "mark of order and png": (UNSUPPORTED, b"\xef\xbb\xbf" + png),
    }


# Sounds


def riff(format_: bytes, data: bytes, *, stated: int | None = None, extra: bytes = b"") -> bytes:
    body = riff_chunk(b"fmt ", format_) + extra + riff_chunk(b"data", data, stated)
    return riff_of(b"WAVE", body)


def wave(code: int = 1, channels: int = 1, rate: int = 16_000, bits: int = 16, align: int | None = None) -> bytes:
    step = channels * bits // 8 if align is None else align
    return struct.pack("<HHIIHH", code, channels, rate, (rate * step) & 0xFFFFFFFF, step & 0xFFFF, bits)


def _floats(value: float) -> bytes:
    return struct.pack("<f", value) * 4_000


def wavs() -> Files:
    second = tone()[44:]
    return {
        "wav of a rate of 0": (BAD, riff(wave(rate=0), second)),
        "wav of a rate of 2**32 - 1": (BAD, riff(wave(rate=2**32 - 1), second)),
        "wav of a rate of 999": (BAD, riff(wave(rate=999), second)),
        "wav of a rate of 768,001": (BAD, riff(wave(rate=768_001), second)),
        "wav of no channels": (BAD, riff(wave(channels=0), second)),
        "wav of 9 channels": (LARGE, riff(wave(channels=9), second)),
        "wav of 1,024 channels": (LARGE, riff(wave(channels=1_024), second)),
        "wav of 65,535 channels": (BAD, riff(wave(channels=65_535), second)),
        "wav of 0 bits": (UNSUPPORTED, riff(wave(bits=0), second)),
        "wav of 255 bits": (UNSUPPORTED, riff(wave(bits=255), second)),
        "wav of an alignment of 0": (OK, riff(wave(align=0), second)),
        "wav of an alignment of 65,535": (OK, riff(wave(align=65_535), second)),
        "wav of an unknown code": (UNSUPPORTED, riff(wave(code=0xABCD), second)),
        "wav that states 2**32 - 1 bytes": (OK, riff(wave(), second, stated=2**32 - 1)),
        "wav that states 2**31 bytes": (OK, riff(wave(), second, stated=2**31)),
        "wav that states no bytes": (OK, riff(wave(), second, stated=0)),
        "wav without data": (BAD, riff_of(b"WAVE", riff_chunk(b"fmt ", wave()))),
        "wav without a format": (BAD, riff_of(b"WAVE", riff_chunk(b"data", second))),
        "wav of a header": (BAD, b"RIFF\x04\0\0\0WAVE"),
        "wav of samples that are no numbers": (BAD, riff(wave(3, bits=32), _floats(float("nan")))),
        "wav of infinite samples": (BAD, riff(wave(3, bits=32), _floats(float("inf")))),
        "wav of huge samples": (BAD, riff(wave(3, bits=32), _floats(3e38))),
        "wav of tiny samples": (OK, riff(wave(3, bits=32), _floats(1e-45))),
        "wav of huge doubles": (BAD, riff(wave(3, bits=64), struct.pack("<d", 1e308) * 4_000)),
        "wav of 1,801 s": (LARGE, riff(wave(rate=1_000, bits=8), b"\x80" * 1_801_000)),
        "wav of 25,000 s": (LARGE, riff(wave(rate=1_000, bits=8), b"\x80" * 14_000_000)),
        "wav of 1,800 s": (OK, riff(wave(rate=1_000, bits=8), b"\x80" * 1_800_000)),
        "wav of 8 channels at 192,000": (OK, riff(wave(channels=8, rate=192_000, bits=8), b"\x80" * 14_500_000)),
        "wav of adpcm blocks of 65,535": (
            OK,
            riff(wave(2, bits=4, align=65_535) + struct.pack("<HH", 32, 65_535), second),
        ),
        "wav of adpcm blocks of 0": (BAD, riff(wave(0x11, bits=4, align=0) + struct.pack("<HH", 2, 0), second)),
        "wav of gsm, which it is not": (OK, riff(wave(0x31, bits=0, align=65) + struct.pack("<HH", 2, 320), second)),
        "wav of 2**31 cues": (OK, riff(wave(), second, extra=riff_chunk(b"cue ", struct.pack("<I", 2**31)))),
        "wav of 2**31 loops": (
            OK,
            riff(wave(), second, extra=riff_chunk(b"smpl", bytes(28) + struct.pack("<II", 2**31, 0))),
        ),
        "wav of 1,000,000 empty chunks": (OK, riff(wave(), second, extra=riff_chunk(b"junk", b"") * 1_000_000)),
        "wav of a list that holds itself": (
            OK,
            riff(wave(), second, extra=riff_chunk(b"LIST", b"INFO" + b"LIST\xff\xff\xff\xff" * 100)),
        ),
        "rf64 that states 2**63 bytes": (
            OK,
            b"RF64\xff\xff\xff\xffWAVE"
            + riff_chunk(b"ds64", struct.pack("<QQQI", 2**63, 2**63, 2**62, 0))
            + riff_chunk(b"fmt ", wave())
            + riff_chunk(b"data", second, 2**32 - 1),
        ),
    }


def sounds() -> Files:
    flac, ogg, mp3, aiff, caf, au, w64 = (tone(format) for format in ("FLAC", "OGG", "MP3", "AIFF", "CAF", "AU", "W64"))
    flags, common = int.from_bytes(flac[18:26], "big"), aiff.find(b"COMM")

    def streaminfo(rate: int, channels: int, bits: int, samples: int) -> bytes:
        packed = rate << 44 | (channels - 1) << 41 | (bits - 1) << 36 | samples
        return flac[:18] + packed.to_bytes(8, "big") + flac[26:]

    return {
        "flac of 2**36 - 1 samples": (BAD, streaminfo(16_000, 1, 16, 2**36 - 1)),
        "flac of a rate of 0": (OK, streaminfo(0, 1, 16, flags & (2**36 - 1))),
        "flac of a rate of 655,350": (OK, streaminfo(655_350, 1, 16, 8_000)),
        "flac of 8 channels, which it is not": (BAD, streaminfo(16_000, 8, 16, 8_000)),
        "flac of 32 bits, which it is not": (BAD, streaminfo(16_000, 1, 32, 8_000)),
        "flac of blocks of 0": (OK, flac[:8] + bytes(4) + flac[12:]),
        "flac of metadata of 16 MB": (BAD, flac[:42] + b"\x84\xff\xff\xff" + flac[42:]),
        "flac of 100,000 empty blocks": (
            OK,
            flac[:4] + bytes([flac[4] & 0x7F]) + flac[5:42] + b"\x01\0\0\0" * 100_000 + b"\x81\0\0\0" + flac[86:],
        ),
        "flac of a picture of 2**32 bytes": (
            OK,
            flac[:42] + b"\x06\0\0\x20" + struct.pack(">IIII", 3, 2**32 - 1, 0, 0) + bytes(16) + flac[42:],
        ),
        "flac of a header": (BAD, b"fLaC"),
        "flac of 300 MB decoded": (OK, silence("FLAC", 98, rate=96_000, channels=8)),
        "flac that ends": (BAD, flac[: len(flac) // 2]),
        "flac of 40 minutes of silence": (LARGE, silence("FLAC", 2_400)),
        "ogg that ends": (BAD, ogg[: len(ogg) // 2]),
        "ogg of a header": (BAD, b"OggS"),
        "ogg of a page that lies": (BAD, ogg[:26] + b"\xff" + ogg[27:]),
        "ogg of no serial": (BAD, ogg[:14] + bytes(4) + ogg[18:]),
        "ogg of 100,000 empty pages": (OK, ogg + (b"OggS\0\0" + bytes(20) + b"\0") * 100_000),
        "ogg of 40 minutes of silence": (LARGE, silence("OGG", 2_400)),
        "mp3 of 14 MB of marks": (UNSUPPORTED, b"\xff\xfb" * 7_000_000),
        "mp3 of 14 MB of zeros": (UNSUPPORTED, mp3[:400] + bytes(14_000_000)),
        "mp3 of a tag of 256 MB": (BAD, b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + mp3),
        "mp3 of 1,000 tags": (OK, (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)) * 1_000 + mp3),
        "mp3 of a tag that inflates": (
            OK,
            b"ID3\x04\0\0\0\0\x7f\x7f" + b"COMM\0\0\x7f\x70\0\x08" + _zeros(2**24)[:16_000] + mp3,
        ),
        "mp3 that ends": (OK, mp3[: len(mp3) // 2]),
        "mp3 of one header": (UNSUPPORTED, b"\xff\xfb\x90\x00"),
        "mp3 of 40 minutes of silence": (LARGE, silence("MP3", 2_400)),
        "aiff of an infinite rate": (BAD, aiff[: common + 16] + b"\x7f\xff" + bytes(8) + aiff[common + 26 :]),
        "aiff of a rate that is no number": (BAD, aiff[: common + 16] + b"\xff" * 10 + aiff[common + 26 :]),
        "aiff of 2**32 - 1 frames": (OK, aiff[: common + 10] + b"\xff\xff\xff\xff" + aiff[common + 14 :]),
        "aiff of 65,535 channels": (BAD, aiff[: common + 8] + b"\xff\xff" + aiff[common + 10 :]),
        "aiff of a header": (BAD, b"FORM\0\0\0\x04AIFF"),
        "caf of a rate that is no number": (BAD, caf[:20] + b"\x7f\xf8" + bytes(6) + caf[28:]),
        "caf of a negative rate": (BAD, caf[:20] + struct.pack(">d", -16_000.0) + caf[28:]),
        "caf of 2**32 - 1 channels": (BAD, caf[:44] + b"\xff\xff\xff\xff" + caf[48:]),
        "caf of a chunk of 2**63 bytes": (BAD, caf[:12] + b"\x7f" + b"\xff" * 7 + caf[20:]),
        "caf of alac without a cookie": (BAD, caf[:28] + b"alac" + caf[32:]),
        "au of a header of 2**32 - 1 bytes": (BAD, au[:4] + b"\xff\xff\xff\xff" + au[8:]),
        "au of 2**32 - 1 channels": (BAD, au[:20] + b"\xff\xff\xff\xff" + au[24:]),
        "au of an unknown coding": (UNSUPPORTED, au[:12] + b"\xff\xff\xff\xff" + au[16:]),
        "w64 of a length of 2**63": (OK, w64[:16] + b"\xff" * 8 + w64[24:]),
    }


def silence(format: str, seconds: float, rate: int = 8_000, channels: int = 1) -> bytes:
    stream = io.BytesIO()
    second = np.zeros((rate, channels), np.int16)
    with soundfile.SoundFile(stream, "w", rate, channels, format=format) as sound:
        for _ in range(int(seconds)):
            sound.write(second)
    return stream.getvalue()


# Damage


def damaged(honest: Mapping[str, bytes], seed: int, *, cuts: int, flips: int) -> dict[str, bytes]:
    """Return each file cut off at random places, and with random bytes of it changed."""
    rng = random.Random(seed)
    files = {}
    for name, data in honest.items():
        for number in range(cuts):
            files[f"{name}, cut {number}"] = data[: rng.randrange(4, len(data))]
        for number in range(flips):
            changed = bytearray(data)
            for _ in range(rng.choice((1, 4, 16, 64))):
                # The structure is at the beginning, more often than not.
                place = rng.randrange(min(len(changed), 128)) if rng.random() < 0.5 else rng.randrange(len(changed))
                changed[place] = rng.choice((0, 0xFF, rng.randrange(256)))
            files[f"{name}, changed {number}"] = bytes(changed)
    return files


def honest_images() -> dict[str, bytes]:
    return {
        "png": picture("PNG"),
        "png of a palette": picture("PNG", mode="P"),
        "jpeg": picture("JPEG"),
        "jpeg, progressive": picture("JPEG", progressive=True),
        "webp": picture("WEBP"),
        "webp, lossless": picture("WEBP", lossless=True),
        "gif": picture("GIF", mode="P"),
        "bmp": picture("BMP"),
        "tiff": picture("TIFF"),
        "tiff, lzw": picture("TIFF", compression="tiff_lzw"),
        "tiff, jpeg": picture("TIFF", compression="jpeg"),
    }


def honest_sounds() -> dict[str, bytes]:
    return {
        format.lower(): tone(format) for format in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU", "W64", "RF64")
    }
