"""`isthmus jobs` stores very many items in the background."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from isthmus_client import terminal
from isthmus_client.command_shared import Failure, echo_lines, server

if TYPE_CHECKING:
    from isthmus_client import Isthmus, Job

_STATES = click.Choice(["queued", "running", "done", "failed", "cancelled"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def jobs() -> None:
    """Store very many items in the background, from JSON lines or a tar.

    A job goes on whatever happens to this command or to the server.
    """


@jobs.command("create")
@click.argument("file", type=click.Path(dir_okay=False, exists=True, path_type=Path))
@click.option("-c", "--collection", default="default", show_default=True, help="Of items that do not name one.")
@click.option("--key", metavar="TEXT", help="Idempotency-Key: with the same FILE it is the same job, not another.")
@click.option("--wait", is_flag=True, help="Stay until it has ended, with a progress bar.")
@click.option("--json", "as_json", is_flag=True, help="The job as a JSON object.")
@click.pass_context
def create_job(
    context: click.Context,
    /,
    file: Path,
    collection: str,
    key: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Send FILE: JSON lines (.jsonl) as POST /items takes items, or a tar (.tar), with .gz behind it or without."""
    from isthmus_client.jobs import kind_of

    if kind_of(file) is None:
        raise Failure(f"{file} is neither JSON lines nor a tar, by its name", "call it .jsonl or .tar")
    with server(context) as space:
        job = space.create_job(file, collection=collection, idempotency_key=key)
        if not as_json:
            click.echo(job.id)
        if wait:
            _wait(context, space, job.id, as_json)
        elif as_json:
            click.echo(json.dumps(asdict(job)))


@jobs.command("list")
@click.option("--state", "states", multiple=True, type=_STATES, help="Only jobs in it; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object per job, a line each.")
@click.pass_context
def list_jobs(context: click.Context, /, states: tuple[str, ...], as_json: bool) -> None:
    """List the jobs that the server knows, the newest first."""
    with server(context) as space:
        listed = space.jobs(limit=1_000, states=states)
    if as_json:
        echo_lines([json.dumps(asdict(job)) for job in listed])
    elif listed:
        rows = [
            (e.id, e.state, e.collection, str(e.done), str(e.failed), str(e.total or ""), e.created) for e in listed
        ]
        echo_lines(
            terminal.table(rows, ("job", "state", "collection", "done", "failed", "of", "created"), right=(3, 4, 5))
        )


@jobs.command("wait")
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="The job as a JSON object.")
@click.pass_context
def wait_for_job(context: click.Context, /, id: str, as_json: bool) -> None:
    """Wait until a job has ended. Exit code 1 where it failed, was cancelled, or refused items."""
    with server(context) as space:
        _wait(context, space, id, as_json)


@jobs.command("errors")
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="JSON lines, as without it.")
@click.pass_context
def job_errors(context: click.Context, /, id: str, as_json: bool) -> None:
    """Print the items that were refused, as JSON lines."""
    with server(context) as space:
        echo_lines([json.dumps(asdict(error), ensure_ascii=False) for error in space.job_errors(id)])


@jobs.command("cancel")
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="The job as a JSON object.")
@click.pass_context
def cancel_job(context: click.Context, /, id: str, as_json: bool) -> None:
    """Stop a job. What it stored stays."""
    with server(context) as space:
        job = space.cancel_job(id)
    click.echo(json.dumps(asdict(job), ensure_ascii=False) if as_json else f"{job.state}: {job.done} stored")


def _wait(context: click.Context, space: "Isthmus", id: str, as_json: bool) -> None:
    with_bar = sys.stderr.isatty() and not as_json
    with terminal.progress("storing") if with_bar else nullcontext() as bar:
        task = None if bar is None else bar.add_task("storing")

        def report(job: "Job") -> None:
            if bar is not None and task is not None:
                bar.update(task, total=max(1, job.total or 0), completed=job.done + job.failed)

        job_at_end = space.wait_for_job(id, report=report)
    if as_json:
        click.echo(json.dumps(asdict(job_at_end), ensure_ascii=False))
    else:
        refused = f", {job_at_end.failed} refused: isthmus jobs errors {id}" if job_at_end.failed else ""
        click.echo(f"{job_at_end.state}: {job_at_end.done} stored{refused}")
        if job_at_end.error:
            click.echo(f"error: {job_at_end.error.detail}", err=True)
    if job_at_end.state != "done" or job_at_end.failed:
        context.exit(1)
