"""The Makefile's plans (make -n), what CI runs, and that the dependencies are declared and pinned."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
NAMES = """
audit bench bench-gpu bench-store chaos check clean consistency crash demo docs field first-run fuzz help hostile
openapi protocols rolling sbom screenshots serve settings starter test test-all wheels
"""
TARGETS = set(NAMES.split())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
OURS = {"isthmus-client"}
"""On no index: the checkout has it."""
BASE = [Requirement(line) for line in PROJECT["dependencies"]]


def names(*extras: str) -> set[str]:
    """The packages that the project asks for with these extras."""
    return {canonicalize_name(each.name) for each in BASE + [each for extra in extras for each in EXTRAS[extra]]}


def names_of_client() -> set[str]:
    """The packages that the client asks for, with its extra for the command."""
    client = tomllib.loads((ROOT / "isthmus_client/pyproject.toml").read_text())["project"]
    lines = [*client["dependencies"], *client["optional-dependencies"]["cli"]]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def make(*arguments: str) -> str:
    # Under `make test` a make would call itself a part of that one, and speak of folders.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_every_target() -> None:
    listed = {line.split()[0] for line in make("help").splitlines()}
    assert listed == TARGETS
    assert make() == make("help")


@pytest.mark.parametrize(
    ("target", "last"),
    [("demo", "-m examples.demo"), ("serve", "-m service serve"), ("test", "-m pytest"), ("test-all", "-m pytest")],
)
def test_each_command_sets_up_what_it_needs_alone(target: str, last: str, tmp_path: Path) -> None:
    plan = make("-n", "-B", target, f"VENV={tmp_path / 'venv'}")
    steps = ["-m venv", "pip install", "-m training export", last]
    places = [plan.find(step) for step in steps]
    assert -1 not in places, plan
    assert places == sorted(places), plan


def test_what_is_set_up_is_not_set_up_again(tmp_path: Path) -> None:
    for name in (".basics", ".installed"):
        (tmp_path / name).touch()
    plan = make("-n", "openapi", f"VENV={tmp_path}")
    assert "pip" not in plan
    assert "service openapi" in plan


def test_another_starter_has_a_bundle_and_a_store_of_its_own() -> None:
    plan = make("-n", "-B", "serve", "STARTER=free")
    assert "training/recipes/starter-free.yaml" in plan and "--out build/starter-free" in plan
    assert "--bundle build/starter-free" in plan and "--store var/store-free" in plan
    assert "--store var/store\n" in make("-n", "serve")


def test_what_works_on_the_project_installs_all_that_it_may_need(tmp_path: Path) -> None:
    (tmp_path / ".basics").touch()
    for target in sorted(TARGETS - {"clean", "demo", "help", "serve", "starter"}):
        assert "demo,dev" in make("-n", target, f"VENV={tmp_path}"), f"{target}: depends on $(INSTALLED)"


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci/run").read_text()
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)
    commands = [line for line in script.splitlines() if line.startswith("make")]
    assert commands[-1] == 'make "${1:-test}"', "the test run's summary is the last thing printed"
    assert "check" in commands[0]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert "bash .ci/run" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]


def test_what_make_test_leaves_out_is_run_each_night() -> None:
    assert "-m 'not full'" in make("-n", "test") and "not full" not in make("-n", "test-all")
    workflow = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    assert workflow[True]["schedule"], "`on` is a truth value in YAML"
    assert "bash .ci/run test-all" in [step.get("run") for step in workflow["jobs"]["test-all"]["steps"]]


def test_every_dependency_is_pinned_and_from_the_default_index() -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    pinned = {Requirement(line).name for line in lines}
    assert (names(*EXTRAS) | names_of_client()) - OURS <= pinned


def test_torch_is_asked_for_by_exactly_its_version_and_only_for_training() -> None:
    assert [str(each) for each in EXTRAS["train"] if each.name == "torch"] == ["torch==2.13.0"]
    assert not {"torch", "transformers"} & names("cpu", "gpu", "demo", "dev")


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("service", ("cpu", "heif", "mcp", "milvus", "openvino", "otel", "parquet", "video")),
        ("training", ("cpu", "parquet", "ray", "train")),
        ("examples", ("demo", "train")),
        ("isthmus_client", ()),
    ],
)
def test_what_is_imported_is_declared(package: str, extras: tuple[str, ...]) -> None:
    # A Milvus in the process, for whoever installs one.
    declared = names_of_client() if package == "isthmus_client" else names(*extras) | {"milvus-lite"}
    providers = packages_distributions()
    undeclared = set()
    for file in (ROOT / package).rglob("*.py"):
        for module in imports(file) - sys.stdlib_module_names - {"service", "training", "examples", "isthmus_client"}:
            if not {canonicalize_name(name) for name in providers[module]} & declared:
                undeclared.add(f"{file.relative_to(ROOT)} imports {module}")
    assert not undeclared


def imports(file: Path) -> set[str]:
    """The top-level names of the absolute imports in a file, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names
