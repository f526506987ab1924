"""Make a root folder of what a server needs of a system, and nothing else: no shell, no package manager, no tool.

python3 rootfs.py TARGET VENV

Copies a virtual environment, the Python that it belongs to, and each shared library that any of their files is linked
to (as ldd says) into the folder TARGET, under the same paths, with users, certificates, a /tmp and a /data. The last
stage of the Dockerfile begins with nothing else. Needs glibc's ldd; changes nothing but TARGET.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

USER = 10001
_UNUSED = ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tkinter", "turtledemo")
"""Of Python's own library; and its config-…, which is for compiling against it."""
_UNUSED_MODULES = ("_tkinter", "_test", "_xx", "_ctypes_test", "xx")
"""Of those in C, which would bring libraries of their own."""
_TOOLS = ("pip", "setuptools", "wheel", "_distutils_hack", "pkg_resources", "distutils-precedence.pth")
_FOR_DOWNLOADS = ("huggingface_hub", "hf_xet", "fsspec", "filelock", "httpx2", "httpcore2", "truststore")
"""What tokenizers would fetch a model with: a server fetches none."""
_FOR_OTHER_SERVERS = ("watchfiles", "websockets")
"""uvicorn's, for reloading code and for websockets."""
LEFT_OUT = frozenset({*_TOOLS, *_FOR_DOWNLOADS, *_FOR_OTHER_SERVERS})
_NOT_FOR_SERVING = {
    "onnxruntime": ("transformers", "quantization", "tools", "datasets"),
    "numpy": ("distutils", "f2py"),
}
_FOR_COMPILERS = (".pyi", ".pyx", ".pxd", ".h", ".a", ".proto")
_COMMANDS = ("isthmus",)
"""Of the environment's; the others are of installers and of shells."""
_SYSTEM = ("/etc/ld.so.cache", "/etc/ssl/certs/ca-certificates.crt", "/etc/nsswitch.conf")
_NAME_SERVICE = ("libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2")
"""Opened by glibc when a name is looked up: no file is linked to them."""


def build(target: Path, venv: Path) -> None:
    python = Path(sysconfig.get_config_var("BINDIR")) / f"python{sysconfig.get_config_var('py_version_short')}"
    library = Path(sysconfig.get_path("stdlib"))
    _copy_python(target, python, library)
    _copy_venv(target, venv, python)
    linked = {path for each in _binaries(target) for path in _libraries(each, target)}
    linked |= {found for name in _NAME_SERVICE for found in Path("/lib").glob(f"*-linux-gnu/{name}")}
    for path in sorted(linked):
        _copy(target, path)
    for name in _SYSTEM:
        if Path(name).exists():
            _copy(target, Path(name))
    _users(target)
    (target / "tmp").mkdir(exist_ok=True)
    (target / "tmp").chmod(0o1777)
    (target / "data").mkdir(exist_ok=True)
    if os.geteuid() == 0:
        os.chown(target / "data", USER, USER)


def _copy_python(target: Path, python: Path, library: Path) -> None:
    _copy(target, python)

    def unused(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == library
        dynamic = Path(folder).name == "lib-dynload"
        return {
            name
            for name in names
            if name in ("test", "tests")
            or (top and _superfluous(name))
            or (dynamic and name.startswith(_UNUSED_MODULES))
        }

    shutil.copytree(library, _in(target, library), symlinks=True, ignore=unused, dirs_exist_ok=True)


def _superfluous(name: str) -> bool:
    return name in _UNUSED or name.startswith("config-")


def _copy_venv(target: Path, venv: Path, python: Path) -> None:
    def unused(folder: str, names: list[str]) -> set[str]:
        within = Path(folder).name
        if Path(folder) == venv / "bin":
            return {name for name in names if name not in _COMMANDS}
        if within == "site-packages":
            return {name for name in names if name.partition("-")[0] in LEFT_OUT or name in LEFT_OUT}
        own = _NOT_FOR_SERVING.get(within, ()) if Path(folder).parent.name == "site-packages" else ()
        return {name for name in names if name in ("test", "tests", *own) or name.endswith(_FOR_COMPILERS)}

    inside = _in(target, venv)
    shutil.copytree(venv, inside, symlinks=True, ignore=unused, dirs_exist_ok=True)
    # The environment's interpreter is a chain of links that may leave by ways which are not copied.
    for name in ("python", "python3"):
        (inside / "bin" / name).symlink_to(python)


def _binaries(target: Path) -> Iterator[Path]:
    """The ELF files in a folder."""
    for path in target.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def _libraries(binary: Path, target: Path) -> Iterator[Path]:
    """The shared libraries that a file is linked to, as far as they are outside of the target."""
    done = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        found = next((word for word in line.split() if word.startswith("/")), None)
        if found is not None and not Path(found).is_relative_to(target):
            yield Path(found)


def _copy(target: Path, path: Path) -> None:
    """A file, to its own place and to the place that it is asked for by."""
    inside = _in(target, path)
    if inside.exists():
        return
    inside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path.resolve(), inside)


def _in(target: Path, path: Path) -> Path:
    return target / path.relative_to("/")


def _users(target: Path) -> None:
    etc = target / "etc"
    etc.mkdir(exist_ok=True)
    (etc / "passwd").write_text(f"root:x:0:0:root:/:/nowhere\nisthmus:x:{USER}:{USER}:isthmus:/data:/nowhere\n")
    (etc / "group").write_text(f"root:x:0:\nisthmus:x:{USER}:\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
