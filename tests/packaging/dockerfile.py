"""The project's Dockerfile, parsed into stages, and its scripts."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]


def script(path: str) -> ModuleType:
    """A program of the project's that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]

    @property
    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for value in self.values("ENV") for pair in shlex.split(value))

    @property
    def command(self) -> list[str]:
        command: list[str] = json.loads(self.values("CMD")[-1])
        return command

    @property
    def health_command(self) -> list[str]:
        command: list[str] = json.loads(self.values("HEALTHCHECK")[-1].partition("CMD")[2])
        return command

    @property
    def copies(self) -> list[tuple[str | None, list[str], str]]:
        """(stage that it is from, or None for the build context; sources; target)."""
        parsed = []
        for value in self.values("COPY"):
            words = shlex.split(value)
            source = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
            parsed.append((source, words[:-1], words[-1]))
        return parsed


def read_stages() -> dict[str, Stage]:
    """The stages by name, in order."""
    stages: dict[str, Stage] = {}
    with (ROOT / "Dockerfile").open("rb") as file:
        steps = [(step["instruction"], step["value"]) for step in DockerfileParser(fileobj=file).structure]
    for instruction, value in steps:
        if instruction == "FROM":
            base, _, name = value.split()
            stages[name] = Stage(name, base)
        elif instruction != "COMMENT":
            list(stages.values())[-1].steps.append((instruction, value))
    return stages


def run_steps(stage: Stage, folder: Path, move: Callable[[str], str]) -> None:
    """Run a stage's steps without Docker, in a folder; `move` puts the image's paths elsewhere."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL", "ISTHMUS"))}
    env = outside | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    workdir = folder
    for instruction, value in stage.steps:
        if instruction == "WORKDIR":
            workdir = folder / value.strip("/")
            workdir.mkdir()
        elif instruction == "ENV":
            env |= {
                key: move(setting).replace("$PATH", env["PATH"])
                for key, setting in Stage("", "", [("ENV", value)]).env.items()
            }
        elif instruction == "COPY":
            for _, sources, target in Stage("", "", [("COPY", value)]).copies:
                for source in sources:
                    _copy(ROOT / source, workdir / source if target.endswith("/") else workdir / target)
        elif instruction == "RUN":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", move(value)],
                cwd=workdir,
                env=env,
                capture_output=True,
                text=True,
                timeout=500,
                check=False,
            )
            assert done.returncode == 0, f"RUN {value}\n{done.stdout}{done.stderr}"
        else:
            raise ValueError(f"{instruction} is not known here")


def make_root(folder: Path) -> Path:
    """Return what the image `cpu` begins with, made in a folder: its root, with the environment at /opt/isthmus."""
    moved = {"/opt/isthmus": folder / "isthmus", "/system": folder / "rootfs"}

    def move(text: str) -> str:
        for inside, outside in moved.items():
            text = text.replace(inside, str(outside))
        return text

    stages = read_stages()
    for name in ("builder", "rootfs"):
        run_steps(stages[name], folder, move)
    root = folder / "rootfs"
    (root / "opt").mkdir(exist_ok=True)
    shutil.move(root / moved["/opt/isthmus"].relative_to("/"), root / "opt/isthmus")
    return root


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)
