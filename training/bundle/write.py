"""Write a bundle, whatever made its towers: hashes, today's date, a manifest, the files."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.contract.bundle import Bundle, Manifest, sha256_file, write_bundle

CARD = "MODEL_CARD.md"


def write(
    target: Path, graphs: Mapping[str, Path], others: Mapping[str, Path], like: Manifest | None = None, **values: Any
) -> Bundle:
    """Write a bundle of graphs and of other files, by their names in it. `values` are its manifest's.

    What they leave open is as `like` has it: the bundle that this one goes on from, whose files are among these.
    """
    old = {} if like is None else like.model_dump()
    files = old.get("files", {}) | {name: sha256_file(path) for name, path in others.items()}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    manifest = Manifest.model_validate(old | values | {"created": today, "files": files})
    return write_bundle(target, manifest, {**graphs, **others})
