"""openapi.yaml, from which clients and the reference are made: names of operations, and bodies that can be sent."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

DOCUMENT: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "openapi.yaml").read_text(encoding="utf-8"))
OPERATIONS = [
    (method.upper(), path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
BODIES = [
    (method, path, kind, content)
    for method, path, operation in OPERATIONS
    for kind, content in operation.get("requestBody", {}).get("content", {}).items()
    if kind not in ("multipart/form-data", "application/x-tar")
]


def test_operations_have_names_of_their_own_and_tags_that_are_explained() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)
    explained = {tag["name"] for tag in DOCUMENT["tags"]}
    assert {tag for _, _, operation in OPERATIONS for tag in operation["tags"]} == explained


def test_every_operation_says_what_it_does() -> None:
    assert [name for name, _, operation in OPERATIONS if not operation.get("description")] == []


@pytest.mark.parametrize(("method", "path", "kind", "content"), BODIES, ids=[path for _, path, _, _ in BODIES])
def test_every_example_of_a_body_can_be_sent(
    shared_client: httpx.Client, method: str, path: str, kind: str, content: dict[str, Any]
) -> None:
    example = content["example"]
    if path.startswith("/v1/"):
        example = example | {"model": "tiny"}  # of this server, which does not serve the starter
    response = shared_client.request(
        method,
        path.replace("{name}", "an-example"),
        headers={"Content-Type": kind},
        **({"content": example} if isinstance(example, str) else {"json": example}),
    )
    assert response.is_success, response.text
