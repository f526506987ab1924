"""`isthmus mcp`: the tools of a running server's /mcp, over standard input and output."""

from typing import Any

import anyio
from httpx2 import AsyncClient, HTTPError
from mcp import MCPError
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server import Server
from mcp.server.stdio import stdio_server

from service import __version__

_TIMEOUT_S = 120.0


def run(url: str, api_key: str | None) -> str | None:
    """Serve until standard input ends. Return what is wrong where the server at `url` does not answer."""
    problem: str | None = None
    try:
        anyio.run(_serve, url, api_key)
    except* (HTTPError, MCPError, OSError) as failed:
        first: BaseException = failed
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        problem = str(first) or type(first).__name__
    return problem


async def _serve(url: str, api_key: str | None) -> None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with (
        AsyncClient(headers=headers, timeout=_TIMEOUT_S) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http)) as remote,
    ):

        async def list_tools(context: Any, params: Any) -> Any:
            return await remote.list_tools()

        async def call_tool(context: Any, params: Any) -> Any:
            return await remote.call_tool(params.name, params.arguments)

        server: Server[Any] = Server("isthmus", version=__version__, on_list_tools=list_tools, on_call_tool=call_tool)
        async with stdio_server() as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())
