"""The protocols, and which of them a path belongs to."""

from collections.abc import Mapping

from service.api.protocols import cohere, immich, jina, mcp, ollama, openai, tei, weaviate
from service.api.protocols.protocol import Protocol
from service.settings import ProtocolName

PROTOCOLS: Mapping[ProtocolName, Protocol] = {
    protocol.name: protocol
    for protocol in (
        openai.PROTOCOL,
        jina.PROTOCOL,
        cohere.PROTOCOL,
        tei.PROTOCOL,
        ollama.PROTOCOL,
        mcp.PROTOCOL,
        weaviate.PROTOCOL,
        immich.PROTOCOL,
    )
}
READS = frozenset[str]().union(*(protocol.reads for protocol in PROTOCOLS.values()))
"""Paths of all protocols whose POST stores nothing."""
_UNDER = sorted(
    ((path, protocol) for protocol in PROTOCOLS.values() for path in protocol.under), key=lambda pair: -len(pair[0])
)


def protocol_of(path: str) -> Protocol | None:
    """Return the protocol that a path belongs to, on or off; None for a native route."""
    return next((protocol for under, protocol in _UNDER if path == under or path.startswith(f"{under}/")), None)
