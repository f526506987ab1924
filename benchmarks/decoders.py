"""How fast is a photograph read, from the file's bytes to what an image tower takes, and how exactly?

python -m benchmarks.decoders [--repeats 7] [--bundle build/starter] [--flickr DIR]

Every way ends in the same resize and normalisation of `service.contract.images`, so the whole path is compared. A way
that needs a package that is not installed is left out and named. Times are of the CPU, all threads together: what a
server with busy cores has to pay. Differences are against Pillow's full decode: the
mean over pixels in 255ths (of the worst photograph), and, with a bundle, the lowest cosine of the tower's vectors.
The photographs are those of scikit-image, as they are, enlarged, and laid in mosaics, whose every part is as sharp as
a camera's; with --flickr (a folder of images) mosaics of those too. Prints a table and, as its last line, one JSON
object.
"""

import argparse
import importlib
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract import images
from service.contract.bundle import read_bundle
from service.contract.images import ImageLimits, ImagePreprocessing, decode_image, preprocess_image, read_image

SPEC = ImagePreprocessing(height=224, width=224, resize="shortest_edge", shortest_edge=256, resample="bicubic")
LIMITS = ImageLimits(max_bytes=2**30, max_pixels=2**30)
SIDES = (640, 1280, 2560, 4000)

Read = Callable[[bytes], NDArray[np.float32]]


def pillow_full(data: bytes) -> NDArray[np.float32]:
    return preprocess_image(decode_image(data, LIMITS), SPEC)


def pillow_gap(gap: float) -> Read:
    def read(data: bytes) -> NDArray[np.float32]:
        with mock.patch.object(images, "REDUCING_GAP", gap):
            return read_image(data, SPEC, LIMITS)

    return read


def ways() -> dict[str, Read | None]:
    """Name → how to read; None where its package is not installed."""
    return {
        "pillow": pillow_full,
        "pillow draft 1": pillow_gap(1.0),
        "pillow draft 1.5": pillow_gap(1.5),
        "pillow draft 2": pillow_gap(2.0),
        "pillow draft 3": pillow_gap(3.0),
        "simplejpeg": _if_there("simplejpeg", _simplejpeg),
        "simplejpeg scaled": _if_there("simplejpeg", _simplejpeg_scaled),
        "turbojpeg": _if_there("turbojpeg", _turbojpeg),
        "turbojpeg scaled": _if_there("turbojpeg", _turbojpeg_scaled),
        "pyvips": _if_there("pyvips", _pyvips),
    }


def _if_there(package: str, make: Callable[[Any], Read]) -> Read | None:
    try:
        return make(importlib.import_module(package))
    except (ImportError, OSError, RuntimeError):  # PyTurboJPEG and pyvips come without the library that they call
        return None


def _simplejpeg(simplejpeg: Any) -> Read:
    return lambda data: preprocess_image(Image.fromarray(simplejpeg.decode_jpeg(data)), SPEC)


def _simplejpeg_scaled(simplejpeg: Any) -> Read:
    least = int(images.REDUCING_GAP * 256)

    def read(data: bytes) -> NDArray[np.float32]:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        factor = least / min(height, width)
        smallest = (int(height * factor), int(width * factor)) if factor < 1 else (0, 0)
        pixels = simplejpeg.decode_jpeg(data, min_height=smallest[0], min_width=smallest[1])
        return preprocess_image(Image.fromarray(pixels), SPEC)

    return read


def _turbojpeg(turbojpeg: Any) -> Read:
    decoder = turbojpeg.TurboJPEG()
    return lambda data: preprocess_image(Image.fromarray(decoder.decode(data, pixel_format=turbojpeg.TJPF_RGB)), SPEC)


def _turbojpeg_scaled(turbojpeg: Any) -> Read:
    decoder = turbojpeg.TurboJPEG()
    least = images.REDUCING_GAP * 256

    def read(data: bytes) -> NDArray[np.float32]:
        width, height, *_ = decoder.decode_header(data)
        scale = next((n for n in (8, 4, 2) if min(width, height) / n >= least), 1)
        pixels = decoder.decode(data, pixel_format=turbojpeg.TJPF_RGB, scaling_factor=(1, scale))
        return preprocess_image(Image.fromarray(pixels), SPEC)

    return read


def _pyvips(pyvips: Any) -> Read:
    def read(data: bytes) -> NDArray[np.float32]:
        image = pyvips.Image.thumbnail_buffer(data, 256, height=10**7, size="both")
        if image.height < 256:
            image = pyvips.Image.thumbnail_buffer(data, 10**7, height=256, size="both")
        pixels = np.ascontiguousarray(image.numpy()[:, :, :3])
        return preprocess_image(Image.fromarray(pixels), SPEC)

    return read


