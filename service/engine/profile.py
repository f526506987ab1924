"""A profile says how each tower of a bundle runs best on this machine, as `isthmus tune` measured it.

A profile is a JSON file in the user's cache folder, named after the bundle. It fits the bundle, the processor, the
number of cores and the versions that it was measured with; for others it is not used.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import onnxruntime

from service import __version__
from service.contract.bundle import Bundle, Modality, Tower
from service.contract.files import read_file
from service.engine import openvino
from service.engine.providers import ServedPrecision, accelerators
from service.settings import Settings

Runtime = Literal["onnxruntime", "openvino"]
log = logging.getLogger(__name__)

_MOST = 65_536
"""Largest number in a choice: a profile that says more was not measured."""


@dataclass(frozen=True)
class Choice:
    """Says how one tower runs on the CPU."""

    runtime: Runtime
    precision: ServedPrecision
    threads: int
    """Threads of one call."""
    lanes: int
    """Calls that run at once."""
    batch: int
    """Limit of one call, in the unit of the modality's budget."""

    def __post_init__(self) -> None:
        numbers = (self.threads, self.lanes, self.batch)
        known = self.runtime in get_args(Runtime) and (self.precision != "bf16" or self.runtime == "openvino")
        if not known or any(type(number) is not int or not 1 <= number <= _MOST for number in numbers):
            raise ValueError(f"{self} is no choice")

    def check(self, tower: Tower) -> None:
        """Raises ValueError where the tower has no graph for it."""
        if ("fp32" if self.precision == "bf16" else self.precision) not in tower.precisions:
            raise ValueError(f"the tower does not come in {self.precision}")


@dataclass(frozen=True)
class Profile:
    machine: Mapping[str, Any]
    towers: Mapping[Modality, Choice]
    measured: Mapping[str, Any]
    """What the choice was made by, for people."""


def machine(bundle: Bundle) -> dict[str, Any]:
    """Return what a profile must have been measured with to be used here."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "bundle": hashlib.sha256(bundle.manifest.model_dump_json().encode()).hexdigest(),
        "isthmus": __version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.installed(),
    }


def place(bundle: Bundle) -> Path:
    """Return the file of a bundle's profile: below $XDG_CACHE_HOME, or ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "isthmus" / f"{bundle.manifest.name}-{bundle.manifest.space}.tune.json"


def write(bundle: Bundle, profile: Profile) -> Path:
    """Keep a profile, in place of an earlier one. Raises OSError."""
    path = place(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)
    return path


def fitting(bundle: Bundle, settings: Settings) -> Mapping[Modality, Choice]:
    """Return the choices of the bundle's profile, none where there is no profile that fits, or where the settings
    choose.

    A profile that is not used is named in the log, with the reason.
    """
    try:
        path = place(bundle)
        profile = json.loads(read_file(path))
        choices = {cast("Modality", name): Choice(**choice) for name, choice in profile["towers"].items()}
        for modality, choice in choices.items():
            choice.check(bundle.manifest.towers[modality])
        differing = sorted(name for name, value in machine(bundle).items() if profile["machine"].get(name) != value)
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the profile of %s cannot be read, and is not used: %s", bundle.manifest.name, error)
        return {}
    if settings.precision != "auto" or settings.threads or settings.device not in ("auto", "cpu"):
        log.info("%s is not used: ISTHMUS_PRECISION, ISTHMUS_THREADS or ISTHMUS_DEVICE is set", path)
        return {}
    if accelerators(settings.device, onnxruntime.get_available_providers()) != ("cpu",):
        log.info("%s is not used, for it is of the CPU and there is CUDA: ISTHMUS_DEVICE=cpu chooses it", path)
        return {}
    if differing:
        log.warning("%s is not used, for it has another %s: isthmus tune measures anew", path, ", ".join(differing))
        return {}
    return choices


def _processor() -> str:
    """Return the processor's model and what it can do, in one digest with the name before it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    flags = " ".join(sorted((fields.get("flags") or fields.get("Features") or "").split()))
    return f"{fields.get('model name', os.uname().machine).strip()} {hashlib.sha256(flags.encode()).hexdigest()[:8]}"
