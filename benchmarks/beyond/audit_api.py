"""`isthmus audit-api` finds each of the planted faults of faulty_api, and none in a sound server or in Isthmus."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.beyond.faulty_api import FAULTS, serving
from benchmarks.servers import isthmus
from isthmus_client.audit import audit, connect


def faults(url: str) -> list[str]:
    """The checks at fault of the server at an address."""
    with httpx2.Client(timeout=60) as client:
        return [finding.check for finding in audit(connect(client, url, None)) if finding.state == "fault"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    caught, beside = {}, {}
    for fault in (None, *FAULTS):
        with serving(fault) as url:
            listed = faults(url)
        name = fault or "none"
        caught[name], beside[name] = fault in listed, [check for check in listed if check != fault]
        print(f"{name:15}{', '.join(listed) or '-'}", flush=True)
    with tempfile.TemporaryDirectory() as folder, isthmus("isthmus", options.bundle, Path(folder, "store")) as server:
        ours = faults(server.address)
    print(f"{'isthmus':15}{', '.join(ours) or '-'}")
    planted = sum(caught[fault] for fault in FAULTS)
    false = len(beside["none"]) + len(ours)
    return {
        "holds": planted == len(FAULTS) and false == 0,
        "planted": len(FAULTS),
        "found": planted,
        "of_a_sound_server": beside["none"],
        "of_isthmus": ours,
    }
