"""A request finds its route in one step where the path has no parameters.

FastAPI tries its routes one by one, some forty before those of the last protocol, and solves the dependencies of each
request anew: together a quarter of the processor time that a text's embedding takes besides the model (docs/LOG.md).
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from inspect import iscoroutinefunction
from typing import Any, get_type_hints

from fastapi import APIRouter
from fastapi.params import Depends
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

Arguments = Mapping[str, Callable[[Request], Awaitable[Any]]]
"""The functions that make a route's arguments of the request, by name."""


class Direct(BaseRoute):
    """Serves the routes of which each argument is made of the request alone, and which return a response themselves.

    It stands before the routes themselves, which are still there for every other request, such as one with query
    parameters, and for the documentation.
    """

    def __init__(self, routers: Iterable[APIRouter]) -> None:
        self._routes: dict[tuple[str, str], tuple[APIRoute, Arguments]] = {}
        for route in (route for router in routers for route in router.routes if isinstance(route, APIRoute)):
            arguments = _arguments(route)
            if arguments is not None:
                self._routes |= {(method, route.path): (route, arguments) for method in route.methods or ()}

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        direct = self._routes.get((scope.get("method", ""), scope["path"]))
        if direct is None or scope["query_string"]:
            return Match.NONE, {}
        return Match.FULL, {"route": direct[0], "endpoint": direct[0].endpoint, "path_params": {}}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        route, arguments = self._routes[scope["method"], scope["path"]]
        request = Request(scope, receive, send)
        response = await route.endpoint(**{name: await make(request) for name, make in arguments.items()})
        await response(scope, receive, send)


def _arguments(route: APIRoute) -> Arguments | None:
    """Return what makes a route's arguments; None where FastAPI has to, or has to make its answer."""
    hints = get_type_hints(route.endpoint, include_extras=True)
    answer = hints.pop("return", None)
    if not (isinstance(answer, type) and issubclass(answer, Response)):
        return None
    arguments = {}
    for name, hint in hints.items():
        made_by = [part.dependency for part in getattr(hint, "__metadata__", ()) if isinstance(part, Depends)]
        if len(made_by) != 1 or made_by[0] is None or not _takes_the_request_alone(made_by[0]):
            return None
        arguments[name] = made_by[0]
    return arguments


def _takes_the_request_alone(dependency: Callable[..., Any]) -> bool:
    hints = get_type_hints(dependency)
    hints.pop("return", None)
    return iscoroutinefunction(dependency) and list(hints.values()) == [Request]
