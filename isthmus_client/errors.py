"""Errors of a call.

ClientError
├── Unreachable             no answer: nothing listens there, the connection broke, it took too long
├── UnreadableAnswer        an answer, and not one of an Isthmus server
└── Refused                 the server answered with an error: status, code, detail, index, errors
    ├── InvalidInput            400, 413, 415, 422: the request, or one of its inputs, cannot be taken
    ├── NotAllowed              401, 403: no key, or one that may not do this
    ├── NotFound                404
    ├── Overloaded              429, still, after the retries
    └── ServerFailed            5xx; 503 after the retries

IsthmusWarning is no failure: what the server says of an answer that may mean little.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx2


class ClientError(Exception):
    """Is the base of all that the client raises on purpose."""


class IsthmusWarning(UserWarning):
    """The server hardly knows the words of a query, an input or a label."""


class Unreachable(ClientError): ...


class UnreadableAnswer(ClientError): ...


class Refused(ClientError):
    """`code` is stable and for programs, `detail` for people. `index` is the failing input's, in a batch."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        index: int | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        errors = [error for error in errors if isinstance(error, Mapping) and {"loc", "msg"} <= error.keys()]
        where = "".join(f"; {'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors)
        super().__init__(f"{detail}{where} ({status} {code})")
        self.status = status
        self.code = code
        self.detail = detail
        self.index = index
        self.errors = tuple(errors)
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidInput(Refused): ...


class NotAllowed(Refused): ...


class NotFound(Refused): ...


class Overloaded(Refused): ...


class ServerFailed(Refused): ...


_KINDS: Mapping[int, type[Refused]] = {
    **dict.fromkeys((400, 413, 415, 422), InvalidInput),
    **dict.fromkeys((401, 403), NotAllowed),
    404: NotFound,
    429: Overloaded,
}


def refusal(response: httpx2.Response, retry_after_s: float | None) -> Refused:
    """Return the exception for an answer that is an error, from its problem+json or else its status."""
    status = response.status_code
    kind = _KINDS.get(status, ServerFailed if status >= 500 else Refused)
    try:
        body = response.json()
    except ValueError:
        body = None
    problem = body if isinstance(body, dict) else {}
    return kind(
        status,
        str(problem.get("code", "unknown")),
        str(problem.get("detail") or response.reason_phrase or "no reason given"),
        index=problem.get("index"),
        errors=problem.get("errors") or (),
        request_id=response.headers.get("x-request-id"),
        retry_after_s=retry_after_s,
    )
