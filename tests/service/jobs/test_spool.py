"""Uploads: whole, too large, gzip, bombs, cut off."""

import asyncio
import gzip
import hashlib
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import BodyTooLarge, MalformedRequest, NotReady
from service.jobs.input import spool
from service.runtime.disk import Disk
from service.runtime.workers import Workers


async def blocks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def spooled(data: bytes, path: Path, most: int = 2**30, size: int = 65_536) -> bytes:
    path.unlink(missing_ok=True)
    with closing(Workers("spool")) as threads:
        digest = asyncio.run(spool(blocks(data, size), path, most, Disk(path.parent, 0), threads))
    assert digest == hashlib.sha256(data).hexdigest()
    return path.read_bytes()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    data=st.binary(max_size=5_000).filter(lambda data: not data.startswith(b"\x1f\x8b")),
    size=st.integers(1, 700),
    parts=st.integers(1, 3),
    padding=st.integers(0, 600),
)
def test_what_comes_is_on_disk_unpacked(data: bytes, size: int, parts: int, padding: int, tmp_path: Path) -> None:
    assert spooled(data, tmp_path / "a", size=size) == data
    packed = gzip.compress(data) * parts + bytes(padding)
    assert spooled(packed, tmp_path / "b", size=size) == data * parts


def test_more_than_allowed_is_413_packed_or_not(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    for sent in (data, gzip.compress(data)):
        assert len(spooled(sent, tmp_path / "a", most=len(data))) == len(data)
        with pytest.raises(BodyTooLarge, match=str(len(data) - 1)):
            spooled(sent, tmp_path / "a", most=len(data) - 1)


def test_a_bomb_is_refused_long_before_it_is_unpacked(tmp_path: Path) -> None:
    """300 MB of zeros in 300 kB."""
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    with pytest.raises(BodyTooLarge, match="100 times"):
        spooled(bomb, tmp_path / "a", most=2**40)
    assert (tmp_path / "a").stat().st_size < 50 * 2**20


@pytest.mark.parametrize("cut", [3, 20, -1])
def test_gzip_that_is_cut_off_or_damaged_is_400(cut: int, tmp_path: Path) -> None:
    packed = gzip.compress(b"x" * 1_000)
    with pytest.raises(MalformedRequest, match="cut off"):
        spooled(packed[:cut], tmp_path / "a")
    with pytest.raises(MalformedRequest, match="damaged"):
        spooled(packed + b"more", tmp_path / "b")


def test_gzip_of_many_parts_that_hold_next_to_nothing_is_400(tmp_path: Path) -> None:
    parts = gzip.compress(b"") * 200_000
    with pytest.raises(MalformedRequest, match="too many parts"):
        spooled(parts, tmp_path / "a")
    honest = [gzip.compress(random.Random(each).randbytes(2_000)) for each in range(2_500)]
    assert len(spooled(b"".join(honest), tmp_path / "b")) == 2_500 * 2_000


def test_a_disk_that_takes_nothing_is_503(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Workers("spool")) as threads, pytest.raises(NotReady, match="cannot be written"):
        asyncio.run(spool(blocks(b"x", 1), tmp_path / "absent" / "a", 10, Disk(tmp_path, 0), threads))
    assert "cannot be written" in caplog.text
