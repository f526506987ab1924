"""What the lifespan opens, and how a route asks for it: `async def route(state: StateDep)`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.classify import Classifier
from service.contract.bundle import Bundle, Modality
from service.metrics import Metrics
from service.pipeline import Embedder
from service.search import Searcher
from service.settings import Settings
from service.store import Store


@dataclass(frozen=True)
class State:
    settings: Settings
    bundle: Bundle
    providers: Mapping[Modality, str]
    """The ONNX Runtime provider that each tower obtained."""
    embedder: Embedder
    store: Store
    searcher: Searcher
    classifier: Classifier
    metrics: Metrics


def current(request: Request) -> State:
    state: State = request.state.services
    return state


StateDep = Annotated[State, Depends(current)]
