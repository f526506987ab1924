"""`mcp`: the Model Context Protocol at /mcp (streamable HTTP, without sessions), for agents: four tools that only read.

The package `mcp` speaks the protocol; here are the tools. `isthmus mcp` passes them on over standard input and output.
"""

import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, ValidationError, model_validator
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service import __version__
from service.api.protocols.protocol import Protocol, Refusal
from service.api.state import State, calling
from service.engine.caller import Caller
from service.engine.inputs import Input, StoredModality
from service.errors import IsthmusError
from service.retrieval.search import Result
from service.schemas.classify import ClassifyRequest, Words
from service.schemas.inputs import RequestModel, first_problem, read_as
from service.schemas.items import Filter, ItemId, Name
from service.schemas.search import SearchRequest
from service.store import DEFAULT_COLLECTION

if TYPE_CHECKING:
    import mcp_types as types
    from mcp.server import ServerRequestContext

router = APIRouter(tags=["mcp"])
String = Annotated[Input, read_as("string")]
_Count = Annotated[int, Field(ge=1, le=50, strict=True, description="How many results; an agent reads each.")]
_INVALID_PARAMS = -32602
_SERVER_ERROR = -32000
_TIMED: list[StoredModality] = ["video", "audio"]


class Searched(RequestModel):
    """Exactly one of query and like."""

    query: String | None = Field(default=None, description="A text; or a data: URI of an image, a sound or a video.")
    like: ItemId | None = Field(default=None, description="The id of a stored item, to find what is like it.")
    collection: Name = DEFAULT_COLLECTION
    filter: Filter | None = None
    top_k: _Count = 10

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.query is None) == (self.like is None):
            raise ValueError("give exactly one of: query, like")
        return self


class SearchArguments(Searched):
    modalities: Annotated[list[StoredModality], Field(min_length=1, max_length=16)] | None = None


class ClassifyArguments(RequestModel):
    input: String = Field(description="A text; or a data: URI of an image, a sound or a video.")
    labels: Annotated[list[Words], Field(min_length=1, max_length=1_000)] = Field(description="Each in a few words.")
    top_k: _Count = 5


class GetArguments(RequestModel):
    id: ItemId
    collection: Name = DEFAULT_COLLECTION


class McpProblem(BaseModel):
    code: int
    message: str


class McpError(BaseModel):
    jsonrpc: Literal["2.0"]
    id: None
    error: McpProblem


Answer = tuple[dict[str, Any], list["types.ContentBlock"]]
"""The structured content, and further blocks beside it as text."""


async def _search(arguments: Searched, state: State, caller: Caller) -> Answer:
    modalities = arguments.modalities if isinstance(arguments, SearchArguments) else _TIMED
    warnings: list[str] = []
    request = SearchRequest.model_construct(
        query=arguments.query or arguments.like,
        top_k=arguments.top_k,
        collection=arguments.collection,
        modalities=modalities,
        filter=arguments.filter,
    )
    [results] = await state.searcher.search(request, caller, warn=warnings.append)
    answer: dict[str, Any] = {"results": [_described(result) for result in results]}
    return answer | ({"warnings": warnings} if warnings else {}), []


def _described(result: Result) -> dict[str, Any]:
    item, moment = result.item, result.moment
    described = {"id": item.id, "score": result.score, "modality": item.modality, "metadata": item.metadata}
    if moment is not None:
        described["moment"] = {"start_s": moment.start, "end_s": moment.end, "modality": moment.modality}
    return described


async def _classify(arguments: ClassifyArguments, state: State, caller: Caller) -> Answer:
    labels = list(dict.fromkeys(arguments.labels))
    request = ClassifyRequest.model_construct(inputs=[arguments.input], labels=labels, top_k=arguments.top_k)
    [result] = await state.classifier.classify(request, caller)
    return {"labels": [{"label": scored.label, "score": scored.score} for scored in result.labels]}, []


