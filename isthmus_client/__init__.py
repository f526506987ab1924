"""A client of the Isthmus service: embed, search and classify images, sounds and texts. It needs httpx2 alone.

Names are imported when they are first asked for: the command's help and completion then need no HTTP.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

VERSION = "0.1.0"

if TYPE_CHECKING:
    from isthmus_client.batches import Batching
    from isthmus_client.calls import Judgement, NewItem
    from isthmus_client.client import AsyncIsthmus, Isthmus
    from isthmus_client.errors import (
        ClientError,
        InvalidInput,
        IsthmusWarning,
        NotAllowed,
        NotFound,
        Overloaded,
        Refused,
        ServerFailed,
        Unreachable,
        UnreadableAnswer,
    )
    from isthmus_client.inputs import Input, array, audio, composed, image, stored, vector, video
    from isthmus_client.results import (
        Classified,
        Collection,
        Embedding,
        Facets,
        Feedback,
        FeedbackVersion,
        Followed,
        Found,
        Item,
        Job,
        JobError,
        LabelSet,
        Map,
        Model,
        Moment,
        Page,
        Point,
        Preview,
        Problem,
        Readiness,
        ScoredLabel,
        Written,
    )
    from isthmus_client.retries import Retries

_MODULES = ("errors", "inputs", "results", "retries", "calls", "batches", "client")


def __getattr__(name: str) -> Any:
    modules = (import_module(f"isthmus_client.{module}") for module in _MODULES if name in __all__)
    for module in modules:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'isthmus_client' has no attribute {name!r}")


__all__ = [
    "AsyncIsthmus",
    "Batching",
    "Classified",
    "ClientError",
    "Collection",
    "Embedding",
    "Facets",
    "Feedback",
    "FeedbackVersion",
    "Followed",
    "Found",
    "Input",
    "InvalidInput",
    "Isthmus",
    "IsthmusWarning",
    "Item",
    "Job",
    "JobError",
    "Judgement",
    "LabelSet",
    "Map",
    "Model",
    "Moment",
    "NewItem",
    "NotAllowed",
    "NotFound",
    "Overloaded",
    "Page",
    "Point",
    "Preview",
    "Problem",
    "Readiness",
    "Refused",
    "Retries",
    "ScoredLabel",
    "ServerFailed",
    "Unreachable",
    "UnreadableAnswer",
    "Written",
    "array",
    "audio",
    "composed",
    "image",
    "stored",
    "vector",
    "video",
]
