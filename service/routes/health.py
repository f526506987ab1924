"""GET /healthz (the process answers), GET /readyz (everything it needs works), GET /metrics."""

import asyncio
import logging

from fastapi import APIRouter
from starlette.responses import Response

from service.contract.bundle import Modality
from service.pipeline import Embedder
from service.responses import JSON
from service.schemas.models import Health, Readiness
from service.state import StateDep

log = logging.getLogger(__name__)
router = APIRouter(tags=["service"])


@router.get("/healthz")
async def healthz() -> Health:
    return Health()


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(state: StateDep) -> JSON:
    """Embeds a small input through every tower, past the cache, and asks the store. 503 if anything fails."""
    modalities = list(state.bundle.manifest.towers)
    towers = await asyncio.gather(*(_embeds(state.embedder, modality) for modality in modalities))
    checks = {f"tower.{modality}": works for modality, works in zip(modalities, towers, strict=True)}
    checks |= {"workers": state.embedder.workers_alive(), "store": state.store.ready()}
    ready = all(checks.values())
    return JSON({"status": "ready" if ready else "not_ready", "checks": checks}, 200 if ready else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(state: StateDep) -> Response:
    return Response(state.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _embeds(embedder: Embedder, modality: Modality) -> bool:
    try:
        await embedder.canary(modality)
    except Exception:  # whatever is wrong, the answer is the same: not ready
        log.warning("the canary of the %s tower failed", modality, exc_info=True)
        return False
    return True
