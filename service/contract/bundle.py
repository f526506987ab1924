"""The bundle: a directory that the trainer writes and the service reads, and the only thing that crosses between them.

manifest.json   what is in it, checked: checksums, preprocessing, space id, figures
<tower>.onnx    encoder + projector + L2, one graph per modality; <tower>.int8.onnx the same in another precision
projectors.safetensors, tokenizer.json, MODEL_CARD.md
manifest.sig    the manifest's signature, where it is signed (signature.py)
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.contract.abstention import Detector
from service.contract.arrays import ArrayPreprocessing
from service.contract.endpoint import EndpointPreprocessing
from service.contract.files import read_file
from service.contract.graphs import NotAGraph, external_files
from service.contract.images import ImagePreprocessing
from service.contract.licences import Licence, Terms, commercial_use, parts, weights_line
from service.contract.patches import LogMelPatches
from service.contract.signature import SIGNATURE, SignatureError, check_signature
from service.contract.tokens import TextPreprocessing
from service.contract.waveforms import Waveforms
from service.contract.windows import LogMelWindows

SCHEMA_VERSION: Final = 1
MANIFEST = "manifest.json"

FrontEnd = Literal["image", "audio", "text", "array"]
"""How an input is read before a tower sees it."""
RESERVED = ("image", "audio", "text", "video", "array", "vector", "file", "id", "compose", "string", "list", "object")
"""Names that no further modality may have, for they mean something else in requests."""
Modality = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,15}$")]
"""Name of a tower: image, audio, text, or another that a bundle chooses for a further sense."""
# bound: a projector of another space, and the map from there into this one. none: the encoder has a projection of its
# own, and its vectors are only brought to length 1.
ProjectorKind = Literal["linear", "mlp", "glu", "token", "attention", "bound", "none"]
MODALITIES: tuple[Literal["image", "audio", "text"], ...] = ("image", "audio", "text")
"""The modalities whose front end is their own name."""
Precision = Literal["fp32", "fp16", "int8"]
Accelerator = Literal["cpu", "cuda"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SpaceId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
# A plain file name: no folder, no "..", nothing hidden, so that a manifest cannot point outside its bundle.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
GraphName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.onnx$", max_length=128)]
_BLOCK_BYTES = 2**20
_DAMAGED = "{} is damaged: its checksum is not the manifest's"
# What a bundle may hold besides graphs: nothing that runs when it is read. `.data`: weights that graphs keep outside.
_OTHERS = (".data", ".json", ".md", ".safetensors", ".txt")
Preprocessing = Annotated[
    ImagePreprocessing
    | LogMelPatches
    | LogMelWindows
    | Waveforms
    | TextPreprocessing
    | EndpointPreprocessing
    | ArrayPreprocessing,
    Field(discriminator="kind"),
]

_FRONT_ENDS: Mapping[str, FrontEnd] = {
    "image": "image",
    "log_mel_patches": "audio",
    "log_mel_windows": "audio",
    "waveform": "audio",
    "text": "text",
    "endpoint": "text",
    "array": "array",
}

# Settings that came after the first spaces: at these values they change no vector, and are left out of hashes.
_LATER = {"query_prefix": "", "passage_prefix": "", "squashed": None}

GATE_COSINE, GATE_R1_LOSS = 0.99, 0.5
"""Gates of a variant: least mean cosine to the tower's own vectors, and most points of R@1 (captions, both ways) or of
top-1 (labels) lost."""

# A graph's inputs are `preprocessing.inputs`. Every graph has one output: float32 (B, dimensions), unit length.
OUTPUT = "unit_vectors"
# An audio tower has one output more, and an input that may be left out: float32 (ΣP, features), what its encoder makes
# of each row, and float32 (N, features), that of rows which were encoded before and go before the call's own. So any
# sound is encoded in calls of any size. Earlier bundles have neither.
ROWS, EARLIER_ROWS = "row_features", "earlier_row_features"


class BundleError(ValueError):
    """A bundle cannot be read: the message names the file and what is wrong with it."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Encoder(_Model):
    """The frozen encoder inside a tower."""

    source: str
    """Where it came from: a hub id, a package, or a folder's name."""
    weights_sha256: Sha256
    licence: str | None = None


class Projector(_Model):
    """The trained part of a tower; its weights are in projectors.safetensors under the modality's name."""

    kind: ProjectorKind
    features: int = Field(gt=0)
    weights_sha256: Sha256


