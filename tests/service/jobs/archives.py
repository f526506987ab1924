"""Tars, of members that are well-formed or not."""

import io
import tarfile
from collections.abc import Mapping


def tar(files: Mapping[str, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of plain files."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return written.getvalue()


def special(name: str, kind: bytes, target: str = "") -> bytes:
    """A header alone, of a link, a device or a pipe."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)
