"""Read what the evaluation sets hold, so that nothing of it gets into the output.

A pool's row is a leak where its text or its medium is an evaluated one, exactly or nearly; either is enough.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from service.contract.errors import InputError
from service.contract.images import decode_image
from training.curate.recipe import Curation, DuplicateSpec
from training.data.duplicates import Images, Texts, content_hash, perceptual_hash
from training.data.shards import identity
from training.files import write
from training.pairs import Pairs, read_pairs


@dataclass(frozen=True)
class HeldOut:
    """Fingerprints of one evaluation set."""

    name: str
    texts: list[str]
    """Captions; prompts made of labels are not the set's own."""
    media: list[str]
    """Hashes of the files, hexadecimal."""
    images: list[int]
    """Perceptual hashes."""
    classes: list[str]
    """Class names, readable; none where there are captions."""


def held_out(curation: Curation, work: Path) -> list[HeldOut]:
    """Fingerprints of every evaluation set, kept in `work` for the next run. Raises PairError."""
    result = []
    for name, splits in curation.spec.against.items():
        read = read_pairs(curation.recipe, name)
        parts = [read[split] for split in splits]
        path = work / f"against-{_key(name, parts)}.json"
        if not path.is_file():
            write(path, json.dumps(asdict(_fingerprints(name, parts))))
        result.append(HeldOut(**json.loads(path.read_text(encoding="utf-8"))))
    return result


class Leaks:
    """An index of evaluation sets."""

    def __init__(self, sets: Sequence[HeldOut], spec: DuplicateSpec) -> None:
        self._texts, self._images = Texts(spec.text), Images(spec.image)
        self._text_sets: list[str] = []
        self._image_sets: list[str] = []
        self._media: dict[str, str] = {}
        for one in sets:
            for text in one.texts:
                self._texts.add(text)
            for fingerprint in one.images:
                self._images.add(fingerprint)
            self._text_sets += [one.name] * len(one.texts)
            self._image_sets += [one.name] * len(one.images)
            for medium in one.media:
                self._media.setdefault(medium, one.name)

    def text(self, text: str) -> str | None:
        """The reason for which a text is a leak, as in the report."""
        if (number := self._texts.repeated(text)) is not None:
            return f"leak.{self._text_sets[number]}.text"
        number = next(self._texts.resembled(text), None)
        return None if number is None else f"leak.{self._text_sets[number]}.text_near"

    def medium(self, content: str, fingerprint: int | None) -> str | None:
        """Says the same of a medium, by its hexadecimal hash and, of an image, its perceptual hash."""
        if content in self._media:
            return f"leak.{self._media[content]}.medium"
        number = None if fingerprint is None else next(self._images.resembled(fingerprint), None)
        return None if number is None else f"leak.{self._image_sets[number]}.medium_near"


def _fingerprints(name: str, parts: Sequence[Pairs]) -> HeldOut:
    texts = [text for part in parts if part.labels is None for text in part.texts]
    files = [path for part in parts for path in part.media]
    media, images = [], []
    for path in tqdm(files, desc=f"against {name}"):
        content = path.read_bytes()
        media.append(content_hash(content).hex())
        if parts[0].modality == "image":
            try:
                images.append(perceptual_hash(decode_image(content)))
            except InputError:
                continue  # what no one can see has no near duplicate
    classes = sorted({part.classes[label] for part in parts if part.labels is not None for label in part.labels})
    return HeldOut(name, texts, media, images, classes)


def _key(name: str, parts: Sequence[Pairs]) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=12)
    for part in parts:
        digest.update(json.dumps([part.texts, None if part.labels is None else part.labels.tolist()]).encode())
        for path in part.media:
            digest.update(identity(path).encode())
    return digest.hexdigest()
