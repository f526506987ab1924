"""Files as people have them, all made here from a seed: of telephones, recorders, scanners, browsers.

`samples(seed)` gives each with what is right for it. All pictures are of one scene and all sounds of one source, so
that what is right is a vector near that of a plain file of the same.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw, ImageFilter

from benchmarks.hostile_media import BAD, LARGE, UNSUPPORTED, chunk, riff_chunk, riff_of, wave

RATE = 16_000
Array = NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """A file, and the one answer that is right for it at every door."""

    name: str
    data: bytes
    kind: Literal["image", "audio"]
    like: bytes | None = None
    """A plain file whose vector this one's has to be near; None where it is to be refused."""
    least: float = 0.99
    """Cosine that counts as near."""
    refused: str | None = None
    """The code of the problem that is right."""
    unlike: bytes | None = None
    """A file whose vector this one's has to be far from: cosine below 0.98."""
    truncated: bool = False
    """Whether the answer has to say that not all of it could be read."""


# Pictures


def scene(seed: int = 0, size: tuple[int, int] = (480, 320)) -> Image.Image:
    """A table with a cup in evening light, more or less: shapes, edges, shades and grain."""
    rng = np.random.default_rng(seed)
    width, height = size
    shades = rng.integers(40, 220, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(shades).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, int(0.7 * height), width, height), fill=(110, 70, 40))
    pen.ellipse((0.3 * width, 0.3 * height, 0.6 * width, 0.8 * height), fill=(225, 220, 205))
    pen.ellipse((0.34 * width, 0.33 * height, 0.56 * width, 0.47 * height), fill=(60, 30, 15))
    pen.arc((0.55 * width, 0.4 * height, 0.72 * width, 0.68 * height), 270, 90, fill=(225, 220, 205), width=18)
    grain = rng.normal(0, 4, (height, width, 1))
    grained = np.clip(np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32) + grain, 0, 255)
    return Image.fromarray(grained.astype(np.uint8))


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    if format == "HEIC":
        import pillow_heif

        tile = options.pop("tile", 0)
        exif = options.pop("exif", None)
        file = pillow_heif.from_pillow(image)
        if exif is not None:
            file.info["exif"] = exif.tobytes()
        file.save(stream, quality=90, **({"tile_size": tile} if tile else {}), **options)
    else:
        image.save(stream, format, **options)
    return stream.getvalue()


def with_chunk(png: bytes, added: bytes) -> bytes:
    """A PNG with a chunk after its header."""
    return png[:33] + added + png[33:]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def lying(image: Image.Image, orientation: int) -> Image.Image:
    """A picture as a camera stores it that writes this orientation."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    return image.transpose(back[orientation])


def huge_exif(count: int) -> bytes:
    """EXIF whose orientation is so many fractions."""
    return (
        b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x0112, 5, count, 26) + b"\0\0\0\0" + b"\1" * (8 * count)
    )


def segments(marker: int, body: bytes, head: bytes = b"") -> bytes:
    """A JPEG's segments that hold a long body, each with the same head."""
    room = 65_000
    parts = [body[start : start + room] for start in range(0, len(body), room)]
    return b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", 2 + len(head) + len(part)) + head + part for part in parts
    )


