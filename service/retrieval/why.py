"""An answer shows why a result was found: by the part of a picture, the seconds of a sound, the words of a query.

Any bundle will do, for nothing but vectors is needed. A picture and a short sound are cut into windows that overlap,
and each is embedded by itself and compared with the query; a cell or a second has the mean of the windows that hold it.
A film and a long sound have stored moments. A word counts for what the similarity loses when the query is embedded
without it (leave-one-out; Li et al., 2016, arXiv 1612.08220).
"""

import io
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from service.contract.audio import decode_audio
from service.contract.errors import InputError
from service.contract.sounds import AudioPreprocessing
from service.contract.vectors import Vectors
from service.engine.caller import Caller
from service.engine.embedder import Embedder
from service.engine.inputs import Media, Text, header_seconds, weighted_sum
from service.errors import NotFound
from service.retrieval.crops import windows
from service.runtime.workers import WorkerDied
from service.schemas.search import Content
from service.store import Item, Store
from service.store.moments import HAVING

_SIDE = 6
"""Rows and columns of a picture's heat map."""
_SPAN = 2
"""Side of a window, in cells; one begins at every cell. Chosen on Caltech101's training photographs (docs/LOG.md)."""
_BOXES = [(row, column, _SPAN) for row in range(_SIDE - _SPAN + 1) for column in range(_SIDE - _SPAN + 1)]
_WINDOW_S, _HOP_S = 3.0, 1.0
"""Length of a sound's windows and the most time between two beginnings. Chosen on ESC-50's fold 4 (docs/LOG.md)."""
_LONGEST_S = 20.0
"""Length of a sound whose windows are embedded, in seconds: a longer one has stored moments, and its preview is but a
beginning."""
_MOST_MOMENTS = 200
_MOST_WORDS = 24
"""Number of pieces of a query's texts that are left out, one by one: of a longer text a piece is several words."""
# A letter of a script that is written without spaces is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True)
class Words:
    """Pieces of a query's texts, and the query's unit vectors (N, D) without each of them."""

    pieces: Sequence[str]
    without: Vectors

    def why(self, similarity: float, vector: Vectors) -> list[dict[str, Any]]:
        """Return what each piece gives to the similarity to an item's vector (D,)."""
        losses = similarity - (self.without @ vector).astype(np.float64)
        return [{"text": text, "contribution": loss} for text, loss in zip(self.pieces, losses.tolist(), strict=True)]


