"""GET /models."""

from fastapi import APIRouter

from service.api.state import Model, StateDep
from service.contract.licences import commercial_use
from service.schemas.models import ModelDescription, ModelsResponse, TowerDescription

router = APIRouter(tags=["service"])


@router.get("/models")
async def list_models(state: StateDep) -> ModelsResponse:
    """The bundles that are served, the default first: their spaces, towers, and the figures they were released with."""
    described = [_described(model) for model in state.models.values()]
    return ModelsResponse(models=described, previews=state.previewer is not None)


def _described(model: Model) -> ModelDescription:
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
