"""GET /models."""

from fastapi import APIRouter

from service.schemas.models import ModelDescription, ModelsResponse, TowerDescription
from service.state import StateDep

router = APIRouter(tags=["service"])


@router.get("/models")
async def models(state: StateDep) -> ModelsResponse:
    """The bundle that is served: its space, its towers, and the figures it was released with."""
    manifest = state.bundle.manifest
    towers = {
        modality: TowerDescription(
            encoder=tower.encoder,
            projector=tower.projector.kind,
            precision=tower.precision,
            provider=state.providers[modality],
            preprocessing=tower.preprocessing,
        )
        for modality, tower in manifest.towers.items()
    }
    described = ModelDescription(
        name=manifest.name,
        created=manifest.created,
        space=manifest.space,
        dimensions=manifest.dimensions,
        matryoshka=list(manifest.matryoshka),
        temperature=manifest.temperature,
        towers=towers,
        evaluation=manifest.evaluation,
        licences=manifest.licences,
    )
    return ModelsResponse(models=[described])
