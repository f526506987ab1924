"""The distribution `isthmus` adds these entry points (`isthmus.commands`) to the command `isthmus`.

`isthmus NAME …` is `python -m service NAME …`, and `doctor`. The flags are named here too, for the completion of
shells, which cannot wait for the server's modules; a test compares them.
"""

import json
from functools import partial

import click

from isthmus_client.command_shared import Failure, imported, passed_on

_NEEDED = "cpu"


def _run(name: str, arguments: tuple[str, ...]) -> int:
    return int(imported("service.__main__", _NEEDED).main([name, *arguments], called=f"isthmus {name}"))


def _same(name: str, description: str, *flags: str) -> click.Command:
    return passed_on(name, f"{description}\n\nThe same as `python -m service {name}`.", partial(_run, name), flags)


serve = _same(
    "serve",
    "Serve a bundle over HTTP.",
    *(
        "--bundle",
        "--device",
        "--host",
        "--keys",
        "--log-level",
        "--media",
        "--milvus-uri",
        "--modalities",
        "--more-bundles",
    ),
    *("--no-previews", "--port", "--precision", "--previews", "--redis-url", "--starter", "--store"),
)
load = _same(
    "load",
    "Take in the Parquet files that `python -m training embed` wrote.",
    *("--bundle", "--collection", "--json", "--milvus-uri", "--store"),
)
keys = _same("keys", "Make, list and revoke API keys.", "--days", "--file", "--json", "--limit", "--name", "--scopes")
check = _same("check", "Verify a bundle, or a store.", "--json")
backup = _same("backup", "Copy a store into one file, while it is served too.", "--jobs", "--json")
restore = _same("restore", "Make a store of a backup.", "--jobs", "--json")
reembed = _same(
    "reembed",
    "Make a store of another space: embed the items of a store again.",
    *("--bundle", "--dry-run", "--json", "--media", "--media-key"),
)
publish = _same(
    "publish",
    "Write a collection, its bundle and a page that searches it, as files.",
    *("--bundle", "--collection", "--json", "--runtime", "--store", "--without-metadata"),
)
upgrade = _same(
    "upgrade",
    "Make a store of another space: map the vectors of a store, and embed the worst again.",
    *("--from", "--json", "--least", "--media", "--media-key", "--share", "--to"),
)
tune = _same(
    "tune",
    "Measure how a bundle runs best on this machine, and keep that for `serve`.",
    *("--full", "--json", "--media", "--seconds", "--texts"),
)
openapi = _same("openapi", "Print the OpenAPI document.")
settings = _same("settings", "Print every setting, as a page.")


@click.command()
@click.option("--bundle", help="The bundle to look at; else the one that `isthmus serve` would serve.")
@click.option("--store", help="The store to look at; else ISTHMUS_STORE.")
@click.option("--port", help="The port that is to be free; else ISTHMUS_PORT, or 8000.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def doctor(context: click.Context, /, as_json: bool, bundle: str | None, store: str | None, port: str | None) -> None:
    """Show what this machine has and lacks to serve, and what to do.

    It looks at Python, packages, ONNX Runtime, the bundle, the store, Redis, the port, disk and memory. Whether a
    recipe can be trained here is another question: python -m training doctor RECIPE.
    """
    checks = []
    for check in imported("service.commands.doctor", _NEEDED).examine(bundle=bundle, store=store, port=port):
        checks.append(check)
        if not as_json:
            colour = {"ok": "green", "note": "yellow", "missing": "red"}[check.state]
            click.echo(f"{click.style(f'{check.state:8}', fg=colour)}{check.what:12}{check.detail}")
            if check.next_step:
                click.echo(f"{'':8}{'':12}→ {check.next_step}")
    lacking = [check.what for check in checks if check.state == "missing"]
    if as_json:
        rows = [{"check": e.what, "state": e.state, "detail": e.detail, "next": e.next_step} for e in checks]
        click.echo(json.dumps({"ok": not lacking, "checks": rows}, ensure_ascii=False))
    else:
        click.echo(f"{len(lacking)} to be mended: {', '.join(lacking)}" if lacking else "all is well")
    if lacking:
        context.exit(1)


@click.command()
@click.pass_context
def mcp(context: click.Context, /) -> None:
    """Give an agent the tools of a running server, over standard input and output (MCP).

    For programs that start their servers themselves: the command is isthmus, its arguments are --url URL mcp. The
    server needs ISTHMUS_PROTOCOLS=mcp. Programs that take a URL need none of this: it is URL/mcp.
    """
    from isthmus_client.client import DEFAULT_URL  # late: help and completion do without httpx2

    url, api_key = context.obj or (None, None)
    url = (url or DEFAULT_URL).rstrip("/")
    problem = imported("service.commands.mcp", "mcp").run(url, api_key)
    if problem is not None:
        raise Failure(f"{url}/mcp: {problem}", "is the server there, and does it have ISTHMUS_PROTOCOLS=mcp?")
