"""Write what a serving image holds, as a CycloneDX document: python .ci/sbom.py OUT.json [cpu | gpu] (cpu).

Made from what is installed here, without a network: this project, the packages that its base and the image's extras ask
for, and what they ask for in turn, but for what the image leaves out.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Set
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "deploy/docker"))
from rootfs import LEFT_OUT  # noqa: E402

EXTRAS = {"cpu": ("cpu", "heif", "milvus", "otel"), "gpu": ("gpu", "heif", "milvus", "otel")}
"""By image: what the Dockerfile installs."""


def needed(asked: Iterable[Requirement]) -> set[str]:
    """Canonical names of what is asked for and of what that asks for in turn, with no more extras than are asked for.

    Raises SystemExit where something is not installed.
    """
    waiting, seen = list(asked), set()
    while waiting:
        each = waiting.pop()
        name = canonicalize_name(each.name)
        extras = frozenset({"", *each.extras})
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            raise SystemExit(f"not installed: {name}") from None
        for further in map(Requirement, requires):
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return {name for name, _ in seen}


def served(document: dict[str, Any], names: Set[str], first: Set[str]) -> dict[str, Any]:
    """The document with these components alone, of which the project itself asks for the first."""
    kept = {
        each["bom-ref"]: canonicalize_name(each["name"])
        for each in document["components"]
        if canonicalize_name(each["name"]) in names
    }
    needs = {each["ref"]: each.get("dependsOn", []) for each in document["dependencies"]}
    root = document["metadata"]["component"]["bom-ref"]
    links = [{"ref": ref, "dependsOn": sorted(kept.keys() & set(needs.get(ref, [])))} for ref in sorted(kept)]
    return document | {
        "components": [each for each in document["components"] if each["bom-ref"] in kept],
        "dependencies": [{"ref": root, "dependsOn": sorted(ref for ref in kept if kept[ref] in first)}, *links],
    }


def asked_for(image: str) -> list[Requirement]:
    """Return what the project itself asks for in this image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in EXTRAS[image]:
        lines += project["optional-dependencies"][extra]
    return [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate()]


def held(image: str) -> set[str]:
    """Canonical names of the packages in this image, without the project itself."""
    absent = {canonicalize_name(each) for each in LEFT_OUT} if image == "cpu" else set()
    return needed(asked_for(image)) - absent


def main(out: str, image: str = "cpu") -> None:
    command = [sys.executable, "-m", "cyclonedx_py", "environment", sys.executable]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--of", "JSON", "-o", "-"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(made.stderr)
    first = {canonicalize_name(each.name) for each in asked_for(image)}
    document = served(json.loads(made.stdout), held(image), first)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(document['components'])} components")


if __name__ == "__main__":
    main(*sys.argv[1:])