class Variant(_Model):
    """A tower in another precision, which passed the gates of export: a further file."""

    file: GraphName
    sha256: Sha256
    gates: dict[str, float] = {}
    """Against the tower's own graph on real inputs: `cosine`, `cosine_lowest`, `r1_loss` in points, `top10_overlap`."""


class Tower(_Model):
    file: GraphName
    sha256: Sha256
    precision: Precision = "fp32"
    """Of `file`."""
    variants: dict[Precision, Variant] = {}
    defaults: dict[Accelerator, Precision] = {}
    """What a server takes on each device unless it is told otherwise; `precision` where nothing is said."""
    encoder: Encoder
    projector: Projector
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None
    """Label sets that its encoder or projector saw in training: results on their classes are concept-informed.

    Empty where it saw none, None where that was not written down.
    """

    @model_validator(mode="before")
    @classmethod
    def _without_tokens(cls, given: Any) -> Any:
        """Leave out a field of bundles of before 2026-12: whether a graph gives token vectors, which nothing reads."""
        return {key: given[key] for key in given if key != "tokens"} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _precisions(self) -> "Tower":
        if self.precision in self.variants:
            raise ValueError(f"{self.precision} is the precision of {self.file}, and there is a variant of it too")
        for device, precision in self.defaults.items():
            if precision not in self.precisions:
                raise ValueError(f"the default on {device} is {precision}, and there is no such variant")
        return self

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Return the precisions that it comes in, its own first."""
        return (self.precision, *self.variants)

    def default(self, device: Accelerator) -> Precision:
        return self.defaults.get(device, self.precision)

    def graph(self, precision: Precision) -> tuple[str, str]:
        """Return file and checksum of the tower in one of its precisions. Raises KeyError."""
        if precision == self.precision:
            return self.file, self.sha256
        variant = self.variants[precision]
        return variant.file, variant.sha256

    def fingerprint(self) -> str:
        """Hash of what defines this tower's vectors, whatever graph computes them, and in whatever precision."""
        return _digest(
            {
                "encoder": self.encoder.weights_sha256,
                "projector": self.projector.weights_sha256,
                "preprocessing": effective(self.preprocessing),
            }
        )


