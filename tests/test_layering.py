"""The contracts of import-linter name every room: one that is added later is bound by them, or `make check` says so."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICE = ROOT / "service"
LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
ROOMS = {path.parent.name for path in SERVICE.glob("*/__init__.py")}
ROOMS |= {path.stem for path in SERVICE.glob("*.py")} - {"__init__"}
MAY = {
    "fastapi": {"api", "commands"},
    "pydantic": {"schemas", "contract", "settings", "api", "commands"},
    "faiss": {"store", "retrieval"},
    "sqlite3": {"store", "jobs"},
    "onnxruntime": {"engine", "commands"},
}
"""Who may import what; the entry `python -m service` leads to commands alone."""


def test_every_room_has_its_storey() -> None:
    [layers] = [each for each in LINTER["contracts"] if each["type"] == "layers"]
    assert {room for storey in layers["layers"] for room in storey.split(" | ")} == ROOMS
    assert len(layers["layers"]) <= 12


def test_who_may_import_what_is_all_that_no_contract_forbids() -> None:
    forbidding = {each["forbidden_modules"][0]: each["source_modules"] for each in LINTER["contracts"][1:]}
    for package, rooms in MAY.items():
        bound = {name.removeprefix("service.") for name in forbidding[package]}
        assert ROOMS - bound - {"__main__"} == rooms, package
    assert forbidding["training"] == ["isthmus_client", "service"]