def photographs(side: int, flickr: Path | None) -> Iterator[bytes]:
    """JPEGs whose longer side is `side`: enlarged or reduced ones, and mosaics."""
    import skimage.data

    names = ("astronaut", "cat", "coffee", "retina")
    originals = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in names]
    for image in originals:
        scale = side / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        yield _jpeg(image.resize(size, Image.Resampling.LANCZOS))
    tiles = originals
    if flickr is not None:
        tiles = [Image.open(file).convert("RGB") for file in sorted(flickr.iterdir())[:400]]
    for start in (0, len(tiles) // 2):
        yield _jpeg(_mosaic(tiles[start:], side))


def _mosaic(tiles: list[Image.Image], side: int) -> Image.Image:
    """4:3, of tiles of 224 pixels at most, as sharp as they come."""
    canvas, edge = Image.new("RGB", (side, side * 3 // 4)), 224
    for number, top in enumerate(range(0, canvas.height, edge)):
        for left in range(0, canvas.width, edge):
            tile = tiles[(number * 31 + left // edge) % len(tiles)]
            canvas.paste(tile.crop((0, 0, edge, edge)), (left, top))
    return canvas


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(
    repeats: int, flickr: Path | None, vectors: Callable[[list[NDArray[np.float32]]], NDArray[np.float64]] | None
) -> dict[str, dict[str, dict[str, float] | None]]:
    """Way → side → {ms, mean, cosine}; the ways take turns, so that a busy moment meets them all."""
    result: dict[str, dict[str, dict[str, float] | None]] = {name: {} for name in ways()}
    for side in SIDES:
        files = list(photographs(side, flickr))
        exact = [pillow_full(data) for data in files]
        taken: dict[str, list[float]] = {}
        there = {name: read for name, read in ways().items() if read is not None}
        for _ in range(repeats):
            for name, read in there.items():
                started = time.process_time()
                for data in files:
                    read(data)
                taken.setdefault(name, []).append(1_000 * (time.process_time() - started) / len(files))
        for name in result:
            if name not in there:
                result[name][str(side)] = None
                continue
            made = [there[name](data) for data in files]
            scale = 127.5  # SPEC's deviation of 0.5, in 255ths
            differences = [scale * float(np.abs(a - b).mean()) for a, b in zip(made, exact, strict=True)]
            figures = {"ms": round(statistics.median(taken[name]), 3), "mean": round(max(differences), 3)}
            if vectors is not None:
                cosines = (vectors(made) * vectors(exact)).sum(axis=1)
                figures["cosine"] = round(float(cosines.min()), 5)
            result[name][str(side)] = figures
    return result


def embedder(bundle: Path) -> Callable[[list[NDArray[np.float32]]], NDArray[np.float64]]:
    """The bundle's image tower. Its own preprocessing aside, it sees SPEC's pixels, squashed to its size."""
    from service.engine.towers import open_towers

    read = read_bundle(bundle)
    tower = open_towers(read, "cpu", 0, ["image"])["image"]
    spec = read.manifest.towers["image"].preprocessing
    assert isinstance(spec, ImagePreprocessing)

    def run(pixels: list[NDArray[np.float32]]) -> NDArray[np.float64]:
        samples = np.rint(127.5 * (np.stack(pixels) + 1)).astype(np.uint8).transpose(0, 2, 3, 1)
        pictures = [Image.fromarray(np.ascontiguousarray(each)) for each in samples]
        return tower.run({"pixels": np.stack([preprocess_image(each, spec) for each in pictures])}).astype(np.float64)

    return run


def table(result: Mapping[str, Mapping[str, Mapping[str, float] | None]]) -> str:
    lines = [f"{'way':20}" + "".join(f"{side:>8} ms {'×':>5} {'mean':>6} {'cosine':>8}" for side in SIDES)]
    for name, by_side in result.items():
        line = f"{name:20}"
        for side, figures in by_side.items():
            plain = result["pillow"][side]
            if figures is None or plain is None:
                line += f"{'not installed':>33}"
                continue
            gain = plain["ms"] / figures["ms"]
            line += f"{figures['ms']:>11.2f} {gain:>5.2f} {figures['mean']:>6.2f} {figures.get('cosine', 1):>8.5f}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bundle", type=Path, help="whose image tower says what a difference is worth")
    parser.add_argument("--flickr", type=Path, help="a folder of photographs for the mosaics")
    options = parser.parse_args(arguments)
    result = measure(options.repeats, options.flickr, embedder(options.bundle) if options.bundle else None)
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
