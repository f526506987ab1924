"""Write a page for each operation of openapi.yaml into docs/reference/api/: `make docs` does so before it builds.

A page says what the operation does, how to call it with curl, and what each field of the request and of the answer is.
index.md lists them.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/reference/api"
_SERVER = "http://127.0.0.1:8000"
_STATUS_CODES = {"200": "OK", "201": "created", "202": "accepted", "204": "no content", "304": "not modified"}

_INTRODUCTION = """\
# HTTP API

These pages are made from `openapi.yaml`, which a test compares with the code. A running server returns the same
document at `/openapi.json`, from which clients can be generated, and at `/docs` a page from which each operation can be
tried. What may change when: [versioning](../versioning.md).

Where the server has [keys](../../how-to/keys.md), send one as `Authorization: Bearer KEY`.
"""
_ERRORS = """\
## Errors

An error is `application/problem+json` (RFC 9457) with a stable `code`; on the routes of a protocol it is what that
protocol's clients read.
"""

Schema = Mapping[str, Any]


class Pages:
    """The pages of an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas: Mapping[str, Schema] = document["components"]["schemas"]
        self._paths: Mapping[str, Mapping[str, Any]] = document["paths"]
        self._tags: Mapping[str, str] = {tag["name"]: tag["description"] for tag in document["tags"]}

    def write(self, folder: Path) -> None:
        """Replace the pages of a folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path, operations in self._paths.items():
            for method, operation in operations.items():
                text = "\n".join(self._page(method.upper(), path, operation))
                (folder / f"{operation['operationId']}.md").write_text(text + "\n", encoding="utf-8")
        (folder / "index.md").write_text("\n".join(self._index()) + "\n", encoding="utf-8")

    def _index(self) -> Iterator[str]:
        yield _INTRODUCTION
        for tag, meaning in self._tags.items():
            yield f"## {tag}\n\n{meaning}\n\n| route | what it does |\n|---|---|"
            for path, operations in self._paths.items():
                for method, operation in operations.items():
                    if tag in operation["tags"]:
                        first = operation["description"].partition("\n\n")[0]
                        yield f"| [{method.upper()} {path}]({operation['operationId']}.md) | {_cell(first)} |"
            yield ""
        yield _ERRORS
        told: dict[str, None] = {}
        yield from self._fields(self._schemas["Problem"], told)
        yield from self._parts(told)

    def _page(self, method: str, path: str, operation: Schema) -> Iterator[str]:
        yield f"# {method} {path}\n"
        yield operation["description"] + "\n"
        scopes = [scope for needed in operation.get("security", []) for scope in needed["key"]]
        key = f"a key with the scope `{scopes[0]}`, where the server has keys" if scopes else "no key"
        yield f"It needs {key}. In a generated client it is called `{operation['operationId']}`.\n"
        content = operation.get("requestBody", {}).get("content", {})
        yield from _calls(method, path, content)
        if parameters := operation.get("parameters"):
            yield "## Parameters\n"
            yield "| name | in | type | meaning |\n|---|---|---|---|"
            for parameter in parameters:
                name = f"`{parameter['name']}`" + (" (required)" if parameter.get("required") else "")
                meaning = parameter.get("description") or parameter["schema"].get("description", "")
                yield f"| {name} | {parameter['in']} | {self._type(parameter['schema'])} | {_cell(meaning)} |"
            yield ""
        told: dict[str, None] = {}
        if "application/json" in content:
            yield "## Body\n"
            yield from self._fields(content["application/json"]["schema"], told)
        for status, response in operation["responses"].items():
            shown = response.get("content", {}).get("application/json", {}).get("schema", {})
            if status in _STATUS_CODES and shown:
                yield f"## Answer {status}, {_STATUS_CODES[status]}\n"
                yield from self._fields(shown, told)
        [(kind, refusal)] = operation["responses"]["default"]["content"].items()
        if kind == "application/problem+json":
            yield "## Refusals\n\nEvery other answer is a [problem](index.md#errors), whose `code` says what is wrong."
        else:
            yield "## Refusals\n\nEvery other answer has this form.\n"
            yield from self._fields(refusal["schema"], told)
        yield from self._parts(told)

    def _fields(self, schema: Schema, told: dict[str, None]) -> Iterator[str]:
        """A table of an object's fields, or the type of what is none; names met on the way are put into `told`."""
        schema = self._resolved(schema)
        if "properties" not in schema:
            yield f"{_cell(self._type(schema, told))}\n"
            return
        if description := schema.get("description"):
            yield description + "\n"
        required = schema.get("required", ())
        yield "| field | type | default | meaning |\n|---|---|---|---|"
        for name, field in schema["properties"].items():
            default = "required" if name in required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`"
            meaning = field.get("description") or self._resolved(field).get("description", "")
            yield f"| `{name}` | {self._type(field, told)} | {default} | {_cell(meaning)} |"
        yield ""

    def _parts(self, told: dict[str, None]) -> Iterator[str]:
        """The objects that a page names, each once, with those that they name."""
        done: set[str] = set()
        while waiting := [name for name in told if name not in done]:
            for name in waiting:
                done.add(name)
                yield f"### {name}\n"
                yield from self._fields(self._schemas[name], told)

    def _resolved(self, schema: Schema) -> Schema:
        reference = schema.get("$ref")
        return self._schemas[reference.rpartition("/")[2]] if reference else schema

    def _type(self, schema: Schema, told: dict[str, None] | None = None) -> str:
        """A type in words: `array of TextInput`, `integer from 1 to 1000`."""
        if reference := schema.get("$ref"):
            name = reference.rpartition("/")[2]
            if told is None or "properties" not in self._schemas[name]:
                return self._type(self._schemas[name], told)
            told.setdefault(name)
            return f"[{name}](#{name.lower()})"
        if "const" in schema:
            return f"`{schema['const']}`"
        if "enum" in schema:
            return " or ".join(f"`{value}`" for value in schema["enum"])
        for choice in ("anyOf", "oneOf", "allOf"):
            if choice in schema:
                kinds = [self._type(kind, told) for kind in schema[choice] if kind.get("type") != "null"]
                return " or ".join(dict.fromkeys(kinds))
        kind = schema.get("type", "any value")
        if kind == "array":
            return f"list of {self._type(schema.get('items', {}), told)}" + _bounds(schema, "Items", "items")
        if kind == "object" and "properties" in schema:
            return "object with " + ", ".join(f"`{name}`" for name in schema["properties"])
        if kind == "string":
            return kind + _bounds(schema, "Length", "characters")
        return kind + _bounds(schema, "imum", "")


def _bounds(schema: Schema, what: str, unit: str) -> str:
    """The least and the greatest value, length or number, in words."""
    unit = f" {unit}" if unit else ""
    least, most = schema.get(f"min{what}"), schema.get(f"max{what}")
    if least is not None and least == most:
        return f", {least}{unit}"
    if least is not None and most is not None:
        return f", {least} to {most:,}{unit}"
    if most is not None:
        return f", at most {most:,}{unit}"
    return f", at least {least}{unit}" if least else ""


def _calls(method: str, path: str, content: Mapping[str, Any]) -> Iterator[str]:
    yield "```sh"
    line = f"curl {'' if method == 'GET' else f'-X {method} '}{_SERVER}{path}"
    if not content:
        yield line
    for kind, body in content.items():
        if isinstance(example := body.get("example"), str):
            yield f"{line} -H 'Content-Type: {kind}' \\\n  --data-binary $'{example.encode('unicode_escape').decode()}'"
        elif example is not None:
            yield f"{line} -H 'Content-Type: {kind}' \\\n  -d '{json.dumps(example, ensure_ascii=False)}'"
    yield "```\n"
    if "multipart/form-data" in content:
        yield (
            "Files are sent as they are in a form: each as a part called `file`, and the JSON, without the inputs that "
            f"are files, as the part `request`: `curl {_SERVER}{path} -F file=@photo.jpg -F 'request={{…}}'`.\n"
        )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    Pages(yaml.safe_load((ROOT / "openapi.yaml").read_text(encoding="utf-8"))).write(PAGES)
