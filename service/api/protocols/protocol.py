"""A protocol is the routes of another server, with that server's own form of an error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, create_model

from service.settings import ProtocolName


@dataclass(frozen=True)
class Refusal:
    """The content of an error's body, at any status."""

    status: int
    code: str
    message: str
    """A sentence that names the field where one is wrong."""
    field: str | None = None


@dataclass(frozen=True)
class Protocol:
    name: ProtocolName
    router: APIRouter
    under: tuple[str, ...]
    """Paths whose errors have this protocol's form, and so has whatever lies below them."""
    reads: frozenset[str]
    """Paths whose POST stores nothing."""
    error: Callable[[Refusal], dict[str, Any]]
    """Returns the body of an error."""
    schema: type[BaseModel]
    """The schema of that body."""


def plain_error(prefix: str, field: str) -> tuple[Callable[[Refusal], dict[str, Any]], type[BaseModel]]:
    """Return `error` and `schema` of a protocol whose errors are an object with the message in one field."""
    definitions: Any = {field: (str, ...)}
    return lambda refusal: {field: refusal.message}, create_model(f"{prefix}Error", **definitions)