class Explainer:
    def __init__(self, embedder: Embedder, store: Store) -> None:
        self._embedder = embedder
        self._store = store

    async def words(self, parts: Sequence[tuple[Content, float]], vectors: Vectors, caller: Caller) -> Words | None:
        """Embed a query, whose parts have these unit vectors (P, D), without each of its words, in one batch. Returns
        None where it has no words, or where one of the shortened texts cannot be embedded."""
        spans = [
            (place, content, match)
            for place, (content, _) in enumerate(parts)
            if isinstance(content, Text)
            for match in _WORD.finditer(content.text)
        ]
        together = -(-len(spans) // _MOST_WORDS)
        pieces: list[str] = []
        shortened: list[tuple[int, Text]] = []
        for place, of_part in groupby(spans, key=itemgetter(0)):
            group = list(of_part)
            for first in range(0, len(group), together):
                content, start = group[first][1], group[first][2].start()
                end = group[first : first + together][-1][2].end()
                pieces.append(content.text[start:end])
                shortened.append((place, replace(content, text=content.text[:start] + content.text[end:])))
        weights = [weight for _, weight in parts]
        texts = [text for _, text in shortened if text.text.strip()]
        results = iter(await self._embedder.embed(texts, caller, admit_unknown=True) if texts else ())
        without = []
        for place, text in shortened:
            part_vectors = list(vectors)
            part_vectors[place] = np.zeros_like(vectors[place])  # where its only word is gone, so is the part
            if text.text.strip():
                result = next(results)
                if isinstance(result, InputError):
                    return None
                part_vectors[place] = result.vector
            try:
                without.append(weighted_sum(part_vectors, weights))
            except InputError:  # nothing is left
                without.append(np.zeros_like(vectors[place]))
        return Words(pieces, np.stack(without)) if pieces else None

    async def why(
        self,
        item: Item,
        query: Vectors,
        nearer: Vectors,
        words: Words | None,
        original: Callable[[Item], Awaitable[bytes | None]] | None,
        caller: Caller,
    ) -> Mapping[str, Any] | None:
        """Return the fields of schemas.search.Why of an item for a query (D,); None where nothing is at hand.

        `nearer` is the item's vector, or that of its best moment. What cannot be read is left out.
        """
        fields: dict[str, Any] = {}
        if (
            item.modality in ("image", "audio")
            and item.modality in self._embedder.channels
            and (file := await self._file(item, original)) is not None
        ):
            try:
                if item.modality == "image":
                    fields["cells"] = await self._cells(file, query, caller)
                else:
                    fields["parts"] = await self._seconds(file, query, caller)
            except (InputError, WorkerDied):  # of this item alone
                fields.clear()
        if item.modality in HAVING and not fields.get("parts"):
            fields["parts"] = await self._moments(item, query)
        if words is not None:
            fields["words"] = words.why(float(query @ nearer), nearer)
        return {name: value for name, value in fields.items() if value is not None} or None

    async def _file(self, item: Item, original: Callable[[Item], Awaitable[bytes | None]] | None) -> bytes | None:
        """Return the preview of an item, or else its original."""
        try:
            preview = await self._store.preview(item.collection, item.id)
        except NotFound:
            return None if original is None else await original(item)
        # The preview of a long sound is only its beginning; its moments say more.
        return preview.data if preview.about.get("whole_seconds", 0.0) <= _LONGEST_S else None

    async def _cells(self, file: bytes, query: Vectors, caller: Caller) -> list[list[float]]:
        """Return how much more similar each cell of a picture is than the whole, row by row: the mean over the windows
        that hold it. Raises InputError."""
        limits = self._embedder.limits.of_images
        crops = await self._embedder.in_worker(partial(windows, file, _SIDE, _BOXES, limits))
        vectors = await self._vectors([Media("image", part) for part in (file, *crops)], caller)
        whole_similarity, *of_windows = (vectors @ query).tolist()
        total, count = np.zeros((2, _SIDE, _SIDE))
        for (row, column, span), similarity in zip(_BOXES, of_windows, strict=True):
            total[row : row + span, column : column + span] += similarity - whole_similarity
            count[row : row + span, column : column + span] += 1
        cells: list[list[float]] = (total / count).tolist()
        return cells

    async def _seconds(self, file: bytes, query: Vectors, caller: Caller) -> list[dict[str, Any]] | None:
        """Return the seconds of a short sound, each with the mean similarity of the windows that hold it; None for a
        long one. Raises InputError."""
        limits, spec = self._embedder.limits, self._embedder.manifest.towers["audio"].preprocessing
        assert isinstance(spec, AudioPreprocessing)
        rate = spec.sampling_rate

        def cut() -> tuple[float, list[float], list[Media]]:
            if not 0 < header_seconds(file, limits) <= _LONGEST_S:
                return 0.0, [], []
            samples = decode_audio(file, rate, limits.of_sounds)
            last_s = max(0.0, len(samples) / rate - _WINDOW_S)
            starts: list[float] = np.linspace(0, last_s, 1 + math.ceil(last_s / _HOP_S)).tolist()
            return (
                len(samples) / rate,
                starts,
                [_window(samples[int(start * rate) : int((start + _WINDOW_S) * rate)], rate) for start in starts],
            )

        seconds, starts, sounds = await self._embedder.in_worker(cut)
        if not sounds:
            return None
        similarities = (await self._vectors(sounds, caller)) @ query
        bounds = np.linspace(0, seconds, 1 + (round(seconds) if len(starts) > 1 else 1))
        middles = (bounds[:-1] + bounds[1:]) / 2
        holding = (starts <= middles[:, None]) & (middles[:, None] < np.array(starts) + _WINDOW_S)
        means = (holding @ similarities / holding.sum(axis=1)).tolist()
        return [
            {"start": round(start, 3), "end": round(end, 3), "modality": "audio", "similarity": similarity}
            for (start, end), similarity in zip(pairwise(bounds.tolist()), means, strict=True)
        ]

    async def _vectors(self, inputs: Sequence[Media], caller: Caller) -> Vectors:
        """Return the unit vectors (N, D) of parts. Raises the InputError of the first that has one."""
        vectors = []
        for result in await self._embedder.embed(inputs, caller):
            if isinstance(result, InputError):
                raise result
            vectors.append(result.vector)
        return np.stack(vectors)

    async def _moments(self, item: Item, query: Vectors) -> list[dict[str, Any]] | None:
        """Return the best moments of an item, in the order of time."""
        moments = (await self._store.moments_of(item.collection, [item.id])).get(item.id, [])
        scored = [(moment, float(query @ moment.vector)) for moment in moments if moment.vector is not None]
        best = sorted(scored, key=lambda pair: -pair[1])[:_MOST_MOMENTS]
        return [
            {"start": moment.start, "end": moment.end, "modality": moment.modality, "similarity": similarity}
            for moment, similarity in sorted(best, key=lambda pair: (pair[0].start, pair[0].modality))
        ] or None


def _window(samples: NDArray[np.float32], rate: int) -> Media:
    """Return a window of a sound as a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return Media("audio", file.getvalue())
