"""openapi.yaml, from which clients and the reference are made: names of operations, bodies that can be sent, refusals
that are given; what linters say of it, and a client that TypeScript's generator makes."""

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests import npm

ROOT = Path(__file__).parents[2]
DOCUMENT: dict[str, Any] = yaml.load((ROOT / "openapi.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
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
    if path == "/feedback":
        shared_client.post("/items", json={"items": [{"id": "holiday/beach", "text": "a beach"}]})
        shared_client.post(path, json={"judgements": [{"query": "a beach", "relevant": ["holiday/beach"]}]})
    response = shared_client.request(
        method,
        path.replace("{name}", "an-example"),
        headers={"Content-Type": kind},
        **({"content": example} if isinstance(example, str) else {"json": example}),
    )
    assert response.is_success, response.text


ABSENT = {"{id}": "no-such", "{name}": "no-such"}
NAMED = ("collection", "model", "label_set")


def filled(path: str) -> str:
    for name, value in ABSENT.items():
        path = path.replace(name, value)
    return path


def fields(operation: dict[str, Any]) -> set[str]:
    """The names of an operation's parameters, and of the fields of its JSON body."""
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    described = DOCUMENT["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], {})
    return {each["name"] for each in operation.get("parameters", [])} | described.get("properties", {}).keys()


def listing(status: int) -> list[tuple[str, str, dict[str, Any]]]:
    return [each for each in OPERATIONS if str(status) in each[2]["responses"]]


def ids(operations: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    return [operation["operationId"] for _, _, operation in operations]


def test_refusals_have_a_schema_and_headers() -> None:
    for name, response in DOCUMENT["components"]["responses"].items():
        assert response["content"] and "X-Request-ID" in response["headers"]
        assert ("Retry-After" in response["headers"]) is (name[-3:] in ("429", "503"))
    for _, _, operation in OPERATIONS:
        if operation["security"]:
            assert operation["responses"].keys() >= {"401", "403", "429", "503"}
        if "requestBody" in operation:
            assert operation["responses"].keys() >= {"400", "413", "415", "422"}


@pytest.mark.parametrize(("method", "path", "operation"), listing(404), ids=ids(listing(404)))
def test_what_is_not_there_is_a_404_where_the_document_says_so(
    shared_client: httpx.Client, method: str, path: str, operation: dict[str, Any]
) -> None:
    example = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
    absent = {name: "no-such" for name in NAMED if name in fields(operation)}
    if example is None:
        response = shared_client.request(method, filled(path), params=absent)
    else:
        if "label_set" in absent:
            absent = {"label_set": "no-such", "inputs": example["inputs"]}
            example = {}
        response = shared_client.request(method, filled(path), json=example | absent)
    if path.startswith("/jobs/") and response.status_code == 422:
        assert response.json()["code"] == "jobs_disabled"
    else:
        assert response.status_code == 404, response.text
    checked(response, operation)


@pytest.mark.parametrize(("method", "path", "operation"), listing(413), ids=ids(listing(413)))
def test_bodies_that_are_refused(
    shared_client: httpx.Client, method: str, path: str, operation: dict[str, Any]
) -> None:
    """A body that is too large is refused before it comes; one of another kind, and one that is no body, after."""
    host, port = shared_client.base_url.host, shared_client.base_url.port
    head = f"{method} {filled(path)} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**50}\r\n"
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall((head + "Content-Type: application/json\r\nConnection: close\r\n\r\n").encode())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")
    other = shared_client.request(method, filled(path), content="x", headers={"Content-Type": "text/x-other"})
    assert other.status_code == 415, other.text
    checked(other, operation)
    broken = shared_client.request(method, filled(path), content="{", headers={"Content-Type": "application/json"})
    assert broken.status_code in (400, 415), broken.text
    checked(broken, operation)


def checked(response: httpx.Response, operation: dict[str, Any]) -> None:
    """Raise AssertionError where an answer is none that the operation lists."""
    name = operation["responses"][str(response.status_code)]["$ref"].rpartition("/")[2]
    listed = DOCUMENT["components"]["responses"][name]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in listed["content"] and "x-request-id" in response.headers


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs that read openapi.yaml, and the document."""
    folder = tmp_path_factory.mktemp("openapi")
    npm.install(
        folder,
        "@redocly/cli@2.77.0",
        "@stoplight/spectral-cli@6.16.3",
        "openapi-typescript@7.13.0",
        "openapi-fetch@0.17.0",
        "typescript@5.9.3",
    )
    (folder / "openapi.yaml").write_text((ROOT / "openapi.yaml").read_text())
    return folder


def run(folder: Path, program: str, *arguments: str) -> str:
    """The output of a program that succeeds."""
    quiet = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
    command = [program if program == "node" else str(folder / "node_modules/.bin" / program), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | quiet, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
def test_linters_find_no_error(programs: Path) -> None:
    assert json.loads(run(programs, "redocly", "lint", "--format=json", "openapi.yaml"))["totals"]["errors"] == 0
    (programs / ".spectral.yaml").write_text('extends: ["spectral:oas"]\n')
    run(programs, "spectral", "lint", "--fail-severity=error", "openapi.yaml")


@pytest.mark.full
def test_a_generated_typescript_client(programs: Path, fresh_client: httpx.Client) -> None:
    run(programs, "openapi-typescript", "openapi.yaml", "-o", "isthmus.ts")
    example = (ROOT / "docs/integrations/typescript_client.ts").read_text()
    (programs / "client.ts").write_text(example)
    picture = DOCUMENT["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["example"]["inputs"][1]
    (programs / "program.ts").write_text(
        f"""
import {{ classify, connect, search, searchMany, upsert }} from "./client.js";
const space = connect("{fresh_client.base_url}");
const upserted: number = await upsert(space, {{ a: "red", b: "blue" }});
const found: string[] = (await search(space, "red", 2)).map((result) => result.id);
const many: number[][] = (await searchMany(space, ["blue", "red"])).map((of) => of.map((result) => result.score));
const label: string = await classify(space, "{picture["image"]}", ["red", "blue"]);
const refused: string = await search(space, "red", -1).then(() => "", (error: Error) => error.message);
console.log(JSON.stringify({{ upserted, found, many, label, refused }}));
"""
    )
    (programs / "package.json").write_text('{"type": "module"}')
    compiled = ("--strict", "--target", "es2022", "--module", "nodenext", "--outDir", "out", "program.ts")
    run(programs, "tsc", *compiled)
    said = json.loads(run(programs, "node", "out/program.js"))
    assert said["upserted"] == 2 and said["found"] == ["a", "b"] and len(said["many"]) == 2
    assert said["many"][0][0] == pytest.approx(1, abs=1e-5)
    assert said["label"] in ("red", "blue") and said["refused"].startswith("invalid_request: ")
