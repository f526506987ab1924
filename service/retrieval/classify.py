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
    parts_of,
    raise_first,
    unknown_warning,
)
from service.errors import InputFailed, InvalidRequest, input_problem
from service.retrieval import adapters
from service.retrieval.crops import crops
from service.retrieval.search import check_modalities
from service.retrieval.single_flight import Shared
from service.runtime.fair import FairSemaphore
from service.schemas.classify import Classified, ClassifyRequest, Grid, Label, ScoredLabel, TaughtLabel
from service.schemas.embed import InputProblem
from service.store import LabelSet, Store

Templates = Sequence[str] | Mapping[Modality, Sequence[str]]
"""Templates for inputs of every modality, or by modality."""
_CHUNK = 256
"""Inputs that the embedder gets at a time, so that 10,000 labels neither fill its queue nor wait in it all at once."""
_ENCODED_AT_ONCE = 2
"""Number of large sets of labels (more than one chunk) encoded at once: each takes memory for its vectors."""
_CACHE_BYTES = 64 * 2**20
_REMEMBERED_SETS = 8
_ROWS = 1_024
"""Label vectors that are converted to float64 at a time."""

_NAMED = 5
"""Largest number of labels that a warning names."""

PLAIN = ("{}",)


@dataclass(frozen=True)
class _Encoded:
    vectors: Vectors
    """Vectors (L, D) of the labels."""
    unknown: Sequence[int] = ()
    """Places of the labels of which the tokenizer knows no word: they all have the same vector."""


@dataclass(frozen=True)
class _Set:
    """The labels of a request, and what is known about them."""

    labels: Sequence[str | Label]
    templates: Templates | None
    stored: Mapping[str, Vectors] = field(default_factory=dict)
    """Label vectors (L, D) by digest."""
    shifts: Mapping[str, Vectors] = field(default_factory=dict)
    """Shifts (L, D) by modality of the examples."""
    detectors: Mapping[str, Detector] = field(default_factory=dict)
    version: str = ""
    ready: dict[str, _Encoded] = field(default_factory=dict)
    """Label vectors of a stored set for requests without templates, by modality."""


