"""Token vectors of inputs, on demand: decode → preprocess → the tower's further outputs. Not cached, not batched.

Only what reranks or is stored for reranking comes here; vectors go the way of pipeline.py.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from service.contract.errors import InputError, UnsupportedMedia
from service.contract.vectors import Vectors
from service.engine.caller import PROCESS, Caller
from service.engine.channel import Channel
from service.engine.embedder import Embedder
from service.engine.inputs import Input, Single, Unreadable, modality_of
from service.errors import InferenceFailed, NotReady
from service.runtime.workers import Workers

log = logging.getLogger(__name__)


class TokenEmbedder:
    """Uses the towers of an embedder, in a thread of its own. Lives on one event loop."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._pool = Workers("tokens")

    @property
    def available(self) -> bool:
        """Return whether any tower of the bundle has token vectors."""
        return any(tower.tokens for tower in self._embedder.manifest.towers.values())

    async def embed(self, inputs: Sequence[Input], caller: Caller = PROCESS) -> list[Vectors | InputError]:
        """Return the unit vectors (N, D) of each input's tokens, or its error.

        Raises Overloaded before any work, DeadlineExceeded, and NotReady at shutdown.
        """
        inputs = await self._embedder.read(inputs, caller)
        counts = Counter(modality_of(given) for given in inputs if isinstance(given, Single))
        async with self._embedder.admitted(counts, len(inputs), caller):
            # One by one, so that a bad input fails alone and a request that ends early leaves little behind.
            return [await self._one(given) for given in inputs]

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.close)

    async def _one(self, given: Input) -> Vectors | InputError:
        if isinstance(given, Unreadable):
            return given.error
        if not isinstance(given, Single):
            return UnsupportedMedia("a video, or an input of several parts, has no tokens to rerank by")
        modality = modality_of(given)
        tower = self._embedder.manifest.towers.get(modality)
        if tower is None or not tower.tokens or modality not in self._embedder.channels:
            return UnsupportedMedia(f"this bundle has no token vectors of {modality} inputs")
        channel = self._embedder.channels[modality]
        try:
            return await self._pool.run(lambda: _tokens(channel, given))
        except InputError as error:
            return error.without_frames()
        except NotReady:
            raise
        except Exception:
            log.exception("an input of kind %s got no token vectors", modality)
            return InferenceFailed("the model failed on this input")


def _tokens(channel: Channel, given: Single) -> Vectors:
    prepared = channel.handling.prepare(given)
    [tokens] = channel.tower.run_tokens(channel.handling.collate([prepared.value]))
    return tokens
