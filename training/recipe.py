"""A recipe: one YAML file that says which encoders, which pairs, which projector. Read once, passed as values."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.contract.bundle import MODALITIES, Modality, Precision
from service.contract.bundle import RESERVED as RESERVED_NAMES
from service.contract.licences import Licence, Terms
from training.errors import TrainingError

SET_HELP = "another value of the YAML file, such as data.root=/data; repeatable"
"""Help of the flag --set of every command."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # arXiv 2409.19425
RESERVED = 5
"""Dimensions of a space whose hubs are corrected: of images, sounds and texts, and two that keep the length at 1."""


Gone = tuple[tuple[str, str | None, str], ...]
GONE: Gone = (
    ("projector.kind", "glu", "it reached R@1 20.06 where mlp reaches 20.12"),
    ("projector.kind", "attention", "pooling by learned queries moved R@1 by 0.05 points (-0.62 to 0.68)"),
    ("train.ema", None, "an average of the weights gained nothing"),
    ("train.regularise.fusemix", None, "it lowered R@1 from 20.1 to 18.3"),
    ("train.regularise.structure", None, "it moved R@1 from 20.1 to 20.4, and one run differs from the next by 1"),
    ("train.regularise.structure_levels", None, "it belonged to train.regularise.structure"),
    ("export.int8", None, "dynamic scales had a mean cosine of 0.9935 where static ones have 0.9958, in the same time"),
    ("train.objective.kind", "sigmoid", "it reached R@1 15.9 where InfoNCE reaches 20.1"),
    ("train.objective.scaling", None, "it belonged to the objective sigmoid"),
    ("train.objective.bias", None, "it belonged to the objective sigmoid"),
)
"""Fields of earlier recipes, or values of them (None: the field), and why they are gone."""


class RecipeError(TrainingError):
    """A recipe cannot be used: the message names the file, the key and what is wrong."""


Checked = TypeVar("Checked", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataRoot(_Model):
    root: Path = Path(".")
    """Every relative path of the recipe starts here. `--set data.root=…` or ISTHMUS_DATA."""


class BesideSource(_Model):
    """A further encoder of the same input, from a folder or a package."""

    folder: Path | None = None
    package: str | None = None
    subfolder: str = ""
    layers: tuple[int, ...] = ()
    """The hidden states that are put beside its last one."""
    size: int | None = Field(default=None, ge=32, le=4096)
    """The square, in pixels, that a picture is brought to for it; None: the size of the first encoder's."""

    @model_validator(mode="before")
    @classmethod
    def _folder(cls, given: Any) -> Any:
        """A path alone is a folder."""
        return {"folder": given} if isinstance(given, str | Path) else given

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.package is None):
            raise ValueError("exactly one of folder and package must be given")
        return self


def _groups(field: str, pattern: str) -> int:
    """Return how many groups a regular expression has. Raises ValueError where it is none."""
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{field} is not a regular expression: {error}") from None


_OF_WEIGHTS = ("pooling", "normalise", "layers", "beside", "tokens", "scales", "concepts")


