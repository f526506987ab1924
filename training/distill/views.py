"""The files of a distillation, the rows of them that validate it, and which files a step draws.

A file that validates has one plain row, kept with the teacher's features of it; steps mix theirs from
`training.distill.spectra`.
"""

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
from tqdm import tqdm

from service.contract.audio import decode_audio
from training.distill.recipe import DistillRecipe
from training.files import whole
from training.pairs import records
from training.recipe import RecipeError

Pooled = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A teacher's inputs (B, 1, frames, mels) → pooled features (B, d)."""
_BATCH = 16


@dataclass(frozen=True)
class Views:
    """Log-mel rows `inputs` (N, frames, mels), and the teacher's `features` of them (N, d)."""

    inputs: NDArray[np.float16]
    features: NDArray[np.float16]


def files_of(recipe: DistillRecipe) -> tuple[list[Path], list[Path]]:
    """Return what is trained on, and what is validated on. Raises RecipeError where they share a file."""
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
            where = {column: set(map(str, values)) for column, values in source.get("where", {}).items()}
            rows = records(listing)
            names = [row["file"] for row in rows if all(row[column] in values for column, values in where.items())]
        else:
            names = listing.read_text(encoding="utf-8").split("\n")
        for name in filter(None, map(str.strip, names)):
            match = re.search(source["group"], name) if "group" in source else None
            group = match.group(1) if match else name
            if group in source.get("without", ()):
                continue
            digest = hashlib.sha256(group.encode()).digest()
            is_held_out = int.from_bytes(digest[:8], "big") / 2**64 < source.get("hold_out", 0.0)
            if is_held_out == held_out:
                chosen.append(root / source["folder"] / name)
    if not chosen:
        raise ValueError(f"no {'held-out ' if held_out else ''}files in {[source['files'] for source in sources]}")
    return sorted(chosen)


def plain_views(recipe: DistillRecipe, files: Sequence[Path], pooled: Pooled, teacher: str, work: Path) -> Views:
    """The first row of each file with the teacher's features of it; made where it is not in `work` yet.

    `teacher` is the hash of the teacher's weights.
    """
    root, spec = recipe.data.root, recipe.preprocessing()
    key = {
        "teacher": teacher,
        "preprocessing": spec.model_dump(),
        "files": [f"{path.relative_to(root)} {path.stat().st_size}" for path in files],
        "ends": recipe.student.ends,
    }

    def make() -> dict[str, NDArray[Any]]:
        inputs, features = np.zeros((len(files), spec.frames, spec.n_mels), np.float16), []
        for start in tqdm(range(0, len(files), _BATCH), desc="views", disable=None):
            for place, path in enumerate(files[start : start + _BATCH], start):
                inputs[place] = spec.prepare(decode_audio(path.read_bytes(), spec.sampling_rate)).rows[0, 0]
            rows = inputs[start : start + _BATCH, None].astype(np.float32)
            features.append(pooled(rows).astype(np.float16))
        return {"inputs": inputs, "features": np.concatenate(features)}

    return Views(**kept(work, "views", key, make))


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
    """The files of one step, from a fresh shuffle each epoch; a function of the step, so that a resumed run sees the
    batches that an uninterrupted one would."""
    size = min(size, total)
    epoch, position = divmod(step, total // size)
    return _shuffled(total, seed, epoch)[position * size : (position + 1) * size]


@functools.lru_cache(maxsize=1)
def _shuffled(total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(total)
