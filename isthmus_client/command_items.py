"""`isthmus list`, `delete`, `collections` and `open` show and change what a server holds."""

import json
import os
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from isthmus_client import terminal
from isthmus_client.command_shared import Failure, echo_lines, known_modalities, parsed_filter, plain_metadata, server

if TYPE_CHECKING:
    from isthmus_client import Item

_PAGE_ITEMS = 1_000
_FILL = "isthmus index FOLDER fills it; isthmus collections lists what there is"
_DELETED_AT_ONCE = 10_000
_DAY_CHARS = len("2026-11-30 13:00:00")
_collection = click.option("-c", "--collection", default="default", show_default=True, help="Where the items are.")


@click.command("list")
@_collection
@click.option("-m", "--modality", shell_complete=known_modalities, help="Only items of it, such as image.")
@click.option("--filter", "filter_json", metavar="JSON", help='Only what it fits, as {"year": {"$gte": 2000}}.')
@click.option("--sort", metavar="KEY", help="In the order of a metadata key that holds numbers.")
@click.option("--order", type=click.Choice(["asc", "desc"]), help="Without --sort: of when they were last written.")
@click.option("-n", "--limit", default=100, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@click.option("--all", "whole", is_flag=True, help="All of them, whatever --limit says.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per item, a line each, with all its metadata.")
@click.pass_context
def list_items(
    context: click.Context,
    /,
    collection: str,
    filter_json: str | None,
    limit: int,
    whole: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """List stored items, the first stored first."""
    with server(context) as space:
        options: Any = {name: value for name, value in given.items() if value is not None}
        if filter_json is not None:
            options["filter"] = parsed_filter(filter_json)
        items = space.items(
            collection=collection, limit=_PAGE_ITEMS if whole else min(limit + 1, _PAGE_ITEMS), **options
        )
        if as_json:
            for item in items if whole else islice(items, limit):
                fields = ("id", "collection", "modality", "metadata", "created", "updated")
                click.echo(json.dumps({name: getattr(item, name) for name in fields}, ensure_ascii=False))
            return
        listed = list(items if whole else islice(items, limit))
        more = next(items, None) is not None
        if not listed:
            raise Failure(f"nothing is listed: the collection {collection!r} holds no such item", _FILL)
    echo_lines(terminal.table([_row(item) for item in listed], ("id", "modality", "stored", "metadata")))
    if more:
        click.echo(f"note: only the first {len(listed):,}; --limit N or --all lists more", err=True)


def _row(item: "Item") -> tuple[str, str, str, str]:
    updated_at = item.updated.replace("T", " ")[:_DAY_CHARS]
    return item.id, item.modality, updated_at, plain_metadata(item.metadata)


@click.command()
@click.argument("ids", nargs=-1, metavar="ID…")
@_collection
@click.option("--filter", "filter_json", metavar="JSON", help='All that it fits, as {"year": {"$lt": 2000}}.')
@click.option("--all", "whole", is_flag=True, help="The collection itself, with all its items.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --filter or --all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with the number of deleted items.")
@click.pass_context
def delete(
    context: click.Context,
    /,
    ids: tuple[str, ...],
    collection: str,
    filter_json: str | None,
    whole: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete stored items, or a whole collection.

    By their ids, or by a filter on metadata. Files stay as they are.
    """
    if bool(ids) + (filter_json is not None) + whole != 1:
        raise click.UsageError("say what to delete: ids, or --filter JSON, or --all")
    condition = None if filter_json is None else parsed_filter(filter_json)
    with server(context) as space:
        if not ids and not yes:
            _ask(space.collection(collection).count if whole else None, collection)
        if whole:
            deleted = space.collection(collection).count
            space.drop_collection(collection)
        elif condition is not None:
            deleted = space.delete(filter=condition, collection=collection)
        else:
            different = list(dict.fromkeys(ids))
            deleted = sum(
                space.delete(different[start : start + _DELETED_AT_ONCE], collection=collection)
                for start in range(0, len(different), _DELETED_AT_ONCE)
            )
    click.echo(json.dumps({"deleted": deleted}) if as_json else f"{deleted:,} deleted")
    if ids and deleted < len(set(ids)):
        missing = len(set(ids)) - deleted
        raise Failure(f"{missing:,} of the ids are no items of the collection {collection!r}", "isthmus list shows all")


def _ask(count: int | None, collection: str) -> None:
    target = f"the collection {collection!r}" if count is not None else f"what the filter fits in {collection!r}"
    if not sys.stdin.isatty():
        raise Failure(f"{target} is deleted only where somebody can be asked", "--yes deletes it without asking")
    contents = "" if count is None else f" with its {count:,} items"
    click.confirm(f"Delete {target}{contents}?", abort=True, err=True)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON object per collection, a line each.")
@click.pass_context
def collections(context: click.Context, /, as_json: bool) -> None:
    """List collections, with the number of their items."""
    with server(context) as space:
        listed = space.collections()
    if as_json:
        echo_lines([json.dumps(asdict(collection), ensure_ascii=False) for collection in listed])
        return
    rows = [
        (
            collection.name,
            f"{collection.count:,}",
            collection.space,
            str(collection.dimensions),
            collection.index,
            ", ".join(collection.keywords),
        )
        for collection in listed
    ]
    if rows:
        header = ("collection", "items", "space", "dimensions", "index", "keywords")
        echo_lines(terminal.table(rows, header, right=(1, 3)))


@click.command("open")
@click.argument("id", required=False)
@_collection
@click.option("--media", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Where the ids are files.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with what is opened.")
@click.pass_context
def open_page(context: click.Context, /, id: str | None, collection: str, media: Path | None, as_json: bool) -> None:
    """Open the server's page, or an item.

    The page in a browser; of an item its file, or where that is not here the original or the preview that the server
    has.
    """
    with server(context) as space:
        if id is None:
            space.ready()  # or it says what to do
            place = f"{space.url}/"
        else:
            item = space.item(id, collection=collection, with_original=True)
            file = (media or Path()) / item.id
            if file.is_file():
                place = str(file.resolve())
            else:
                if item.original is None:
                    space.preview(id, collection=collection)
                route = "previews" if item.original is None else "media"
                place = f"{space.url}/{route}/{quote(id, safe='')}?collection={collection}"
    click.echo(json.dumps({"opened": place}, ensure_ascii=False) if as_json else place)
    no_display = sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if no_display or click.launch(place):
        raise Failure("this machine has no display, or no program that opens it", f"open it on another one: {place}")
