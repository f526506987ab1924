"""Build the distributions: python deploy/wheels.py OUT BUNDLE …

isthmus and isthmus-client as they are in this checkout, and a package for each starter bundle: isthmus-starter for the
bundle called `starter`, isthmus-starter-free for `starter-free`. Needs setuptools, and no network. Sources are copied
first: what an earlier build left beside them gets into no wheel.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from service import __version__  # noqa: E402
from service.commands.starters import DEFAULT, GROUP  # noqa: E402
from service.contract.bundle import MANIFEST, Bundle, Manifest, read_bundle  # noqa: E402
from service.contract.licences import markdown  # noqa: E402
from service.contract.signature import SIGNATURE  # noqa: E402

MAX_WHEEL_BYTES = 100_000_000
"""What PyPI takes of one file."""
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "service", "training")
_LEFT_BY_BUILDS = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")

_PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{distribution}"
version = "{version}"
description = "A bundle that Isthmus serves where none is named: images, sounds and texts in one space"
readme = "README.md"
requires-python = ">=3.11"
license = {licence}
license-files = ["LICENCES.md", "LICENSE"]
authors = [{{ name = "The Isthmus authors" }}]
keywords = ["embeddings", "multimodal", "onnx"]
classifiers = [
    "Development Status :: 4 - Beta",
    "Intended Audience :: Developers",
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]

[project.entry-points."{group}"]
{name} = "{package}:path"

[tool.setuptools]
packages = ["{package}", "{package}.bundle"]

[tool.setuptools.package-data]
{package} = ["py.typed"]
"{package}.bundle" = ["*"]
"""
_MODULE = '''\
"""The bundle {name!r} of Isthmus, as a package: `isthmus serve` finds it by the entry point that calls `path`."""

from pathlib import Path


def path() -> Path:
    """The bundle's folder."""
    return Path(__file__).parent / "bundle"
'''


def write_starter(bundle: Bundle, folder: Path) -> None:
    """Write the source of a starter's package into an empty folder. Raises SystemExit where it has another name."""
    name = bundle.manifest.name
    if name != "starter" and not re.fullmatch(r"starter-[a-z0-9]+", name):
        raise SystemExit(f"{bundle.path} is called {name!r}: a starter is called `starter`, or `starter-` and a word")
    package = f"isthmus_{name.replace('-', '_')}"
    inside = folder / package / "bundle"
    inside.mkdir(parents=True)
    files = [MANIFEST, *bundle.manifest.checksums()]
    if (bundle.path / SIGNATURE).is_file():
        files.append(SIGNATURE)
    for file in files:
        shutil.copyfile(bundle.path / file, inside / file)
    (folder / package / "__init__.py").write_text(_MODULE.format(name=name), encoding="utf-8")
    (folder / package / "py.typed").touch()
    card = bundle.path / "MODEL_CARD.md"
    (folder / "README.md").write_text(card.read_text(encoding="utf-8") if card.is_file() else name, encoding="utf-8")
    stated = markdown(bundle.manifest.parts, bundle.manifest.terms)
    (folder / "LICENCES.md").write_text(stated, encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")  # Apache-2.0, as the package itself and most encoders
    project = _PROJECT.format(
        distribution=f"isthmus-{name}",
        version=__version__,
        licence=json.dumps(licence_expression(bundle.manifest)),
        group=GROUP,
        name=DEFAULT if name == "starter" else name.removeprefix("starter-"),
        package=package,
    )
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")


def licence_expression(manifest: Manifest) -> str:
    """All the licences of what a bundle is made of, as one SPDX expression; free words become a LicenseRef."""
    expressions: dict[str, None] = {}
    for part in manifest.parts:
        try:
            spdx = str(canonicalize_license_expression(part.licence))
        except InvalidLicenseExpression:
            spdx = "LicenseRef-" + re.sub(r"[^A-Za-z0-9]+", "-", part.licence).strip("-")
        expressions[f"({spdx})" if " OR " in spdx else spdx] = None
    return " AND ".join(sorted(expressions)) or "LicenseRef-not-stated"


def build(out: Path, bundles: Sequence[Path]) -> list[Path]:
    """Write the wheels into `out`, in place of older ones of the same version. Raises SystemExit."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "isthmus_client", folder / "client", ignore=_LEFT_BY_BUILDS)
        (folder / "server").mkdir()
        for source in SOURCES:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / "server" / source, ignore=_LEFT_BY_BUILDS)
            else:
                shutil.copyfile(ROOT / source, folder / "server" / source)
        sources = [folder / "client", folder / "server"]
        for number, path in enumerate(bundles):
            sources.append(folder / f"starter{number}")
            write_starter(read_bundle(path), sources[-1])
        made = folder / "made"
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
        command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(made), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        wheels = sorted(made.iterdir())
        for wheel in wheels:
            check_size(wheel)
        return [Path(shutil.copyfile(wheel, out / wheel.name)) for wheel in wheels]


def check_size(wheel: Path) -> None:
    """Raises SystemExit where no index would take it."""
    if wheel.stat().st_size > MAX_WHEEL_BYTES:
        raise SystemExit(f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {MAX_WHEEL_BYTES:,}")


if __name__ == "__main__":
    for wheel in build(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]]):
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")
