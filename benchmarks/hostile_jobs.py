"""Inputs of bulk jobs that are made to hurt: tars, JSONL and gzip.

Each function returns {name: (what is sent, what is right for it)}. What is right is the code of the problem that
refuses the request, or that of the job as a whole; or else what became of its items: their codes in order, `ok` for
those that were stored, with a + between. Tars are written header by header, since tarfile makes none that lie.
"""

import functools
import gzip
import io
import json
import random
import tarfile
from collections.abc import Mapping

from benchmarks import hostile_media as media

Cases = Mapping[str, tuple[bytes, str]]

OK, UNUSABLE, REFUSED, UNREADABLE = "ok", "unusable_input", "invalid_item", "malformed_item"
LARGE, MALFORMED = "body_too_large", "malformed_request"
MIXED, INVALID = f"{REFUSED}+{OK}", f"invalid_input+{OK}"
STRANGE, EMPTY = "unsupported_media", "undecodable_media"
END = bytes(1024)
_BLOCK = 512
TRACE = "isthmus-hostile-trace"
"""The word in the name of everything that a job would leave where it must not be, and in what it must not read."""


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def header(
    name: str | bytes, size: int | bytes = 0, kind: bytes = b"0", link: str = "", *, checksum: int | None = None
) -> bytes:
    """One block, in the format of GNU. A size as bytes is what stands in its field."""
    stated = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    named = name if isinstance(name, bytes) else name.encode()
    fields = named[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + stated + b"00000000000\0"
    rest = kind + link.encode()[:100].ljust(100, b"\0") + b"ustar  \0"
    block = (fields + b" " * 8 + rest).ljust(_BLOCK, b"\0")
    said = sum(block) if checksum is None else checksum
    return block[:148] + b"%06o\0 " % said + block[156:]


def member(name: str | bytes, data: bytes = b"", kind: bytes = b"0", link: str = "") -> bytes:
    return header(name, len(data), kind, link) + data + bytes(-len(data) % _BLOCK)


def pax(records: Mapping[str, str], kind: bytes = b"x") -> bytes:
    """An extended header, of the next member or (`g`) of all that follow."""
    lines = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + len(str(len(line)))
        length += len(str(length + len(line) - len(line))) - len(str(len(line)))
        lines += b"%d%b" % (length, line)
    return member("pax", lines, kind)


_TEXT = b"a text"
_GOOD = member("good.txt", b"a good text")


def _beside(part: bytes) -> bytes:
    return part + _GOOD + END


@functools.cache
def archives() -> Cases:
    return {**_damaged(), **_named(), **_linked(), **_filled()}


def _damaged() -> Cases:
    base256, below = b"\x80" + (2**60).to_bytes(11, "big"), b"\xff" * 11 + b"\0"
    return {
        "of nothing": (b"", UNUSABLE),
        "of a byte": (b"x", UNUSABLE),
        "of an end alone": (END, OK),
        "of text": (b"this is no tar " * 100, UNUSABLE),
        "of a zip": (b"PK\3\4" + bytes(4_000), UNUSABLE),
        "of noise": (_noise(10_000), UNUSABLE),
        "of 2**60 bytes stated": (header("a.png", base256) + _TEXT, UNUSABLE),
        "of 8 GB stated": (header("a.png", 8**11 - 1) + _TEXT, UNUSABLE),
        "of 8 GB stated, of a text": (header("a.txt", 8**11 - 1) + _TEXT, UNUSABLE),
        "of 8 GB of metadata stated": (header("metadata.jsonl", 8**11 - 1) + _TEXT, UNUSABLE),
        "of a size below zero": (header("a.png", below) + _TEXT + bytes(506) + END, UNUSABLE),
        "of a size that is no number": (header("a.png", b"9zzzzzzzzzz") + END, UNUSABLE),
        "of a wrong checksum": (header("a.png", 0, checksum=1) + END, UNUSABLE),
        "of a wrong checksum later": (_GOOD + header("a.png", 0, checksum=1) + END, UNUSABLE),
        "cut off in a header": (_GOOD + header("a.png", 5)[:200], UNUSABLE),
        "cut off in a member": (header("a.png", 5_000) + _TEXT, UNUSABLE),
        "without an end": (_GOOD, UNUSABLE),
        "with junk after its end": (_GOOD + END + _noise(50_000), OK),
    }


def _named() -> Cases:
    return {
        "of 20,000 empty members": (b"".join(header(f"{number}.png") for number in range(20_000)) + END, EMPTY),
        "of 20,000 folders": (_beside(b"".join(header(f"{number}/", kind=b"5") for number in range(20_000))), OK),
        "of 5,000 members of one name": (member("same.txt", _TEXT) * 5_000 + END, OK),
        "of 5,000 names within each other": (_beside(member("/".join("a" * 45) + "/b.txt", _TEXT)), OK),
        "that leads up": (_beside(member(f"../../{TRACE}.txt", _TEXT)), MIXED),
        "that leads up later": (_beside(member(f"a/../../../{TRACE}.txt", _TEXT)), MIXED),
        "of an absolute name": (_beside(member(f"/tmp/{TRACE}.txt", _TEXT)), MIXED),
        "of an absolute name of two slashes": (_beside(member(f"//tmp/{TRACE}.txt", _TEXT)), MIXED),
        "that leads up, by a long name": (
            _beside(member("././@LongLink", b"../" * 200 + TRACE.encode() + b".txt\0", b"L") + member("x.txt", _TEXT)),
            MIXED,
        ),
        "that leads up, by an extended name": (
            _beside(pax({"path": f"../../{TRACE}.txt"}) + member("x.txt", _TEXT)),
            MIXED,
        ),
        "of an absolute name for all": (pax({"path": f"/tmp/{TRACE}.txt"}, b"g") + member("x.txt") + END, REFUSED),
        "of backslashes that lead up": (_beside(member(f"..\\..\\{TRACE}.txt", _TEXT)), OK),
        "of a drive": (_beside(member(f"C:\\{TRACE}.txt", _TEXT)), OK),
        "of a name that is no UTF-8": (_beside(member(b"\xff\xfe.txt", _TEXT)), MIXED),
        "of a name of 100,000 letters": (_beside(pax({"path": "a" * 100_000}) + member("x.txt", _TEXT)), MIXED),
        "of a name that breaks lines": (_beside(member("a\r\nSet-Cookie: b.txt", _TEXT)), MIXED),
        "of a hidden name": (_beside(member(f".{TRACE}", _TEXT)), OK),
    }


def _linked() -> Cases:
    return {
        "of a symlink to a secret": (_beside(member("a.txt", kind=b"2", link="/etc/passwd")), MIXED),
        "of a symlink and a file through it": (
            member("out", kind=b"2", link="/tmp") + member(f"out/{TRACE}.txt", _TEXT) + END,
            MIXED,
        ),
        "of a hard link to a secret": (_beside(member("a.txt", kind=b"1", link="/etc/passwd")), MIXED),
        "of a hard link out of it": (_beside(member("a.txt", kind=b"1", link="../../../../etc/passwd")), MIXED),
        "of a link to itself": (_beside(member("a.txt", kind=b"2", link="a.txt")), MIXED),
        "of a device": (_beside(member("null.txt", kind=b"3")), MIXED),
        "of a disk": (_beside(member("disk.txt", kind=b"4")), MIXED),
        "of a pipe": (_beside(member("pipe.txt", kind=b"6")), MIXED),
        "of a sparse file": (_beside(header("s.txt", 0, b"S")), MIXED),
        "of a sparse file of 2**60 bytes": (
            _beside(
                pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**60)})
                + member("s.txt", b"1\n0\n1\n" + bytes(506))
            ),
            MIXED,
        ),
        "of a sparse map of 1,000,000 lines": (
            _beside(
                pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"})
                + member("s.txt", b"1000000\n" + b"0\n1\n" * 1_000_000)
            ),
            UNUSABLE,
        ),
        "of a sparse header of noise": (
            _beside(pax({"GNU.sparse.map": "0,1," * 100_000}) + member("s.txt", _TEXT)),
            UNUSABLE,
        ),
        "of an extended header of 10 MB": (pax({"comment": "x" * 10_000_000}) + member("a.txt", _TEXT) + END, UNUSABLE),
        "of 20,000 extended records": (
            _beside(pax({f"k{number}": "v" for number in range(20_000)}) + member("a.txt", _TEXT)),
            OK,
        ),
        "of 5,000 extended headers for all": (_beside(pax({"comment": "x"}, b"g") * 5_000), UNUSABLE),
        "of an extended header that is cut short": (member("pax", b"99999 path=a\n", b"x") + _GOOD + END, REFUSED),
        "of an extended header of no numbers": (member("pax", b"x path=a\n", b"x") + _GOOD + END, OK),
        "of an extended size of 2**70": (pax({"size": str(2**70)}) + member("a.txt", _TEXT) + END, UNUSABLE),
        "of an extended size below zero": (pax({"size": "-512"}) + member("a.txt", _TEXT) + END, UNUSABLE),
        "of a long name of 8 GB": (header("././@LongLink", 8**11 - 1, b"L") + _TEXT, UNUSABLE),
        "of 2,000 long names": (member("././@LongLink", b"a.txt\0", b"L") * 2_000 + _GOOD + END, UNUSABLE),
    }