class Manifest(_Model):
    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    created: str
    """ISO 8601 date."""
    space: SpaceId
    admits: tuple[SpaceId, ...] = ()
    """Older spaces whose towers are all here unchanged: their stored vectors stay valid."""
    dimensions: int = Field(gt=0, le=16_384)
    matryoshka: tuple[int, ...] = ()
    """Shorter lengths that the projectors were trained to be cut to; any length may be asked for."""
    towers: dict[Modality, Tower] = Field(min_length=1, max_length=16)
    temperature: float = Field(gt=0)
    """Softmax temperature of similarities that training learned; scores are softmax(similarity / temperature)."""
    bias: float | None = None
    """The bias of a sigmoid's space (SigLIP): sigmoid(similarity / temperature + bias) is the probability of a
    label by itself, of media that `bias_of` says it of."""
    means: dict[Modality, list[float]] = {}
    """Mean unit vector per modality over the training pairs: the modality gap."""
    abstention: dict[Modality, Detector] = {}
    """Which inputs are of none of the labels: learned with classes withheld."""
    templates: dict[Modality, list[str]] = {}
    """Prompt templates, with one {}, for labels of images and of sounds."""
    evaluation: dict[str, float | int | bool | str | list[float]] = {}
    licences: tuple[Licence, ...] = ()
    """Of what the weights are made of; older bundles have plain words."""
    terms: tuple[Terms, ...] = ()
    files: dict[FileName, Sha256] = {}
    """Every other file of the bundle."""

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        for modality, tower in self.towers.items():
            if modality in MODALITIES and front_end_of(tower.preprocessing) != modality:
                raise ValueError(f"the {modality} tower has {tower.preprocessing.kind} preprocessing")
            if modality not in MODALITIES and (modality in RESERVED or tower.preprocessing.kind == "endpoint"):
                raise ValueError(f"a tower cannot be called {modality}, with {tower.preprocessing.kind} preprocessing")
            if isinstance(tower.preprocessing, TextPreprocessing) and tower.preprocessing.tokenizer not in self.files:
                raise ValueError(f"the tokenizer {tower.preprocessing.tokenizer} is not among the files")
        graphs = [tower.graph(precision)[0] for tower in self.towers.values() for precision in tower.precisions]
        if len({*graphs, *self.files}) < len(graphs) + len(self.files):
            raise ValueError("one file is named twice")
        for name in self.files:
            if not name.endswith(_OTHERS):
                raise ValueError(f"{name}: besides graphs a bundle holds only {', '.join(_OTHERS)}")
        for modality, mean in self.means.items():
            if len(mean) != self.dimensions:
                raise ValueError(f"the {modality} mean has {len(mean)} numbers, not {self.dimensions}")
        for templates in self.templates.values():
            for template in templates:
                if template.count("{}") != 1:
                    raise ValueError(f"the template {template!r} must hold {{}} once")
        if any(not 0 < size <= self.dimensions for size in self.matryoshka):
            raise ValueError("a Matryoshka dimension is outside the space")
        if self.space != space_id(self.dimensions, self.towers):
            raise ValueError("the space id does not match the towers")
        return self

    @property
    def stored_modalities(self) -> tuple[Modality, ...]:
        """Return the modalities that stored items may have: the names of towers, `vector` and `video`."""
        return tuple(dict.fromkeys((*MODALITIES, "vector", "video", *self.towers)))

    @property
    def parts(self) -> tuple[Licence, ...]:
        """Return the licences that are stated, and those of encoders that are not among them."""
        return parts(self.licences, {tower.encoder.source: tower.encoder.licence for tower in self.towers.values()})

    def checksums(self) -> dict[str, str]:
        """Return every file of the bundle but the manifest, with its checksum."""
        graphs = (tower.graph(precision) for tower in self.towers.values() for precision in tower.precisions)
        return dict(self.files) | dict(graphs)

    def bias_of(self, modality: str) -> float | None:
        """Return the bias for labels of inputs of a modality, where it was learned with them: that of an imported
        model's own media and texts, not of towers that were trained or bound since, nor of texts with texts."""
        imported = {name for name, tower in self.towers.items() if tower.projector.kind == "none"}
        return self.bias if modality != "text" and {modality, "text"} <= imported else None

    def accepts(self, space: str) -> bool:
        """Return whether vectors made in `space` may stand beside vectors made by this bundle."""
        return space == self.space or space in self.admits


@dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: Manifest

    def tower_path(self, modality: Modality, precision: Precision | None = None) -> Path:
        """Return the tower's graph in one of its precisions; its own where none is named. Raises KeyError."""
        tower = self.manifest.towers[modality]
        return self.path / tower.graph(precision or tower.precision)[0]

    @contextmanager
    def checked(self, name: str) -> Iterator[Path]:
        """Yield the path of a copy in memory of one of the bundle's files, which has the checksum that the manifest
        says.

        What is read there is what was checked, whatever becomes of the file meanwhile. Raises BundleError, also where a
        graph keeps weights in a file that is not the bundle's.
        """
        file, digest = self.path / name, hashlib.sha256()
        with _memory(name) as (copy, path):
            try:
                with file.open("rb") as source:
                    while block := source.read(_BLOCK_BYTES):
                        digest.update(block)
                        copy.write(block)
                copy.seek(0)
            except OSError as error:
                raise BundleError(f"{file} cannot be read: {error.strerror}") from None
            if digest.hexdigest() != self.manifest.checksums()[name]:
                raise BundleError(_DAMAGED.format(file))
            if name not in self.manifest.files:
                _check_graph(path, self.manifest, file)
            yield path


def front_end_of(preprocessing: Preprocessing) -> FrontEnd:
    return _FRONT_ENDS[preprocessing.kind]


