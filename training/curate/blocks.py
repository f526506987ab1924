"""A block of a pool's rows: filtered, freed of leaks, encoded, and kept in a file of its own.

The file is named by what the rows say and by all that decides what becomes of them, so that a run goes on where it was
interrupted, and a change of the concepts or of the numbers to keep encodes nothing anew.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.audio import decode_audio
from service.contract.bundle import Modality, read_bundle
from service.contract.errors import InputError
from service.contract.images import decode_image, preprocess_image
from training.curate.encoding import Floats, media_vectors, text_vectors
from training.curate.filters import row_filter
from training.curate.leaks import HeldOut, Leaks
from training.curate.recipe import CurateError, Curation
from training.curate.rows import Row
from training.data.duplicates import content_hash, perceptual_hash
from training.encoders import FrozenEncoder, load_encoder
from training.files import whole
from training.heads.bundled import as_encoder

_VERSION = 1
DECIMALS = 6
"""The decimals that are kept of every cosine: far below what matters, far above what a machine's rounding changes."""


class Record(NamedTuple):
    """A row that no filter left out. Records compare by source, then by what they say."""

    source: int
    """Place of its source in the file."""
    media: str
    text: str
    fields: str
    """The row's other columns, as JSON."""
    content: str
    """Hash of the medium's file, hexadecimal; empty without a medium."""
    fingerprint: int
    """Perceptual hash of an image; -1 without."""
    similarity: float | None

    def key(self) -> int:
        """Return what it is, whatever file it came from: 128 bits of text and medium."""
        digest = hashlib.blake2b(self.content.encode() + b":", digest_size=16)
        digest.update(self.text.encode("utf-8", "replace"))
        return int.from_bytes(digest.digest())


@dataclass(frozen=True)
class Block:
    """Holds what is left of a block's rows."""

    source: int
    rows: int
    """How many there were."""
    dropped: dict[str, int]
    """Reasons, and how many rows each."""
    records: list[Record]
    vectors: Floats
    """(records, d), unit length; (records, 0) where no concept asks for them."""


