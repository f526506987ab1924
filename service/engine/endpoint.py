"""An embedding API makes the vectors of such a tower's texts: they leave this machine, and the log says so.

The operator names the API, never the bundle: a bundle could name one that reads along. It is asked by the rules of
fetching, its answers are bounded, and what it does not answer fails for everyone who waits, with a reason.
"""

import asyncio
import logging
import time

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle
from service.contract.endpoint import PROBE, EndpointPreprocessing, request_of, shape_of, vectors_of
from service.contract.vectors import Vectors
from service.engine.fetch import Fetcher, Headers, Url, upstream_config
from service.engine.towers import Arrays, Tower
from service.errors import FetchFailed, NotReady, Overloaded
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

CANARY = ""
"""Stands for a look at the tower: it asks the API only after a failure, for probes must cost nothing."""
_TRIES, _FIRST_PAUSE_S = 3, 0.5
_MOST_BYTES = 64 * 2**20
_LONGEST_PAUSE_S = 3_600.0
_REFUSED_TEXTS = frozenset({400, 413, 422})
_AGAIN = frozenset({408, 425, 429})


class EndpointTower(Tower):
    """Gives an API's vectors of texts to the bundle's own head. Several threads may call `run` at once."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        """Raises SettingsError where no API is named, or one of another shape."""
        spec = bundle.manifest.towers["text"].preprocessing
        assert isinstance(spec, EndpointPreprocessing)
        self._described, self._settings = spec, settings
        config = upstream_config(settings, "endpoint")
        if config is None or settings.endpoint is None:
            raise SettingsError(
                f"{bundle.path}: the model {spec.model!r} of an embedding API embeds its texts: set "
                "ISTHMUS_ENDPOINT to the address of the API"
            )
        self._config, self._url = config, Url.parse(settings.endpoint)
        try:
            same = shape_of(settings.endpoint) == spec.shape
        except ValueError as error:
            raise SettingsError(f"ISTHMUS_ENDPOINT: {error}") from None
        if not same:
            raise SettingsError(f"ISTHMUS_ENDPOINT: {bundle.path} was attached to a route of the shape {spec.shape}")
        log.warning("texts leave this machine: %s embeds them with %r", self._url.authority, spec.model)
        super().__init__(bundle, "text", "cpu", 1)
        self._failing = False

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """Return the unit vectors (B, dimensions) of texts. Raises NotReady, Overloaded, and ValueError where the API
        refuses the texts themselves."""
        texts: list[str] = arrays["texts"].tolist()
        if texts == [CANARY] and not self._failing:
            return super().run({"features": np.asarray([self._described.probe], np.float32)})
        texts = [text or PROBE for text in texts]
        self._failing = True
        # The API may have another model from one call to the next: the known vector of a text comes with each of them.
        features = self._ask([*texts, PROBE])
        if not self._described.knows(features[-1]):
            raise NotReady(f"the embedding API's vectors are not those of the model {self._described.model!r}")
        self._failing = False
        return super().run({"features": features[: len(texts)]})

    def _ask(self, texts: list[str]) -> Vectors:
        content = request_of(self._described.shape, self._described.model, texts)
        ends = time.monotonic() + 0.8 * self._settings.request_deadline_s  # before who waits is told of the deadline
        for tried in range(1, _TRIES + 1):
            status, body, wait_s = self._post(content, max(0.1, (ends - time.monotonic()) / (_TRIES + 1 - tried)))
            if status == 200:
                return self._read(body, len(texts))
            pause = max(wait_s, _FIRST_PAUSE_S * 2 ** (tried - 1))
            if status in _REFUSED_TEXTS:
                raise ValueError(f"the embedding API refuses the texts ({status})")
            if status is not None and status < 500 and status not in _AGAIN:
                raise NotReady(
                    f"the embedding API refuses this server ({status}): ISTHMUS_ENDPOINT, ISTHMUS_ENDPOINT_KEY"
                )
            if tried < _TRIES and time.monotonic() + pause < ends:
                time.sleep(pause)
                continue
            if status == 429:
                raise Overloaded("the embedding API takes no more texts at present", retry_after_s=max(1, round(pause)))
            break
        raise NotReady("the embedding API does not answer")

    def _post(self, content: bytes, timeout_s: float) -> tuple[int | None, bytes, float]:
        """Return status, body and the seconds to wait; no status where nothing answers."""
        key = self._settings.endpoint_key
        headers: Headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key.get_secret_value()}"

        async def post() -> tuple[int, bytes, bytes]:
            fetcher = Fetcher(self._config, self._settings, lambda result, size: None, timeout_s=timeout_s)
            return await fetcher.post(self._url, headers, content, _MOST_BYTES)

        try:
            status, body, wait = asyncio.run(post())
        except FetchFailed:
            return None, b"", 0.0
        return status, body, min(float(wait), _LONGEST_PAUSE_S) if wait.isdigit() else 0.0

    def _read(self, body: bytes, count: int) -> Vectors:
        try:
            return vectors_of(self._described.shape, body, count)
        except ValueError as error:
            raise NotReady(f"the embedding API's answer cannot be used: {error}") from None
