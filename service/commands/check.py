"""`check` verifies a bundle, or a store."""

import argparse
import json
from pathlib import Path

from service.contract.bundle import BundleError
from service.contract.endpoint import EndpointPreprocessing
from service.contract.licences import weights_line
from service.engine.handling import handling
from service.engine.towers import Tower
from service.settings import read_settings
from service.store import upkeep
from service.store.schema import FILE

HELP = "verify a bundle, or a store, which may be served meanwhile"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="BUNDLE or STORE", help="the folder of a bundle, or of a store")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object, in place of text")


def run(path: Path, as_json: bool = False) -> int:
    if (path / FILE).exists():
        return check_store(path, as_json)
    check_bundle(path, as_json)
    return 0


def check_bundle(path: Path, as_json: bool = False) -> None:
    """Verify a bundle: its manifest, its checksums, and that every tower embeds."""
    bundle = read_settings().read_bundle(path, hashed=True)
    manifest = bundle.manifest
    if not as_json:
        weights = weights_line(manifest.parts)
        print(f"{manifest.name}: space {manifest.space}, {manifest.dimensions} dimensions, {weights}")
    for modality, described in manifest.towers.items():
        if isinstance(described.preprocessing, EndpointPreprocessing):
            if not as_json:
                print(f"{modality}: {described.encoder.source}, asked at ISTHMUS_ENDPOINT: not asked now")
            continue
        how = handling(bundle, modality, read_settings())
        for precision in described.precisions:
            shape = Tower(bundle, modality, "cpu", 0, precision).run(how.collate([how.canary.value])).shape
            if shape != (1, manifest.dimensions):
                path = bundle.tower_path(modality, precision)
                raise BundleError(f"{path} gives {shape}, not (1, {manifest.dimensions})")
        if not as_json:
            projector, precisions = described.projector.kind, ", ".join(described.precisions)
            print(f"{modality}: {described.encoder.source}, {projector} projector, {precisions}: ok")
    if as_json:
        fields = {"name": manifest.name, "space": manifest.space, "dimensions": manifest.dimensions}
        print(json.dumps({"ok": True, **fields, "towers": list(manifest.towers)}))


def check_store(path: Path, as_json: bool = False) -> int:
    """Verify a store: pages, rows, vectors, and that its indexes match the rows; return 1 where anything is wrong."""
    checks = []
    for good, description in upkeep.check(path):
        checks.append({"ok": good, "what": description})
        if not as_json:
            print(f"{'ok' if good else 'WRONG':8}{description}", flush=True)
    right = all(check["ok"] for check in checks)
    if as_json:
        print(json.dumps({"ok": right, "checks": checks}))
    return int(not right)
