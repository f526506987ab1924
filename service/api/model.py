"""A model: a bundle that is served, under the name in its manifest. It can be read again while it works."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.contract.bundle import Bundle, BundleError, Manifest, Modality
from service.engine.embedder import Embedder
from service.engine.towers import TowerError
from service.retrieval.classify import Classifier
from service.runtime.workers import OwnThread

log = logging.getLogger(__name__)

_READING_S = 600.0
"""For a bundle on a disk that hardly answers."""


class ReloadRefused(RuntimeError):
    """What is on disk is not served. The message is for the operator, and says why."""


@dataclass
class Model:
    path: Path
    embedder: Embedder
    classifier: Classifier
    _reloading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _reading: OwnThread = field(default_factory=lambda: OwnThread("bundle"))

    @property
    def bundle(self) -> Bundle:
        return self.embedder.bundle

    @property
    def manifest(self) -> Manifest:
        return self.embedder.manifest

    @property
    def providers(self) -> Mapping[Modality, str]:
        """The ONNX Runtime provider that each tower obtained."""
        return {modality: channel.provider for modality, channel in self.embedder.channels.items()}

    async def reload(self) -> Manifest:
        """Read the bundle's folder again and serve what is there from now on; no request notices.

        Raises ReloadRefused, and goes on as before, where it is of another space (vectors that clients hold would mean
        nothing to it), goes by another name, or cannot be read or run.
        """
        async with self._reloading:
            try:
                bundle = await self._reading.run(self.bundle.read_again, _READING_S)
                _check_same(self.manifest, bundle)
                await self.embedder.replace(bundle)
            except (BundleError, TowerError, ValueError) as error:
                raise ReloadRefused(f"{self.path} is not reloaded: {error}") from error
            except TimeoutError:
                raise ReloadRefused(f"{self.path} is not reloaded: its disk does not answer") from None
            return bundle.manifest


def _check_same(served: Manifest, bundle: Bundle) -> None:
    there = bundle.manifest
    if there.space != served.space:
        raise BundleError(
            f"it is of the space {there.space}, and {served.space} is served: stored vectors would not fit it; "
            "restart the server to serve another space, and it says how its store is carried over"
        )
    if there.name != served.name:
        raise BundleError(
            f"it is called {there.name!r}, and {served.name!r} is served: restart the server to rename it"
        )
