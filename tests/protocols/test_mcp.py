"""The Model Context Protocol, by its official client 2.3.0: over streamable HTTP in the revisions 2026-07-28 and
2025-11-25, and over the standard input and output of `isthmus mcp`."""

import asyncio
import base64
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import pytest
from mcp import MCPError, StdioServerParameters
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client

from tests.protocols.conftest import Native, same

pytestmark = pytest.mark.client("mcp")
TOOLS = {"search", "classify", "get", "find_moment"}
Call = Callable[[Client], Any]


@asynccontextmanager
async def over_http(url: str, key: str | None = None, **options: Any) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http), **options) as client,
    ):
        yield client


@pytest.fixture(params=["auto", "legacy", "stdio"])
def ask(request: pytest.FixtureRequest, server: httpx.Client) -> Callable[[Call], Any]:
    """Connects, asks, and disconnects."""
    url = str(server.base_url)

    async def asked(call: Call) -> Any:
        if request.param == "stdio":
            program = f"from service.commands.entry_points import mcp; mcp.main([], obj=({url!r}, None))"
            async with Client(StdioServerParameters(command=sys.executable, args=["-c", program])) as client:
                return await call(client)
        async with over_http(url, mode=request.param) as client:
            return await call(client)

    return lambda call: asyncio.run(asked(call))


@pytest.fixture(autouse=True)
def stored(server: httpx.Client, picture: str, wav: Callable[..., bytes]) -> None:
    long = base64.b64encode(wav(seconds=25.0)).decode()
    items = [
        {"id": "red.png", "image": picture, "metadata": {"year": 2024}},
        {"id": "note", "text": "a blue dog"},
        {"id": "tone.wav", "audio": long},
    ]
    assert server.post("/items", json={"items": items}).status_code == 200


def test_the_tools(ask: Callable[[Call], Any]) -> None:
    tools = ask(lambda client: client.list_tools()).tools
    assert {tool.name for tool in tools} == TOOLS
    for tool in tools:
        assert tool.description and tool.input_schema["type"] == "object" and tool.annotations.read_only_hint


def test_search_finds_and_get_shows(ask: Callable[[Call], Any], native: Native, picture: str) -> None:
    async def both(client: Client) -> Any:
        found = await client.call_tool("search", {"query": "red", "filter": {"year": 2024}})
        like = await client.call_tool("search", {"like": "red.png", "modalities": ["text"]})
        shown = await client.call_tool("get", {"id": found.structured_content["results"][0]["id"]})
        return found, like, shown

    found, like, shown = ask(both)
    [item] = found.structured_content["results"]
    assert (item["id"], item["modality"], item["metadata"]) == ("red.png", "image", {"year": 2024})
    query, document = native("red", {"image": picture})
    same(item["score"], query @ document)
    assert [each["id"] for each in like.structured_content["results"]] == ["note"]
    text, image = shown.content
    assert '"red.png"' in text.text and image.type == "image" and image.mime_type.startswith("image/")
    assert len(base64.b64decode(image.data)) > 100


def test_classify_and_find_a_moment(ask: Callable[[Call], Any], picture: str) -> None:
    async def both(client: Client) -> Any:
        labels = {"input": picture, "labels": ["blue", "red"]}
        return await client.call_tool("classify", labels), await client.call_tool("find_moment", {"query": "tone"})

    classified, moments = ask(both)
    assert classified.structured_content["labels"][0]["label"] == "red"
    assert sum(label["score"] for label in classified.structured_content["labels"]) == pytest.approx(1)
    [found] = moments.structured_content["results"]
    assert found["id"] == "tone.wav" and found["moment"]["modality"] == "audio"
    assert 0 <= found["moment"]["start_s"] < found["moment"]["end_s"] <= 25


@pytest.mark.parametrize(
    ("tool", "arguments", "names"),
    [
        ("search", {}, "exactly one of: query, like"),
        ("search", {"query": "red", "like": "note"}, "exactly one of: query, like"),
        ("search", {"query": "red", "top_k": 51}, "top_k"),
        ("search", {"query": "red", "rerank": True}, "rerank"),
        ("search", {"query": "red", "collection": "nowhere"}, "nowhere"),
        ("search", {"query": "data:image/png;base64,!"}, "query"),
        ("find_moment", {"query": "tone", "modalities": ["text"]}, "modalities"),
        ("classify", {"input": "red", "labels": []}, "labels"),
        ("classify", {"input": "", "labels": ["a"]}, "inputs[0]"),
        ("get", {"id": "nobody"}, "nobody"),
    ],
)
def test_refusals(server: httpx.Client, tool: str, arguments: dict[str, Any], names: str) -> None:
    async def asked() -> Any:
        async with over_http(str(server.base_url)) as client:
            return await client.call_tool(tool, arguments)

    answer = asyncio.run(asked())
    assert answer.is_error and names in answer.content[0].text


def test_what_is_no_tool(server: httpx.Client) -> None:
    async def asked() -> Any:
        async with over_http(str(server.base_url)) as client:
            with pytest.raises(MCPError, match="search, classify, get, find_moment"):
                await client.call_tool("delete", {})

    asyncio.run(asked())
    assert server.get("/mcp").status_code == 405


def test_a_server_that_is_not_there_or_does_not_speak_it(shared_client: httpx.Client) -> None:
    for url in ("http://127.0.0.1:9", str(shared_client.base_url)):
        program = f"from service.commands.entry_points import mcp; mcp.main([], obj=({url!r}, None))"
        done = subprocess.run([sys.executable, "-c", program], input="", capture_output=True, text=True, check=False)
        assert done.returncode == 1 and f"{url}/mcp: " in done.stderr and "ISTHMUS_PROTOCOLS=mcp" in done.stderr


def test_keys(keyed: tuple[httpx.Client, str]) -> None:
    client, clear = keyed
    refused = client.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    assert refused.status_code == 401 and "API key" in refused.json()["error"]["message"]

    async def asked() -> Any:
        async with over_http(str(client.base_url), clear) as reader:
            return await reader.list_tools()

    assert {tool.name for tool in asyncio.run(asked()).tools} == TOOLS