class EncoderSource(_Model):
    """Says where a frozen encoder comes from: one of the five. A path with a dot first is beside the recipe."""

    hub: str | None = None
    revision: str | None = None
    folder: Path | None = None
    package: str | None = None
    """An installed Python package that carries a model folder."""
    onnx: Path | None = None
    """A folder with encoder.onnx and encoder.json (its preprocessing)."""
    endpoint: str | None = None
    """Of texts: the route of an embedding API, in the shape of OpenAI's, Ollama's or text-embeddings-inference's. Its
    key is the variable ISTHMUS_ENDPOINT_KEY."""
    model: str = ""
    """The model that the API is asked for."""
    vectors: Path | None = None
    """A file of JSON lines, each a `text` and its `vector`: these texts are not sent. Without an endpoint, all texts
    that training needs must be in it."""
    front_end: Literal["array"] | None = None
    """Of a modality that is none of the three: how its files are read. `onnx` then names a folder whose encoder.json
    says the shape of the arrays."""
    subfolder: str = ""
    licence: str | None = None
    preprocessing: dict[str, Any] = {}
    """Changes to the preprocessing that comes with the encoder."""
    pooling: Literal["cls", "mean", "both", "last"] | None = None
    """An item's vector: its CLS state, the mean of the others, both side by side (SAIL), or, for texts, the last
    token's state. None: the encoder's own."""
    normalise: bool | None = None
    """Bring a text's vector to length 1 before the projector. None: where sentence-transformers' modules.json does."""
    layers: tuple[int, ...] = ()
    """Hidden states, in transformers' numbering, that are put beside the last one: several layers mixed."""
    concepts: bool = False
    """Put the scores of the encoder's own classifier beside its features: what it was trained to name."""
    beside: list[BesideSource] = []
    """Further encoders that take the same input: their features are put beside, their scores averaged."""
    scales: tuple[int, ...] = ()
    """Further squares, in pixels, that a convolution sees a picture at: its vectors are averaged over them."""
    tokens: int | None = Field(default=None, gt=0)
    """Local vectors of a picture, for token heads: means over a grid of so many cells. None: all."""
    views: Annotated[int, Field(ge=0)] | Literal["online"] = 0
    """Augmented views of each picture that training draws from (training.encode.augment): so many are encoded and
    cached; online: each draw is a new one, encoded in its step. 0: the picture as it is."""
    labels: str | None = None
    """The label set that the encoder was trained with: results on its classes are concept-informed."""
    precision: Literal["fp32", "int8"] = "fp32"
    """int8: it is quantised before anything is encoded with it, so that heads learn from what will be served."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        remote = self.endpoint or self.vectors
        if sum(value is not None for value in (self.hub, self.folder, self.package, self.onnx, remote)) != 1:
            raise ValueError("exactly one of hub, folder, package, onnx and endpoint (or vectors) must be given")
        if remote is not None and (not self.model or any(getattr(self, name) for name in _OF_WEIGHTS)):
            raise ValueError("an endpoint needs a model, and gives vectors as they are: nothing of it can be chosen")
        chosen = ("pooling", "normalise", "layers", "beside", "tokens", "scales")
        if self.onnx is not None and any(getattr(self, name) for name in chosen):
            raise ValueError(f"an ONNX encoder is as it is: {', '.join(chosen[:-1])} and scales cannot be chosen")
        if len(set(self.layers)) != len(self.layers) or any(layer < 0 for layer in self.layers):
            raise ValueError("layers must be different numbers from 0 up")
        if len(set(self.scales)) != len(self.scales) or any(not 32 <= size <= 4096 for size in self.scales):
            raise ValueError("scales must be different sizes from 32 to 4096 pixels")
        return self


_TAUGHT = ("pairs", "concepts")
"""Supervisions of pairs from which something is learned."""


class PairSource(_Model):
    """A set of (media, text) pairs: captions, or labels turned into captions by templates."""

    modality: Modality
    table: str | Path | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """CSV, TSV or JSONL with one row per pair, a caption file of COCO's (JSON), or shards that hold their media
    (training.data.shards): a path, a glob, an address, or several. Without it `folder` holds one sub-folder per
    label."""
    folder: Path = Path()
    """Where media lie that are named and not held by the table."""
    media: str = "file"
    text: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The column of captions, or several: each caption of a row is a pair."""
    label: str | None = None
    split_column: str | None = None
    splits: dict[Literal["train", "validation", "test"], list[str]] = {}
    """Values of `split_column`. Where nothing names splits, all is train; with the supervision `none`, all is test."""
    split_files: dict[Literal["train", "validation", "test"], Path] = {}
    """One media name per line for each split."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share of train, by hash of the group, when no validation split is named."""
    group: str | None = None
    """Regular expression whose first group names what must not span train and validation (a source recording)."""
    names: dict[str, str] = {}
    """Readable class names for labels that are not."""
    words: str | None = None
    """Regular expression that finds, in a text, the words that people would type alone. Each becomes a text of its own,
    and validation measures how well it finds the media that it belongs to (mean average precision)."""
    word_forms: tuple[str, ...] = Field(default=("{}",), min_length=1)
    """What people type for a word, each a text of its own. `a {}` is `an` before a vowel."""
    weight: float = Field(default=1.0, ge=0.0)
    """Share of the training steps. 0: nothing is learned from it, and its validation split counts all the same."""
    supervision: Literal["pairs", "concepts", "none", "choice"] = "pairs"
    """What training takes of the train split: its texts or labels; its media alone, captioned by what their encoder's
    own classifier names (concepts); or nothing. The test split is evaluated all the same. choice: nothing is learned
    from it, and all of the train split is validation, by which settings are chosen."""
    exclude: Path | None = None
    """A CSV whose column `file` names media that training leaves out, such as what `suspects` wrote."""
    where: dict[str, list[str]] = {}
    """Columns of the table with the values that a row of the train split must have, such as a licence."""
    skip_empty: bool = False
    """Leave rows out that have no text, instead of refusing the table."""
    unseen: list[str] = []
    """Labels that are kept from training and validation, to be told apart from all others in the test split."""
    prompts: dict[str, list[str]] = {}
    """Prompts of their own for some classes, by readable name: descriptions that stand for the templates there. The
    name of a YAML file beside the recipe stands for what it holds."""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.table is None and "folder" not in self.model_fields_set:
            raise ValueError("a table or a folder must be given")
        if self.table is None and (self.text or self.label):
            raise ValueError("text and label name columns of a table, and there is no table")
        if self.table is not None and (self.text is None) == (self.label is None):
            raise ValueError("a table needs exactly one of text and label")
        if self.words is not None:
            if self.text is None:
                raise ValueError("words are found in texts, and no column is named as text")
            if _groups("words", self.words) > 1:
                raise ValueError("words may have one group (…) at most: others are written (?:…)")
        elif self.word_forms != ("{}",):
            raise ValueError("word_forms are forms of what words finds, and words is not given")
        if wrong := [form for form in self.word_forms if form.count("{}") != 1]:
            raise ValueError(f"word_forms: {wrong[0]!r} does not have {{}} once, where the word belongs")
        if self.group is not None and not _groups("group", self.group):
            raise ValueError(f"group: {self.group!r} has no group (…) around what must not span train and validation")
        return self

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        """Whatever names splits must name each of them once: else media of the test split may be trained on."""
        if (self.split_column is None) != (not self.splits):
            raise ValueError("split_column names a column, and splits its values: one without the other splits nothing")
        values = [value for values in self.splits.values() for value in values]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"splits: {twice[0]!r} is named more than once")
        if self.validation_fraction and (self.splits.get("validation") or "validation" in self.split_files):
            raise ValueError("validation_fraction is for pairs whose validation split is not named, and it is")
        return self

    @property
    def tables(self) -> tuple[str, ...]:
        return () if self.table is None else self.table if isinstance(self.table, tuple) else (str(self.table),)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return () if self.text is None else (self.text,) if isinstance(self.text, str) else self.text


