"""The project's Dockerfile, parsed into stages."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]


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
        return json.loads(self.values("CMD")[-1])

    @property
    def health_command(self) -> list[str]:
        return json.loads(self.values("HEALTHCHECK")[-1].partition("CMD")[2])

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
