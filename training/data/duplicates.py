"""Exact and near duplicates of texts and of images.

Texts: MinHash over character 5-grams with banded hashing (Broder, 1997; Lee et al., arXiv 2107.06499), every find
checked by its true Jaccard similarity. Images: perceptual hashes within a Hamming distance, found through equal
segments (pigeonhole: exact). Sounds have exact duplicates only.
"""

import hashlib
import unicodedata
from collections.abc import Iterator

import imagehash
import numpy as np
from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]
from PIL import Image

PERMUTATIONS = 128
_SHINGLE = 5
_MISSED = 1e-3
"""Highest chance that a pair just at the threshold is overlooked."""
_SEED = MinHash(num_perm=PERMUTATIONS)


def normalised(text: str) -> str:
    """Return what exact duplicates share: letters and digits, case folded, single spaces.

    A text of other characters alone, such as emoji, is only folded.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(letter if letter.isalnum() else " " for letter in folded).split()
    return " ".join(words) or " ".join(folded.split())


def text_hash(text: str) -> bytes:
    """16 bytes of the normalised text."""
    return hashlib.blake2b(normalised(text).encode("utf-8", "replace"), digest_size=16).digest()


def content_hash(content: bytes) -> bytes:
    """16 bytes of a medium's file."""
    return hashlib.blake2b(content, digest_size=16).digest()


def shingles(text: str) -> frozenset[str]:
    """Character 5-grams of the normalised text; of a shorter one, itself."""
    whole = normalised(text)
    return frozenset(whole[start : start + _SHINGLE] for start in range(max(1, len(whole) - _SHINGLE + 1)))


def perceptual_hash(image: Image.Image) -> int:
    """128 bits of an image: pHash, then dHash, 64 each.

    Two hashes must agree, since one alone takes plain pictures for the same.
    """
    both = [*imagehash.phash(image).hash.flat, *imagehash.dhash(image).hash.flat]
    return int.from_bytes(np.packbits(np.asarray(both, bool)).tobytes())


def banding(threshold: float) -> tuple[int, int]:
    """(bands, rows) of the longest bands that overlook a pair at the threshold in at most one of 1,000 cases."""
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= _MISSED:
            return bands, rows
    return PERMUTATIONS, 1


class Texts:
    """An index of texts that says which of them a text repeats."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self._exact: dict[bytes, int] = {}
        self._texts: list[str] = []
        self._near = None if threshold is None else MinHashLSH(num_perm=PERMUTATIONS, params=banding(threshold))

    def add(self, text: str) -> int:
        """The text's number, counting from 0; a text that is here already is added again."""
        number = len(self._texts)
        self._texts.append(text)
        self._exact.setdefault(text_hash(text), number)
        if self._near is not None:
            self._near.insert(number, _minhash(shingles(text)))
        return number

    def repeated(self, text: str) -> int | None:
        """The first text that, normalised, is the same."""
        return self._exact.get(text_hash(text))

    def resembled(self, text: str) -> Iterator[int]:
        """The numbers of texts whose shingles overlap by the threshold or more."""
        if self._near is None or self.threshold is None:
            return
        parts = shingles(text)
        for number in sorted(self._near.query(_minhash(parts))):
            other = shingles(self._texts[number])
            if len(parts & other) >= self.threshold * len(parts | other):
                yield number


class Images:
    """An index of perceptual hashes that says which of them an image resembles."""

    def __init__(self, distance: int | None) -> None:
        self.distance = distance
        self._hashes: list[int] = []
        segments = (distance or 0) + 1
        self._edges = [64 * part // segments for part in range(segments + 1)]
        self._buckets: dict[tuple[int, int], list[int]] = {}

    def add(self, fingerprint: int) -> int:
        """The image's number, counting from 0."""
        number = len(self._hashes)
        self._hashes.append(fingerprint)
        for segment in self._segments(fingerprint):
            self._buckets.setdefault(segment, []).append(number)
        return number

    def resembled(self, fingerprint: int) -> Iterator[int]:
        """Images both of whose hashes differ by at most the distance."""
        if self.distance is None:
            return
        near = {number for segment in self._segments(fingerprint) for number in self._buckets.get(segment, ())}
        for number in sorted(near):
            differing = fingerprint ^ self._hashes[number]
            if max((differing >> 64).bit_count(), (differing & (2**64 - 1)).bit_count()) <= self.distance:
                yield number

    def _segments(self, fingerprint: int) -> Iterator[tuple[int, int]]:
        # pHashes that differ in at most d bits agree in one of d + 1 segments.
        whole = fingerprint >> 64
        for start, end in zip(self._edges, self._edges[1:], strict=False):
            yield start, whole >> start & ((1 << (end - start)) - 1)


def _minhash(parts: frozenset[str]) -> MinHash:
    made = MinHash(num_perm=PERMUTATIONS, permutations=_SEED.permutations, scheme=_SEED.scheme)
    made.update_batch([part.encode("utf-8", "replace") for part in parts])
    return made
