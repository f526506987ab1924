"""The Dockerfile without a Docker engine: linted, its references resolved, its steps run in a venv."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from packaging.utils import canonicalize_name

from service.contract.bundle import Manifest
from service.contract.licences import weights_line
from service.settings import Settings
from tests.packaging.dockerfile import ROOT, Stage, make_root, read_stages, script

FINAL = ("cpu", "gpu")
_NEEDED = ("unshare", "mount", "chroot")
"""To stand in for what starts a container."""
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
    sent = {rule[1:].split("/")[0] for rule in rules if rule.startswith("!")}
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
    assert {source for source, _, _ in stage.copies} == {"starter", "rootfs" if name == "cpu" else "gpu-builder"}
    built_by = " ".join(value for _, value in lineage(stages, next(s for s, _, _ in stage.copies if s != "starter")))
    assert f".[{name},heif,milvus,otel]" in built_by
    for unwanted in ("[train", "torch", "transformers"):
        assert unwanted not in built_by
    assert stage.values("USER") == ["10001:10001"]
    if name == "cpu":
        assert stage.base == "scratch" and not stage.values("RUN"), "there is nothing in it that could run"
    assert stage.health_command[0] == stage.command[0] == "python", "no shell is asked for"
    assert "/readyz" in stage.health_command[-1]
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


@pytest.mark.parametrize("name", FINAL)
def test_the_label_says_what_the_server_says_of_the_starter(stages: dict[str, Stage], name: str) -> None:
    manifest = ROOT / "build/starter/manifest.json"
    if not manifest.is_file():
        pytest.skip("build/starter is absent: `make starter` builds it")
    said = weights_line(Manifest.model_validate_json(manifest.read_bytes()).parts)
    labels = " ".join(stages[name].values("LABEL"))
    assert f'isthmus.weights="{said}"' in labels, f"the LABEL of the Dockerfile is not: {said}"


def test_both_images_differ_only_in_what_they_run_on(stages: dict[str, Stage]) -> None:
    def said(name: str) -> list[tuple[str, str]]:
        steps = [step for step in stages[name].steps if step[0] not in ("RUN", "COPY")]
        return [(kind, re.sub(r"DEVICE=\w+|:\$PATH", "", value)) for kind, value in steps]

    assert said("cpu") == said("gpu")


@dataclass(frozen=True)
class Image:
    """The final CPU stage as far as a machine without Docker can have it: what it copies, in a folder."""

    stage: Stage
    root: Path
    env: dict[str, str]

    def run(self, command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.inside(command), env=self.env | env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )

    def inside(self, command: list[str]) -> list[str]:
        """A command that runs with the folder for its root, read-only but for /tmp and /data, as the image's user."""
        unshare, mount, chroot = (shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") for name in _NEEDED)
        script = f"""
            set -e
            {mount} --bind {self.root} {self.root}
            {mount} --bind {self.root}/data {self.root}/data
            {mount} -t tmpfs tmpfs {self.root}/tmp
            {mount} -t proc proc {self.root}/proc
            {mount} --bind /dev {self.root}/dev
            {mount} -o remount,ro,bind {self.root}
            exec {chroot} --userspec={self.stage.values("USER")[-1]} {self.root} "$@"
        """
        assert command[0] == "python" and unshare is not None
        return [unshare, "--mount", "--", "/bin/bash", "-c", script, "bash", "/opt/isthmus/bin/python", *command[1:]]


@pytest.fixture(scope="module")
def image(stages: dict[str, Stage], bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Runs the stages that the final one copies from, step by step, with the paths of the image moved into a folder."""
    if os.geteuid() != 0:
        pytest.skip("only root may change a process's root")
    root = make_root(tmp_path_factory.mktemp("image"))
    for name in ("proc", "dev"):  # a container's are made by what starts it
        (root / name).mkdir()
    final = stages["cpu"]
    shutil.copytree(bundle_dir, root / final.env["ISTHMUS_BUNDLE"].strip("/"))
    return Image(final, root, final.env)


def _is_program(path: Path) -> bool:
    """Return whether a file is in machine code, and no library. Scripts need an interpreter, and there is one."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF" and ".so" not in path.name and not path.is_symlink()


@pytest.mark.full
def test_the_image_holds_nothing_to_run_but_python(image: Image) -> None:
    found = {path.name for path in image.root.rglob("*") if path.is_file() and _is_program(path)}
    assert found == {f"python3.{sys.version_info.minor}"}
    assert not list(image.root.rglob("pip")), "nothing can be installed"


@pytest.mark.full
def test_the_image_has_no_torch_and_no_trainer(image: Image) -> None:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is not None)"
    for absent in ("torch", "transformers", "training", "tests", "pip", "ensurepip"):
        assert image.run(["python", "-c", probe, absent]).returncode == 0, f"{absent} is in the image"
    assert image.run(["python", "-c", probe, "service"]).returncode == 1, "the probe finds nothing at all"


@pytest.mark.full
def test_the_bill_of_materials_says_what_the_image_holds(image: Image) -> None:
    listing = "from importlib.metadata import distributions; print(*(each.name for each in distributions()))"
    done = image.run(["python", "-c", listing])
    assert {canonicalize_name(name) for name in done.stdout.split()} == script(".ci/sbom.py").held("cpu") | {"isthmus"}


@pytest.mark.full
def test_the_environment_of_the_image_is_small(image: Image) -> None:
    files = [path for path in (image.root / "opt/isthmus").rglob("*") if not path.is_symlink() and path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000_000


@pytest.mark.full
def test_the_image_has_what_the_service_imports(image: Image) -> None:
    imports = (
        "from service.api.app import create_app; import pymilvus, opentelemetry.sdk, ssl, sqlite3, soundfile, soxr"
    )
    done = image.run(["python", "-W", "error::ImportWarning", "-c", imports])
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_the_image_is_read_only_and_without_privileges(image: Image) -> None:
    probe = """
import os, pathlib
assert os.getuid() == os.getgid() == 10001
for folder, writable in (("/", False), ("/opt", False), ("/etc", False), ("/tmp", True), ("/data", True)):
    try:
        (pathlib.Path(folder) / "probe").write_text("x")
    except OSError:
        assert not writable, folder
    else:
        assert writable, folder
try:
    os.execv("/bin/sh", ["sh"])
except FileNotFoundError:
    print("no shell")
"""
    done = image.run(["python", "-c", probe])
    assert (done.returncode, done.stdout) == (0, "no shell\n"), done.stderr


@pytest.mark.full
def test_the_image_serves_and_its_health_check_knows(image: Image, free_port: int) -> None:
    port = {"ISTHMUS_PORT": str(free_port)}
    assert image.run(image.stage.health_command, **port).returncode != 0, "healthy before it was started"
    with subprocess.Popen(
        image.inside(image.stage.command), env=image.env | port, stdout=subprocess.PIPE, text=True
    ) as server:
        overdue = threading.Timer(DEADLINE_S, server.kill)
        overdue.start()
        try:
            assert server.stdout is not None
            assert any("listening on" in line for line in server.stdout), "the server did not start"
            healthy = image.run(image.stage.health_command, **port)
            assert healthy.returncode == 0, healthy.stderr
            url = f"http://127.0.0.1:{free_port}"
            answer = httpx.post(f"{url}/items", json={"items": [{"id": "a", "text": "red"}]}, trust_env=False)
            assert answer.status_code == 200, answer.text
        finally:
            overdue.cancel()
            server.terminate()
            status = server.wait(DEADLINE_S)
    assert status in (0, -signal.SIGTERM), "uvicorn finishes its work, then ends by the signal it was sent"
    assert any((image.root / "data").iterdir()), "its store is on the volume"