def effective(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the settings of a preprocessing without those that came later and, at their value, change nothing."""
    settings = preprocessing.model_dump(mode="json")
    return {name: value for name, value in settings.items() if name not in _LATER or value != _LATER[name]}


def space_id(dimensions: int, towers: Mapping[Modality, Tower]) -> str:
    """Return the 16 hex digits that name a space: what its vectors are made by, not where or when."""
    parts = {modality: tower.fingerprint() for modality, tower in sorted(towers.items())}
    return _digest({"dimensions": dimensions, "towers": parts})[:16]


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _memory(name: str) -> Iterator[tuple[IO[bytes], Path]]:
    """Yield an empty file without a name, which nobody else can reach, and a path at which this process can open it."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create(name), "wb") as file:
            yield file, Path(f"/proc/self/fd/{file.fileno()}")
    else:  # another system than Linux
        with tempfile.TemporaryFile() as file:
            yield file, Path(f"/dev/fd/{file.fileno()}")


def check_target(target: Path) -> None:
    """Raises BundleError where a bundle may not be written to `target`, which holds something that is no bundle's."""
    if foreign := _foreign(target):
        raise BundleError(f"{target} holds {foreign}, which is no bundle's: not overwriting it")


def write_bundle(target: Path, manifest: Manifest, files: Mapping[str, Path]) -> Bundle:
    """Write a bundle to `target` and verify it there, replacing an older bundle by renames once it is whole.

    `files` maps each name in the manifest to the file to copy. Raises BundleError when a name or a checksum does not
    match, or when `target` holds anything that is not a bundle's. The older bundle is there until the new one is.
    """
    named = _named(manifest.model_dump(mode="json"))
    if set(files) != named:
        raise BundleError(f"the manifest and the files differ: {', '.join(sorted(set(files) ^ named))}")
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        staging.chmod(0o755)
        for name, source in files.items():
            shutil.copyfile(source, staging / name)
        (staging / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        read_bundle(staging)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old)
        try:
            os.replace(staging, target)
        except OSError:
            if old is not None:
                os.replace(old, target)
            raise
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Bundle(target, manifest)


def read_bundle(
    path: Path, signers: Sequence[Ed25519PublicKey] = (), *, commercial: bool = False, hashed: bool = True
) -> Bundle:
    """Read and verify a bundle: the manifest's shape, every file's presence and checksum, that nothing leads out of it;
    that one of the signers signed it, if there are any; and, where `commercial`, that the licences of all its parts
    allow commercial use. Raises BundleError.

    Where files are only opened by `Bundle.checked` they need not be `hashed` here: they are as they are opened.
    """
    try:
        raw = read_file(path / MANIFEST)
    except OSError:
        raise BundleError(f"{path} holds no readable {MANIFEST}: it is not a bundle") from None
    if signers:
        try:
            check_signature(raw, path / SIGNATURE, signers)
        except SignatureError as error:
            raise BundleError(str(error)) from None
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{path / MANIFEST}: {where}: {first['msg']}") from None
    if commercial and not commercial_use(manifest.parts):
        raise BundleError(
            f"{path} ({manifest.name}) is refused: ISTHMUS_LICENCES is commercial, and {weights_line(manifest.parts)}"
        )
    for name, sha256 in manifest.checksums().items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"{file} is missing")
        if not file.resolve().is_relative_to(path.resolve()):
            raise BundleError(f"{file} leads out of the bundle, to {file.resolve()}")
        if hashed and sha256_file(file) != sha256:
            raise BundleError(_DAMAGED.format(file))
        if hashed and name not in manifest.files:
            _check_graph(file, manifest, file)
    return Bundle(path, manifest)


def _check_graph(path: Path, manifest: Manifest, file: Path) -> None:
    """Check that a graph's weights are in its own file, or in one that the manifest names; `path` is where it is read.
    Raises BundleError."""
    try:
        outside = external_files(path)
    except NotAGraph as error:
        raise BundleError(f"{file} is not an ONNX graph: {error}") from None
    if strange := sorted(outside - manifest.files.keys()):
        raise BundleError(f"{file} keeps weights in {strange[0]!r}, which is no file of the bundle")


def _named(manifest: Any) -> set[str]:
    """Return the files that a manifest, as plain JSON, names."""
    towers = manifest["towers"].values()
    variants = (variant["file"] for tower in towers for variant in tower.get("variants", {}).values())
    return {*manifest["files"], *(tower["file"] for tower in towers), *variants}


def _foreign(target: Path) -> str | None:
    """Return something at `target` that writing a bundle there would destroy and that no older bundle put there."""
    if not target.exists():
        return None
    if not target.is_dir():
        return "a file"
    names = {path.name for path in target.iterdir()}
    # Not read as a Manifest: a bundle of an older schema, or a damaged one, may be replaced too.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        names -= {MANIFEST, SIGNATURE, *_named(json.loads((target / MANIFEST).read_bytes()))}
    return min(names, default=None)


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
