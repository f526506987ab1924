"""`isthmus audit-api` against servers with one planted fault each, a sound one, and ours."""

import json

import httpx2
import pytest
from click.testing import CliRunner

from benchmarks.beyond.faulty_api import FAULTS, serving
from isthmus_client import command


def audited(url: str, *options: str) -> tuple[int, dict[str, str]]:
    result = CliRunner().invoke(command.cli, ["audit-api", url, "--json", *options])
    answer = json.loads(result.stdout)
    states = {one["check"]: one["state"] for one in answer["checks"]}
    assert answer["faults"] == [name for name, state in states.items() if state == "fault"]
    return result.exit_code, states


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    with serving(fault) as url:
        code, states = audited(url)
    assert code == 1 and states[fault] == "fault"


def test_a_sound_server_has_no_fault_and_every_fault_has_a_check() -> None:
    with serving(None) as url:
        for address in (url, f"{url}/v1/", f"{url}/v1/embeddings"):
            code, states = audited(address)
            assert code == 0 and set(states.values()) == {"ok"} and states.keys() >= FAULTS.keys()


def test_ours_has_no_fault(shared_client: httpx2.Client) -> None:
    faults = [name for name, state in audited(str(shared_client.base_url))[1].items() if state == "fault"]
    assert not set(faults) - {"hubs", "gap", "unknown", "tokens"}, (
        "the tiny bundle reads a few words of a few that it knows"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:9"], "Connection refused"),
        (["nonsense"], "name the API as in"),
        (["http://127.0.0.1:9", "--key-env", "NO_SUCH_VARIABLE"], "there is no such variable"),
    ],
)
def test_what_is_no_api_is_said(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command.cli, ["audit-api", *arguments])
    assert result.exit_code in (1, 2) and said in result.output
    with serving(None) as url:
        result = CliRunner().invoke(command.cli, ["audit-api", url, "--model", "another"])
    assert result.exit_code == 1 and "status 400" in result.output
