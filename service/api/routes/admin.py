"""POST /admin/reload."""

from fastapi import APIRouter

from service.api.responses import JSON
from service.api.state import StateDep
from service.schemas.models import Reloaded

router = APIRouter(prefix="/admin", tags=["service"])


@router.post("/reload", response_model=Reloaded, responses={409: {"model": Reloaded}})
async def reload(state: StateDep) -> JSON:
    """Read every model's bundle again, as SIGHUP does. 409 where one is refused, which is served on as it was; the
    log says why."""
    done = await state.reload()
    models = {name: "done" if each else "refused" for name, each in done.items()}
    return JSON({"models": models}, 200 if all(done.values()) else 409)
