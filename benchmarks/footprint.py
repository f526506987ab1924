"""`startup_s`: from nothing to ready. `env_mb`: the Python environment of the image's final stage, built as there."""

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.paired import say
from benchmarks.plan import Plan
from benchmarks.servers import isthmus
from tests.packaging.dockerfile import make_root


def startup(plan: Plan) -> dict[str, float | None]:
    """Median of several starts; what the first of them read from the disk, the others find in memory."""
    taken = []
    for _ in range(plan.starts):
        store = plan.fresh()
        started = time.perf_counter()
        with isthmus("isthmus", plan.bundle, store):
            taken.append(time.perf_counter() - started)
    say("start-up", seconds=statistics.median(taken), slowest=max(taken))
    return {"startup_s": statistics.median(taken)}


def environment(_: Plan) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory() as name:
        made = make_root(Path(name)) / "opt/isthmus"
        sizes = subprocess.run(["du", "-sk", made], check=True, capture_output=True, text=True).stdout
    megabytes = int(sizes.split()[0]) * 1_024 / 1e6
    say("environment", mb=megabytes)
    return {"env_mb": megabytes}
