"""A client of the Isthmus service: embed, search and classify images, sounds and texts. It needs httpx alone."""

from isthmus_client.batches import Batching
from isthmus_client.calls import NewItem
from isthmus_client.client import AsyncIsthmus, Isthmus
from isthmus_client.errors import (
    ClientError,
    Conflict,
    InvalidInput,
    NotAllowed,
    NotFound,
    Overloaded,
    Refused,
    ServerFailed,
    Unreachable,
    UnreadableAnswer,
)
from isthmus_client.inputs import Input, audio, composed, image, stored, vector
from isthmus_client.results import (
    Classified,
    Collection,
    Embedding,
    Found,
    Item,
    LabelSet,
    Model,
    Page,
    Problem,
    Readiness,
    ScoredLabel,
    Written,
)
from isthmus_client.retries import Retries

__all__ = [
    "AsyncIsthmus",
    "Batching",
    "Classified",
    "ClientError",
    "Collection",
    "Conflict",
    "Embedding",
    "Found",
    "Input",
    "InvalidInput",
    "Isthmus",
    "Item",
    "LabelSet",
    "Model",
    "NewItem",
    "NotAllowed",
    "NotFound",
    "Overloaded",
    "Page",
    "Problem",
    "Readiness",
    "Refused",
    "Retries",
    "ScoredLabel",
    "ServerFailed",
    "Unreachable",
    "UnreadableAnswer",
    "Written",
    "audio",
    "composed",
    "image",
    "stored",
    "vector",
]
