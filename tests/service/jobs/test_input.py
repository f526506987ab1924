"""Inputs of every kind become numbered items; hostile archives; JSONL and tars of anything (property tests)."""

import contextlib
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.errors import DiskFull
from service.jobs.input import Bounds, Piece, Reader, Unusable, build
from service.runtime.disk import Disk
from service.settings import Limits
from tests.service.jobs.archives import END, special, tar

BOUNDS = Bounds(Limits(), items=10_000)
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces(form: Any, source: Path, bounds: Bounds = BOUNDS) -> list[Piece]:
    """All that is in an input, read chunk by chunk."""
    plan = source.parent / "plan.sqlite3"
    count = build(form, source, plan, bounds, threading.Event(), Disk(source.parent, 0))
    reader = Reader(source, plan)
    try:
        found: list[Piece] = []
        while length := reader.length(len(found), 7, 1_000):
            found += reader.pieces(len(found), length)
        assert len(found) == count
        return found
    finally:
        reader.close()


def of(form: Any, data: bytes, folder: Path, bounds: Bounds = BOUNDS) -> list[Piece]:
    source = folder / "input"
    source.write_bytes(data)
    return pieces(form, source, bounds)


# JSONL


@QUIET
@given(lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line)), ended=st.booleans())
@example(lines=[b"\xef\xbb\xbf{}", b"", b" \t\r", b"x"], ended=False)
@example(lines=[b"\xef\xbb\xbf"], ended=True)
def test_any_bytes_are_lines(lines: list[bytes], ended: bool, tmp_path: Path) -> None:
    """Return what a reader in two lines of Python finds, whatever the bytes are."""
    data = b"\n".join(lines) + b"\n" * ended
    first = data.removeprefix(b"\xef\xbb\xbf")
    expected = [(n, line) for n, line in enumerate(first.split(b"\n"), 1) if line.strip()]
    found = [(piece.line, piece.data.removesuffix(b"\n")) for piece in of("jsonl", data, tmp_path)]
    assert found == expected


def test_a_line_that_is_too_long_is_refused_alone(tmp_path: Path) -> None:
    bounds = Bounds(Limits(body_bytes=200_000), items=10)
    first, long, last = of("jsonl", b"{}\n" + b"x" * 200_001 + b"\n[1]", tmp_path, bounds)
    assert (first.kind, first.data) == ("line", b"{}\n")
    assert (long.kind, long.line, long.data) == ("refused", 2, b"")
    assert "200000" in long.detail
    assert (last.line, last.data) == (3, b"[1]")


def test_an_input_of_too_many_items_is_unusable(tmp_path: Path) -> None:
    bounds = Bounds(Limits(), items=3)
    assert len(of("jsonl", b"1\n2\n3\n", tmp_path, bounds)) == 3
    with pytest.raises(Unusable, match="more than 3 items"):
        of("jsonl", b"1\n2\n3\n4\n", tmp_path, bounds)


def test_a_chunk_has_so_many_bytes_or_one_item(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"12345\n" * 4 + b"x" * 50 + b"\n123\n")
    count = build("jsonl", tmp_path / "input", tmp_path / "plan", BOUNDS, threading.Event(), Disk(tmp_path, 0))
    reader = Reader(tmp_path / "input", tmp_path / "plan")
    assert (count, [reader.length(first, 3, 14) for first in range(7)]) == (6, [2, 2, 2, 1, 1, 1, 0])
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.length(0, 1, 1)


def test_planning_ends_when_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"1\n" * 5_000)
    stopped = threading.Event()
    stopped.set()
    assert build("jsonl", tmp_path / "input", tmp_path / "plan", BOUNDS, stopped, Disk(tmp_path, 0)) < 5_000


