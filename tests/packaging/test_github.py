"""GitHub can read the workflows, the templates and the citation."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from service import __version__
from tests.packaging.dockerfile import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_commit_and_say_which_version_it_is(workflow: Path) -> None:
    used = re.findall(r"uses: (.+)", workflow.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_has_an_end_and_no_right_that_it_does_not_name(workflow: Path) -> None:
    read = yaml.safe_load(workflow.read_text())
    assert read["permissions"] == {"contents": "read"}
    for name, job in read["jobs"].items():
        assert job["timeout-minutes"] <= 90, name


def test_ci_tries_every_python_that_the_packages_name() -> None:
    tried = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    for project in ("pyproject.toml", "isthmus_client/pyproject.toml"):
        classifiers = tomllib.loads((ROOT / project).read_text())["project"]["classifiers"]
        named = [found[1] for each in classifiers if (found := re.fullmatch(r".* :: Python :: (3\.\d+)", each))]
        assert tried["python"] == named


def test_images_are_built_and_published_for_both_processors() -> None:
    built, published = (
        yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"]["image"]["strategy"]["matrix"]
        for name in ("ci", "publish")
    )
    assert (
        {each["runner"] for each in published["include"]}
        == set(built["runner"])
        == {
            "ubuntu-24.04",
            "ubuntu-24.04-arm",
        }
    )


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