def tiff(samples: Array, tags: dict[int, tuple[int, Sequence[float]]], order: Literal["<", ">"] = "<") -> bytes:
    """A TIFF of one strip from an array (H, W) or (H, W, n). `tags` are {number: (type, values)}."""
    kinds = {"u": 1, "i": 2, "f": 3}
    count = 1 if samples.ndim == 2 else samples.shape[2]
    body = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    described: dict[int, tuple[int, Sequence[float]]] = {
        256: (4, [samples.shape[1]]),
        257: (4, [samples.shape[0]]),
        258: (3, [8 * samples.dtype.itemsize] * count),
        259: (3, [1]),
        262: (3, [2 if count > 2 else 1]),
        273: (4, [8]),
        277: (3, [count]),
        278: (4, [samples.shape[0]]),
        279: (4, [len(body)]),
        339: (3, [kinds[samples.dtype.kind]] * count),
    } | tags
    codes, sizes = {2: "B", 3: "H", 4: "I", 8: "h", 11: "f", 12: "d"}, {2: 1, 3: 2, 4: 4, 8: 2, 11: 4, 12: 8}
    start = 8 + len(body) + len(body) % 2
    directory, beyond = b"", b""
    after = start + 2 + 12 * len(described) + 4
    for number, (kind, values) in sorted(described.items()):
        packed = struct.pack(f"{order}{len(values)}{codes[kind]}", *values)
        if sizes[kind] * len(values) > 4:
            place, beyond = after + len(beyond), beyond + packed
            packed = struct.pack(order + "I", place)
        directory += struct.pack(order + "HHI", number, kind, len(values)) + packed.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(order + "I", start) + body + b"\0" * (len(body) % 2)
    return head + struct.pack(order + "H", len(described)) + directory + bytes(4) + beyond


def exchanging_profile() -> bytes:
    """An sRGB profile whose red is blue and whose blue is red."""
    profile = bytearray(srgb_profile())
    count = int.from_bytes(profile[128:132], "big")
    entries = {bytes(profile[place : place + 4]): place for place in range(132, 132 + 12 * count, 12)}
    red, blue = entries[b"rXYZ"] + 4, entries[b"bXYZ"] + 4
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    return bytes(profile)


def in_hdr(image: Image.Image) -> Image.Image:
    """A picture in the primaries of BT.2020 and the curve of ST 2084, where white is 203 of 10,000 nits."""
    levels = np.asarray(image) / 255
    light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    wide = light @ np.array([[0.6274, 0.0691, 0.0164], [0.3293, 0.9195, 0.0880], [0.0433, 0.0114, 0.8956]])
    power = np.clip(wide * 203 / 10_000, 0, 1) ** 0.1593017578125
    curve = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    return Image.fromarray(np.rint(255 * curve).astype(np.uint8))


def said_to_be_hdr(heif: bytes) -> bytes:
    """A HEIC or AVIF whose box of colours says that they are those of `in_hdr`."""
    place = heif.index(b"nclx") + 4
    return heif[:place] + struct.pack(">HH", 9, 16) + heif[place + 4 :]


def logo(kind: str, colour: tuple[int, int, int], mode: str = "RGBA") -> Image.Image:
    """A drawing of one colour on nothing."""
    image = Image.new("RGBA", (320, 320), (*colour, 0))
    pen = ImageDraw.Draw(image)
    if kind == "star":
        points = [
            (160 + radius * np.sin(angle), 160 - radius * np.cos(angle))
            for angle, radius in zip(np.arange(10) * np.pi / 5, [140, 60] * 5, strict=True)
        ]
        pen.polygon(points, fill=(*colour, 255))
    else:
        pen.rectangle((20, 150, 300, 220), fill=(*colour, 255))
        pen.rectangle((80, 100, 230, 150), fill=(*colour, 255))
        pen.ellipse((50, 190, 120, 260), fill=(*colour, 255))
        pen.ellipse((200, 190, 270, 260), fill=(*colour, 255))
    if mode == "P":
        drawn = Image.new("P", image.size, 0)
        drawn.putpalette([200, 10, 10, *colour])
        drawn.paste(1, mask=image.getchannel("A").point(lambda level: 255 * (level > 127)))
        drawn.info["transparency"] = 0
        return drawn
    return image.convert(mode)


def on(ground: int, image: Image.Image) -> bytes:
    plain = Image.new("RGBA", image.size, (ground, ground, ground, 255))
    return saved(Image.alpha_composite(plain, image.convert("RGBA")).convert("RGB"))


def _right(plain: bytes, name: str, data: bytes, like: bytes | None = None, least: float = 0.99, **more: Any) -> Sample:
    return Sample(name, data, "image", like or plain, least, **more)