@pytest.mark.parametrize(("form", "data"), [("jsonl", b"{}\n"), ("tar", tar({"a.txt": b"a"}))])
def test_a_plan_that_the_disk_has_no_room_for_is_no_fault_of_the_input(form: Any, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(data)
    with pytest.raises(DiskFull):
        build(form, tmp_path / "input", tmp_path / "plan", BOUNDS, threading.Event(), Disk(tmp_path, 2**62))


# Tar

NAME = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=30).filter(
    lambda part: part.strip() and not part.startswith(".") and not part.lower().endswith((".json", ".jsonl"))
)


@QUIET
@given(
    files=st.dictionaries(st.lists(NAME, min_size=1, max_size=3).map("/".join), st.binary(max_size=600), max_size=8),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_the_files_of_a_tar_are_its_items(files: dict[str, bytes], format: int, tmp_path: Path) -> None:
    found = of("tar", tar(files, format=format), tmp_path)
    assert {piece.name: piece.data for piece in found} == {
        name: data for name, data in files.items() if not name.startswith("/")
    }
    assert all(piece.kind == ("text" if piece.name.lower().endswith((".txt", ".md")) else "media") for piece in found)


@QUIET
@given(
    data=st.binary(max_size=3_000)
    | st.tuples(st.binary(max_size=1_500), st.integers(0, 5_000), st.integers(0, 255)).map(
        lambda given: (
            lambda whole: whole[: given[1] % len(whole)] + bytes([given[2]]) + whole[given[1] % len(whole) + 1 :]
        )(tar({"a.png": given[0], "b.txt": b"b", "c/d.wav": given[0]}))
    )
)
def test_damaged_bytes_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    """Never another exception, an endless loop, or a name that leads out."""
    found: list[Piece] = []
    with contextlib.suppress(Unusable):
        found = of("tar", data, tmp_path)
    for piece in found:
        assert piece.kind == "refused" or not (piece.name.startswith("/") or ".." in piece.name.split("/"))


@pytest.mark.parametrize(
    ("member", "detail"),
    [
        (special("../../etc/passwd", tarfile.REGTYPE), "leads out"),
        (special("a/../../b", tarfile.REGTYPE), "leads out"),
        (special("/etc/passwd", tarfile.REGTYPE), "leads out"),
        (special("link", tarfile.SYMTYPE, "/etc/passwd"), "not a plain file"),
        (special("link", tarfile.LNKTYPE, "/etc/passwd"), "not a plain file"),
        (special("null", tarfile.CHRTYPE), "not a plain file"),
        (special("disk", tarfile.BLKTYPE), "not a plain file"),
        (special("pipe", tarfile.FIFOTYPE), "not a plain file"),
        (special("sparse", tarfile.GNUTYPE_SPARSE), "not a plain file"),
    ],
    ids=["up", "up later", "absolute", "symlink", "hard link", "device", "disk", "pipe", "sparse"],
)
def test_what_is_dangerous_is_refused_and_the_rest_read(member: bytes, detail: str, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path.parent))
    [refused, good] = of("tar", member + tar({"good.txt": b"x"}), tmp_path)
    assert refused.kind == "refused" and detail in refused.detail
    assert (good.kind, good.name, good.data) == ("text", "good.txt", b"x")
    assert sorted(os.listdir(tmp_path)) == ["input", "plan.sqlite3"]
    assert sorted(os.listdir(tmp_path.parent)) == before


def test_a_file_that_is_too_large_is_refused_by_its_header(tmp_path: Path) -> None:
    small = Bounds(Limits(image_bytes=10, audio_bytes=20, text_chars=2), items=10)
    found = of("tar", tar({"a.png": bytes(21), "b.txt": bytes(13), "c.wav": bytes(20)}), tmp_path, small)
    assert [piece.kind for piece in found] == ["refused", "refused", "media"]
    assert "20 bytes" in found[0].detail and "12 bytes" in found[1].detail


