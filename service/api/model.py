"""A model: a bundle that is served, under the name in its manifest."""

from dataclasses import dataclass

from service.contract.bundle import Manifest
from service.engine.embedder import Embedder
from service.retrieval.classify import Classifier


@dataclass(frozen=True)
class Model:
    embedder: Embedder
    classifier: Classifier

    @property
    def manifest(self) -> Manifest:
        return self.embedder.manifest
