"""`isthmus audit-api`: a doctor for any server with OpenAI's embeddings route."""

import json
import os

import click

from isthmus_client.command_shared import Failure

_COLOURS = {"ok": "green", "note": "yellow", "fault": "red"}


@click.command("audit-api")
@click.argument("url")
@click.option("--model", help="Which of its models; else the first that it lists.")
@click.option("--key-env", metavar="NAME", help="The variable that holds the key of the server.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait for an answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def audit_api(
    context: click.Context, /, url: str, model: str | None, key_env: str | None, timeout_s: float, as_json: bool
) -> None:
    """Find what is wrong with the embeddings of any OpenAI-shaped API.

    It sends about 250 short requests and one of 2,049 inputs, which a hosted API charges for. It changes nothing.
    """
    import httpx2

    from isthmus_client.audit import Limited, audit, connect

    key = os.environ.get(key_env, "").strip() if key_env else None
    if key == "":
        raise click.UsageError(f"--key-env {key_env}: there is no such variable, or it is empty")
    if key and not (key.isascii() and key.isprintable()):  # httpx's own error would show it
        raise click.UsageError(f"--key-env {key_env}: a key has no control characters and none beyond ASCII")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    findings = []
    with httpx2.Client(headers=headers, timeout=timeout_s, follow_redirects=False) as client:
        try:
            api = connect(client, url, model)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, Limited) as error:
            safe_url = url.partition("?")[0].rpartition("@")[2]  # without a password or a key
            raise Failure(f"{safe_url}: {error}", "name the API as in http://127.0.0.1:8000/v1") from None
        for finding in audit(api):
            findings.append(finding)
            if not as_json:
                state = click.style(f"{finding.state:7}", fg=_COLOURS[finding.state])
                click.echo(f"{state}{finding.check:15}{finding.detail}")
    unchecked = sum(finding.detail.startswith("not checked") for finding in findings)
    faults = [finding.check for finding in findings if finding.state == "fault"]
    if as_json:
        rows = [{"check": finding.check, "state": finding.state, "detail": finding.detail} for finding in findings]
        click.echo(json.dumps({"model": api.model, "faults": faults, "checks": rows}, ensure_ascii=False))
    else:
        verdict = f"{len(faults)} at fault: {', '.join(faults)}" if faults else "no fault"
        click.echo(verdict + (f"; {unchecked} not checked" if unchecked else ""))
    if faults:
        context.exit(1)