def test_headers_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    """tarfile reads the whole of an extended header or of a long name."""
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 3 * 2**20
        with pytest.raises(Unusable, match=r"no tar|damaged"):
            of("tar", header.tobuf(tarfile.GNU_FORMAT) + bytes(header.size) + tar({"a.txt": b"a"}), tmp_path)
    # One after the other, each small: what tarfile keeps of them for the whole archive is thrown away.
    many = b"".join(tarfile.TarInfo.create_pax_global_header({f"key{number}": "x" * 100}) for number in range(200))
    assert [piece.name for piece in of("tar", many + tar({"a.txt": b"a"}), tmp_path)] == ["a.txt"]


def test_a_size_below_zero_does_not_go_round_for_ever(tmp_path: Path) -> None:
    header = bytearray(special("a.txt", tarfile.REGTYPE))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)  # base 256, as GNU tar writes large sizes
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(Unusable):
        of("tar", tar({"b.txt": b"b"})[:1024] + bytes(header) + END, tmp_path)


@pytest.mark.parametrize(("body", "name"), [(b"PK\3\4" + bytes(600), "a ZIP archive"), (b"BZh91AY", "a bzip2 archive")])
def test_another_archive_is_called_by_its_name(tmp_path: Path, body: bytes, name: str) -> None:
    with pytest.raises(Unusable, match=f"no tar, plain or gzipped. This is {name}"):
        of("tar", body, tmp_path)


def test_an_archive_that_is_cut_off_or_damaged_is_refused_as_a_whole(tmp_path: Path) -> None:
    whole = tar({"a.txt": b"a" * 600, "b.txt": b"b"})
    for end in (100, 512, 600, 1_000, 1_536, 1_600, 2_048):  # in a header, in a file, between two, before the mark
        with pytest.raises(Unusable, match=r"no tar|damaged|cut off"):
            of("tar", whole[:end], tmp_path)
    wrong = bytearray(whole)
    wrong[1_536 + 10] ^= 0xFF  # tarfile by itself takes a bad header for the end
    with pytest.raises(Unusable, match="damaged"):
        of("tar", bytes(wrong), tmp_path)
    assert of("tar", END, tmp_path) == []


def test_metadata_come_from_files_beside_and_from_the_table(tmp_path: Path) -> None:
    table = b'{"file_name": "a/b.png", "set": "table", "n": 1}\n\n{"n": 1}\nnonsense\n{"file_name": "./c.txt", "k": 2}'
    files = {"a/b.json": b'{"set": "beside"}', "a/b.png": b"B", "c.txt": b"C", "metadata.jsonl": table}
    files |= {"d.png.json": b'{"d": 1}', "d.json": b'{"d": 2}', "d.png": b"D", "e.json": bytes(20_000)}
    found = of("tar", tar(files), tmp_path)
    assert {
        piece.name: [orjson.loads(each) for each in piece.metadata] for piece in found if piece.kind != "refused"
    } == {
        "a/b.png": [{"set": "table", "n": 1}, {"set": "beside"}],
        "c.txt": [{"k": 2}],
        "d.png": [{"d": 1}],
    }
    refused = [(piece.name, piece.detail) for piece in found if piece.kind == "refused"]
    assert [name for name, _ in refused] == ["metadata.jsonl", "metadata.jsonl", "e.json"]
    assert refused[0][1].startswith("line 3 ") and refused[1][1].startswith("line 4 ")


def test_hidden_files_and_folders_are_no_items(tmp_path: Path) -> None:
    files = {"._a.png": b"a", ".git/b.png": b"b", "c/.DS_Store": b"c", "./d.txt": b"d"}
    assert [piece.name for piece in of("tar", tar(files), tmp_path)] == ["d.txt"]


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    archive = tar({"a\xe9.txt": b"a", "b.txt": b"b"}, format=tarfile.GNU_FORMAT).replace("é".encode(), b"\xe9\xff")
    header = bytearray(archive[:512])
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    refused, good = of("tar", bytes(header) + archive[512:], tmp_path)
    assert refused.kind == "refused" and "UTF-8" in refused.detail
    refused.name.encode()
    assert good.name == "b.txt"
