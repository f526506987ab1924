"""Cached views for distillation: augmented inputs at the student's size beside the teacher's features of the same view.

The student and the teacher always see the same crop, colours or mixture ("consistent teaching", Beyer et al., 2022,
"Knowledge distillation: A good teacher is patient and consistent"), so a view's target is computed once. The first
view of every file is the plain one. Each file has its own random stream, so a cache is the same however often its
making was interrupted.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from tqdm import tqdm

from service.contract.audio import decode_audio
from service.contract.images import ImagePreprocessing, decode_image, preprocess_image
from service.contract.windows import LogMelWindows

Teacher = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A teacher's model inputs (B, ...) → features (B, d)."""

_BLOCK_FILES = 16


@dataclass(frozen=True)
class Views:
    """`inputs` (N, ...) as stored, uint8 pixels (H, W, 3) or float16 log-mel (frames, mels); `features` (N, d)."""

    inputs: NDArray[Any]
    features: NDArray[np.float16]


def listed_files(root: Path, sources: list[dict[str, Any]], held_out: bool) -> list[Path]:
    """The files that the recipe's `sources` name, sorted; of each source either the part held out or the rest.

    A source is `{folder, files, where, hold_out, group, without}`: `files` is a list with one name to a line, or a CSV
    with a column `file`, of which `where` keeps the rows with one of the given values; a `hold_out` fraction of the
    groups is held out, chosen by hash, a group being what the pattern `group` finds in the name (default: the whole
    name); the groups `without` are left out.
    """
    chosen = []
    for source in sources:
        listing = root / source["files"]
        if listing.suffix == ".csv":
            with listing.open(newline="", encoding="utf-8") as stream:
                where = {column: {str(value) for value in values} for column, values in source.get("where", {}).items()}
                names = [
                    row["file"]
                    for row in csv.DictReader(stream)
                    if all(row[column] in values for column, values in where.items())
                ]
        else:
            names = listing.read_text(encoding="utf-8").split("\n")
        for name in filter(None, map(str.strip, names)):
            found = re.search(source["group"], name) if "group" in source else None
            if (found.group(1) if found else name) in source.get("without", ()):
                continue
            digest = hashlib.sha256((found.group(1) if found else name).encode()).digest()
            is_held_out = int.from_bytes(digest[:8], "big") / 2**64 < source.get("hold_out", 0.0)
            if is_held_out == held_out:
                chosen.append(root / source["folder"] / name)
    if not chosen:
        raise ValueError(f"no {'held-out ' if held_out else ''}files in {[source['files'] for source in sources]}")
    return sorted(chosen)


def image_views(
    path: Path, rng: np.random.Generator, count: int, student: ImagePreprocessing, teacher: ImagePreprocessing
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """One image → student pixels (count, H, W, 3) and teacher inputs (count, 3, H', W'); the first view is plain.

    The others are random resized crops (35 % to 100 % of the area, aspect 3:4 to 4:3), flipped half the time, with
    brightness, contrast and saturation changed by up to 30 %.
    """
    image = decode_image(path.read_bytes())
    pixels = np.empty((count, student.height, student.width, 3), np.uint8)
    inputs = np.empty((count, 3, teacher.height, teacher.width), np.float32)
    for view in range(count):
        shown = image if view == 0 else augmented(image, rng, (teacher.width, teacher.height))
        inputs[view] = preprocess_image(shown, teacher)
        pixels[view] = np.asarray(shown.resize((student.width, student.height), Image.Resampling.BILINEAR))
    return pixels, inputs


def augmented(image: Image.Image, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A view of an image at `size` (width, height); see image_views."""
    area = rng.uniform(0.35, 1.0)
    aspect = np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
    across, down = min(1.0, np.sqrt(area * aspect)), min(1.0, np.sqrt(area / aspect))
    left, top = rng.uniform(0, 1 - across) * image.width, rng.uniform(0, 1 - down) * image.height
    box = (left, top, left + across * image.width, top + down * image.height)
    image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(0.7, 1.3))
    return image


def sound_view(
    path: Path, rng: np.random.Generator, spec: LogMelWindows
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """One sound → the first of its rows (1, frames, mels), and the same as (1, 1, frames, mels) in float32."""
    stored = spec.prepare(decode_audio(path.read_bytes(), spec.sampling_rate)).rows[:1, 0].astype(np.float16)
    return stored, stored[:, None].astype(np.float32)


def cached_views(
    folder: Path,
    key: dict[str, Any],
    files: list[Path],
    view: Callable[[Path, np.random.Generator], tuple[NDArray[Any], NDArray[np.float32]]],
    teacher: Teacher,
    workers: int,
) -> Views:
    """The views of `files` and the teacher's features of them, made where they are not cached yet, and memory-mapped.

    `key` names everything the content depends on; its hash names the cache. An interrupted making goes on at the
    last finished block of files.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = folder / f"views-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / "finished.json"
    done = json.loads(finished.read_text())["files"] if finished.exists() else 0
    inputs_path, features_path = folder / "inputs.npy", folder / "features.npy"
    if done < len(files):
        seeds = np.random.SeedSequence(key["seed"]).spawn(len(files))
        stored, teacher_inputs = view(files[0], np.random.default_rng(seeds[0]))
        each = len(stored)
        if done:
            inputs = np.lib.format.open_memmap(inputs_path, mode="r+")
            features = np.lib.format.open_memmap(features_path, mode="r+")
        else:
            shape, d = (len(files) * each, *stored.shape[1:]), teacher(teacher_inputs).shape[1]
            inputs = np.lib.format.open_memmap(inputs_path, "w+", stored.dtype, shape)
            features = np.lib.format.open_memmap(features_path, "w+", np.float16, (shape[0], d))
        blocks = [
            range(start, min(start + _BLOCK_FILES, len(files))) for start in range(done, len(files), _BLOCK_FILES)
        ]
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(files), initial=done, desc="views") as bar:
            for block, results in zip(blocks, _one_ahead(pool, blocks, files, seeds, view), strict=True):
                rows = slice(block.start * each, block.stop * each)
                inputs[rows] = np.concatenate([stored for stored, _ in results])
                features[rows] = np.concatenate([teacher(teacher_inputs) for _, teacher_inputs in results])
                partial = finished.with_suffix(".partial")
                partial.write_text(json.dumps({"files": block.stop}))
                os.replace(partial, finished)
                bar.update(len(block))
        inputs.flush()
        features.flush()
    inputs, features = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (inputs_path, features_path))
    return Views(inputs, features)


def _one_ahead(
    pool: ThreadPoolExecutor, blocks: list[range], files: list[Path], seeds: list[np.random.SeedSequence], view: Any
) -> Iterator[list[Any]]:
    """The views of each block, the next block being made while the teacher looks at this one."""

    def submit(block: range) -> list[Any]:
        return [pool.submit(view, files[index], np.random.default_rng(seeds[index])) for index in block]

    waiting = submit(blocks[0])
    for block in [*blocks[1:], None]:
        ahead = submit(block) if block is not None else []
        yield [future.result() for future in waiting]
        waiting = ahead