def _wrong(name: str, data: bytes, code: str = BAD, kind: Literal["image", "audio"] = "image") -> Sample:
    return Sample(name, data, kind, refused=code)


def images(seed: int, size: tuple[int, int] = (480, 320)) -> Iterator[Sample]:
    photo = scene(seed, size)
    for part in (_turned, _described, _cut_off, _of_samples, _on_grounds, _animated):
        yield from part(photo)
    yield _wrong("unknown.jpg", b"This is a text that is called a picture.\n" * 20, UNSUPPORTED)
    yield _wrong("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNSUPPORTED)


def _turned(photo: Image.Image) -> Iterator[Sample]:
    """Pictures of telephones, and pictures that are turned by their metadata."""
    right = partial(_right, saved(photo))
    grey = saved(photo.convert("L"))
    yield right("photo.heic", saved(photo, "HEIC"))
    yield right("tiles.heic", saved(photo, "HEIC", tile=64))
    for orientation in (3, 5, 6):
        turned_photo = lying(photo, orientation)
        for format in ("HEIC", "AVIF", "JPEG", "WEBP", "PNG", "TIFF"):
            # A new one for each: AVIF's writer takes the orientation out of what it is given.
            exif = turned(orientation)
            options = {} if format in ("HEIC", "PNG", "TIFF") else {"quality": 92}
            yield right(f"turned{orientation}.{format.lower()}", saved(turned_photo, format, exif=exif, **options))
    yield right("photo.avif", saved(photo, "AVIF", quality=85))
    yield right("grey.avif", saved(photo.convert("L"), "AVIF", quality=90), grey)


def _described(photo: Image.Image) -> Iterator[Sample]:
    """Pictures with large, odd or damaged metadata."""
    plain = saved(photo)
    right = partial(_right, plain)
    jpeg = saved(photo, "JPEG", quality=92)
    bomb = zlib.compress(bytes(2_500_000))
    yield right("text_2mb.png", with_chunk(plain, chunk(b"zTXt", b"note\0\0" + bomb)), least=0.999)
    yield right(
        "profile_6mb.png", with_chunk(plain, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(6_000_000)))), least=0.999
    )
    yield right("bad_checksum.png", with_chunk(plain, chunk(b"tEXt", b"a\0b", crc=1)), least=0.999)
    yield right("bad_time.png", with_chunk(plain, chunk(b"tIME", b"x") + chunk(b"pHYs", b"")), least=0.999)
    yield right("bad_transparency.png", with_chunk(plain, chunk(b"tRNS", b"\0")), least=0.999)
    yield right("huge_exif.png", with_chunk(plain, chunk(b"eXIf", huge_exif(1_000_000)[6:])), least=0.999)
    million = segments(0xE1, huge_exif(1_000_000)[6:], b"Exif\0\0")
    yield right("huge_exif.jpg", jpeg[:2] + million + jpeg[2:])
    yield right("comments.jpg", jpeg[:2] + segments(0xFE, bytes(1_000_000)) + jpeg[2:])
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    by_xmp = saved(lying(photo, 6), "JPEG", quality=92)
    yield right("turned_by_xmp.jpg", by_xmp[:2] + segments(0xE1, xmp) + by_xmp[2:])


