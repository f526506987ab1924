"""The client as a distribution of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_installs_without_the_service(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "isthmus_client", source, ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install += ["--disable-pip-version-check", "--no-index", "--target", str(target), str(source)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    installed = {path.name for path in target.iterdir()}
    assert installed == {"bin", "isthmus_client", "isthmus_client-0.1.0.dist-info"}
    assert (target / "isthmus_client/py.typed").is_file()
    done = subprocess.run(
        [str(target / "bin/isthmus"), "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "isthmus 0.1.0\n"), done.stderr