async def _get(arguments: GetArguments, state: State, caller: Caller) -> Answer:
    import mcp_types as types

    item = await state.store.get(arguments.collection, arguments.id)
    details = (await state.store.shown(arguments.collection, [arguments.id])).get(arguments.id)
    answer = {"id": item.id, "modality": item.modality, "metadata": item.metadata}
    answer |= {"created": item.created, "updated": item.updated}
    if details is not None and details.text is not None:
        answer["text"] = details.text
    if details is None or details.media_type is None:
        return answer, []
    preview = await state.store.preview(arguments.collection, arguments.id)
    data, kind = base64.b64encode(preview.data).decode("ascii"), preview.media_type
    if kind.startswith("image/"):
        return answer, [types.ImageContent(data=data, mime_type=kind)]
    return answer, [types.AudioContent(data=data, mime_type=kind)]


_TOOLS: Mapping[str, tuple[type[RequestModel], Callable[[Any, State, Caller], Awaitable[Answer]], str]] = {
    "search": (
        SearchArguments,
        _search,
        "Find the stored images, sounds, videos and texts nearest to a description, a file or a stored item. Scores "
        "are cosine similarities.",
    ),
    "classify": (ClassifyArguments, _classify, "Tell which of your labels fits an input best. Scores sum to 1."),
    "get": (
        GetArguments,
        _get,
        "Return a stored item: its metadata and text, its preview as an image or a sound.",
    ),
    "find_moment": (
        Searched,
        _search,
        "Find where in the stored videos and long sounds something is seen or heard: seconds from and to.",
    ),
}


async def _list_tools(context: "ServerRequestContext[Any, Any]", params: Any) -> "types.ListToolsResult":
    import mcp_types as types

    hints = types.ToolAnnotations(read_only_hint=True, open_world_hint=False)
    tools = [
        types.Tool(name=name, description=description, input_schema=arguments.model_json_schema(), annotations=hints)
        for name, (arguments, _, description) in _TOOLS.items()
    ]
    return types.ListToolsResult(tools=tools)


async def _call_tool(
    context: "ServerRequestContext[Any, Any]", params: "types.CallToolRequestParams"
) -> "types.CallToolResult":
    """Answer a call. What is wrong with its arguments, or its input, is told to the agent in the result."""
    import mcp_types as types
    from mcp import MCPError

    if params.name not in _TOOLS:
        raise MCPError(_INVALID_PARAMS, f"there is no such tool: there are {', '.join(_TOOLS)}")
    request = context.request
    assert isinstance(request, Request)
    state: State = request.state.services
    model, tool, _ = _TOOLS[params.name]
    try:
        limits = state.settings.limits
        arguments = await state.readers.run(lambda: model.model_validate(params.arguments or {}, context=limits))
        answer, blocks = await tool(arguments, state, await calling(request))
    except ValidationError as error:
        problem = first_problem(error)
    except IsthmusError as error:
        problem = str(error)
    else:
        text = types.TextContent(text=orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY).decode())
        return types.CallToolResult(content=[text, *blocks], structured_content=orjson.loads(text.text))
    return types.CallToolResult(content=[types.TextContent(text=problem)], is_error=True)


class _Handled(Response):
    """The answer that the package gives to a request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from mcp.server import Server
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

        server = Server("isthmus", version=__version__, on_list_tools=_list_tools, on_call_tool=_call_tool)
        # One for each request: nothing is kept between two of them. The gate has looked at Host and Origin.
        # Its own limit of a body, 4 MiB, stays: it reads bodies on the event loop.
        manager = StreamableHTTPSessionManager(server, json_response=True, stateless=True)
        async with manager.run():
            await manager.handle_request(scope, receive, send)


@router.post("/mcp", include_in_schema=False)
async def mcp() -> Response:
    """Answer an agent in the Model Context Protocol."""
    return _Handled()


def _error(refusal: Refusal) -> dict[str, Any]:
    error = {"code": _SERVER_ERROR, "message": refusal.message}
    return {"jsonrpc": "2.0", "id": None, "error": error}


PROTOCOL = Protocol("mcp", router, ("/mcp",), frozenset({"/mcp"}), _error, McpError)