class Preparation:
    """Everything that preparing a block needs; the encoders are loaded when the first block needs them."""

    def __init__(self, curation: Curation, sets: Sequence[HeldOut], work: Path) -> None:
        self.curation, self.sets, self.work = curation, sets, work
        self._filters = {name: row_filter(source) for name, source in curation.spec.pool.items()}
        self._names = list(curation.spec.pool)

    @cached_property
    def _leaks(self) -> Leaks:
        return Leaks(self.sets, self.curation.spec.duplicates)

    @cached_property
    def reader(self) -> FrozenEncoder | None:
        """The text encoder that the concepts are compared in."""
        concepts = self.curation.spec.concepts
        if concepts is None:
            return None
        return self.tower("text") if concepts.encoder == "bundle" else load_encoder(self.curation.recipe, "text")

    @cached_property
    def read_texts(self) -> Callable[[Sequence[str]], Floats]:
        assert self.reader is not None
        return text_vectors(self.reader)

    @cached_property
    def _bundle(self) -> Any:
        assert self.curation.spec.bundle is not None
        return read_bundle(self.curation.recipe.path(self.curation.spec.bundle))

    def tower(self, modality: Modality) -> FrozenEncoder:
        """A tower of the bundle. Raises CurateError where it has none."""
        if modality not in self._bundle.manifest.towers:
            raise CurateError(f"the bundle {self._bundle.path} has no {modality} tower")
        return as_encoder(self._bundle, modality)

    @cached_property
    def _bundle_texts(self) -> Callable[[Sequence[str]], Floats]:
        return text_vectors(self.tower("text"))

    @cached_property
    def _bundle_media(self) -> dict[str, tuple[Any, Any]]:
        used = {one.modality for one in self.curation.spec.pool.values() if self._compared(one)}
        towers = {modality: self.tower(modality) for modality in used}
        return {modality: (tower.preprocessing, media_vectors(tower)) for modality, tower in towers.items()}

    @staticmethod
    def _compared(source: Any) -> bool:
        return source.similarity is not None or source.by == "similarity"

    @cached_property
    def _settings(self) -> dict[str, str]:
        """Returns of each source the hash of all but its rows that decides what becomes of them."""
        spec, result = self.curation.spec, {}
        sets = hashlib.blake2b(repr(self.sets).encode("utf-8", "replace"), digest_size=16).hexdigest()
        for name, source in spec.pool.items():
            values = {
                "version": _VERSION,
                "source": source.model_dump(exclude={"files", "cap", "similarity", "columns", "folder"}),
                "place": self._names.index(name),
                "against": sets,
                "duplicates": spec.duplicates.model_dump() if spec.against else None,
                "reader": self.reader.weights_sha256 if source.by == "concepts" and self.reader else None,
                "bundle": self._bundle.manifest.space if self._compared(source) else None,
            }
            result[name] = json.dumps(values, sort_keys=True)
        return result

    def __call__(self, name: str, rows: Sequence[Row]) -> Path:
        """The file of a block, made if it is not there."""
        path = self.work / "blocks" / f"{self._key(name, rows)}.npz"
        if not path.is_file():
            write_block(path, self._prepare(name, rows))
        return path

    def _key(self, name: str, rows: Sequence[Row]) -> str:
        digest = hashlib.blake2b(self._settings[name].encode(), digest_size=16)
        folder = self.curation.folder(name)
        for row in rows:
            said = json.dumps([row.text, row.media, row.fields], sort_keys=True, default=str)
            digest.update(said.encode("utf-8", "replace"))
            if row.content is not None:
                digest.update(content_hash(row.content))
            elif row.media is not None:
                try:
                    status = (folder / row.media).stat()
                    digest.update(f"{status.st_size}:{status.st_mtime_ns}".encode())
                except OSError:
                    digest.update(b"absent")
        return digest.hexdigest()

    def _prepare(self, name: str, rows: Sequence[Row]) -> Block:
        source = self.curation.spec.pool[name]
        dropped: Counter[str] = Counter()
        records: list[Record] = []
        similarity: NDArray[np.float64] | None = None
        if self._compared(source):
            media = self._bundle_media[source.modality][1](self._survivors(name, rows, records, dropped))
            texts = self._bundle_texts([record.text for record in records])
            similarity = np.round((media.astype(np.float64) * texts).sum(1), DECIMALS)
        else:
            for _ in self._survivors(name, rows, records, dropped):
                pass
        if source.by == "concepts":
            vectors = self.read_texts([record.text for record in records])
        else:
            vectors = np.zeros((len(records), 0), np.float32)
        read = np.isfinite(vectors.sum(axis=1))
        if similarity is not None:
            read &= np.isfinite(similarity)
        dropped["unreadable text"] += int((~read).sum())
        if similarity is not None:
            records = [one._replace(similarity=float(fit)) for one, fit in zip(records, similarity, strict=True)]
        records = [record for record, good in zip(records, read, strict=True) if good]
        return Block(self._names.index(name), len(rows), dict(+dropped), records, vectors[read])

    def _survivors(self, name: str, rows: Sequence[Row], records: list[Record], dropped: Counter[str]) -> Iterator[Any]:
        """Preprocessed media, or None each, of the rows that are not left out; `records` and `dropped` are filled."""
        for row in rows:
            reason = self._filters[name](row) or self._leaks.text(row.text)
            content, fingerprint, prepared = "", -1, None
            if reason is None and row.media is not None:
                try:
                    data = row.content or (self.curation.folder(name) / row.media).read_bytes()
                    fingerprint, prepared = self._seen(name, data)
                except (InputError, OSError):
                    reason = "unreadable medium"
                else:
                    content = content_hash(data).hex()
                    reason = self._leaks.medium(content, None if fingerprint < 0 else fingerprint)
            if reason is not None:
                dropped[reason] += 1
                continue
            fields = json.dumps(row.fields, sort_keys=True, ensure_ascii=False, default=str)
            records.append(
                Record(self._names.index(name), row.media or "", row.text, fields, content, fingerprint, None)
            )
            yield prepared

    def _seen(self, name: str, data: bytes) -> tuple[int, Any]:
        """Perceptual hash, and what the bundle's tower is fed. Raises InputError for what cannot be decoded."""
        source = self.curation.spec.pool[name]
        spec = self._bundle_media[source.modality][0] if self._compared(source) else None
        if source.modality == "image":
            image = decode_image(data)
            return perceptual_hash(image), None if spec is None else preprocess_image(image, spec)
        if spec is None:
            return -1, None
        return -1, spec.prepare(decode_audio(data, spec.sampling_rate))


def write_block(path: Path, block: Block) -> None:
    """Write the whole file or none; two writers of one block write the same."""
    said = {"source": block.source, "rows": block.rows, "dropped": block.dropped, "records": block.records}
    with whole(path) as partial, partial.open("wb") as stream:
        np.savez(stream, vectors=block.vectors, said=np.frombuffer(json.dumps(said).encode(), np.uint8))


def read_block(path: Path) -> Block:
    """Return what `write_block` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        said = json.loads(arrays["said"].tobytes())
        said["records"] = [Record(*values) for values in said["records"]]
        return Block(vectors=arrays["vectors"], **said)
