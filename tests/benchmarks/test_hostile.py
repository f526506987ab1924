"""A part of `make hostile`: what takes next to no time, on a server with a tiny bundle."""

from pathlib import Path

import pytest

from benchmarks import attacks, hostile, hostile_floods, hostile_jobs, hostile_media
from service.api.problems import _OF_HTTP, STATUS
from tests import tiny_bundle

_QUICK_BYTES = 2_000_000


@pytest.mark.full
def test_every_attack_that_is_small_is_answered_as_it_should_be(bundle_dir: Path, tmp_path: Path) -> None:
    every = [
        *attacks.of_http(),
        *attacks.of_forms(),
        *attacks.of_json("tiny", tiny_bundle.DIMENSIONS),
        *attacks.of_jobs(),
        *attacks.of_damaged_files(seed=1, cuts=1, flips=1),
    ]
    small = [each for each in every if len(each.wire) < _QUICK_BYTES]
    assert len(small) > 450
    findings = hostile.attack_all(bundle_dir, tmp_path / "store", small)
    assert findings.tried == len(small)
    assert findings.bad == 0, findings
    assert findings.refused_as_documented + findings.answered_as_valid == len(small)


def test_what_is_right_is_a_code_that_the_service_has() -> None:
    codes = {code for _, code in STATUS.values()} | {code for code, _ in _OF_HTTP.values()}
    codes |= {"headers_too_large", "model_not_found"}
    right = {code for each in (*attacks.of_http(), *attacks.of_forms()) for code in each.right}
    makers = (hostile_media.webps, hostile_media.polyglots, hostile_media.bmps, hostile_media.tiffs, hostile_media.wavs)
    right |= {code for make in makers for code, _ in make().values()}
    assert right <= codes | {hostile_media.OK}
    of_jobs = {code for each in attacks.of_jobs() for right in each.right for code in right.split("+")}
    assert of_jobs <= codes | {hostile_media.OK, "unusable_input", "invalid_item", "malformed_item"}


def test_the_same_seed_makes_the_same_attacks() -> None:
    first, second = (list(attacks.of_damaged_files(seed=3, cuts=1, flips=2)) for _ in range(2))
    other = list(attacks.of_damaged_files(seed=4, cuts=1, flips=2))
    assert first == second != other


@pytest.mark.parametrize("wire", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc"])
def test_half_an_answer_is_none(wire: bytes) -> None:
    assert not hostile._whole(wire)


def test_a_body_that_is_no_problem_is_told_apart() -> None:
    assert hostile._code(b'{"code":"x"}') == "x"
    assert hostile._code(b'{"error":{"code":"y"}}') == "y"
    assert hostile._code(b"Internal Server Error") == hostile._code(b'"x"') == "no problem of ours"


def test_what_escapes_is_found(tmp_path: Path) -> None:
    assert hostile._escaped(tmp_path / "store") == 0
    (tmp_path / f"x{hostile_jobs.TRACE}").write_text("")
    assert hostile._escaped(tmp_path / "store") == 1


def test_a_flood_of_one_client_leaves_another_served_and_the_server_ends(bundle_dir: Path, tmp_path: Path) -> None:
    maps = hostile_floods.FLOODS[0]
    with hostile_floods.serving(bundle_dir, tmp_path, count=100, wide=0) as (server, keys, dimensions):
        told = hostile_floods.flood(server, keys, maps, dimensions)
        assert len(told.answers) == 40 and {code for code, _ in told.answers} <= maps.right
        assert {code for _, code, _ in told.neighbour} == {hostile_floods.OK}
        assert hostile_floods.ended_in(server, keys, dimensions, [maps]) < hostile_floods.ENDED_S


@pytest.mark.full
def test_every_flood_is_of_requests_that_are_read() -> None:
    for one in hostile_floods.FLOODS:
        wires = list(one.wires(tiny_bundle.DIMENSIONS))
        assert wires and len(wires) == len(set(wires))
        for wire in wires:
            head, _, body = wire.partition(b"\r\n\r\n")
            assert len(body) < 20_000_000 and b"Bearer KEY" in head
            assert not body or int(head.rpartition(b"Content-Length: ")[2]) == len(body)
