"""GET /healthz (the process answers), GET /readyz (everything it needs works), GET /metrics, GET /models."""

import asyncio
import logging

from fastapi import APIRouter
from starlette.responses import Response

from service.api.responses import JSON
from service.api.state import Model, State, StateDep
from service.contract.bundle import Modality
from service.contract.licences import commercial_use
from service.engine.embedder import Embedder
from service.errors import NotReady
from service.runtime.disk import free_bytes
from service.schemas.models import Health, ModelDescription, ModelsResponse, Readiness, TowerDescription

log = logging.getLogger(__name__)
router = APIRouter(tags=["service"])


@router.get("/healthz")
async def healthz(state: StateDep) -> Health:
    """Return whether the process is alive; 503 where a model call hangs, which only a restart may end."""
    if any(channel.hangs for model in state.models.values() for channel in model.embedder.channels.values()):
        raise NotReady("a model does not answer")
    return Health()


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(state: StateDep) -> JSON:
    """Embed a small input through every tower, past the cache, and ask the store. 503 if any of these fails, or while
    the server is about to end (`accepting`); `failing` names what does.

    Without Redis, without room on the store's disk (`disk`), or where the store can be read and not written (`store`),
    the answer is 200 and `degraded`: most requests are answered as well as before, and a server that is left alone for
    it would leave all of them to the others, which are no better.
    It needs no key: who asks while others do gets the same answer, so that asking often costs no more model calls.
    """
    return await state.readiness(lambda: _readiness(state))


async def _readiness(state: State) -> JSON:
    towers = {
        _check(state, name, modality): (model.embedder, modality)
        for name, model in state.models.items()
        for modality in model.embedder.channels
    }
    works = await asyncio.gather(*(_embeds(embedder, modality) for embedder, modality in towers.values()))
    checks = dict(zip(towers, works, strict=True))
    checks["workers"] = all(model.embedder.workers_alive() for model in state.models.values())
    checks["store"] = await state.store.ready()
    checks["jobs"] = state.jobs is None or state.jobs.alive
    checks["accepting"] = not state.draining.is_set()
    if state.keys is not None:
        checks["keys"] = await state.keys.readable()
    ready = all(checks.values())
    wanting = await _optional_checks(state)
    checks |= wanting
    state.metrics.checked(checks)
    providers = {name: embedder.channels[modality].tower.provider for name, (embedder, modality) in towers.items()}
    status = ("ready" if all(checks.values()) else "degraded") if ready else "not_ready"
    failing = [name for name, passed in checks.items() if not passed]
    answer = {"status": status, "checks": checks, "failing": failing, "providers": providers}
    return JSON(answer, 200 if ready else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(state: StateDep) -> Response:
    """Return the metrics in the text format of Prometheus."""
    return Response(state.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _optional_checks(state: State) -> dict[str, bool]:
    """Return whether each part works that the server can do without for a while, by the part's name."""
    checks = {"store": await state.store.writable()}
    if state.settings.redis_url is not None:
        checks["redis"] = await state.home.embedder.cache_alive()
    folders = {state.settings.store, state.settings.jobs_folder or state.settings.store}
    free = [count for folder in folders if (count := free_bytes(folder)) is not None]
    if free:
        checks["disk"] = min(free) >= state.settings.min_free_bytes
    return checks


def _check(state: State, name: str, modality: Modality) -> str:
    return f"tower.{modality}" if state.models[name] is state.default else f"{name}: tower.{modality}"


async def _embeds(embedder: Embedder, modality: Modality) -> bool:
    try:
        await embedder.canary(modality)
    except Exception:  # whatever is wrong, the answer is the same: not ready
        log.warning("the canary of the %s tower failed", modality, exc_info=True)
        return False
    return True


@router.get("/models")
async def list_models(state: StateDep) -> ModelsResponse:
    """List the served bundles, the default first: their spaces, towers, and the figures they were released with."""
    described = [_model(model) for model in state.models.values()]
    return ModelsResponse(models=described, previews=state.previewer is not None)


def _model(model: Model) -> ModelDescription:
    manifest, channels = model.manifest, model.embedder.channels
    towers = {
        modality: TowerDescription(
            encoder=tower.encoder,
            projector=tower.projector.kind,
            precision=channels[modality].tower.precision,
            precisions=list(tower.precisions),
            provider=channels[modality].tower.provider,
            lanes=channels[modality].lanes,
            tuned=channels[modality].tower.choice is not None,
            preprocessing=tower.preprocessing,
        )
        for modality, tower in manifest.towers.items()
        if modality in channels
    }
    return ModelDescription(
        name=manifest.name,
        created=manifest.created,
        space=manifest.space,
        dimensions=manifest.dimensions,
        matryoshka=list(manifest.matryoshka),
        temperature=manifest.temperature,
        bias=manifest.bias,
        towers=towers,
        evaluation=manifest.evaluation,
        licences=list(manifest.parts),
        terms=list(manifest.terms),
        commercial=commercial_use(manifest.parts),
    )
