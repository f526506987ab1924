"""The Dockerfile without a Docker engine: linted, its references resolved, its steps run in a venv."""

import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.settings import Settings
from tests.packaging.dockerfile import ROOT, Stage, read_stages, run_steps

FINAL = ("cpu", "gpu")
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_stages()


def test_the_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_copied_path_is_in_the_build_context_or_made_by_an_earlier_stage(stages: dict[str, Stage]) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rules, "nothing is in the context but what is named"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    earlier: set[str] = set()
    copied: set[str] = set()
    for stage in stages.values():
        for source, paths, _ in stage.copies:
            for path in paths:
                if source is None:
                    copied.add(path.split("/")[0])
                    assert path.split("/")[0] in sent, f".dockerignore leaves {path} out"
                    assert (ROOT / path).exists(), f"{path} is not there to be copied"
                else:
                    assert source in earlier
                    assert any(path in step for _, step in lineage(stages, source)), f"{source} does not make {path}"
        earlier.add(stage.name)
    assert copied == sent, "the context holds what no stage copies"


def lineage(stages: dict[str, Stage], name: str) -> list[tuple[str, str]]:
    """The steps of a stage and of the stages it builds on."""
    stage = stages[name]
    return [*(lineage(stages, stage.base) if stage.base in stages else []), *stage.steps]


def test_cpu_is_what_a_build_without_a_target_makes(stages: dict[str, Stage]) -> None:
    assert list(stages)[-1] == "cpu"


@pytest.mark.parametrize("name", FINAL)
def test_a_final_stage_is_lean_and_unprivileged(stages: dict[str, Stage], name: str) -> None:
    stage = stages[name]
    assert {source for source, _, _ in stage.copies} == {"starter", "builder" if name == "cpu" else "gpu-builder"}
    built_by = " ".join(value for _, value in lineage(stages, next(s for s, _, _ in stage.copies if s != "starter")))
    assert f".[{name}]" in built_by
    for unwanted in ("[train", "torch", "transformers"):
        assert unwanted not in built_by
    assert int(stage.values("USER")[-1]) > 0
    assert stage.command == ["python", "-m", "service", "serve"]
    assert stage.values("EXPOSE") == [stage.env["ISTHMUS_PORT"]]
    assert stage.values("VOLUME") == [stage.env["ISTHMUS_STORE"]]
    assert any(target == stage.env["ISTHMUS_BUNDLE"] for _, _, target in stage.copies)


@pytest.mark.parametrize("name", FINAL)
def test_the_environment_of_a_final_stage_is_valid_settings(
    stages: dict[str, Stage], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {key: value for key, value in stages[name].env.items() if key.startswith("ISTHMUS_")}
    assert {key.removeprefix("ISTHMUS_").lower() for key in given} <= set(Settings.model_fields)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.device == ("cuda" if name == "gpu" else "cpu")


def test_both_images_differ_only_in_what_they_run_on(stages: dict[str, Stage]) -> None:
    cpu, gpu = ([(name, re.sub(r"gpu-|DEVICE=\w+", "", value)) for name, value in stages[name].steps] for name in FINAL)
    assert cpu == gpu


@dataclass(frozen=True)
class Image:
    """The final CPU stage as far as a machine without Docker can have it: its virtual environment, elsewhere."""

    stage: Stage
    prefix: Path
    env: dict[str, str]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program(command[0]), *command[1:]],
            env=self.env,
            cwd=self.prefix,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def program(self, name: str) -> str:
        found = shutil.which(name, path=self.env["PATH"])
        assert found, f"{name} is not in the image"
        return found


@pytest.fixture(scope="module")
def image(stages: dict[str, Stage], bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Runs the builder stage, step by step, with the paths of the image moved into a folder."""
    folder = tmp_path_factory.mktemp("image")
    moved = {"/opt/isthmus": folder / "isthmus", "/opt/starter": bundle_dir, "/data": folder / "store"}

    def move(text: str) -> str:
        for inside, outside in moved.items():
            text = text.replace(inside, str(outside))
        return text

    run_steps(stages["builder"], folder, move)
    final = stages["cpu"]
    settings = {key: move(value).replace("$PATH", "/usr/bin:/bin") for key, value in final.env.items()}
    return Image(final, folder / "isthmus", settings)


@pytest.mark.slow
def test_the_image_has_no_torch_and_no_trainer(image: Image) -> None:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is not None)"
    for absent in ("torch", "transformers", "training", "tests"):
        assert image.run(["python", "-c", probe, absent]).returncode == 0, f"{absent} is in the image"
    assert image.run(["python", "-c", probe, "service"]).returncode == 1, "the probe finds nothing at all"


@pytest.mark.slow
def test_the_image_has_what_the_service_imports(image: Image) -> None:
    done = image.run(["python", "-W", "error", "-c", "from service.main import create_app"])
    assert done.returncode == 0, done.stderr
    done = image.run(["python", "-m", "pip", "check"])
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_image_serves_and_its_health_check_knows(image: Image, free_port: int) -> None:
    here = Image(image.stage, image.prefix, image.env | {"ISTHMUS_PORT": str(free_port)})
    assert here.run(here.stage.health_command).returncode != 0, "healthy before it was started"
    program, *arguments = here.stage.command
    with subprocess.Popen(
        [here.program(program), *arguments], env=here.env, cwd=here.prefix, stdout=subprocess.PIPE, text=True
    ) as server:
        overdue = threading.Timer(DEADLINE_S, server.kill)
        overdue.start()
        try:
            assert server.stdout is not None
            assert any("listening on" in line for line in server.stdout), "the server did not start"
            healthy = here.run(here.stage.health_command)
            assert healthy.returncode == 0, healthy.stderr
        finally:
            overdue.cancel()
            server.terminate()
            status = server.wait(DEADLINE_S)
    assert status in (0, -signal.SIGTERM), "uvicorn finishes its work, then ends by the signal it was sent"
