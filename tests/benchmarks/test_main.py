"""The suite's last line, what it does without a part, and the generator. Speed is not a test's business."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks import peers
from benchmarks.load import Generator, request
from benchmarks.paired import ratio, take_turns
from benchmarks.plan import Plan
from benchmarks.servers import BenchmarkError

# As the issue that asks for them writes them down.
KEYS = [
    "http_over_raw.text",
    "http_over_raw.image",
    "vs_infinity.text.full.c1",
    "vs_infinity.text.full.c16",
    "vs_infinity.text.full.c64",
    "vs_infinity.text.full.b32",
    "vs_infinity.text.fp32.c1",
    "vs_infinity.text.fp32.c16",
    "vs_infinity.text.fp32.c64",
    "vs_infinity.text.fp32.b32",
    "vs_infinity.text.int8.c1",
    "vs_infinity.text.int8.c16",
    "vs_infinity.text.int8.c64",
    "vs_infinity.text.int8.b32",
    "vs_infinity.text.p50_c1",
    "vs_infinity.image",
    "added_latency_ms.text",
    "overload.errors",
    "overload.p99_ratio",
    "overload.rss_growth",
    "soak.rss_growth",
    "soak.unanswered",
    "startup_s",
    "env_mb",
    "rss_mb",
    "index_over_bare_decode",
]

FURTHER = {"vs_infinity.image.fp32", "added_latency_ms.text.fp32"}


def test_the_keys_are_those_that_were_asked_for_and_each_has_a_target() -> None:
    assert [key for key in suite.KEYS if key not in FURTHER] == KEYS
    assert set(suite.TARGETS) == set(suite.KEYS) == {*KEYS, *FURTHER}
    assert set(peers.SCENARIOS) == set(suite.SCENARIOS)


def test_every_part_is_there() -> None:
    assert all(callable(suite.find(name)) for name in suite.PARTS)


def test_what_was_not_measured_is_null_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: Plan) -> dict[str, float | None]:
        raise BenchmarkError("there is no data")

    parts = {"one": broken, "two": lambda _: {"env_mb": 377.123456}}
    known: dict[str, dict[str, float | None]] = {"three": {"startup_s": 1.0}}
    plan = Plan(tmp_path, tmp_path, tmp_path, 1.0, 1, 1.0, 1.0)
    figures = suite.measure(plan, ["one", "two", "three"], known, find=lambda name: parts[name])
    assert {key: value for key, value in figures.items() if value is not None} == {"env_mb": 377.1235, "startup_s": 1.0}
    assert set(known) == {"two", "three"}
    assert "there is no data" in capsys.readouterr().out
    told = suite.table(figures)
    assert "not reached" not in told
    assert "not reached" in suite.table(figures | {"env_mb": 401.0})


def test_one_part_over_the_command_line_and_its_figures_again(
    bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bundle", str(bundle_dir), "--folder", str(tmp_path), "--only", "startup", "--starts", "1"]
    assert suite.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(figures) == list(suite.KEYS)
    assert [key for key, value in figures.items() if value is not None] == ["startup_s"]
    assert 0 < figures["startup_s"] < 120
    assert suite.main([*arguments, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--rounds", "many"], ["--only", "nothing"]])
def test_a_wrong_argument_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(wrong)
    assert f"'{wrong[1]}'" in capsys.readouterr().err


def test_turns_alternate_and_a_ratio_is_the_median_of_the_rounds() -> None:
    order: list[str] = []
    given = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(each) for name, each in given.items()} == {"a": 3, "b": 3}
    assert ratio([1.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


@pytest.fixture
def server() -> Iterator[str]:
    """Answers 200, 200, 429, then hangs up, and so on: one byte of the body at a time."""
    ready, answered = threading.Event(), 0
    addresses: list[str] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        while head := await reader.read(65_536):
            assert head.startswith(b"POST /path HTTP/1.1\r\nHost: here\r\n")
            answered += 1
            if answered % 4 == 0:
                break
            status = b"429 Too Many" if answered % 4 == 3 else b"200 OK"
            for piece in (b"HTTP/1.1 " + status + b"\r\nContent-", b"Length: 4\r\n\r\n", b"bo", b"dy"):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as listening:
            addresses.append(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            stops.append(lambda: loop.call_soon_threadsafe(ended.set))
            ready.set()
            await ended.wait()
            await asyncio.sleep(0)

    stops: list = []
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(20)
    yield addresses[0]
    stops[0]()
    thread.join(20)


def test_the_generator_counts_what_it_was_answered(server: str) -> None:
    asked = [request("here", "/path", b"{}")]
    with Generator(server) as load:
        open_ = load.open(asked, rate=400.0, seconds=0.1)
        assert open_.unanswered == 10
        assert open_.statuses == {200: 20, 429: 10}
        assert len(open_.latencies) == 20
        assert open_.sample == b"body"
        assert 0 < open_.median <= open_.latency(99)
        closed = load.closed(asked, clients=3, seconds=0.2)
        assert closed.unanswered == 3, "each went on until it was hung up on"
        assert set(closed.statuses) <= {200, 429}


def test_the_generator_says_what_went_wrong(free_port: int) -> None:
    with Generator(f"http://127.0.0.1:{free_port}") as load, pytest.raises(ConnectionError):
        load.closed([request("here", "/path", b"")], clients=1, seconds=0.1)
