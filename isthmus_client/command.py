"""`isthmus`, the command for people: `embed`, `search`, `classify` ask a running server.

Other distributions add commands by entry points of the group `isthmus.commands`: `isthmus` adds those that work on this
machine, such as `serve`. What takes long to import is imported by the command that needs it, so that help and
completion are quick.
"""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import get_completion_class

from isthmus_client import VERSION, terminal
from isthmus_client.command_audit import audit_api
from isthmus_client.command_index import index
from isthmus_client.command_inputs import queries, read_inputs
from isthmus_client.command_items import collections, delete, list_items, open_page
from isthmus_client.command_jobs import jobs
from isthmus_client.command_shared import (
    Failure,
    echo_lines,
    known_modalities,
    parsed_filter,
    passed_on,
    plain_metadata,
    server,
)

if TYPE_CHECKING:
    from isthmus_client import Followed, Isthmus

_QUERIES_AT_ONCE, _RESULTS_AT_ONCE = 32, 5_000
_PROBABLE = 0.7
"""Where no result has this confidence, there is probably nothing."""
_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the number of the signal."""
GROUP = "isthmus.commands"
OF_THE_SERVER = (
    *("backup", "check", "doctor", "keys", "load", "mcp", "openapi", "publish", "reembed", "restore", "serve"),
    *("settings", "tune", "upgrade"),
    *("add-modality", "attach", "bind", "curate", "evaluate", "export", "import", "select", "train"),
)
"""The commands that the distribution `isthmus` adds. Where it is not installed, each says so."""
INSTALL = (
    "in a checkout: make wheels, then: pip install --find-links dist 'isthmus[cpu,heif]' isthmus-starter "
    "('isthmus[cpu,train]' to train)"
)
"""The packages are on no index yet."""


class Commands(click.Group):
    """The client's own commands, and those that other distributions add, listed apart from each other."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*self.commands, *(name for name in sorted(_plugins()) if name not in self.commands)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command = super().get_command(context, name)
        if command is not None:
            return command
        if name in _plugins():
            return _load(_plugins()[name])
        return _absent(name, "it comes with the server") if name in OF_THE_SERVER else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        asking = [name for name in self.commands if name != "completion"]
        names = [name for name in self.list_commands(context) if name not in asking]
        training = [name for name in names if name in _plugins() and _plugins()[name].value.startswith("training.")]
        local = [name for name in names if name not in training]
        sections = (("Ask a running server", asking), ("On this machine", local), ("Train and measure", training))
        for title, names in ((title, names) for title, names in sections if names):
            commands = [(name, self.get_command(context, name)) for name in names]
            rows = [(name, item.get_short_help_str(formatter.width)) for name, item in commands if item is not None]
            with formatter.section(title):
                formatter.write_dl(rows)
        if missing := [name for name in OF_THE_SERVER if name not in _plugins()]:
            with formatter.section("Not installed here"):
                formatter.write_text(f"{', '.join(missing)}: the server. {INSTALL}")


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> click.Command:
    """Return the command of an entry point; where it cannot be imported, one that says so."""
    try:
        command: click.Command = point.load()
    except (ImportError, AttributeError) as error:
        return _absent(point.name, str(error))
    return command


