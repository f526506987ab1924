"""Tell schemathesis how the uploads of jobs are sent: their bodies are bytes, as they are."""

from typing import Any

import schemathesis
from schemathesis import SerializationContext


@schemathesis.serializer("application/jsonl", "application/x-tar")
def as_it_is(context: SerializationContext, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
