"""Everything the service can refuse or fail with; `api/problems.py` says as which HTTP status.

IsthmusError
├── InvalidRequest      well-formed, and asks for something that cannot be
├── MalformedRequest    not JSON, not multipart: cannot be read at all
├── Unauthenticated     no key, or one that is not valid
├── Forbidden           a key that may not do this
│   └── CrossOrigin         a page of another site asks, and there are no keys to tell who that is
├── Misdirected         asked for by a name that this server does not answer to
├── RateLimited         what the key may use is used up
├── NotFound            no such item, collection, label set or model
├── BodyTooLarge        past the limit on a request's body
├── UnsupportedBody     a content type that this route does not read
├── InputFailed         one input of a request: its index, and what is wrong with it
└── ServiceError        the request was fine
    ├── Overloaded          too much is waiting
    ├── NotReady            starting, shutting down, or a part is not working
    │   └── DiskFull            what is to be written would take the disk's last room
    └── DeadlineExceeded    not done in time

contract.errors.InputError and its subclasses say what is wrong with one input; InferenceFailed joins them here.
Messages are fixed text, safe to send to a client: never another exception's text, a path or an address.
"""

from collections.abc import Mapping
from typing import Any

from service.contract.errors import InputError


class IsthmusError(Exception):
    """Raised where a request is refused. `code` may be narrower than the table's."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class InvalidRequest(IsthmusError): ...


class MalformedRequest(IsthmusError): ...


class Unauthenticated(IsthmusError): ...


class Forbidden(IsthmusError): ...


class CrossOrigin(Forbidden): ...


class Misdirected(IsthmusError): ...


class NotFound(IsthmusError): ...


class BodyTooLarge(IsthmusError): ...


class UnsupportedBody(IsthmusError): ...


class InputFailed(IsthmusError):
    """The input at `index` of the list called `field` cannot be embedded; None where there is no list."""

    def __init__(self, index: int | None, cause: InputError, *, field: str = "inputs") -> None:
        where = field if index is None else f"{field}[{index}]"
        super().__init__(f"{where}: {cause}")
        self.index = index
        self.cause = cause


class RateLimited(IsthmusError):
    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceError(IsthmusError): ...


class Overloaded(ServiceError):
    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(ServiceError): ...


class DiskFull(NotReady): ...


class DeadlineExceeded(ServiceError): ...


class InferenceFailed(InputError):
    """The tower failed on this input alone, its neighbours in the batch aside."""

    code = "inference_failed"


class FetchDisabled(InputError):
    """The input is a URL, and this server does not fetch."""

    code = "url_fetch_disabled"


class FetchRefused(InputError):
    """The input is a URL that this server does not fetch, by its looks."""

    code = "url_refused"


class FetchFailed(InputError):
    """The input is a URL, and nothing came of it; `temporary`: it may be otherwise in a while."""

    code = "url_fetch_failed"

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


def input_problem(error: InputError) -> dict[str, str]:
    """Return the fields that stand in a failed input's place when a batch goes on without it."""
    return {"code": error.code, "detail": str(error)}


def words_of(problem: Mapping[str, Any]) -> str:
    """Return the words of one of Pydantic's errors, without the mark that it puts before those of a validator."""
    return str(problem["msg"]).removeprefix("Value error, ")
