"""Zero-shot classification: labels → prompts → label vectors → calibrated scores of an input.

Prompt ensembling as in CLIP (Radford et al., 2021, section 3.1.4): a label's vector is the mean of the unit vectors of
its prompts, scaled to length 1. Scores are the softmax of the similarities at the temperature that training learned.
"""

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.contract.bundle import Manifest
from service.contract.errors import InputError
from service.contract.vectors import Vectors, l2_normalise
from service.errors import InputFailed, InvalidRequest
from service.inputs import all_embedded, embed_inputs
from service.pipeline import Embedded, Embedder, Text
from service.schemas.classify import Label
from service.schemas.inputs import AnyInput
from service.store import LabelSet, Store

_CHUNK = 256
"""Prompts handed to the embedder at a time, so that 10,000 labels neither fill its queue nor wait in it all at once."""
_CACHE_BYTES = 64 * 2**20

PLAIN = ("{}",)


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


class Classifier:
    """Remembers the label vectors of the sets used last."""

    def __init__(self, embedder: Embedder, store: Store) -> None:
        self._embedder = embedder
        self._store = store
        self._cache: OrderedDict[str, Vectors] = OrderedDict()

    async def classify(
        self,
        inputs: Sequence[AnyInput],
        *,
        labels: Sequence[str | Label] | None = None,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
        threshold: float | None = None,
    ) -> list[Classification]:
        """One classification per input, over distinct labels or those of a stored set.

        Raises NotFound (the label set), InputFailed (an input, or a label's prompt).
        """
        stored: LabelSet | None = None
        if label_set is not None:
            stored = await self._store.label_set(label_set)
            labels, own = stored.definition["labels"], stored.definition["templates"]
            labels = [each if isinstance(each, str) else Label.model_validate(each) for each in labels]
            templates = templates or own
        assert labels is not None
        embedded = all_embedded(await embed_inputs(self._embedder, inputs))
        vectors = {}
        for modality in dict.fromkeys(each.modality for each in embedded):
            chosen = templates or default_templates(self._embedder.manifest, modality)
            digest = label_digest(labels, chosen)
            fits = stored is not None and self._embedder.manifest.accepts(stored.space)  # another model's need not
            saved = stored.vectors.get(digest) if stored is not None and fits else None
            vectors[modality] = saved if saved is not None else await self._label_vectors(digest, labels, chosen)
        names = [each if isinstance(each, str) else each.name for each in labels]
        temperature = self._embedder.manifest.temperature
        return await asyncio.to_thread(
            lambda: [
                _classification(each, vectors[each.modality], names, temperature, top_k, threshold) for each in embedded
            ]
        )

    async def save_label_set(self, name: str, labels: Sequence[str | Label], templates: Sequence[str] | None) -> None:
        """Encode a label set for every modality there is, and store it. Raises InputFailed."""
        manifest = self._embedder.manifest
        vectors = {}
        for modality in manifest.towers:
            chosen = templates or default_templates(manifest, modality)
            digest = label_digest(labels, chosen)
            vectors[digest] = await self._label_vectors(digest, labels, chosen)
        definition = {
            "labels": [each if isinstance(each, str) else each.model_dump() for each in labels],
            "templates": list(templates) if templates else None,
        }
        await self._store.put_label_set(name, definition, vectors)

    async def _label_vectors(self, digest: str, labels: Sequence[str | Label], templates: Sequence[str]) -> Vectors:
        """(L, D), from the cache or encoded now."""
        vectors = self._cache.get(digest)
        if vectors is None:
            vectors = await self._encode(labels, templates)
            self._cache[digest] = vectors
        self._cache.move_to_end(digest)
        while len(self._cache) > 1 and sum(held.nbytes for held in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return vectors

    async def _encode(self, labels: Sequence[str | Label], templates: Sequence[str]) -> Vectors:
        prompts, owners = [], []
        for position, label in enumerate(labels):
            own = [template.replace("{}", label) for template in templates] if isinstance(label, str) else label.prompts
            prompts += own
            owners += [position] * len(own)
        sums = np.zeros((len(labels), self._embedder.manifest.dimensions))
        for start in range(0, len(prompts), _CHUNK):
            chunk = owners[start : start + _CHUNK]
            results = await self._embedder.embed([Text(prompt) for prompt in prompts[start : start + _CHUNK]])
            for owner, result in zip(chunk, results, strict=True):
                if isinstance(result, InputError):
                    raise InputFailed(owner, result, field="labels")
            # Sums point where means point.
            np.add.at(sums, chunk, np.stack([result.vector for result in results if isinstance(result, Embedded)]))
        try:
            return await asyncio.to_thread(l2_normalise, sums)
        except ValueError:
            raise InvalidRequest("labels: the prompts of a label cancel each other out") from None


def default_templates(manifest: Manifest, modality: str) -> Sequence[str]:
    """The bundle's templates for labels of this modality; a text is compared with the label's own words."""
    return next((held for name, held in manifest.templates.items() if name == modality and name != "text"), PLAIN)


def label_digest(labels: Sequence[str | Label], templates: Sequence[str]) -> str:
    """Names label vectors: equal for equal labels, in the same order, under the same templates."""
    parts = [each if isinstance(each, str) else [each.name, each.prompts] for each in labels]
    return hashlib.sha256(json.dumps([parts, list(templates)]).encode()).hexdigest()


def _classification(
    embedded: Embedded, vectors: Vectors, names: Sequence[str], temperature: float, top_k: int, threshold: float | None
) -> Classification:
    # float64, so that a label's score does not depend on its place among the others.
    similarities = vectors.astype(np.float64) @ embedded.vector.astype(np.float64)
    logits = similarities / temperature
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    order = np.argsort(-similarities, kind="stable")[:top_k]
    best = [Score(names[place], float(scores[place]), float(similarities[place])) for place in order]
    return Classification(best, abstained=threshold is not None and best[0].score < threshold)
