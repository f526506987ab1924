"""Training media that the test splits hold too, exactly or nearly, are taken out of training; the tests stay whole.

Pictures are compared by perceptual hashes, over all sources of a recipe; recordings by the source that a recipe's
`group` finds in their names, within their set.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from service.contract.errors import InputError
from service.contract.images import decode_image
from training.data.duplicates import Images, perceptual_hash
from training.data.shards import Medium, identity
from training.files import write
from training.pairs import Pairs, Split, group_of, media_name
from training.recipe import Recipe

Read = Mapping[str, Mapping[Split, Pairs]]


def without_leaks(recipe: Recipe, read: Read, cache: Path) -> dict[str, dict[Split, Pairs]]:
    """Returns the pairs with train and validation freed of what is in a test split; prints how many media each lost."""
    result: dict[str, dict[Split, Pairs]] = {name: dict(splits) for name, splits in read.items()}
    hashes = _Hashes(cache)
    tests = Images(recipe.leaks.image)
    for name, splits in read.items():
        if recipe.pairs[name].modality == "image" and recipe.leaks.image is not None:
            for fingerprint in hashes.of(splits["test"].media, f"{name} test hashes"):
                if fingerprint is not None:
                    tests.add(fingerprint)
    for name, splits in read.items():
        source, tested = recipe.pairs[name], _groups(recipe, name, splits["test"])
        folder = recipe.path(source.folder)
        for split in ("train", "validation"):
            part: Pairs = splits[split]
            kept = [group_of(source.group, media_name(path, folder)) not in tested for path in part.media]
            if source.modality == "image" and recipe.leaks.image is not None:
                prints = hashes.of(part.media, f"{name} {split} hashes")
                alone = (one is None or next(tests.resembled(one), None) is None for one in prints)
                kept = [of_group and of_looks for of_group, of_looks in zip(kept, alone, strict=True)]
            if not all(kept):
                lost = len(kept) - sum(kept)
                what = f"{lost:,} of {len(kept):,} {split} media are in a test split, exactly or nearly: left out"
                print(f"{name}: {what}", file=sys.stderr)
                result[name][split] = subset(part, np.asarray(kept, bool))
    return result


def subset(part: Pairs, kept: NDArray[np.bool_], *, texts: bool = False) -> Pairs:
    """The pairs of the media that are kept; with `texts` also without the texts that then belong to none."""
    place = np.cumsum(kept) - 1
    links = part.links[kept[part.links[:, 0]]].copy()
    links[:, 0] = place[links[:, 0]]
    labels = None if part.labels is None else part.labels[kept]
    media = [path for path, keep in zip(part.media, kept, strict=True) if keep]
    if texts:
        used, places = np.unique(links[:, 1], return_inverse=True)
        links[:, 1] = places.reshape(-1)
        part = replace(part, texts=[part.texts[index] for index in used])
    return replace(part, media=media, links=links, labels=labels)


def _groups(recipe: Recipe, name: str, part: Pairs) -> set[str | None]:
    pattern = recipe.pairs[name].group
    if pattern is None or not recipe.leaks.group:
        return set()
    folder = recipe.path(recipe.pairs[name].folder)
    return {group_of(pattern, media_name(path, folder)) for path in part.media} - {None}


class _Hashes:
    """Perceptual hashes of files, kept in the cache by path, size and time of change."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def of(self, files: Sequence[Medium], what: str) -> Iterator[int | None]:
        """The hashes in the order of the files; None for one that cannot be read, which the features tell of."""
        stated = [identity(file) for file in files]
        digest = hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:24]
        path = self._cache / f"hashes-{digest}.json"
        if not path.is_file():
            write(path, json.dumps([_hash(file) for file in tqdm(files, desc=what, disable=None)]))
        return (int(fingerprint, 16) if fingerprint else None for fingerprint in json.loads(path.read_text()))


def _hash(file: Medium) -> str:
    try:
        return f"{perceptual_hash(decode_image(file.read_bytes())):032x}"
    except (InputError, OSError):
        return ""
