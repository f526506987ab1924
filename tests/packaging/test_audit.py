"""`make audit` reads pip-audit's answers, and `make sbom` lists an environment."""

import json
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.packaging.dockerfile import read_stages, script

AUDIT, SBOM = script(".ci/audit.py"), script(".ci/sbom.py")
FINE = {"name": "numpy", "version": "2.4.6", "vulns": []}
WEAK = {"name": "pillow", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
UNKNOWN = {"name": "certifi", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def audit(*packages: Any, returncode: int = 0) -> tuple[int, str]:
    code, text = AUDIT.verdict(returncode, json.dumps({"dependencies": packages, "fixes": []}), "")
    return code, text


def test_everything_checked_and_nothing_found() -> None:
    assert audit(FINE) == (0, "1 of 1 packages checked, 0 known weaknesses")


def test_a_weakness_is_named_with_its_remedy() -> None:
    code, text = audit(FINE, WEAK, UNKNOWN, returncode=1)
    assert code == 1
    assert "pillow 1.0: PYSEC-1, fixed in 1.1" in text
    assert "NOT CHECKED: certifi" in text


def test_what_the_service_does_not_know_is_no_good_news() -> None:
    code, text = audit(FINE, UNKNOWN)
    assert code == 2
    assert text.splitlines() == ["1 of 2 packages checked, 0 known weaknesses", "NOT CHECKED: certifi"]
    code, text = audit(UNKNOWN, UNKNOWN)  # which pip-audit calls: No known vulnerabilities found
    assert code == 2
    assert text.startswith("NOTHING WAS CHECKED")


@pytest.mark.parametrize("output", ["", "[]", "null", '{"dependencies": 1', "<html>"])
def test_a_service_that_cannot_be_reached_has_checked_nothing(output: str) -> None:
    code, text = AUDIT.verdict(1, output, "Traceback …\nConnectionError: Failed to resolve 'pypi.invalid'\n")
    assert code == 2
    assert text.startswith("NOTHING WAS CHECKED: the advisory service did not answer.\nConnectionError")


def test_the_bill_of_materials_holds_what_serving_leads_to() -> None:
    names = ("Served", "below", "train_only", "shared")
    needs = {"Served==1": ["below==1", "shared==1"], "below==1": ["train_only==1"], "train_only==1": ["shared==1"]}
    document = {
        "bomFormat": "CycloneDX",
        "metadata": {"component": {"bom-ref": "root", "name": "isthmus"}},
        "components": [{"bom-ref": f"{name}==1", "name": name} for name in names],
        "dependencies": [{"ref": "root", "dependsOn": []}, *({"ref": r, "dependsOn": d} for r, d in needs.items())],
    }
    kept = SBOM.served(document, {"served", "below", "shared"}, {"served"})
    assert [each["name"] for each in kept["components"]] == ["Served", "below", "shared"]
    assert kept["dependencies"][0] == {"ref": "root", "dependsOn": ["Served==1"]}
    assert {"ref": "below==1", "dependsOn": []} in kept["dependencies"]
    assert {"ref": "Served==1", "dependsOn": ["below==1", "shared==1"]} in kept["dependencies"]


@pytest.mark.parametrize(("image", "stage"), [("cpu", "builder"), ("gpu", "gpu-builder")])
def test_the_bill_of_materials_is_of_the_extras_that_the_image_has(image: str, stage: str) -> None:
    asked = f"'.[{','.join(SBOM.EXTRAS[image])}]'"
    assert any(asked in step for step in read_stages()[stage].values("RUN"))


def test_what_serving_needs_are_the_extras_that_it_asks_for_and_no_others() -> None:
    plain = SBOM.needed([Requirement("uvicorn")])
    assert {"uvicorn", "click", "h11"} <= plain and "httptools" not in plain
    assert "httptools" in SBOM.needed([Requirement("uvicorn[standard]")])
    assert "torch" not in SBOM.needed([Requirement("tokenizers")])
    with pytest.raises(SystemExit, match="not installed: absent-package"):
        SBOM.needed([Requirement("absent_package")])