class ProjectorSpec(_Model):
    kind: Literal["ridge", "cca", "linear", "mlp", "token"] = "mlp"
    """Closed forms (ridge, cca) and trained heads; all but linear maps must beat the linear baseline to ship."""
    dimensions: int = Field(default=512, gt=1)
    hidden: int = Field(default=1024, gt=0)
    """Width inside mlp."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    text_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """The dropout of the text projector; None means the same. Texts are many and their features few: they need less."""
    power: float = Field(default=1.0, gt=0.0, le=1.0)
    """Signed power of pooled media features (Perronnin et al., 2010); 0.5 evens out bursts of rectified ones."""
    rise: float = Field(default=0.0, ge=0.0)
    """How much longer an image head's branch of concepts is where the classifier is sure (training.heads.projector)."""
    querybank: int = Field(default=0, ge=0)
    """Media of each modality in the bank that hubs among the texts are corrected by, and texts in the one for hubs
    among the media (training.heads.querybank); 0: none."""
    matryoshka: tuple[int, ...] = ()
    """Shorter lengths that vectors can be cut to: each is trained like the whole (arXiv 2205.13147)."""

    @property
    def closed(self) -> bool:
        """Return whether the head is computed instead of trained."""
        return self.kind in ("ridge", "cca")

    @property
    def linear(self) -> bool:
        return self.closed or self.kind == "linear"

    @property
    def inner(self) -> int:
        """The dimensions that are left beside those that the correction of hubs reserves."""
        return self.dimensions - (RESERVED if self.querybank else 0)

    @property
    def needs_tokens(self) -> bool:
        """Return whether the head reads local vectors, and not pooled ones alone."""
        return self.kind == "token"

    @model_validator(mode="after")
    def _nested(self) -> Self:
        if list(self.matryoshka) != sorted({m for m in self.matryoshka if 0 < m < self.dimensions}):
            raise ValueError(f"matryoshka must rise and stay between 1 and {self.dimensions - 1}")
        if self.querybank and (self.matryoshka or self.inner < 1):
            raise ValueError(
                f"querybank reserves the last {RESERVED} dimensions: not with matryoshka, nor without more"
            )
        return self


