"""`check`: verify a bundle, or a store."""

import argparse
from pathlib import Path

from service.contract.bundle import BundleError
from service.contract.licences import weights_line
from service.engine.handling import handling
from service.engine.towers import Tower
from service.settings import read_settings
from service.store import upkeep
from service.store.schema import FILE

HELP = "verify a bundle, or a store, which may be served meanwhile"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="BUNDLE or STORE")


def run(path: Path) -> int:
    if (path / FILE).exists():
        return check_store(path)
    check_bundle(path)
    return 0


def check_bundle(path: Path) -> None:
    """Verify a bundle: its manifest, its checksums, and that every tower embeds."""
    bundle = read_settings().read_bundle(path, hashed=True)
    manifest = bundle.manifest
    print(f"{manifest.name}: space {manifest.space}, {manifest.dimensions} dimensions, {weights_line(manifest.parts)}")
    for modality, described in manifest.towers.items():
        how = handling(bundle, modality, read_settings())
        for precision in described.precisions:
            shape = Tower(bundle, modality, "cpu", 0, precision).run(how.collate([how.canary.value])).shape
            if shape != (1, manifest.dimensions):
                path = bundle.tower_path(modality, precision)
                raise BundleError(f"{path} gives {shape}, not (1, {manifest.dimensions})")
        projector = described.projector.kind
        print(f"{modality}: {described.encoder.source}, {projector} projector, {', '.join(described.precisions)}: ok")


def check_store(path: Path) -> int:
    """Verify a store: pages, rows, vectors, and that its indexes match the rows; return 1 where anything is wrong."""
    wrong = False
    for good, said in upkeep.check(path):
        print(f"{'ok' if good else 'WRONG':8}{said}", flush=True)
        wrong = wrong or not good
    return int(wrong)
