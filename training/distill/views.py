"""The files of a distillation, and the views of them that teacher and student see.

Student and teacher always see the same crop, colours or mixture ("consistent teaching", Beyer et al., 2022,
arXiv 2106.05237). Pictures are kept once, as memory-mapped pixels, and sounds as spectra; each step makes its own views
of them. Validation media have one plain view each, kept with the teacher's features of it.
"""

import csv
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from tqdm import tqdm

from service.contract.audio import decode_audio
from service.contract.images import ImagePreprocessing, decode_image, preprocess_image
from training.distill.recipe import DistillRecipe
from training.files import whole
from training.recipe import RecipeError

Pooled = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A teacher's model inputs (B, ...) → pooled features (B, d)."""
_BATCH = 16


@dataclass(frozen=True)
class Views:
    """`inputs` (N, ...) as stored, uint8 pixels (H, W, 3) or float16 log-mel (frames, mels); `features` (N, d)."""

    inputs: NDArray[Any]
    features: NDArray[np.float16]


def files_of(recipe: DistillRecipe) -> tuple[list[Path], list[Path]]:
    """What is trained on, and what is validated on. Raises RecipeError where they share a file."""
    root = recipe.data.root
    files = listed_files(root, recipe.data.train, held_out=False)
    held_out = [source for source in recipe.data.train if source.get("hold_out")]
    # A validation source that holds out is the held-out part of a training source, and is not listed twice.
    plain = [source for source in recipe.data.validation if not source.get("hold_out")]
    validation = listed_files(root, plain, held_out=False) if plain else []
    if held_out:
        validation = sorted({*validation, *listed_files(root, held_out, held_out=True)})
    if common := set(files) & set(validation):
        raise RecipeError(f"data.validation: {min(common)} is trained on")
    return files, validation


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


def pictures(files: Sequence[Path], work: Path, side: int = 256) -> NDArray[np.uint8]:
    """Every picture squashed to (side, side, 3), memory-mapped; made where it is not there yet."""
    listed = json.dumps([side, *(f"{path} {path.stat().st_size}" for path in files)])
    path = work / f"pictures-{hashlib.sha256(listed.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        with whole(path) as partial:
            stored = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(files), side, side, 3))
            for index, file in enumerate(tqdm(files, desc="pictures", disable=None)):
                image = decode_image(file.read_bytes())
                stored[index] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
            stored.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def plain_views(recipe: DistillRecipe, files: Sequence[Path], pooled: Pooled, teacher: str, work: Path) -> Views:
    """The plain view of each file with the teacher's features of it; made where it is not in `work` yet.

    `teacher` is the hash of the teacher's weights.
    """
    root = recipe.data.root
    key = {
        "teacher": teacher,
        "teacher_preprocessing": repr(recipe.teacher.preprocessing),
        "student_preprocessing": recipe.preprocessing().model_dump(),
        "files": [f"{path.relative_to(root)} {path.stat().st_size}" for path in files],
        "layers": recipe.student.cuts,
    }

    def make() -> dict[str, NDArray[Any]]:
        stored, features = [], []
        for start in tqdm(range(0, len(files), _BATCH), desc="views", disable=None):
            part = [plain_view(recipe, path) for path in files[start : start + _BATCH]]
            stored += [own for own, _ in part]
            features.append(pooled(np.stack([inputs for _, inputs in part])).astype(np.float16))
        return {"inputs": np.stack(stored), "features": np.concatenate(features)}

    return Views(**kept(work, "views", key, make))


def plain_view(recipe: DistillRecipe, path: Path) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """One file as it is stored for the student, and as the teacher takes it; of a sound, its first row."""
    spec = recipe.preprocessing()
    if isinstance(spec, ImagePreprocessing):
        assert recipe.teacher.preprocessing is not None
        image = decode_image(path.read_bytes())
        small = image.resize((spec.width, spec.height), Image.Resampling.BILINEAR)
        return np.asarray(small), preprocess_image(image, recipe.teacher.preprocessing)
    row = spec.prepare(decode_audio(path.read_bytes(), spec.sampling_rate)).rows[0, 0].astype(np.float16)
    return row, row[None].astype(np.float32)


def kept(work: Path, kind: str, key: Any, make: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Arrays that are made once for each `key`, and read from `work` from then on."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = work / f"{kind}-{digest}.npz"
    if not path.exists():
        with whole(path) as partial, partial.open("wb") as stream:
            np.savez(stream, **make())  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def batch_rows(total: int, size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The rows of one step, from a fresh shuffle each epoch; a function of the step, so that a resumed run sees the
    batches that an uninterrupted one would."""
    size = min(size, total)
    each_epoch = total // size
    epoch, position = divmod(step, each_epoch)
    return _shuffled(total, seed, epoch)[position * size : (position + 1) * size]


@functools.lru_cache(maxsize=1)
def _shuffled(total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(total)