class ObjectiveSpec(_Model):
    """The contrast of a batch; training/fit/losses says what each is."""

    kind: Literal["info_nce", "sdm"] = "info_nce"
    repeats: Literal["mask", "positive"] | None = None
    """Pairs of a batch that share medium, text or label: left out, or positives too. sdm has them as positives."""
    captions: int = Field(default=1, gt=0)
    """Texts of each medium in a batch; batch_size counts pairs."""
    other_texts: int = Field(default=0, ge=0)
    """Texts of the source, beside those of its batch, that each medium is told from. Where texts have no projector they
    cost little."""
    chunk: int | None = Field(default=None, gt=0)
    """Rows of logits at a time: the (batch, batch) matrix is never held. None: all at once."""
    mixed: bool = False
    """Every source in every batch instead of one source per step."""
    negatives: Literal["all", "own"] = "all"
    """Whether, under torchrun, pairs of all processes are each other's negatives, or those of one process only."""

    @property
    def repeated(self) -> Literal["mask", "positive"]:
        return self.repeats or ("positive" if self.kind == "sdm" else "mask")

    @model_validator(mode="after")
    def _applicable(self) -> Self:
        if self.kind == "sdm" and self.repeats == "mask":
            raise ValueError("sdm matches a distribution over repeated pairs: repeats cannot be mask")
        return self


class RegulariserSpec(_Model):
    """Weights of what is added to the contrast; 0 is off."""

    noise_robust: float = Field(default=0.0, ge=0.0)
    """The weight of NMTune, for pairs that may be wrong."""
    alignment: float = Field(default=0.0, ge=0.0)
    uniformity: float = Field(default=0.0, ge=0.0)


