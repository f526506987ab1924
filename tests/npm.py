"""Programs of npm, by exact version."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def install(folder: Path, *packages: str) -> None:
    """Install packages (name@version) into a folder; skips the test where npm cannot, which CI does not allow."""
    npm = shutil.which("npm")
    missing = "" if npm and shutil.which("node") else "Node or npm is not installed"
    if npm and not missing:
        command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
        command += ["--prefix", str(folder), *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=300)
        missing = done.stderr[-500:] if done.returncode else ""
    if missing:
        assert "CI" not in os.environ, missing
        pytest.skip(f"{', '.join(packages)} cannot be had: {missing}")