def _filled() -> Cases:
    honest = io.BytesIO()
    with tarfile.open(fileobj=honest, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty.png"))
    picture = media.picture(size=(8, 8))
    return {
        "of an archive in it": (_beside(member("inner.tar", honest.getvalue())), f"{OK}+{STRANGE}"),
        "of an archive that inflates": (_beside(member("inner.png", _gzip(bytes(10**7)))), f"{OK}+{STRANGE}"),
        "of a picture that inflates": (
            _beside(
                member(
                    "a.png",
                    media.PNG_SIGNATURE + media.ihdr(100_000, 100_000) + media.chunk(b"IDAT") + media.chunk(b"IEND"),
                )
            ),
            f"media_too_large+{OK}",
        ),
        "of a picture called a text": (_beside(member("a.txt", picture)), f"{UNREADABLE}+{OK}"),
        "of a text of 1 MB": (_beside(member("a.txt", b"a" * 1_000_000)), MIXED),
        "of a file of 26 MB": (_beside(member("a.png", bytes(26_000_000))), f"{OK}+{STRANGE}"),
        "of metadata of 1 MB": (
            member("a.png", picture) + member("a.json", json.dumps({"k": "v" * 1_000_000}).encode()) + END,
            MIXED,
        ),
        "of metadata that are a list": (member("a.png", picture) + member("a.json", b"[]") + END, UNREADABLE),
        "of metadata of depth": (member("a.png", picture) + member("a.json", b'{"a":' * 3_000) + END, UNREADABLE),
        "of metadata that are no number": (member("a.png", picture) + member("a.json", b'{"a":NaN}') + END, UNREADABLE),
        "of a table of a line of 20 MB": (_beside(member("metadata.jsonl", b"x" * 20_000_000)), MIXED),
        "of a table of 20,000 lines of nothing": (_beside(member("metadata.jsonl", b"{}\n" * 20_000)), MIXED),
        "of a table of depth": (_beside(member("metadata.jsonl", b"[" * 60_000)), MIXED),
        "of a table that leads up": (
            _beside(member("metadata.jsonl", json.dumps({"file_name": f"../{TRACE}.txt"}).encode())),
            OK,
        ),
        "of gzip in gzip": (_gzip(_gzip(_GOOD + END)), UNUSABLE),
        "of gzip that inflates": (_gzip(bytes(2**26)), LARGE),
        "of gzip of many empty ones": (_gzip(b"") * 200_000, MALFORMED),
        "of gzip that is cut off": (_gzip(_GOOD + END)[:-12], MALFORMED),
        "of gzip that is damaged": (_gzip(_noise(9_000))[:4_000] + bytes(4_000), MALFORMED),
        "of gzip with a name that leads up": (_named_gzip(_GOOD + END), OK),
    }


def _named_gzip(data: bytes) -> bytes:
    written = io.BytesIO()
    with gzip.GzipFile(f"../../{TRACE}", "wb", fileobj=written, mtime=0) as file:
        file.write(data)
    return written.getvalue()


def _line(**body: object) -> bytes:
    return json.dumps({"id": "x", "text": "a text"} | body).encode() + b"\n"


_GOOD_LINE, _MIXED_MALFORMED = _line(id="good"), f"{UNREADABLE}+{OK}"


def _before_good(*bad: bytes) -> bytes:
    return b"\n".join(bad) + b"\n" + _GOOD_LINE


@functools.cache
def lines() -> Cases:
    return {**_no_objects(), **_wrong_fields()}


def _no_objects() -> Cases:
    return {
        "of nothing": (b"", OK),
        "of 1,000,000 blank lines": (b"\n" * 1_000_000, OK),
        "of a line of 21 MB": (_before_good(b'{"text":"' + b"a" * 21_000_000 + b'"}'), MIXED),
        "of a line of 21 MB without an end": (_GOOD_LINE + b"a" * 21_000_000, "malformed_item+ok"),
        "of a text of 19 MB": (_before_good(_line(text="a" * 19_000_000).rstrip()), INVALID),
        "of a line of 19 MB of objects": (
            _before_good(b'{"id":"x","text":[' + b"{}," * 6_000_000 + b"{}]}"),
            _MIXED_MALFORMED,
        ),
        "of 1,000,000 brackets": (_before_good(b"[" * 1_000_000), _MIXED_MALFORMED),
        "of objects to a depth of 100,000": (
            _before_good(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
            _MIXED_MALFORMED,
        ),
        "of lists to a depth of 1,000": (
            _before_good(b'{"id":"x","text":' + b"[" * 1_000 + b"]" * 1_000 + b"}"),
            MIXED,
        ),
        "of NaN": (_before_good(b'{"id":"x","vector":[NaN]}'), _MIXED_MALFORMED),
        "of infinity": (_before_good(b'{"id":"x","vector":[Infinity]}'), _MIXED_MALFORMED),
        "of 1e999": (_before_good(b'{"id":"x","vector":[1e999]}'), _MIXED_MALFORMED),
        "of a vector of another length": (_before_good(b'{"id":"x","vector":[1.0,2.0]}'), INVALID),
        "of a vector of zeros": (_before_good(_line(text=None, vector=[0.0] * 384).rstrip()), INVALID),
        "of 1,000,000 numbers": (_before_good(b'{"id":"x","vector":[' + b"1," * 1_000_000 + b"1]}"), MIXED),
        "of a list": (_before_good(b'["a"]'), _MIXED_MALFORMED),
        "of a text": (_before_good(b'"a"'), _MIXED_MALFORMED),
        "of a number": (_before_good(b"1"), _MIXED_MALFORMED),
        "of null": (_before_good(b"null"), _MIXED_MALFORMED),
        "of two objects": (_before_good(b"{}{}"), _MIXED_MALFORMED),
        "of half an object": (_before_good(b'{"id":"x","te'), _MIXED_MALFORMED),
    }


def _wrong_fields() -> Cases:
    return {
        "of an id that is a number": (_before_good(_line(id=1).rstrip()), MIXED),
        "of an id that is empty": (_before_good(_line(id="").rstrip()), MIXED),
        "of an id of 1 MB": (_before_good(_line(id="i" * 1_000_000).rstrip()), MIXED),
        "of an id with a NUL": (_before_good(_line(id="a\0b").rstrip()), MIXED),
        "of an id that leads up": (_before_good(_line(id=f"../../{TRACE}").rstrip()), OK),
        "of a lone surrogate": (_before_good(b'{"id":"\\ud800","text":"a"}'), _MIXED_MALFORMED),
        "of what is no UTF-8": (_before_good(b'{"id":"x","text":"\xff\xfe"}'), _MIXED_MALFORMED),
        "of UTF-16": (_GOOD_LINE.decode().encode("utf-16"), UNREADABLE),
        "of bytes of nothing": (_before_good(bytes(100_000)), _MIXED_MALFORMED),
        "of a mark of order": (b"\xef\xbb\xbf" + _GOOD_LINE, OK),
        "of a text that is a list": (_before_good(_line(text=["a"]).rstrip()), MIXED),
        "of a text that is an object": (_before_good(_line(text={"a": 1}).rstrip()), MIXED),
        "of a picture that is no base64": (_before_good(b'{"id":"x","image":"!!!"}'), f"{OK}+undecodable_media"),
        "of a picture that is a text": (_before_good(b'{"id":"x","image":"aGVsbG8="}'), f"{OK}+{STRANGE}"),
        "of a file by its path": (_before_good(b'{"id":"x","image":"file:///etc/passwd"}'), f"{OK}+undecodable_media"),
        "of a file of a form": (_before_good(b'{"id":"x","file":"/etc/passwd"}'), MIXED),
        "of a URL": (_before_good(b'{"id":"x","image":{"url":"http://169.254.169.254/"}}'), MIXED),
        "of an unknown field": (_before_good(_line(colour="red").rstrip()), MIXED),
        "of 100,000 unknown fields": (
            _before_good(_line(**{f"k{number}": 1 for number in range(100_000)}).rstrip()),
            MIXED,
        ),
        "of metadata that are a list": (_before_good(_line(metadata=[]).rstrip()), MIXED),
        "of metadata of 1 MB": (_before_good(_line(metadata={"k": "v" * 1_000_000}).rstrip()), MIXED),
        "of metadata of depth": (
            _before_good(b'{"id":"x","text":"a","metadata":{"a":' + b"[" * 900 + b"]" * 900 + b"}}"),
            MIXED,
        ),
        "of a collection that leads up": (_before_good(_line(collection="../x").rstrip()), MIXED),
        "of 20,000 lines of {}": (b"{}\n" * 20_000, REFUSED),
        "of 20,000 lines of noise": (
            b"".join(_noise(20, number).replace(b"\n", b"x") + b"\n" for number in range(20_000)),
            UNREADABLE,
        ),
        "of no item": (_before_good(b'{"id":"x"}'), MIXED),
        "of everything at once": (_before_good(_line(image="aGVsbG8=", vector=[1.0]).rstrip()), MIXED),
        "of gzip that inflates": (_gzip(b"\n" * 2**26), LARGE),
        "of gzip of many empty ones": (_gzip(b"") * 200_000, MALFORMED),
        "of gzip of 500": (b"".join(_gzip(_line(id=f"part {number}")) for number in range(500)), OK),
    }