class TrainSpec(_Model):
    steps: int = Field(default=3000, gt=0)
    epochs: int | None = Field(default=None, gt=0)
    """Instead of `steps`: how often all media are drawn. The cosine then moves once an epoch."""
    batch_size: int = Field(default=1024, gt=1)
    """Pairs of a step in each process; under torchrun a step has as many times more as there are processes."""
    learning_rate: float = Field(default=1e-3, gt=0)
    lowest_rate: float = Field(default=0.0, ge=0)
    """The rate at which the cosine ends."""
    weight_decay: float = Field(default=0.02, ge=0)
    warmup_steps: int = Field(default=200, ge=0)
    temperature: float = Field(default=0.07, gt=0)
    validate_every: int = Field(default=100, gt=0)
    patience: int | None = Field(default=10, gt=0)
    """Validations without a gain after which training ends: the rate falls to zero over a tenth of the steps so far.
    None: it goes on to the last step."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    objective: ObjectiveSpec = ObjectiveSpec()
    regularise: RegulariserSpec = RegulariserSpec()
    until: dict[str, float] = {}
    """Share of the steps after which a source is no longer drawn: noisy pairs first, clean ones last."""
    baseline: bool = True
    """Compute and train the linear heads that a non-linear one must beat to ship."""
    baseline_steps: int = Field(default=500, gt=0)
    """Upper bound of the linear baseline's steps."""
    start: Path | None = None
    """projectors.safetensors to go on from, of the same kind and dimensions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the heads run under autocast; losses stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = False
    """Write losses and validation for TensorBoard beside the checkpoint (needs the package tensorboard)."""

    @model_validator(mode="after")
    def _several(self) -> Self:
        if self.batch_size < 2 * self.objective.captions:
            raise ValueError(
                f"batch_size {self.batch_size} with objective.captions {self.objective.captions} leaves fewer than two "
                "media in a batch: nothing to tell apart"
            )
        return self


class ExportSpec(_Model):
    """Says what a bundle's towers come in. What does not pass the gates of training/bundle/precision.py is refused."""

    weights: Literal["fp32", "fp16"] = "fp32"
    """fp16: the files keep large weights in 16 bits, and a runtime makes them 32 bits again as it loads them: half the
    size, at the speed and, to a cosine of 0.9999, with the vectors of fp32."""
    precisions: tuple[Precision, ...] = ("fp32",)
    calibration: int = Field(default=256, gt=0)
    """Training items of each modality that the scales of int8 are measured on."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "fp32" not in self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ValueError("precisions must be different, and hold fp32: the others are measured against it")
        return self


class TextSource(_Model):
    """A set of captions without media."""

    table: Path
    """CSV or TSV without a heading, as it is or compressed (.gz)."""
    column: int = Field(default=0, ge=0)
    """Which column holds the captions, counting from 0."""


class LeakSpec(_Model):
    """Holds what of the training media counts as in a test split, and is left out of training."""

    image: int | None = Field(default=None, ge=0, le=16)
    """Bits of 64 by which each of two perceptual hashes of a picture may differ from a test picture's. None: pictures
    are not compared."""
    group: bool = False
    """Leave media out whose `group` has media in the test split of their set."""


class EmergentSpec(_Model):
    """Retrieval between the test media of modalities that never met in training."""

    queries: str
    """Labelled pairs whose test media are the queries."""
    gallery: list[str] = Field(min_length=1)
    """Pairs whose test media are searched."""
    shows: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(min_length=1)
    """What answers the queries, by their readable class names: classes, or words of a caption, of media that answer
    them."""


class Recipe(_Model):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    data: DataRoot = DataRoot()
    encoders: dict[Modality, EncoderSource]
    pairs: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], PairSource]
    texts: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], TextSource] = {}
    """Caption-only sets. Where there are any, the text projector is computed from them (training.heads.captions), and
    media learn towards it."""
    projector: ProjectorSpec = ProjectorSpec()
    train: TrainSpec = TrainSpec()
    export: ExportSpec = ExportSpec()
    templates: dict[Modality, list[str]] = {}
    leaks: LeakSpec = LeakSpec()
    emergent: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], EmergentSpec] = {}
    licences: tuple[Licence, ...] = ()
    """The licence of each data set that is learned from, and of encoders of which more is to be said than their
    `licence`."""
    terms: tuple[Terms, ...] = ()
    """Terms of access to data that are stated apart: no licences of the weights."""
    notes: str = ""
    """Goes into the model card."""
    attribution: Path | None = None
    """A file that names the authors of what was learned from; it travels in the bundle as ATTRIBUTION.md."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for modality, encoder in self.encoders.items():
            if (modality in MODALITIES) != (encoder.front_end is None) or (encoder.front_end and encoder.onnx is None):
                raise ValueError(
                    f"encoders.{modality}: front_end: array, with onnx, is for a modality that is none of "
                    f"{', '.join(MODALITIES)}, and needed there"
                )
            if modality not in MODALITIES and modality in RESERVED_NAMES:
                raise ValueError(f"encoders.{modality}: no modality can have this name")
            if (encoder.endpoint or encoder.vectors) and (modality != "text" or self.projector.needs_tokens):
                raise ValueError(f"encoders.{modality}: an endpoint is for texts, and for heads of pooled features")
        if "text" not in self.encoders or len(self.encoders) < 2:
            raise ValueError("encoders must name text and at least one other, such as image")
        for name, source in self.pairs.items():
            if source.modality == "text":
                raise ValueError(f"pairs.{name} pairs texts with texts: the modality is that of the media")
            if source.modality not in self.encoders:
                raise ValueError(f"pairs.{name} has {source.modality} media, and there is no {source.modality} encoder")
            if source.supervision == "concepts" and not self.encoders[source.modality].concepts:
                raise ValueError(f"pairs.{name} asks for concepts, and encoders.{source.modality}.concepts is not set")
            if (source.label or source.table is None) and not self.templates.get(source.modality):
                raise ValueError(f"pairs.{name} has labels, and templates.{source.modality} is empty")
        for modality, templates in self.templates.items():
            if wrong := [one for one in templates if one.count("{}") != 1 or set("{}") & {*one.replace("{}", "")}]:
                raise ValueError(f"templates.{modality}: {wrong[0]!r} does not have {{}} once, where the label belongs")
        for name, spec in self.emergent.items():
            for pairs in (spec.queries, *spec.gallery):
                if pairs not in self.pairs:
                    raise ValueError(f"emergent.{name} names {pairs}, and there are no such pairs")
        if (
            self.pairs
            and not self.texts
            and not any(source.supervision == "pairs" and source.weight for source in self.pairs.values())
        ):
            raise ValueError(
                "no pairs have texts to train on: none has the supervision pairs and a weight, and there are no texts"
            )
        if self.texts and (self.projector.closed or self.projector.needs_tokens):
            raise ValueError(f"texts: not for {self.projector.kind} heads")
        for modality, encoder in self.encoders.items():
            if encoder.tokens and (modality != "image" or encoder.scales or encoder.beside or encoder.concepts):
                raise ValueError(f"encoders.{modality}: tokens are for images, without scales, beside and concepts")
            if encoder.views and modality != "image":
                raise ValueError(f"encoders.{modality}: views are for images")
            if encoder.scales and (modality != "image" or self.projector.needs_tokens):
                raise ValueError(f"encoders.{modality}: scales are for images, and not for token heads")
            if encoder.precision == "int8" and self.projector.needs_tokens:
                raise ValueError(
                    f"encoders.{modality}: an int8 encoder gives pooled features only: no {self.projector.kind} head"
                )
            if not (encoder.concepts or encoder.beside):
                continue
            if modality == "text":
                raise ValueError("encoders.text: concepts and beside are for images and sounds")
            if self.projector.needs_tokens or self.projector.closed:
                raise ValueError(f"encoders.{modality}: concepts and beside are not for {self.projector.kind} heads")
            if encoder.concepts and not self.templates.get(modality):
                raise ValueError(f"encoders.{modality}.concepts needs templates.{modality} to read the names in")
        for name, share in self.train.until.items():
            if name not in self.pairs or not 0 < share < 1:
                raise ValueError(f"train.until.{name}: it must name pairs, and lie between 0 and 1")
        taught = {name for name, source in self.pairs.items() if source.weight and source.supervision in _TAUGHT}
        if taught and set(self.train.until) >= taught:
            raise ValueError("train.until ends every source: one must last")
        if self.projector.needs_tokens and any(source.pooling == "both" for source in self.encoders.values()):
            raise ValueError(f"a {self.projector.kind} projector takes one width: pooling cannot be both")
        return self

    def labels_seen(self, modality: Modality) -> tuple[str, ...]:
        """The label sets that the encoder or the projector of a modality is trained with: what informs its results."""
        encoder = self.encoders[modality]
        encoder_labels = encoder.labels or ("its encoder's classes" if encoder.concepts else None)
        pairs = [
            name
            for name, source in self.pairs.items()
            if source.modality == modality and source.text is None and source.supervision == "pairs"
        ]
        return tuple([encoder_labels, *pairs] if encoder_labels else pairs)

    def only(self, modalities: Collection[str]) -> Self:
        """The recipe of some of its modalities: their encoders, pairs and templates, and nothing that needs others."""
        pairs = {name: source for name, source in self.pairs.items() if source.modality in modalities}
        until = {name: end for name, end in self.train.until.items() if name in pairs}
        return self.model_copy(
            update={
                "encoders": {name: source for name, source in self.encoders.items() if name in modalities},
                "pairs": pairs,
                "templates": {name: prompts for name, prompts in self.templates.items() if name in modalities},
                "train": self.train.model_copy(update={"until": until if set(until) != set(pairs) else {}}),
                "emergent": {
                    name: spec for name, spec in self.emergent.items() if {spec.queries, *spec.gallery} <= set(pairs)
                },
            }
        )

    def path(self, relative: Path) -> Path:
        return self.data.root / relative


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; ISTHMUS_DATA replaces data.root, `key.key=value` overrides replace both. Raises RecipeError."""
    values = read_yaml(path, overrides)
    refuse_gone(path, values, GONE)
    for source in _mappings(values.get("encoders")):
        for key in ("folder", "onnx"):
            if str(source.get(key) or "").startswith("."):
                source[key] = str((path.parent / source[key]).resolve())
    if str(values.get("attribution") or "").startswith("."):
        values["attribution"] = str((path.parent / values["attribution"]).resolve())
    for source in _mappings(values.get("pairs")):
        if isinstance(source.get("prompts"), str):
            source["prompts"] = _mapping(path.parent / source["prompts"])
    return checked(Recipe, values, f"{path}: ")


def _mappings(values: Any) -> list[dict[str, Any]]:
    """The mappings that a mapping holds; what is none is refused when all is checked."""
    return [source for source in values.values() if isinstance(source, dict)] if isinstance(values, dict) else []


def checked(kind: type[Checked], values: Any, where: str, error: type[TrainingError] = RecipeError) -> Checked:
    """Checks what a file says; raises `error`, which begins with `where` and names the first key that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise error(f"{where}{key}: {first['msg']}" if key else f"{where}{first['msg']}") from None


