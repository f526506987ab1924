"""`isthmus audit-api` against servers with one planted fault each, a sound one, and ours."""

import json
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from benchmarks.beyond.faulty_api import FAULTS, MODEL, Handler, serving
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


class Talkative(Handler):
    """It has a field of its own in every answer, and lists its models without an object around them."""

    def _send(self, status: int, body: Any) -> None:
        if status == 200:
            body = [{"id": MODEL}] if "embedding" not in str(body["data"][0]) else body | {"provider": "us"}
        super()._send(status, body)


class Paced(Handler):
    """It refuses the first request of each length, or all but the first request, and asks to come again at once."""

    seen, fewest = frozenset[str](), False

    def do_POST(self) -> None:
        length, seen = self.headers["content-length"], self.seen
        type(self).seen = seen | {length}
        if not seen if self.fewest else length in seen:
            super().do_POST()
            return
        self.rfile.read(int(length))
        self.send_response(429)
        for name in ("retry-after", "content-length"):
            self.send_header(name, "0")
        self.end_headers()


@pytest.mark.parametrize("fault", ["truncation", "unknown"])
def test_a_field_of_every_answer_tells_of_no_fault(fault: str) -> None:
    with serving(fault, Talkative) as url:
        assert audited(url)[1][fault] == "fault"
    with serving(None, Talkative) as url:
        assert audited(url)[0] == 0


def test_a_server_that_asks_for_a_slower_pace_is_waited_for_and_has_no_fault() -> None:
    with serving(None, Paced) as url:
        code, states = audited(url)
        assert code == 0 and set(states.values()) == {"ok"} and states.keys() >= FAULTS.keys()
    with serving(None, type("Fewest", (Paced,), {"fewest": True})) as url:
        result = CliRunner().invoke(command.cli, ["audit-api", url])
        assert result.exit_code == 0 and "status 429 after 5 tries" in result.output
        assert "no fault; 9 not checked" in result.output


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://me:secret@127.0.0.1:9/v1?key=secret"])
def test_keys_and_passwords_are_not_shown(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("secret\nx", "sécret", "secret"):
        monkeypatch.setenv("A_KEY", key)
        result = CliRunner().invoke(command.cli, ["audit-api", address, "--key-env", "A_KEY"])
        assert result.exit_code in (1, 2) and result.output
        assert "cret" not in result.output and not isinstance(result.exception, ValueError)
