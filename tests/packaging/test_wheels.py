"""The wheels of `make wheels`: what is in them, and that they work in a fresh environment, in an empty folder."""

import email
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path

import pytest

import service
from service.contract.licences import Licence
from tests import tiny_bundle
from tests.packaging.dockerfile import ROOT, script

WHEELS = script("deploy/wheels.py")
NAMES = ("isthmus", "isthmus_client", "isthmus_starter")
DEADLINE_S = 60.0
LICENCES = [
    Licence(of="Flickr8k", licence="non-commercial research", commercial=False),
    Licence(of="ESC-50", licence="CC-BY-NC-3.0"),
    Licence(of="captions", licence="CC-BY-4.0"),
]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels, with a tiny bundle for the starter."""
    folder = tmp_path_factory.mktemp("wheels")
    bundle = tiny_bundle.build(folder / "bundle", name="starter", licences=LICENCES)
    built = WHEELS.build(folder / "dist", [bundle.path])
    assert [each.name for each in built] == [f"{name}-{service.__version__}-py3-none-any.whl" for name in NAMES]
    return folder / "dist"


def opened(dist: Path, name: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(dist.glob(f"{name}-*.whl")))


def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(next(each for each in wheel.namelist() if each.endswith("/METADATA"))))


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_is_complete_and_everything_is_typed(dist: Path, name: str) -> None:
    with opened(dist, name) as wheel:
        said, files = metadata(wheel), set(wheel.namelist())
    assert said["Author"] == "The Isthmus authors" and said["Summary"] and said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] and said["License-File"]
    assert said["Description-Content-Type"] == "text/markdown" and len(said.get_payload()) > 10
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    packages = {file.partition("/")[0] for file in files if file.endswith("/__init__.py")}
    assert {f"{package}/py.typed" for package in packages} <= files
    assert {file.partition("/")[0] for file in files} == packages | {f"{name}-{service.__version__}.dist-info"}


def test_every_dependency_is_bounded(dist: Path) -> None:
    for name in NAMES:
        with opened(dist, name) as wheel:
            needed = metadata(wheel).get_all("Requires-Dist", [])
        assert [each for each in needed if not any(sign in each.partition(";")[0] for sign in ("==", ">="))] == []


def test_no_file_is_in_two_and_the_client_owns_the_command(dist: Path) -> None:
    files: dict[str, str] = {}
    for name in NAMES:
        with opened(dist, name) as wheel:
            for file in wheel.namelist():
                assert files.setdefault(file, name) == name
            points = [file for file in wheel.namelist() if file.endswith("/entry_points.txt")]
            assert ("[console_scripts]" in wheel.read(points[0]).decode()) == (name == "isthmus_client")
    with opened(dist, "isthmus") as wheel:
        assert f"isthmus-client[cli]=={service.__version__}" in metadata(wheel).get_all("Requires-Dist", [])


def test_the_licences_of_the_starter_are_those_of_its_parts(dist: Path) -> None:
    with opened(dist, "isthmus_starter") as wheel:
        said = metadata(wheel)
        stated = wheel.read(next(each for each in wheel.namelist() if each.endswith("/LICENCES.md"))).decode()
    parts = ["Apache-2.0", "CC-BY-4.0", "CC-BY-NC-3.0", "LicenseRef-non-commercial-research"]
    assert said["License-Expression"] == " AND ".join(parts)
    assert "| Flickr8k | non-commercial research | forbidden |" in stated


def test_a_wheel_that_no_index_would_take_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.whl").open("wb") as file:
        file.truncate(WHEELS.MAX_WHEEL_BYTES)
        WHEELS.check_size(tmp_path / "a.whl")
        file.truncate(WHEELS.MAX_WHEEL_BYTES + 1)
    with pytest.raises(SystemExit, match=r"a\.whl has 100,000,001 bytes, more than"):
        WHEELS.check_size(tmp_path / "a.whl")


def test_a_bundle_of_another_name_is_no_starter(tmp_path: Path, bundle_dir: Path) -> None:
    with pytest.raises(SystemExit, match="is called 'tiny': a starter is called"):
        WHEELS.build(tmp_path / "dist", [bundle_dir])
    free = tiny_bundle.build(tmp_path / "free", name="starter-free")
    WHEELS.write_starter(free, tmp_path / "source")
    assert 'free = "isthmus_starter_free:path"' in (tmp_path / "source/pyproject.toml").read_text()
    assert 'license = "Apache-2.0 AND LicenseRef-not-stated"' in (tmp_path / "source/pyproject.toml").read_text()
    assert list((tmp_path / "dist").glob("*")) == []


Run = Callable[..., subprocess.CompletedProcess[str]]


class Environment:
    """A fresh virtual environment that sees what the tests' has installed, but for this project and torch."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.python = folder / "venv/bin/python"
        self.empty = folder / "empty"
        self.empty.mkdir()
        venv.create(folder / "venv", symlinks=True)
        (folder / "others").mkdir()
        for site in (Path(path) for path in sys.path if path.endswith("site-packages")):
            for path in site.iterdir():
                if "isthmus" not in path.name and path.name != "torch" and not (folder / "others" / path.name).exists():
                    (folder / "others" / path.name).symlink_to(path)
        site = next((folder / "venv/lib").glob("python*/site-packages"))
        (site / "others.pth").write_text(f"{folder / 'others'}\n")
        self.pip(
            "install", "--no-index", "--no-deps", "--find-links", str(wheels), *(n.replace("_", "-") for n in NAMES)
        )

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(self.python)]
        subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)

    def isthmus(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command, in the empty folder."""
        return subprocess.run(
            [self.python.with_name("isthmus"), *arguments],
            cwd=self.empty,
            env=_clean() | environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    @contextmanager
    def serving(self) -> Iterator[tuple[str, str]]:
        """`isthmus serve` with no argument but a free port: its address, and what it says next."""
        command = [self.python.with_name("isthmus"), "serve", "--port", "0"]
        with subprocess.Popen(command, cwd=self.empty, env=_clean(), stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                yield server.stdout.readline().removeprefix("listening on ").strip(), server.stdout.readline().strip()
            finally:
                server.terminate()


def _clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("ISTHMUS_", "PYTHON", "VIRTUAL"))}


@pytest.mark.full
def test_the_wheels_work_in_an_empty_folder_and_what_is_removed_is_named(
    dist: Path, tmp_path: Path, png: Callable[..., bytes]
) -> None:
    there = Environment(tmp_path, dist)
    where = [there.python, "-c", "import service, training, isthmus_client; print(service.__file__)"]
    imported = subprocess.run(where, cwd=there.empty, env=_clean(), capture_output=True, text=True, check=True).stdout
    assert imported.startswith(str(tmp_path)), "it is the wheel that is tried, not the checkout"
    (tmp_path / "media").mkdir()
    for colour in ("red", "blue"):
        (tmp_path / "media" / f"{colour}.png").write_bytes(png(colour))
    with there.serving() as (url, said):
        because = "Flickr8k (non-commercial research), ESC-50 (CC-BY-NC-3.0)"
        assert said == f"serving starter, weights: non-commercial, because of {because}"
        indexed = there.isthmus("index", str(tmp_path / "media"), ISTHMUS_URL=url)
        assert (indexed.returncode, indexed.stdout) == (0, "2 indexed\n"), indexed.stderr
        found = there.isthmus("search", "red", "-k", "1", ISTHMUS_URL=url)
        assert "red.png" in found.stdout, found.stderr
    trained = there.isthmus("train", "recipe.yaml")
    assert trained.returncode == 1 and "there is no package 'torch' here" in trained.stderr
    assert "isthmus[cpu,train]" in trained.stderr

    there.pip("uninstall", "--yes", "isthmus-starter")
    alone = there.isthmus("serve")
    assert alone.returncode == 2 and "no starter is installed here" in alone.stderr and "--bundle" in alone.stderr

    there.pip("uninstall", "--yes", "isthmus")
    assert there.isthmus("--version").stdout == f"isthmus {service.__version__}\n"
    for arguments in (["serve"], ["serve", "--help"], ["train", "recipe.yaml"], ["doctor"]):
        absent = there.isthmus(*arguments)
        assert absent.returncode == 1, arguments
        assert f"`isthmus {arguments[0]}` is not installed here" in absent.stderr and "make wheels" in absent.stderr
    asked = there.isthmus("search", "red", ISTHMUS_URL="http://127.0.0.1:1")
    assert asked.returncode == 1 and "cannot be reached" in asked.stderr
    assert "serve" in there.isthmus("--help").stdout.partition("Not installed here:")[2]


def test_the_client_ships_the_licence_of_the_project() -> None:
    assert (ROOT / "isthmus_client/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