def load_with_recipe(
    path: Path, overrides: list[str] | None, gives: str, error: type[TrainingError]
) -> tuple[dict[str, Any], Recipe]:
    """Reads a file that names a recipe: its other values, and the recipe. Raises `error` or RecipeError.

    `--set data.root=…` and ISTHMUS_DATA reach the recipe; other overrides are the file's own. `gives` says in the
    error what the recipe is for.
    """
    values = read_yaml(path, overrides)
    stated = values.pop("data", None)
    data = checked(DataRoot, stated, f"{path}: data.", error).root if stated else None
    if not isinstance(values.get("recipe"), str):
        raise error(f"{path}: recipe must name the recipe that gives {gives}")
    return values, load_recipe(path.parent / values.pop("recipe"), None if data is None else [f"data.root={data}"])


def refuse_gone(path: Path, values: dict[str, Any], fields: Gone) -> None:
    """Raise RecipeError for a field, or a value of a field, that an earlier version had; see GONE."""
    for key, gone, reason in fields:
        value: Any = values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and gone in (None, value):
            stated = key if gone is None else f"{key}: {gone}"
            raise RecipeError(f"{path}: {stated} is gone, because {reason} (docs/LOG.md): take it out of the recipe")


def read_yaml(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The recipe's values with ISTHMUS_DATA and overrides applied, not yet checked. Raises RecipeError."""
    values = _mapping(path)
    if root := os.environ.get("ISTHMUS_DATA"):
        data = values.get("data")
        values["data"] = {**(data if isinstance(data, dict) else {}), "root": root}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override}: not key=value")
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"--set {override}: {parent} is not a mapping")
        try:
            inner[last] = parse_yaml(value)
        except yaml.YAMLError:
            raise RecipeError(f"--set {override}: {value!r} is not YAML: put it into quotation marks") from None
    return values


def parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML text. Raises yaml.YAMLError, also where a mapping states a key twice."""
    loader = _UniqueKeys(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once: of two, PyYAML would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        stated = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in stated:
                    problem = f"{key.value} is stated twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                stated.add(key.value)
        return node


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, as it stands there. Raises RecipeError."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a mapping of keys to values")
    return values
