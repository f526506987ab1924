"""The refusals of each operation as openapi.yaml lists them: which statuses it may answer with, and their headers."""

from collections.abc import Mapping
from typing import Any

from service.api.keys import Scope
from service.api.protocols.registry import PROTOCOLS

_NUMBER = {"schema": {"type": "integer"}}
_STRING = {"schema": {"type": "string"}}
_RETRY = {"Retry-After": {"description": "Seconds to wait before the request is sent again.", **_NUMBER}}
_NAMES = frozenset({"collection", "model", "label_set"})
"""Fields that name something that has to be there."""
_CREATED = frozenset({"createJob", "upsertItems"})
"""Operations that create the collection that they name."""

REFUSALS: Mapping[int, dict[str, Any]] = {
    400: {"description": "The body is no JSON, or a form that cannot be read (`malformed_request`)."},
    401: {
        "description": "No API key (`missing_api_key`), or one that is not valid (`invalid_api_key`).",
        "headers": {"WWW-Authenticate": _STRING},
    },
    403: {"description": "The key lacks the scope (`forbidden`), or a page of another site asks (`cross_origin`)."},
    404: {"description": "There is no such thing as the request names (`not_found`, `model_not_found`)."},
    413: {"description": "The body (`body_too_large`) or a file in it (`media_too_large`) is too large."},
    415: {"description": "The body (`unsupported_body`) or a file in it (`unsupported_media`) is of a kind not read."},
    422: {
        "description": "The request is not valid: `errors` names the fields (`invalid_request`). Or an input cannot be "
        "read, as `code` says: `index` names it."
    },
    429: {
        "description": "What the key may use is used up (`rate_limited`), or too much is waiting (`overloaded`). The "
        "RateLimit fields tell of the key's limits, on other answers too; the last three of the nearest one.",
        "headers": {
            **_RETRY,
            "RateLimit": _STRING,
            "RateLimit-Policy": _STRING,
            "RateLimit-Limit": _NUMBER,
            "RateLimit-Remaining": _NUMBER,
            "RateLimit-Reset": _NUMBER,
        },
    },
    503: {"description": "Not ready (`not_ready`), or the disk is full (`disk_full`).", "headers": _RETRY},
    504: {"description": "Not done within the deadline (`deadline_exceeded`): `detail` says what to send less of."},
}
for _refusal in REFUSALS.values():
    _refusal["headers"] = {"X-Request-ID": _STRING, **_refusal.get("headers", {})}


def refusals_of(
    method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any], scope: Scope | None
) -> list[int]:
    """Return the statuses of REFUSALS that an operation may answer with. `scope`: what a key for it needs."""
    bodies = operation.get("requestBody", {}).get("content", {})
    fields = {parameter["name"] for parameter in operation.get("parameters", [])}
    # Of the other routes, `reading.known_parameters` refuses query parameters.
    statuses = {422} if fields or {"service", *PROTOCOLS}.isdisjoint(operation["tags"]) else set()
    if bodies:
        statuses |= {400, 413, 415, 422, 504}
        reference = bodies.get("application/json", {}).get("schema", {}).get("$ref", "")
        fields |= schemas.get(reference.rpartition("/")[2], {}).get("properties", {}).keys()
    if (("{" in path and method != "PUT") or fields & _NAMES) and operation["operationId"] not in _CREATED:
        statuses.add(404)
    if scope is not None:
        statuses |= {401, 403, 429, 503}
    if scope == "read":
        statuses.add(504)
    return sorted(statuses)