def _cut_off(photo: Image.Image) -> Iterator[Sample]:
    """Pictures whose end is missing."""
    right = partial(_right, saved(photo))
    jpeg = saved(photo, "JPEG", quality=92)
    yield right("no_end.jpg", jpeg[:-2], truncated=True)
    yield right("10_bytes_short.jpg", jpeg[:-10], truncated=True)
    # The last scan, which sharpens every block, is what is cut off: told in the answer, and a little further away.
    yield right("short_progressive.jpg", saved(photo, "JPEG", progressive=True)[:-200], least=0.97, truncated=True)
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "HEIC", "AVIF"):
        whole = saved(photo, format)
        yield _wrong(f"half.{format.lower()}", whole[: len(whole) // 2])
        yield _wrong(f"start.{format.lower()}", whole[:40])


def _of_samples(photo: Image.Image) -> Iterator[Sample]:
    """Pictures of other kinds of samples, and of colours by a profile."""
    right = partial(_right, saved(photo))
    grey = saved(photo.convert("L"))
    light = np.asarray(photo.convert("L"))
    colours = np.asarray(photo)
    wide = light.astype(np.uint16)
    yield right("12_bit.tif", tiff(wide * 16, {281: (3, [4095])}), grey)
    yield right("12_bit_big_endian.tif", tiff(wide * 16, {281: (3, [4095])}, ">"), grey)
    yield right("10_bit_colour.tif", tiff(colours.astype(np.uint16) * 4, {281: (3, [1023] * 3)}))
    yield right("16_bit_colour.tif", tiff(colours.astype(np.uint16) * 257, {}))
    yield right("white_is_zero.tif", tiff(65_535 - wide * 257, {262: (3, [0])}), grey)
    yield right("signed.tif", tiff((wide.astype(np.int32) * 257 - 32_768).astype(np.int16), {}), grey)
    yield right("32_bit.tif", tiff(light.astype(np.uint32) * 16_843_009, {}), grey)
    yield right("float_to_1.tif", tiff(light.astype(np.float32) / 255, {}), grey)
    heights = light.astype(np.float32) * 8
    yield right("heights.tif", tiff(heights, {}), grey, least=0.97)
    yield right("heights_below_zero.tif", tiff(heights - 1_020, {}), grey, least=0.97)
    yield right("float_from_minus_1.tif", tiff(light.astype(np.float32) / 127.5 - 1, {}), grey, least=0.97)
    yield right("small_signed.tif", tiff(wide.astype(np.int16) * 8, {}), grey, least=0.97)
    hole = np.zeros_like(light)
    hole[:16] = 1
    holed = saved(Image.fromarray(np.where(hole, 0, light).astype(np.uint8)))
    for name, samples, missing in (
        ("holes.tif", np.where(hole, np.float32(-9_999), heights), b"-9999"),
        ("holes_nan.tif", np.where(hole, np.float32(np.nan), heights), b"nan"),
        ("holes_signed.tif", np.where(hole, np.int16(-32_768), wide.astype(np.int16) * 8), b"-32768"),
    ):
        yield right(name, tiff(samples, {42113: (2, missing + b"\0")}), holed, least=0.97)
    yield _wrong("nan.tif", tiff(np.where(hole, np.float32(np.nan), heights), {}), BAD)
    yield right("float_to_65535.tif", tiff(light.astype(np.float32) * 257, {}), grey)
    yield _wrong("double.tif", tiff(light.astype(np.float64) / 255, {}), UNSUPPORTED)
    yield right("float_colour.tif", tiff(colours.astype(np.float32) / 255, {}))
    yield _wrong("planes.tif", tiff(colours.astype(np.float32), {284: (3, [2])}), UNSUPPORTED)
    yield right("16_bit.png", saved(Image.fromarray(wide * 257)), grey)
    yield right("cmyk.jpg", saved(photo.convert("CMYK"), "JPEG", quality=92))
    yield right("cmyk.tif", saved(photo.convert("CMYK"), "TIFF"))
    exchanged = Image.fromarray(np.ascontiguousarray(colours[..., ::-1]))
    profile = exchanging_profile()
    for format in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF"):
        yield right(f"profile.{format.lower()}", saved(exchanged, format, icc_profile=profile, quality=92))
    linear = Image.fromarray(np.rint(255 * (colours / 255) ** 2.2).astype(np.uint8))
    gamma = struct.pack(">I", 100_000)
    yield right("linear.png", with_chunk(saved(linear), chunk(b"gAMA", gamma)))
    yield right("linear_but_srgb.png", with_chunk(saved(photo), chunk(b"gAMA", gamma) + chunk(b"sRGB", b"\0")))
    yield right("gamma_of_0.png", with_chunk(saved(photo), chunk(b"gAMA", bytes(4))))
    hdr = in_hdr(photo)
    yield right("hdr.png", with_chunk(saved(hdr), chunk(b"cICP", bytes([9, 16, 0, 1]))))
    yield right("hdr.avif", said_to_be_hdr(saved(hdr, "AVIF", quality=95)), least=0.97)
    yield right("hdr.heic", said_to_be_hdr(saved(hdr, "HEIC")), least=0.97)
    yield right("srgb.jpg", saved(photo, "JPEG", quality=92, icc_profile=srgb_profile()))


def _on_grounds(photo: Image.Image) -> Iterator[Sample]:
    """Logos on a ground that one does not see."""
    right = partial(_right, saved(photo))
    white, black = (255, 255, 255), (0, 0, 0)
    for mode in ("RGBA", "LA", "P"):
        star, car = (saved(logo(kind, white, mode)) for kind in ("star", "car"))
        yield right(f"white_star_{mode}.png", star, on(0, logo("star", white)), 0.999, unlike=car)
        yield right(f"white_car_{mode}.png", car, on(0, logo("car", white)), 0.999, unlike=star)
        yield right(f"black_star_{mode}.png", saved(logo("star", black, mode)), on(255, logo("star", black)), 0.999)
    yield right(
        "pale_star.webp",
        saved(logo("star", (245, 245, 235)), "WEBP", lossless=True),
        on(0, logo("star", (245, 245, 235))),
    )


def _animated(photo: Image.Image) -> Iterator[Sample]:
    """Animations whose first frame shows nothing."""
    right = partial(_right, saved(photo))
    few = photo.quantize(64, dither=Image.Dither.NONE)
    dark = Image.new("RGB", photo.size)
    clear = Image.new("RGBA", photo.size, (0, 0, 0, 0))
    dot = dark.copy()
    dot.putpixel((5, 5), (255, 255, 255))
    frames = [photo, photo.rotate(2)]
    reduced = saved(few.convert("RGB"))
    yield right(
        "black_first.gif", saved(dark.quantize(4), "GIF", save_all=True, append_images=[few, few]), reduced, 0.95
    )
    yield right(
        "sparse_first.gif",
        saved(dark.quantize(4), "GIF", save_all=True, append_images=[dot.quantize(4), few]),
        reduced,
        0.95,
    )
    yield right("black_first.png", saved(dark, save_all=True, append_images=frames), least=0.999)
    yield right(
        "clear_first.png",
        saved(clear, save_all=True, append_images=[frame.convert("RGBA") for frame in frames]),
        least=0.999,
    )
    yield right("black_first.webp", saved(dark, "WEBP", save_all=True, append_images=[dot, *frames], quality=90))
    yield right("black_first.avif", saved(dark, "AVIF", save_all=True, append_images=frames, quality=90))
    gif = saved(few, "GIF")
    comments = b"!\xfe" + (b"\xff" + b"c" * 255) * 4_000 + b"\0"
    yield right(
        "comments.gif",
        gif[: 13 + 3 * 2 ** ((gif[10] & 7) + 1)] + comments + gif[13 + 3 * 2 ** ((gif[10] & 7) + 1) :],
        reduced,
    )


def large_images(seed: int) -> Iterator[Sample]:
    """Yield what takes seconds to make."""
    photo = scene(seed)
    large = saved(photo.resize((8_160, 6_120), Image.Resampling.BICUBIC), "JPEG", quality=80)
    like = saved(photo.resize((1_020, 765), Image.Resampling.BICUBIC))
    yield Sample("50_megapixels.jpg", large, "image", like)
    many = saved(Image.new("L", (8_160, 6_120), 90), compress_level=1)
    yield Sample("50_megapixels.png", many, "image", refused=LARGE)


def srgb_profile() -> bytes:
    """An sRGB profile, without the time at which it was made."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)
    return bytes(profile)


# Sounds


def source(seed: int = 0, seconds: float = 2.0) -> NDArray[np.float32]:
    """A bird over a stream, more or less: whistles that rise and fall over noise, at RATE."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    whistle = np.sin(2 * np.pi * (900 * time + 60 * np.sin(2 * np.pi * 3 * time))) * (
        np.sin(2 * np.pi * 1.5 * time) > 0
    )
    noise = np.convolve(rng.normal(0, 1, len(time)), np.ones(8) / 8, "same")
    mixed = 0.5 * whistle + 0.12 * noise
    return np.asarray(0.8 * mixed / np.abs(mixed).max(), np.float32)


def written(samples: Array, format: str = "WAV", rate: int = RATE, **options: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=format, **options)
    return stream.getvalue()


def muxed(samples: Array, format: str, codec: str, rate: int = RATE, options: dict[str, str] | None = None) -> bytes:
    """A container with a sound, by PyAV."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=format, options=options) as target:
        track: Any = target.add_stream(codec, rate=rate, layout="mono")
        block = 1_024
        for start in range(0, len(samples), block):
            piece = (samples[start : start + block] * 32_767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            target.mux(track.encode(frame))
        target.mux(track.encode(None))
    return stream.getvalue()


def two_tracks(first: Array, default: Array) -> bytes:
    """A Matroska of two tracks, of which the second is the one that players play."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as target:
        tracks: list[Any] = [target.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        tracks[1].disposition = av.stream.Disposition.default
        for track, samples in zip(tracks, (first, default), strict=True):
            frame = av.AudioFrame.from_ndarray((samples * 32_767).astype(np.int16).reshape(1, -1), "s16", "mono")
            frame.sample_rate, frame.pts = RATE, 0
            target.mux(track.encode(frame))
    return stream.getvalue()


def joined(heard: Array) -> dict[str, bytes]:
    """Sounds in two parts, one file after the other, as where a station is recorded, or files are joined."""
    first, second = heard[: len(heard) // 2], heard[len(heard) // 2 :]
    files = {
        f"joined.{format.lower()}": written(first, format) + written(second, format)
        for format in ("OGG", "FLAC", "MP3")
    }
    files["joined.opus"] = muxed(first, "ogg", "libopus", 48_000) + muxed(second, "ogg", "libopus", 48_000)
    tag = b"ID3\4\0\0\0\0\2\0" + bytes(256)
    files["joined_tagged.mp3"] = tag + written(first, "MP3") + tag + written(second, "MP3")
    for name, format, codec in (("joined_rates.aac", "adts", "aac"), ("joined_rates.mp3", "mp3", "libmp3lame")):
        files[name] = muxed(first, format, codec) + muxed(second, format, codec, 44_100)
    return files


def digital_output(heard: Array) -> bytes:
    """A WAV whose samples are a stream of AC-3, as a digital output has it: played, it is noise."""
    stream = muxed(heard, "spdif", "ac3", 48_000)
    return riff((b"fmt ", wave(channels=2, rate=48_000)), (b"data", bytes(4_000) + stream))


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def with_cover(m4a: bytes, cover: bytes) -> bytes:
    """An MP4 whose last box is `moov`, with a cover in it."""
    place = m4a.rindex(b"moov") - 4
    item = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover)))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    described = box(b"udta", box(b"meta", bytes(4) + handler + item))
    moov = m4a[place + 8 :] + described
    return m4a[:place] + box(b"moov", moov)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    return riff_of(b"WAVE", b"".join(riff_chunk(kind, data) for kind, data in chunks))