class Classifier:
    """Remembers the label vectors of the sets used last."""

    def __init__(self, embedder: Embedder, store: Store, image_limits: ImageLimits = ImageLimits()) -> None:
        self._embedder = embedder
        self._store = store
        self._image_limits = image_limits
        self._cache: OrderedDict[str, _Encoded] = OrderedDict()
        self._encoding: dict[tuple[str, str], Shared[_Encoded]] = {}
        """Encodings under way, by digest and by the key that is charged."""
        self._places = FairSemaphore(_ENCODED_AT_ONCE, per_caller=1)
        self._sets: OrderedDict[str, _Set] = OrderedDict()

    async def classify(
        self,
        request: ClassifyRequest,
        caller: Caller = PROCESS,
        warn: Callable[[str], None] = lambda _: None,
    ) -> list[Classified]:
        """Return one classification per input. `warn` receives a message for inputs and labels that the model hardly
        knows.

        Raises NotFound (the label set), InvalidRequest (nothing learned to abstain), and InputFailed for a label's
        prompt, and for the first input that something is wrong with unless the request asks for errors in their places.
        """
        grid, abstain = request.grid, request.abstain
        if request.label_set is not None:
            labels = await self._stored_set(request.label_set)
        else:
            labels = _Set(request.labels or (), None)
        if grid is None:
            embedded = await self._embedder.embed(request.inputs, caller, admit_unknown=True)
        else:
            embedded = await self._embedded_cells(request.inputs, grid, caller)
        if request.on_error == "fail":
            raise_first(embedded if grid is None else embedded[:: grid.rows * grid.columns + 1])
        for index, result_of_input in enumerate(embedded):
            for warning in unknown_warning(f"inputs[{index}]", result_of_input):
                warn(warning)
        unknown: set[int] = set()
        classified = {
            place: Classified(labels=[], abstained=False, error=InputProblem(**input_problem(result)))
            for place, result in enumerate(embedded)
            if isinstance(result, InputError)
        }
        good = {place: result for place, result in enumerate(embedded) if isinstance(result, Embedded)}
        for modality in dict.fromkeys(result.modality for result in good.values()):
            places = [place for place, result in good.items() if result.modality == modality]
            detector = self._detector(labels, modality) if abstain else None
            encoded = await self._vectors(labels, modality, request.templates, caller)
            unknown.update(encoded.unknown)
            vectors = np.stack([good[place].vector for place in places])
            classifying = partial(
                _classifications,
                vectors,
                encoded.vectors,
                [_name(label) for label in labels.labels],
                self._embedder.manifest.temperature,
                self._embedder.manifest.bias_of(modality),
                request.top_k,
                request.threshold,
                detector,
                0.5 if abstain is True else float(abstain),
            )
            classified |= zip(places, await self._embedder.in_worker(classifying), strict=True)
        if unknown:
            warn(_unknown_labels(labels.labels, sorted(unknown)))
        in_order = [classified[place] for place in range(len(embedded))]
        return in_order if grid is None else _with_cells(in_order, grid)

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
            chosen_templates = templates_for(manifest, modality, templates)
            digest = label_digest(labels, chosen_templates)
            encoded = await self._label_vectors(digest, labels, chosen_templates, caller)
            if encoded.unknown:
                raise InputFailed(encoded.unknown[0], InputError(UNKNOWN_TEXT), field="labels")
            by_modality[modality] = vectors[digest] = encoded.vectors
        examples = [
            (f"labels[{owner}].examples", place, example)
            for owner, label in enumerate(labels)
            if isinstance(label, TaughtLabel)
            for place, example in enumerate(label.examples)
        ]
        counts = [len(label.examples) if isinstance(label, TaughtLabel) else 0 for label in labels]
        owners = np.repeat(np.arange(len(labels)), counts)
        taught = await self._embed_all(examples, caller)
        unlike = await self._embed_all(
            [("off_topic", place, content) for place, content in enumerate(off_topic)], caller
        )
        detectors: dict[str, Any] = {}
        for modality in dict.fromkeys(example.modality for example in taught):
            of_modality = np.array([example.modality == modality for example in taught])
            taught_vectors = np.stack([example.vector for example in taught if example.modality == modality])
            off = [example.vector for example in unlike if example.modality == modality]
            learning = partial(
                _learn, taught_vectors, owners[of_modality], by_modality[modality], off, manifest.temperature
            )
            shift, detector = await self._embedder.in_worker(learning)
            vectors[_SHIFT + modality] = shift
            if detector is not None:
                detectors[modality] = detector.model_dump()
        definition = {
            "labels": [_defined(label) for label in labels],
            "templates": templates,
            "detectors": detectors,
        }
        await self._store.put_label_set(name, definition, vectors)

    async def _embed_all(self, inputs: Sequence[tuple[str, int, Input]], caller: Caller) -> list[Embedded]:
        """Embed any number of inputs. Raises InputFailed with the list and place that are given with the bad one."""
        embedded: list[Embedded] = []
        for chunk in _chunks(inputs):
            results = await self._embedder.embed([input for *_, input in chunk], caller)
            for (where, place, _), result in zip(chunk, results, strict=True):
                if isinstance(result, InputError):
                    raise InputFailed(place, result, field=where)
                embedded.append(result)
        return embedded

    async def _embedded_cells(self, inputs: Sequence[Input], grid: Grid, caller: Caller) -> list[Embedded | InputError]:
        """Embed each image followed by its cells, row by row; all of them are the error where one fails."""
        count = grid.rows * grid.columns + 1
        images = [await self._cells(input, grid) for input in await self._embedder.read(inputs, caller)]
        results = await self._embedder.embed([cell for image in images for cell in image], caller, admit_unknown=True)
        embedded: list[Embedded | InputError] = []
        for start in range(0, len(results), count):
            cell_results = results[start : start + count]
            error = next((result for result in cell_results if isinstance(result, InputError)), None)
            embedded += cell_results if error is None else [error] * count
        return embedded

    async def _cells(self, image: Input, grid: Grid) -> list[Input]:
        """Return an image and its cells; where there is something wrong with it, that in the place of each."""
        if isinstance(image, Media) and image.kind == "image":
            cutting = partial(crops, image.data, grid.rows, grid.columns, self._image_limits)
            try:
                return [image, *(replace(image, data=cell) for cell in await self._embedder.in_worker(cutting))]
            except InputError as error:
                image = Unreadable(error.without_frames())
        elif not isinstance(image, Unreadable):
            image = Unreadable(InputError("only an image has a grid of cells"))
        return [image] * (grid.rows * grid.columns + 1)

    async def _stored_set(self, name: str) -> _Set:
        """Return a stored set, read from the store only where it has changed. Raises NotFound."""
        version = await self._store.label_set_version(name)
        remembered = self._sets.get(name)
        if remembered is None or remembered.version != version:
            label_set = await self._store.label_set(name)
            remembered = self._sets[name] = self._opened(label_set)
        self._sets.move_to_end(name)
        while len(self._sets) > _REMEMBERED_SETS:
            self._sets.popitem(last=False)
        return remembered

    def _opened(self, label_set: LabelSet) -> _Set:
        labels = stored_labels(label_set.definition)
        detectors = label_set.definition.get("detectors", {})
        vectors = dict(label_set.vectors)
        shifts = {key.removeprefix(_SHIFT): vectors.pop(key) for key in label_set.vectors if key.startswith(_SHIFT)}
        if not self._embedder.manifest.accepts(label_set.space):  # another model's: only its words mean something here
            if shifts:
                raise InvalidRequest("label_set: its examples were embedded by a model of another space")
            vectors = {}
        return _Set(
            labels,
            label_set.definition["templates"],
            vectors,
            shifts,
            {modality: Detector.model_validate(detector) for modality, detector in detectors.items()},
            label_set.updated,
        )

    def _detector(self, labels: _Set, modality: str) -> Detector:
        fitted: dict[Any, Detector] = {**self._embedder.manifest.abstention, **labels.detectors}
        if modality not in fitted:
            raise InvalidRequest(
                f"abstain: neither the labels nor this bundle have learned which {modality} inputs are off topic"
            )
        return fitted[modality]

    async def _vectors(self, labels: _Set, modality: str, templates: Templates | None, caller: Caller) -> _Encoded:
        """Return the label vectors (L, D) for inputs of a modality, moved by its examples."""
        chosen_templates = templates_for(self._embedder.manifest, modality, templates or labels.templates)
        plain = templates is None and bool(labels.version)
        if plain and modality in labels.ready:
            return labels.ready[modality]
        digest = label_digest(labels.labels, chosen_templates)
        vectors = labels.stored.get(digest)
        if vectors is None:
            encoded = await self._label_vectors(digest, labels.labels, chosen_templates, caller)
        else:
            encoded = _Encoded(vectors)
        if modality in labels.shifts:
            moved = await self._embedder.in_worker(partial(adapters.shifted, encoded.vectors, labels.shifts[modality]))
            encoded = replace(encoded, vectors=moved)
        if plain:
            labels.ready[modality] = encoded
        return encoded

    async def _label_vectors(
        self, digest: str, labels: Sequence[str | Label], templates: Sequence[str], caller: Caller
    ) -> _Encoded:
        """Return label vectors (L, D) from the cache, or encode them: once for all requests with the same labels.

        Given up when the last of them goes away.
        """
        encoded = self._cache.get(digest)
        if encoded is None:
            charged = (digest, "" if caller.meter is None else caller.meter.key)
            encoding = self._encoding.get(charged)
            if encoding is None or encoding.given_up:
                encoding = self._encoding[charged] = Shared(self._encode(labels, templates, caller))
                encoding.task.add_done_callback(lambda _, this=encoding: self._encoded(charged, this))  # type: ignore[misc]
            encoded = await encoding.outcome()
            self._cache[digest] = encoded
        self._cache.move_to_end(digest)
        while len(self._cache) > 1 and sum(cached.vectors.nbytes for cached in self._cache.values()) > _CACHE_BYTES:
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
        """Return each label's sum of its prompts' vectors (L, D), at unit length; `chunk` holds the first prompts."""
        sums = np.zeros((len(labels), self._embedder.manifest.dimensions))
        doubtful: set[int] = set()
        known_owners: set[int] = set()
        while chunk:
            owners = [owner for owner, _ in chunk]
            results = await self._embedder.embed([Text(prompt) for _, prompt in chunk], caller, admit_unknown=True)
            for owner, result in zip(owners, results, strict=True):
                if isinstance(result, InputError):
                    raise InputFailed(owner, result, field="labels")
                if result.unknown:
                    doubtful.add(owner)
                if result.unknown < 1:
                    known_owners.add(owner)
            # Sums point where means point.
            np.add.at(sums, owners, np.stack([result.vector for result in results if isinstance(result, Embedded)]))
            chunk = list(islice(prompts, _CHUNK))
        try:
            vectors = await self._embedder.in_worker(lambda: l2_normalise(sums))
        except ValueError:
            raise InvalidRequest("labels: the prompts of a label cancel each other out") from None
        # The words of a template are always known, so the name is checked by itself.
        templated = sorted(place for place in doubtful if not _own_prompts(labels[place]))
        unknown = [place for place in doubtful - known_owners if _own_prompts(labels[place])]
        for start in range(0, len(templated), _CHUNK):
            places = templated[start : start + _CHUNK]
            results = await self._embedder.embed([Text(_name(labels[place])) for place in places], caller)
            unknown += [place for place, result in zip(places, results, strict=True) if isinstance(result, InputError)]
        return _Encoded(vectors, sorted(unknown))