def _absent(name: str, why: str) -> click.Command:
    """Return a command that is not here: whatever it is given, it says what to install."""

    def say(arguments: tuple[str, ...]) -> NoReturn:
        raise Failure(f"`isthmus {name}` is not installed here: {why}", INSTALL)

    return passed_on(name, "Not installed here.", say)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--url", envvar="ISTHMUS_URL", show_envvar=True, help="Where the server is (http://127.0.0.1:8000).")
@click.option("--api-key", envvar="ISTHMUS_API_KEY", show_envvar=True, help="For a server that asks for one.")
@click.version_option(VERSION, message="isthmus %(version)s")
@click.pass_context
def cli(context: click.Context, url: str | None, api_key: str | None) -> None:
    """Embed, search and classify images, sounds and texts in one space.

    An INPUT is a file (an image or a sound), a text, or `-` for standard input: a file's content, or a text per line.
    """
    context.obj = (url, api_key)


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…", type=click.Path(allow_dash=True))
@click.option("--text", "as_text", is_flag=True, help="Every INPUT is a text, even where there is a file of that name.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Keep so many, renormalised.")
@click.option("--role", type=click.Choice(["query", "passage"]), help="Of texts: what is asked, or what is stored.")
@click.option("--model", help="One of GET /models.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per input, a line each, with the whole vector.")
@click.pass_context
def embed(context: click.Context, /, inputs: tuple[str, ...], as_text: bool, as_json: bool, **options: Any) -> None:
    """Print the unit vectors of inputs."""
    items = list(read_inputs(inputs, as_text))
    failures = 0
    rows = []
    with server(context) as space:
        embeddings = space.embed_many((i for _, i in items), **_not_none(options))
        for (name, _), embedding in zip(items, embeddings, strict=True):
            if embedding.error or embedding.vector is None:
                failures += 1
                if not as_json:
                    click.echo(f"error: {name}: {embedding.error.detail if embedding.error else 'no vector'}", err=True)
            if as_json:
                fields: dict[str, Any] = {"input": name, "modality": embedding.modality, "embedding": embedding.vector}
                fields |= {"unknown": embedding.unknown} if embedding.unknown else {}
                if embedding.error:
                    fields["error"] = {"code": embedding.error.code, "detail": embedding.error.detail}
                click.echo(json.dumps(fields, ensure_ascii=False))
            elif embedding.vector is not None:
                head = " ".join(f"{number:+.3f}" for number in embedding.vector[:6])
                rows.append((name, embedding.modality or "", str(len(embedding.vector)), f"{head} …"))
    if rows:
        echo_lines(terminal.table(rows, ("input", "modality", "dimensions", "vector"), right=(2,)))
    if failures:
        context.exit(1)


@cli.command()
@click.argument("query", nargs=-1, metavar="QUERY…", type=click.Path(allow_dash=True))
@click.option("--like", metavar="ID", help="More like a stored item, instead of QUERY or as a part of it.")
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Of each QUERY, in order, where there are several."
)
@click.option("--then", multiple=True, metavar="STEP", help="What is to come after QUERY, in videos; repeatable.")
@click.option("--text", "as_text", is_flag=True, help="QUERY is a text, even where there is a file of that name.")
@click.option("-k", "--top", default=10, show_default=True, type=click.IntRange(min=1), help="How many results.")
@click.option(
    "-m",
    "--modality",
    "modalities",
    multiple=True,
    shell_complete=known_modalities,
    help="Only results of it, such as image; repeatable.",
)
@click.option("-c", "--collection", default="default", show_default=True, help="Where to search.")
@click.option("--filter", "filter_json", metavar="JSON", help='On metadata, as {"year": {"$gte": 2000}}.')
@click.option("--fdr", type=click.FloatRange(0, 1, True, True), help="Only what is no chance, at this rate of errors.")
@click.option("--media", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Where the ids are files.")
@click.option("--pictures/--no-pictures", default=None, help="Draw what is found in the terminal; else where it can.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per query, a line each.")
@click.pass_context
def search(
    context: click.Context,
    /,
    query: tuple[str, ...],
    like: str | None,
    weights: tuple[float, ...],
    then: tuple[str, ...],
    as_text: bool,
    top: int,
    modalities: tuple[str, ...],
    collection: str,
    filter_json: str | None,
    fdr: float | None,
    media: Path | None,
    pictures: bool | None,
    as_json: bool,
) -> None:
    """Find stored items by text, image, sound or several together.

    Several arguments are a weighted sum. Without -m, what fits best among its own kind comes first, be it a picture, a
    video, a sound or a text. With --then, videos and long sounds are found in which one thing follows the other.

    `-` reads a query per line of standard input, or the content of one file.
    """
    options: dict[str, Any] = {"top_k": top, "collection": collection}
    if modalities:
        options["modalities"] = list(modalities)
    if filter_json is not None:
        options["filter"] = parsed_filter(filter_json)
    parsed_queries = queries(query, like, weights, as_text)
    draw = terminal.shows_pictures() if pictures is None else pictures
    with server(context) as space:
        if then:
            if fdr is not None:
                raise click.UsageError("--fdr judges a query alone, not what comes after it (--then)")
            steps = [step for _, step in (*parsed_queries, *read_inputs(then, as_text))]
            _show_followed(space.follow(steps, **options), as_json)
            return
        options |= {"include": ["metadata", "confidence"], "balance": not modalities}
        if fdr is not None:
            options["fdr"] = fdr
        at_once = min(_QUERIES_AT_ONCE, max(1, _RESULTS_AT_ONCE // top))  # the server bounds their product
        for first in range(0, len(parsed_queries), at_once):
            batch = parsed_queries[first : first + at_once]
            answers = space.search_many([query_input for _, query_input in batch], **options)
            for (name, _), hits in zip(batch, (answer[:top] for answer in answers), strict=True):
                if as_json:
                    results = [
                        {"id": hit.id, "score": hit.score, "modality": hit.modality, "metadata": hit.metadata}
                        for hit in hits
                    ]
                    click.echo(json.dumps({"query": name, "results": results}, ensure_ascii=False))
                    continue
                if len(parsed_queries) > 1:
                    click.echo(click.style(name, bold=True))
                _show_found(space, hits, collection, media, draw)
                if hits and all(hit.confidence is not None and hit.confidence < _PROBABLE for hit in hits):
                    click.echo(
                        "note: probably nothing here: the best fits no better than chance would have it", err=True
                    )
                if not hits:
                    _nothing_found(space, collection, options)


for added in (index, list_items, delete, collections, open_page, jobs, audit_api):
    cli.add_command(added)


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…", type=click.Path(allow_dash=True))
@click.option("--text", "as_text", is_flag=True, help="Every INPUT is a text, even where there is a file of that name.")
@click.option("-l", "--label", "labels", multiple=True, help="One label; repeatable.")
@click.option("--labels", "file", type=click.File(), help="A file with a label per line.")
@click.option("--label-set", help="Labels that the server has stored.")
@click.option("-k", "--top", "top_k", default=5, show_default=True, type=click.IntRange(min=1), help="How many labels.")
@click.option("--threshold", type=click.FloatRange(0, 1), help='"None of these" where the best score is below it.')
@click.option("--abstain", is_flag=True, help='"None of these" where a learned detector says so.')
@click.option("--model", help="One of GET /models.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per input, a line each.")
@click.pass_context
def classify(
    context: click.Context,
    /,
    inputs: tuple[str, ...],
    as_text: bool,
    labels: tuple[str, ...],
    file: Any,
    label_set: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show which of your labels fits, without training a classifier."""
    words = [*labels, *(line.strip() for line in file or () if line.strip())]
    if bool(words) == bool(label_set):
        raise click.UsageError("say the labels: --label dog --label cat, --labels FILE, or the name of a --label-set")
    request = _not_none(options) | ({"labels": words} if words else {"label_set": label_set})
    if not options["abstain"]:
        request.pop("abstain", None)
    sources = list(read_inputs(inputs, as_text))
    with server(context) as space:
        for first in range(0, len(sources), _QUERIES_AT_ONCE):
            batch = sources[first : first + _QUERIES_AT_ONCE]
            for (name, _), result in zip(batch, space.classify([i for _, i in batch], **request), strict=True):
                scored = [{"label": e.label, "score": e.score, "similarity": e.similarity} for e in result.labels]
                if as_json:
                    fields = {"input": name, "labels": scored, "abstained": result.abstained}
                    click.echo(json.dumps(fields, ensure_ascii=False))
                    continue
                click.echo(click.style(name, bold=True) + ("   none of these" if result.abstained else ""))
                rows = [
                    (f"  {label.label}", f"{label.score:.3f}", terminal.bar(label.score)) for label in result.labels
                ]
                echo_lines(terminal.table(rows, ("  label", "score", ""), right=(1,)))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script with which your shell completes `isthmus`.

    \b
    bash:  isthmus completion bash > ~/.local/share/bash-completion/completions/isthmus
    zsh:   isthmus completion zsh > "${fpath[1]}/_isthmus"
    fish:  isthmus completion fish > ~/.config/fish/completions/isthmus.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "isthmus", "_ISTHMUS_COMPLETE").source())


def main() -> NoReturn:
    try:
        code = cli.main(prog_name="isthmus", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("stopped", err=True)
        sys.exit(_INTERRUPTED)
    sys.exit(code)


def _show_found(space: "Isthmus", hits: Sequence[Any], collection: str, media: Path | None, draw: bool) -> None:
    rows = [(f"{hit.score:.3f}", hit.modality, hit.id, plain_metadata(hit.metadata)) for hit in hits]
    lines = terminal.table(rows, ("score", "modality", "id", "metadata"), right=(0,)) if rows else []
    for line, hit in zip(lines, [None, *hits], strict=False):
        click.echo(line)
        if draw and hit is not None and hit.modality == "image" and (file := _file_of(space, hit, collection, media)):
            echo_lines(terminal.picture(file))


def _show_followed(followed: Sequence["Followed"], as_json: bool) -> None:
    """Print what follows a script, with the second of each step."""
    if as_json:
        click.echo(json.dumps({"results": [asdict(result) for result in followed]}, ensure_ascii=False))
        return
    rows = [
        (
            f"{hit.score:.3f}",
            hit.modality,
            hit.id,
            "  ".join(f"{step.start:.0f} s" if step else "–" for step in hit.steps),
        )
        for hit in followed
    ]
    echo_lines(terminal.table(rows, ("score", "modality", "id", "steps at"), right=(0,)))
    if not followed:
        raise Failure("nothing found: no video and no long sound is stored there")


def _file_of(space: "Isthmus", hit: Any, collection: str, media: Path | None) -> "Path | IO[bytes] | None":
    """Return the file of a result, called by its path in the indexed folder; else the server's preview."""
    from isthmus_client import NotFound

    file = Path(media or "", hit.id)
    if file.is_file():
        return file
    try:
        return io.BytesIO(space.preview(hit.id, collection=collection).data)
    except NotFound:
        return None


def _nothing_found(space: "Isthmus", collection: str, options: dict[str, Any]) -> None:
    count = space.collection(collection).count
    if count:
        hint = "none fits the filter or the modality" if {"filter", "modalities"} & options.keys() else "none fits"
        hint = f"none is more than chance at --fdr {options['fdr']}" if "fdr" in options else hint
        raise Failure(f"nothing found among the {count} items of the collection {collection!r}: {hint}")
    raise Failure(f"the collection {collection!r} is empty", "isthmus index FOLDER fills it")


def _not_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
