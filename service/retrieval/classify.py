"""Zero-shot classification: labels → prompts → label vectors → calibrated scores of an input.

Prompt ensembling as in CLIP (Radford et al., 2021, section 3.1.4): a label's vector is the mean of the unit vectors of
its prompts, scaled to length 1. Scores are the softmax of the similarities at the temperature that training learned.
Examples of a label move its vector (adapters.py); a detector says whether an input is of any label (abstention.py).
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract import abstention
from service.contract.abstention import Detector
from service.contract.bundle import Manifest, Modality
from service.contract.errors import InputError
from service.contract.images import ImageLimits
from service.contract.vectors import Vectors, l2_normalise
from service.engine.caller import PROCESS, Caller
from service.engine.embedder import Embedder
from service.engine.inputs import (
    UNKNOWN_TEXT,
    Embedded,
    Input,
    Media,
    Text,
    Unreadable,
    raise_first,
    unknown_warning,
)
from service.errors import InputFailed, InvalidRequest
from service.retrieval import adapters
from service.retrieval.crops import crops
from service.retrieval.single_flight import Shared
from service.runtime.fair import FairSemaphore
from service.store import LabelSet, Store

Templates = Sequence[str] | Mapping[Modality, Sequence[str]]
"""For inputs of every modality, or by modality."""
_CHUNK = 256
"""Inputs handed to the embedder at a time, so that 10,000 labels neither fill its queue nor wait in it all at once."""
_ENCODED_AT_ONCE = 2
"""Sets of labels, of those that are more than a chunk: each takes memory for its vectors while it is encoded."""
_CACHE_BYTES = 64 * 2**20
_REMEMBERED_SETS = 8
_ROWS = 1_024
"""Label vectors that are widened to float64 at a time."""

_NAMED = 5
"""Labels that a warning names."""

PLAIN = ("{}",)


@dataclass(frozen=True)
class Label:
    name: str
    prompts: Sequence[str] | None = None
    """Whole sentences that stand for the label, in place of the templates."""
    examples: Sequence[Input] = ()
    """They move the label for inputs of their modality."""


@dataclass(frozen=True)
class Grid:
    rows: int
    columns: int


@dataclass(frozen=True)
class Score:
    label: str
    score: float
    similarity: float


@dataclass(frozen=True)
class Classification:
    labels: list[Score]
    """Best first."""
    abstained: bool
    on_topic: float | None = None
    cells: "list[list[Classification]] | None" = None
    error: InputError | None = None
    """Of an input that cannot be classified, where the others are."""


@dataclass(frozen=True)
class _Encoded:
    vectors: Vectors
    """(L, D), of the labels."""
    unknown: Sequence[int] = ()
    """Places of the labels of which the tokenizer knows no word: their vectors are those of any such label."""


@dataclass(frozen=True)
class _Set:
    """The labels of a request, and what is known about them."""

    labels: Sequence[str | Label]
    templates: Templates | None
    stored: Mapping[str, Vectors] = field(default_factory=dict)
    """Label vectors (L, D) by digest."""
    shifts: Mapping[str, Vectors] = field(default_factory=dict)
    """(L, D) by modality of the examples."""
    detectors: Mapping[str, Detector] = field(default_factory=dict)
    version: str = ""
    ready: dict[str, _Encoded] = field(default_factory=dict)
    """Of a stored set: label vectors by modality and the templates that stand for it when a request names none."""


class Classifier:
    """Remembers the label vectors of the sets used last."""

    def __init__(self, embedder: Embedder, store: Store, image_limits: ImageLimits = ImageLimits()) -> None:
        self._embedder = embedder
        self._store = store
        self._image_limits = image_limits
        self._cache: OrderedDict[str, _Encoded] = OrderedDict()
        self._encoding: dict[tuple[str, str], Shared[_Encoded]] = {}
        """By digest, and by the key that is charged for it."""
        self._places = FairSemaphore(_ENCODED_AT_ONCE, per_caller=1)
        self._sets: OrderedDict[str, _Set] = OrderedDict()

    async def classify(
        self,
        inputs: Sequence[Input],
        *,
        labels: Sequence[str | Label] | None = None,
        label_set: str | None = None,
        templates: Templates | None = None,
        top_k: int = 5,
        threshold: float | None = None,
        abstain: bool | float = False,
        grid: Grid | None = None,
        fail: bool = True,
        caller: Caller = PROCESS,
        warn: Callable[[str], None] = lambda _: None,
    ) -> list[Classification]:
        """One classification per input, over distinct labels or those of a stored set. `warn` is told of inputs and
        labels that the model hardly knows.

        With `fail`, raises InputFailed for the first input that something is wrong with; without, that is its `error`.
        Raises NotFound (the label set), InputFailed (a label's prompt), InvalidRequest (nothing learned to abstain).
        """
        chosen = await self._stored_set(label_set) if label_set is not None else _Set(labels or (), None)
        if grid is None:
            embedded = await self._embedder.embed(inputs, caller, admit_unknown=True)
        else:
            embedded = await self._embedded_cells(inputs, grid, caller)
        if fail:
            raise_first(embedded if grid is None else embedded[:: grid.rows * grid.columns + 1])
        for index, given in enumerate(embedded):
            for warning in unknown_warning(f"inputs[{index}]", given):
                warn(warning)
        unknown: set[int] = set()
        found = [Classification([], False, error=each if isinstance(each, InputError) else None) for each in embedded]
        good = {place: each for place, each in enumerate(embedded) if isinstance(each, Embedded)}
        for modality in dict.fromkeys(each.modality for each in good.values()):
            places = [place for place, each in good.items() if each.modality == modality]
            detector = self._detector(chosen, modality) if abstain else None
            encoded = await self._vectors(chosen, modality, templates, caller)
            unknown.update(encoded.unknown)
            own = np.stack([good[place].vector for place in places])
            classifying = partial(
                _classifications,
                own,
                encoded.vectors,
                [_name(each) for each in chosen.labels],
                self._embedder.manifest.temperature,
                top_k,
                threshold,
                detector,
                0.5 if abstain is True else float(abstain),
            )
            results = await self._embedder.in_worker(classifying)
            for place, result in zip(places, results, strict=True):
                found[place] = result
        if unknown:
            warn(_unknown_labels(chosen.labels, sorted(unknown)))
        return found if grid is None else _with_cells(found, grid)

    async def save_label_set(
        self,
        name: str,
        labels: Sequence[str | Label],
        templates: Templates | None,
        off_topic: Sequence[Input] = (),
        caller: Caller = PROCESS,
    ) -> None:
        """Encode a label set for every modality there is, learn from its examples, and store it. Raises InputFailed."""
        manifest = self._embedder.manifest
        vectors: dict[str, Vectors] = {}
        by_modality: dict[str, Vectors] = {}
        for modality in manifest.towers:
            own = templates_for(manifest, modality, templates)
            digest = label_digest(labels, own)
            encoded = await self._label_vectors(digest, labels, own, caller)
            if encoded.unknown:
                raise InputFailed(encoded.unknown[0], InputError(UNKNOWN_TEXT), field="labels")
            by_modality[modality] = vectors[digest] = encoded.vectors
        examples = [
            (f"labels[{owner}].examples", place, example)
            for owner, label in enumerate(labels)
            if isinstance(label, Label)
            for place, example in enumerate(label.examples)
        ]
        counts = [len(label.examples) if isinstance(label, Label) else 0 for label in labels]
        owners = np.repeat(np.arange(len(labels)), counts)
        taught = await self._embed_all(examples, caller)
        unlike = await self._embed_all([("off_topic", place, each) for place, each in enumerate(off_topic)], caller)
        detectors: dict[str, Any] = {}
        for modality in dict.fromkeys(each.modality for each in taught):
            mine = np.array([each.modality == modality for each in taught])
            vectors_taught = np.stack([each.vector for each in taught if each.modality == modality])
            off = [each.vector for each in unlike if each.modality == modality]
            learning = partial(_learn, vectors_taught, owners[mine], by_modality[modality], off, manifest.temperature)
            shift, detector = await self._embedder.in_worker(learning)
            vectors[_shift_key(modality)] = shift
            if detector is not None:
                detectors[modality] = detector.model_dump()
        definition = {
            "labels": [_defined(each) for each in labels],
            "templates": templates,
            "detectors": detectors,
        }
        await self._store.put_label_set(name, definition, vectors)

    async def _embed_all(self, inputs: Sequence[tuple[str, int, Input]], caller: Caller) -> list[Embedded]:
        """Any number of inputs. Raises InputFailed with the list and the place that stand before the bad one."""
        embedded: list[Embedded] = []
        for start in range(0, len(inputs), _CHUNK):
            chunk = inputs[start : start + _CHUNK]
            results = await self._embedder.embed([given for *_, given in chunk], caller)
            for (where, place, _), result in zip(chunk, results, strict=True):
                if isinstance(result, InputError):
                    raise InputFailed(place, result, field=where)
                embedded.append(result)
        return embedded

    async def _embedded_cells(self, inputs: Sequence[Input], grid: Grid, caller: Caller) -> list[Embedded | InputError]:
        """Each image followed by its cells, row by row; all of them an error where one is."""
        count = grid.rows * grid.columns + 1
        images = [await self._cells(given, grid) for given in await self._embedder.read(inputs, caller)]
        results = await self._embedder.embed([cell for image in images for cell in image], caller, admit_unknown=True)
        embedded: list[Embedded | InputError] = []
        for start in range(0, len(results), count):
            own = results[start : start + count]
            error = next((result for result in own if isinstance(result, InputError)), None)
            embedded += own if error is None else [error] * count
        return embedded

    async def _cells(self, image: Input, grid: Grid) -> list[Input]:
        """An image and its cells; where there is something wrong with it, that in the place of each."""
        if isinstance(image, Media) and image.modality == "image":
            cutting = partial(crops, image.data, grid.rows, grid.columns, self._image_limits)
            try:
                return [image, *(Media("image", cell) for cell in await self._embedder.in_worker(cutting))]
            except InputError as error:
                image = Unreadable(error.without_frames())
        elif not isinstance(image, Unreadable):
            image = Unreadable(InputError("only an image has a grid of cells"))
        return [image] * (grid.rows * grid.columns + 1)

    async def _stored_set(self, name: str) -> _Set:
        """A stored set, read from the store only where it has changed since it was last used. Raises NotFound."""
        version = await self._store.label_set_version(name)
        known = self._sets.get(name)
        if known is None or known.version != version:
            held = await self._store.label_set(name)
            known = self._sets[name] = self._opened(held)
        self._sets.move_to_end(name)
        while len(self._sets) > _REMEMBERED_SETS:
            self._sets.popitem(last=False)
        return known

    def _opened(self, held: LabelSet) -> _Set:
        labels = stored_labels(held.definition)
        detectors = held.definition.get("detectors", {})
        own, shifts = {}, {}
        for key, vectors in held.vectors.items():
            if modality := _shifted_modality(key):
                shifts[modality] = vectors
            else:
                own[key] = vectors
        if not self._embedder.manifest.accepts(held.space):  # another model's: only its words mean something here
            if shifts:
                raise InvalidRequest("label_set: its examples were embedded by a model of another space")
            own = {}
        return _Set(
            labels,
            held.definition["templates"],
            own,
            shifts,
            {modality: Detector.model_validate(each) for modality, each in detectors.items()},
            held.updated,
        )

    def _detector(self, chosen: _Set, modality: str) -> Detector:
        own = chosen.detectors.get(modality)
        held = next((each for name, each in self._embedder.manifest.abstention.items() if name == modality), None)
        if own is None and held is None:
            raise InvalidRequest(
                f"abstain: neither the labels nor this bundle have learned which {modality} inputs are off topic"
            )
        detector = own or held
        assert detector is not None
        return detector

    async def _vectors(self, chosen: _Set, modality: str, templates: Templates | None, caller: Caller) -> _Encoded:
        """Label vectors (L, D) for inputs of a modality, moved by examples of it."""
        own = templates_for(self._embedder.manifest, modality, templates or chosen.templates)
        plain = templates is None and bool(chosen.version)
        if plain and modality in chosen.ready:
            return chosen.ready[modality]
        digest = label_digest(chosen.labels, own)
        stored = chosen.stored.get(digest)
        if stored is None:
            encoded = await self._label_vectors(digest, chosen.labels, own, caller)
        else:
            encoded = _Encoded(stored)
        if modality in chosen.shifts:
            moved = await self._embedder.in_worker(partial(adapters.shifted, encoded.vectors, chosen.shifts[modality]))
            encoded = replace(encoded, vectors=moved)
        if plain:
            chosen.ready[modality] = encoded
        return encoded

    async def _label_vectors(
        self, digest: str, labels: Sequence[str | Label], templates: Sequence[str], caller: Caller
    ) -> _Encoded:
        """(L, D), from the cache or encoded now: once, and in the room of one, however many bring the same labels.

        Given up when the last of them goes away.
        """
        encoded = self._cache.get(digest)
        if encoded is None:
            charged = (digest, "" if caller.meter is None else caller.meter.key)
            encoding = self._encoding.get(charged)
            if encoding is None or encoding.given_up:
                encoding = self._encoding[charged] = Shared(self._encode(labels, templates, caller))
                encoding.task.add_done_callback(lambda _, own=encoding: self._encoded(charged, own))  # type: ignore[misc]
            encoded = await encoding.outcome()
            self._cache[digest] = encoded
        self._cache.move_to_end(digest)
        while len(self._cache) > 1 and sum(held.vectors.nbytes for held in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return encoded

    def _encoded(self, charged: tuple[str, str], encoding: Shared[_Encoded]) -> None:
        if self._encoding.get(charged) is encoding:
            del self._encoding[charged]

    async def _encode(self, labels: Sequence[str | Label], templates: Sequence[str], caller: Caller) -> _Encoded:
        prompts = _prompts(labels, templates)
        first = list(islice(prompts, _CHUNK))
        if len(first) < _CHUNK:
            return await self._sums(labels, first, prompts, caller)
        async with self._places:
            return await self._sums(labels, first, prompts, caller)

    async def _sums(
        self,
        labels: Sequence[str | Label],
        chunk: list[tuple[int, str]],
        prompts: Iterator[tuple[int, str]],
        caller: Caller,
    ) -> _Encoded:
        """(L, D) of unit length: of each label the sum of its prompts' vectors, `chunk` being the first of them."""
        sums = np.zeros((len(labels), self._embedder.manifest.dimensions))
        doubtful: set[int] = set()
        said: set[int] = set()
        while chunk:
            owners = [owner for owner, _ in chunk]
            results = await self._embedder.embed([Text(prompt) for _, prompt in chunk], caller, admit_unknown=True)
            for owner, result in zip(owners, results, strict=True):
                if isinstance(result, InputError):
                    raise InputFailed(owner, result, field="labels")
                if result.unknown:
                    doubtful.add(owner)
                if result.unknown < 1:
                    said.add(owner)
            # Sums point where means point.
            np.add.at(sums, owners, np.stack([result.vector for result in results if isinstance(result, Embedded)]))
            chunk = list(islice(prompts, _CHUNK))
        try:
            vectors = await self._embedder.in_worker(lambda: l2_normalise(sums))
        except ValueError:
            raise InvalidRequest("labels: the prompts of a label cancel each other out") from None
        # The words of a template are known whatever stands in it: there the name is asked for by itself.
        templated = sorted(place for place in doubtful if not _own_prompts(labels[place]))
        unknown = [place for place in doubtful - said if _own_prompts(labels[place])]
        for start in range(0, len(templated), _CHUNK):
            places = templated[start : start + _CHUNK]
            results = await self._embedder.embed([Text(_name(labels[place])) for place in places], caller)
            unknown += [place for place, result in zip(places, results, strict=True) if isinstance(result, InputError)]
        return _Encoded(vectors, sorted(unknown))


def _unknown_labels(labels: Sequence[str | Label], places: Sequence[int]) -> str:
    named = ", ".join(repr(_name(labels[place])[:64]) for place in places[:_NAMED])
    more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
    return f"labels: the model's tokenizer knows no word of {named}{more}, whose scores are those of any such label"


def _prompts(labels: Sequence[str | Label], templates: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Each label's place and its prompts, one by one: all of them together may be thousands of times the request."""
    for place, label in enumerate(labels):
        for prompt in _own_prompts(label) or (template.replace("{}", _name(label)) for template in templates):
            yield place, prompt


def templates_for(manifest: Manifest, modality: str, given: Templates | None = None) -> Sequence[str]:
    """The templates for inputs of a modality: those given, else the bundle's; a text is compared with the label's own
    words."""
    if isinstance(given, Mapping):
        given = next((held for name, held in given.items() if name == modality), None)
    if given is not None:
        return given
    return next((held for name, held in manifest.templates.items() if name == modality and name != "text"), PLAIN)


def label_digest(labels: Iterable[str | Label], templates: Sequence[str]) -> str:
    """Names label vectors: equal for equal labels, in the same order, under the same templates."""
    parts = [
        each if isinstance(each, str) else each.name if each.prompts is None else [each.name, each.prompts]
        for each in labels
    ]
    return hashlib.sha256(json.dumps([parts, list(templates)]).encode()).hexdigest()


def _name(label: str | Label) -> str:
    return label if isinstance(label, str) else label.name


def _own_prompts(label: str | Label) -> Sequence[str] | None:
    return None if isinstance(label, str) else label.prompts


def _defined(label: str | Label) -> str | dict[str, Any]:
    """A label as it is stored: its words, and how many examples it was taught by."""
    if isinstance(label, str):
        return label
    examples = len(label.examples)
    return (
        {"name": label.name}
        | ({"prompts": list(label.prompts)} if label.prompts else {})
        | ({"examples": examples} if examples else {})
    )


def stored_labels(definition: Mapping[str, Any]) -> list[str | Label]:
    """The words of a stored set's labels; what examples taught it is not among them."""
    return [
        each if isinstance(each, str) else Label(name=each["name"], prompts=each.get("prompts"))
        for each in definition["labels"]
    ]


_SHIFT = "shift:"


def _shift_key(modality: str) -> str:
    return _SHIFT + modality


def _shifted_modality(key: str) -> str | None:
    return key.removeprefix(_SHIFT) if key.startswith(_SHIFT) else None


def _learn(
    examples: Vectors,
    owners: NDArray[np.int64],
    label_vectors: Vectors,
    off_topic: Sequence[Vectors],
    temperature: float,
) -> tuple[Vectors, Detector | None]:
    """What the examples of one modality teach: shifts (L, D), and where there is enough to tell apart, a detector."""
    shift = adapters.shifts(examples, owners, len(label_vectors))
    if len(examples) < 2 or len(off_topic) < 2:
        return shift, None
    own = adapters.own_similarities(examples, owners, label_vectors)
    on = np.concatenate([abstention.scores(rows, temperature) for rows in own])
    moved = adapters.shifted(label_vectors, shift).astype(np.float64)
    unlike = np.stack(off_topic).astype(np.float64)
    pieces = (unlike[start : start + adapters.ROWS] @ moved.T for start in range(0, len(unlike), adapters.ROWS))
    off = np.concatenate([abstention.scores(rows, temperature) for rows in pieces])
    return shift, abstention.fit([row[None] for row in on], [row[None] for row in off])


def _classifications(
    inputs: Vectors,
    labels: Vectors,
    names: Sequence[str],
    temperature: float,
    top_k: int,
    threshold: float | None,
    detector: Detector | None,
    cut: float,
) -> list[Classification]:
    """Of inputs (N, D) over label vectors (L, D)."""
    # float64, so that a label's score does not depend on its place among the others.
    wide = inputs.astype(np.float64)
    similarities = np.concatenate(
        [wide @ labels[start : start + _ROWS].astype(np.float64).T for start in range(0, len(labels), _ROWS)], axis=1
    )
    logits = similarities / temperature
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    likely: Sequence[float | None] = [None] * len(inputs)
    if detector is not None:
        likely = detector.probability(abstention.scores(similarities, temperature)).tolist()
    results = []
    for own, similar, on_topic in zip(scores, similarities, likely, strict=True):
        order = _best(similar, top_k)
        best = [Score(names[place], float(own[place]), float(similar[place])) for place in order]
        unsure = threshold is not None and best[0].score < threshold
        results.append(Classification(best, unsure or (on_topic is not None and on_topic < cut), on_topic))
    return results


def _best(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Places of the `count` largest, largest first; equal ones in the order in which they stand."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _with_cells(found: Sequence[Classification], grid: Grid) -> list[Classification]:
    """Images followed by their cells → images that hold their cells."""
    each = grid.rows * grid.columns + 1
    results = []
    for start in range(0, len(found), each):
        whole, *cells = found[start : start + each]
        rows = [cells[row * grid.columns : (row + 1) * grid.columns] for row in range(grid.rows)]
        results.append(replace(whole, cells=rows))
    return results