def _unknown_labels(labels: Sequence[str | Label], places: Sequence[int]) -> str:
    names = ", ".join(repr(_name(labels[place])[:64]) for place in places[:_NAMED])
    more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
    return f"labels: the model's tokenizer knows no word of {names}{more}, whose scores are those of any such label"


def _prompts(labels: Sequence[str | Label], templates: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield each label's place and its prompts one by one: together they may be very many."""
    for place, label in enumerate(labels):
        for prompt in _own_prompts(label) or (template.replace("{}", _name(label)) for template in templates):
            yield place, prompt


def templates_for(manifest: Manifest, modality: str, given: Templates | None = None) -> Sequence[str]:
    """Return the templates for inputs of a modality: those given, else the bundle's, of which a text has none."""
    if given is not None and not isinstance(given, Mapping):
        return given
    check_modalities(manifest, given, "templates")
    own: dict[Any, Sequence[str]] = {**manifest.templates, "text": PLAIN, **(given or {})}
    return own.get(modality, PLAIN)


def label_digest(labels: Iterable[str | Label], templates: Sequence[str]) -> str:
    """Return a digest of label vectors: equal for equal labels, in the same order, under the same templates."""
    parts = [
        label if isinstance(label, str) else label.name if label.prompts is None else [label.name, label.prompts]
        for label in labels
    ]
    return hashlib.sha256(json.dumps([parts, list(templates)]).encode()).hexdigest()


def _chunks(inputs: Sequence[tuple[str, int, Input]]) -> Iterator[list[tuple[str, int, Input]]]:
    """Yield the inputs in order, as many at a time as have _CHUNK parts, or one."""
    chunk: list[tuple[str, int, Input]] = []
    count = 0
    for item in inputs:
        parts = len(parts_of(item[-1]))
        if chunk and count + parts > _CHUNK:
            yield chunk
            chunk, count = [], 0
        chunk.append(item)
        count += parts
    if chunk:
        yield chunk


def _name(label: str | Label) -> str:
    return label if isinstance(label, str) else label.name


def _own_prompts(label: str | Label) -> Sequence[str] | None:
    return None if isinstance(label, str) else label.prompts


def _defined(label: str | Label) -> str | dict[str, Any]:
    """Return a label as it is stored: its words, and how many examples it was taught by."""
    if isinstance(label, str):
        return label
    examples = len(label.examples) if isinstance(label, TaughtLabel) else 0
    return (
        {"name": label.name}
        | ({"prompts": list(label.prompts)} if label.prompts else {})
        | ({"examples": examples} if examples else {})
    )


def stored_labels(definition: Mapping[str, Any]) -> list[str | Label]:
    """Return the words of a stored set's labels; what examples taught it is not among them."""
    return [
        label if isinstance(label, str) else Label(name=label["name"], prompts=label.get("prompts"))
        for label in definition["labels"]
    ]


_SHIFT = "shift:"
"""Goes before the modality in the key of a stored set's shifts."""


def _learn(
    examples: Vectors,
    owners: NDArray[np.int64],
    label_vectors: Vectors,
    off_topic: Sequence[Vectors],
    temperature: float,
) -> tuple[Vectors, Detector | None]:
    """Return what the examples of one modality teach: shifts (L, D), and a detector where there are enough examples."""
    shift = adapters.shifts(examples, owners, len(label_vectors))
    if len(examples) < 2 or len(off_topic) < 2:
        return shift, None
    similarities = adapters.own_similarities(examples, owners, label_vectors)
    on = np.concatenate([abstention.scores(rows, temperature) for rows in similarities])
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
    bias: float | None,
    top_k: int,
    threshold: float | None,
    detector: Detector | None,
    least_on_topic: float,
) -> list[Classified]:
    """Classify inputs (N, D) over label vectors (L, D)."""
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
    for label_scores, similar, row, on_topic in zip(scores, similarities, logits, likely, strict=True):
        order = _best(similar, top_k)
        alone = [None] * len(order) if bias is None else _sigmoid(row[order] + bias).tolist()
        best = [
            ScoredLabel(
                label=names[place],
                score=float(label_scores[place]),
                similarity=float(similar[place]),
                probability=probability,
            )
            for place, probability in zip(order, alone, strict=True)
        ]
        is_weak = threshold is not None and best[0].score < threshold
        abstained = is_weak or (on_topic is not None and on_topic < least_on_topic)
        results.append(Classified(labels=best, abstained=abstained, on_topic=on_topic))
    return results


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(logits / 2)))


def _best(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Return the places of the `count` largest values, largest first; equal values keep their order."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _with_cells(classified: Sequence[Classified], grid: Grid) -> list[Classified]:
    """Attach the results of cells to the images before them."""
    size = grid.rows * grid.columns + 1
    results = []
    for start in range(0, len(classified), size):
        image, *cells = classified[start : start + size]
        rows = [cells[row * grid.columns : (row + 1) * grid.columns] for row in range(grid.rows)]
        results.append(image if image.error else image.model_copy(update={"cells": rows}))
    return results
