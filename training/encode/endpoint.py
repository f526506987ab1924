"""Vectors of texts from an embedding API, from a file, or from both: the file first."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
from numpy.typing import NDArray

from isthmus_client.retries import Retries, retry_after
from service.contract.endpoint import PROBE, Shape, of_one_model, request_of, shape_of, vectors_of
from training.errors import TrainingError

KEY = "ISTHMUS_ENDPOINT_KEY"
_RETRIED = frozenset({408, 425, 429, *range(500, 600)})
_TOGETHER = 32
"""Texts of a call: what text-embeddings-inference takes by default."""
_REFUSED_TEXTS = frozenset({400, 413, 422})
_PATIENT = Retries(attempts=8, first_s=0.5)


class EndpointError(TrainingError):
    """An embedding API gives no vectors: the message says why. What it gave before is kept in the cache."""


@dataclass(frozen=True)
class Endpoint:
    """Texts → vectors (N, d), of a model that is somewhere else."""

    url: str | None
    model: str
    shape: Shape
    known: dict[str, NDArray[np.float32]]
    """Vectors of the file, by text."""
    probe: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    retries: Retries = field(default_factory=lambda: _PATIENT)
    timeout_s: float = 60.0

    @classmethod
    def open(cls, url: str | None, model: str, vectors: Path | None) -> "Endpoint":
        """Read the file, and ask the API for the vector of a text, which says how long they are. Raises
        EndpointError."""
        try:
            shape = "openai" if url is None else shape_of(url)
        except ValueError as error:
            raise EndpointError(str(error)) from None
        known = {} if vectors is None else _read(vectors)
        if url is None:
            probe = next(iter(known.values()))
        else:
            print(f"texts leave this machine: {httpx2.URL(url).host} embeds them with {model}", file=sys.stderr)
            # One text of the file says whether the file and the API are of one model.
            probe, *asked = cls(url, model, shape, {})([PROBE, *list(known)[:1]])
            for vector, stored in zip(asked, known.values(), strict=False):
                if not of_one_model(vector, stored):
                    raise EndpointError(f"{vectors} does not hold the vectors that {url} gives for {model}")
        return cls(url, model, shape, known, probe)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of texts. Raises EndpointError."""
        absent = [text for text in dict.fromkeys(texts) if text not in self.known]
        if absent and self.url is None:
            raise EndpointError(f"the file of vectors has none of {absent[0]!r}, and there is no endpoint to ask")
        asked = dict(self.known)
        for start in range(0, len(absent), _TOGETHER):
            some = absent[start : start + _TOGETHER]
            asked |= dict(zip(some, self._ask(some), strict=True))
        vectors = [asked[text] for text in texts]
        width = len(self.probe) or len(vectors[0])
        if any(len(vector) != width for vector in vectors):
            raise EndpointError(f"{self.url} gives {self.model} vectors of other lengths than {width}")
        return np.stack(vectors)

    def _ask(self, texts: Sequence[str]) -> NDArray[np.float32]:
        assert self.url is not None
        headers = {"content-type": "application/json"}
        if key := os.environ.get(KEY):
            headers["authorization"] = f"Bearer {key}"
        failed = 0
        while True:
            pause = None
            try:
                content = request_of(self.shape, self.model, texts)
                answer = httpx2.post(self.url, content=content, headers=headers, timeout=self.timeout_s)
                if answer.status_code == 200:
                    return vectors_of(self.shape, answer.content, len(texts))
                if answer.status_code in _REFUSED_TEXTS and len(texts) > 1:  # too many together, for this API
                    half = len(texts) // 2
                    return np.concatenate([self._ask(texts[:half]), self._ask(texts[half:])])
                why = f"answers {answer.status_code}"
                if answer.status_code in _RETRIED:
                    pause = self.retries.pause(failed + 1, retry_after(answer))
            except httpx2.HTTPError as error:
                why, pause = f"does not answer ({type(error).__name__})", self.retries.pause(failed + 1, None)
            except ValueError as error:
                why = str(error)
            failed += 1
            if pause is None:
                raise EndpointError(f"{self.url} {why}; the same command goes on from what it gave")
            time.sleep(pause)


def _read(path: Path) -> dict[str, NDArray[np.float32]]:
    known = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                known[str(row["text"])] = np.asarray(row["vector"], np.float32)
    except OSError as error:
        raise EndpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise EndpointError(f"{path}: line {len(known) + 1} is no JSON object with a text and a vector") from None
    if not known or {vector.shape for vector in known.values()} != {next(iter(known.values())).shape}:
        raise EndpointError(f"{path} holds no vectors, or vectors of several lengths")
    return known
