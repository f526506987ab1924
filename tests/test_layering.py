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
    [layers] = [one for one in LINTER["contracts"] if one["type"] == "layers" and one["containers"] == ["service"]]
    assert {room for storey in layers["layers"] for room in storey.split(" | ")} == ROOMS
    assert len(layers["layers"]) <= 12


def test_who_may_import_what_is_all_that_no_contract_forbids() -> None:
    contracts = [one for one in LINTER["contracts"] if one["type"] == "forbidden"]
    forbidding = {one["forbidden_modules"][0]: one["source_modules"] for one in contracts}
    for package, rooms in MAY.items():
        bound = {name.removeprefix("service.") for name in forbidding[package]}
        assert ROOMS - bound - {"__main__"} == rooms, package
    assert forbidding["training"] == ["isthmus_client", "service"]
