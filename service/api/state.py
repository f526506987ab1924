"""The lifespan opens these services; a route asks for them by `async def route(state: StateDep)`."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.api.keys import Keyring
from service.api.responses import JSON
from service.contract.bundle import Manifest
from service.engine.caller import Caller
from service.engine.embedder import Embedder
from service.engine.fetch import Fetcher, Fetches
from service.engine.previews import Previewer
from service.errors import NotFound, Overloaded
from service.jobs.jobs import Jobs
from service.retrieval.classify import Classifier
from service.retrieval.projection import Maps
from service.retrieval.search import Searcher
from service.retrieval.single_flight import SingleFlight
from service.runtime.metrics import Metrics
from service.runtime.quotas import Limiter, Meter
from service.runtime.workers import Workers
from service.settings import Settings
from service.store import Store

_MEDIA_THREADS = 4


@dataclass(frozen=True)
class Model:
    """Serves a bundle under the name in its manifest."""

    embedder: Embedder
    classifier: Classifier

    @property
    def manifest(self) -> Manifest:
        return self.embedder.manifest


@dataclass(frozen=True)
class State:
    settings: Settings
    models: Mapping[str, Model]
    """Models by name, the default first."""
    home: Model
    """The one whose space the store has: items and queries are embedded by it."""
    store: Store
    searcher: Searcher
    previewer: Previewer | None
    """Maker of previews, where the operator wants them stored."""
    maps: Maps
    metrics: Metrics
    limiter: Limiter
    keys: Keyring | None = None
    """API keys; None: there are none, and no key is needed."""
    fetcher: Fetcher | None = None
    """Fetcher of URLs; None: URLs are not fetched."""
    upstream: Fetcher | None = None
    """The client of Immich's upstream; None where there is none."""
    jobs: Jobs | None = None
    """The bulk jobs; None where no folder is set for them."""
    readers: Workers = field(default_factory=lambda: Workers("read", spare=1))
    """Threads that read large bodies, one of a caller at a time, because reading holds the interpreter's lock; not the
    event loop, where a flood of bodies would keep all other requests waiting."""
    media_readers: Workers = field(default_factory=lambda: Workers("media", _MEDIA_THREADS, spare=1))
    """Threads that read the files of `media`, which may lie on a slow disk."""
    readiness: SingleFlight[JSON] = field(default_factory=SingleFlight)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the server works for the last time before it ends."""

    def model(self, name: str | None) -> Model:
        """Return the model that a request names, by an alias too, or the default. Raises NotFound."""
        if name is None:
            return self.default
        name = self.settings.aliases.get(name, name)
        if name not in self.models:
            raise NotFound("there is no such model: /models and /v1/models list what there is", code="model_not_found")
        return self.models[name]

    @property
    def default(self) -> Model:
        return next(iter(self.models.values()))

    def refuse_if_full(self) -> None:
        """Raises Overloaded where no queue of any model has room, so that whatever comes to be embedded is refused."""
        channels = [channel for model in self.models.values() for channel in model.embedder.channels.values()]
        if not any(channel.has_room(1) for channel in channels):
            raise Overloaded(
                "too many inputs are waiting", retry_after_s=min(channel.until_there_is_room() for channel in channels)
            )

    async def close(self) -> None:
        """Answer everyone who waits for a vector or a map with NotReady."""
        self.maps.close()
        self.readers.close(wait=False)
        self.media_readers.close(wait=False)
        await asyncio.gather(*(model.embedder.close() for model in self.models.values()))

    # Shortcuts to the home model, for routes that do not let a request choose.

    @property
    def embedder(self) -> Embedder:
        return self.home.embedder

    @property
    def classifier(self) -> Classifier:
        return self.home.classifier


async def current(request: Request) -> State:
    state: State = request.state.services
    return state


StateDep = Annotated[State, Depends(current)]


async def calling(request: Request) -> Caller:
    """Return the caller that the request is embedded for."""
    services: State = request.state.services
    meter: Meter | None = getattr(request.state, "meter", None)
    return Caller(meter, None if services.fetcher is None else Fetches(services.fetcher, meter))


CallerDep = Annotated[Caller, Depends(calling)]