def integers(samples: Array) -> bytes:
    return (samples * 32_767).astype("<i2").tobytes()


def _heard(plain: bytes, name: str, data: bytes, least: float = 0.99, **more: Any) -> Sample:
    return Sample(name, data, "audio", plain, least, **more)


def sounds(seed: int) -> Iterator[Sample]:
    heard = source(seed)
    yield from _boxed(heard, saved(scene(seed, (240, 240)), "JPEG"))
    yield from _waves(heard)
    yield from _other_formats(heard)


def _boxed(heard: Array, cover: bytes) -> Iterator[Sample]:
    """Sounds in the containers of telephones, browsers and cameras."""
    plain = written(heard)
    right = partial(_heard, plain)
    m4a = muxed(heard, "ipod", "aac")
    yield right("telephone.m4a", m4a, 0.97)
    yield right("song_with_cover.m4a", with_cover(m4a, cover), 0.97, unlike=cover)
    yield right("recorder.aac", muxed(heard, "adts", "aac"), 0.97)
    yield right("telephone.3gp", muxed(heard, "3gp", "aac"), 0.97)
    yield right("sound_only.mp4", muxed(heard, "mp4", "aac"), 0.97)
    yield right("sound_only.mov", muxed(heard, "mov", "pcm_s16le"))
    yield right("browser.webm", muxed(heard, "webm", "libopus"), 0.97)
    yield right("sound_only.mkv", muxed(heard, "matroska", "flac"))
    yield right("mpegts.mp4", muxed(heard, "mpegts", "aac"), 0.97)
    yield right("sound_only.mpg", muxed(heard, "mpeg", "mp2", 48_000), 0.97)
    camcorder = muxed(heard, "mpegts", "ac3", 48_000, {"mpegts_m2ts_mode": "1"})
    yield right("camcorder.mts", camcorder, 0.97)
    checked = (camcorder[place + 4 : place + 192] + bytes(16) for place in range(0, len(camcorder), 192))
    yield right("receiver.ts", b"".join(checked), 0.97)
    yield right("default_track.mka", two_tracks(source(seed=77, seconds=1)[::-1], heard))
    yield right("sound_only.avi", muxed(heard, "avi", "pcm_s16le"))
    yield _wrong("half.m4a", m4a[: len(m4a) // 2], kind="audio")


def _waves(heard: Array) -> Iterator[Sample]:
    """FLAC, and RIFF WAVE of every kind of samples."""
    plain = written(heard)
    silence = np.zeros_like(heard)
    right = partial(_heard, plain)
    flac = written(heard, "FLAC")
    streamed = bytearray(flac)
    streamed[21] &= 0xF0
    streamed[22:42] = bytes(20)
    yield right("streamed.flac", bytes(streamed), 0.999)
    yield _wrong("half.flac", flac[: len(flac) // 2], kind="audio")
    at = plain.index(b"data") + 4
    for name, length in (("size_0.wav", 0), ("size_all_ones.wav", 0xFFFF_FFFF), ("size_2_31.wav", 0x7FFF_FFFF)):
        yield right(name, plain[:4] + bytes(4) + plain[8:at] + struct.pack("<I", length) + plain[at + 4 :], 0.999)
    yield right("short.wav", plain[:-1_000], truncated=True)
    yield _wrong("start.wav", plain[:20], kind="audio")
    yield _wrong("no_samples.wav", riff((b"fmt ", wave()), (b"data", b"")), kind="audio")
    odd = (
        (b"JUNK", bytes(27)),
        (b"fmt ", wave()),
        (b"bext", bytes(603)),
        (b"data", integers(heard)),
        (b"LIST", b"INFO"),
    )
    yield right("odd_chunks.wav", riff(*odd), 0.999)
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM"):
        least = 0.9 if subtype in ("PCM_U8", "ULAW", "ALAW", "IMA_ADPCM") else 0.999
        yield right(f"{subtype.lower()}.wav", written(heard, subtype=subtype), least)
    yield right("antiphase.wav", written(np.stack([heard, -heard], 1)), 0.999)
    yield right("antiphase.flac", written(np.stack([heard, -heard], 1), "FLAC"), 0.999)
    yield right("one_ear.wav", written(np.stack([heard, silence], 1)), 0.999)
    yield right("one_of_six.wav", written(np.stack([silence] * 4 + [heard, silence], 1)), 0.999)
    guid = bytes.fromhex("01000000" + "21 07 d3 11 86 44 c8 c1 ca 00 00 00".replace(" ", ""))
    spatial = np.stack([heard, -heard, 0.9 * heard, -0.5 * heard], 1)
    extensible = wave(0xFFFE, channels=4) + struct.pack("<HHI", 22, 16, 0) + guid
    yield right("ambisonic.wav", riff((b"fmt ", extensible), (b"data", integers(spatial))), 0.999)
    for name, scale in (("int16", 32_768.0), ("int24", 8_388_608.0), ("int8", 128.0)):
        yield right(f"float_{name}_scale.wav", written(heard * np.float32(scale), subtype="FLOAT"), 0.999)


def _other_formats(heard: Array) -> Iterator[Sample]:
    """Other formats, whole, cut off, and with lengths that are not theirs."""
    plain = written(heard)
    right = partial(_heard, plain)
    for format in ("AIFF", "CAF", "AU", "W64", "RF64", "OGG", "MP3"):
        name = f"{format.lower()}.wav" if format in ("W64", "RF64") else f"plain.{format.lower()}"
        yield right(name, written(heard, format), 0.97)
    aiff = bytearray(written(heard, "AIFF"))
    common, body = aiff.index(b"COMM") + 8, aiff.index(b"SSND") + 4
    aiff[common + 2 : common + 6], aiff[body : body + 4] = bytes(4), bytes(4)
    yield right("size_0.aiff", bytes(aiff), 0.999)
    written_as = {kind: written(heard, kind) for kind in ("AIFF", "CAF", "AU", "W64", "RF64", "FLAC", "OGG", "MP3")}
    for format, data in written_as.items():
        ending = "wav" if format in ("W64", "RF64") else format.lower()
        # What begins as a format that is read here is damaged, not unknown.
        start = b"ID3\4\0\0\0\0\2\0" + bytes(256) if format == "MP3" else data[: 20 if format == "AU" else 40]
        yield _wrong(f"start_{format.lower()}.{ending}", start, kind="audio")
        if format != "FLAC":
            yield right(f"short_{format.lower()}.{ending}", data[: len(data) * 9 // 10], 0.9, truncated=True)
    for name, format, codec in (("short.webm", "webm", "libopus"), ("short.mkv", "matroska", "flac")):
        data = muxed(heard, format, codec)
        yield right(name, data[: len(data) * 9 // 10], 0.9, truncated=True)
    au, caf = written_as["AU"], written_as["CAF"]
    for name, length in (("size_0.au", 0), ("streamed.au", 0xFFFF_FFFF), ("size_2_31.au", 0x7FFF_FFFF)):
        yield right(name, au[:8] + struct.pack(">I", length) + au[12:], 0.999)
    for offset in (0, 23, len(au) + 1, 2**31, 2**32 - 1):
        yield _wrong(f"begins_at_{offset}.au", au[:4] + struct.pack(">I", offset) + au[8:], kind="audio")
    yield _wrong("unknown_coding.au", au[:12] + b"\xff" * 4 + au[16:], UNSUPPORTED, kind="audio")
    at = caf.index(b"data") + 4
    for name, length in (("streamed.caf", -1), ("size_0.caf", 0), ("size_4.caf", 4)):
        yield right(name, caf[:at] + struct.pack(">q", length) + caf[at + 8 :], 0.999)
    for name in ("joined.ogg", "joined.flac", "joined.mp3", "joined.opus", "joined_rates.aac"):
        yield right(name, joined(heard)[name], 0.95)
    mp3 = muxed(heard, "mp3", "libmp3lame", 44_100)
    yield right("from_a_stream.mp3", mp3[700:], 0.9)
    yield right("padded.mp3", bytes(5_000) + written(heard, "MP3"), 0.97)
    yield right("digital_output.wav", digital_output(heard), 0.97)
    yield _wrong("a.wma", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(3_000), UNSUPPORTED, kind="audio")
    yield _wrong("unknown.wav", b"no sound at all\n" * 30, UNSUPPORTED, kind="audio")


MAKERS: Sequence[Callable[[int], Iterator[Sample]]] = (images, sounds, large_images)


def samples(seed: int = 0) -> Iterator[Sample]:
    for make in MAKERS:
        yield from make(seed)
