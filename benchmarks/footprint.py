"""`startup_s`: from nothing to ready. `env_mb`: the Python environment of the image's final stage, built as there."""

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks import real
from benchmarks.load import Generator
from benchmarks.paired import say
from benchmarks.plan import Plan
from benchmarks.servers import isthmus
from service.contract.bundle import read_bundle
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


def memory(plan: Plan) -> dict[str, float | None]:
    """Resident memory of a server whose towers have each embedded for a while: batches of all sizes."""
    with isthmus("isthmus", plan.bundle, plan.fresh()) as server:
        name = read_bundle(plan.bundle).manifest.name
        sent = [real.text_requests(server, "/v1/embeddings", name, size) for size in (1, 32)]
        pictures = [[{"image": real.in_base64(jpeg)} for jpeg in group] for group in real.groups(real.jpegs(64), 8)]
        sounds = [[{"audio": real.in_base64(sound)}] for sound in real.sounds(32)]
        media = [*pictures, *sounds]
        sent.append([real.post(server, "/embed", {"inputs": group}) for group in media])
        with Generator(server.address) as load:
            for requests in sent:
                load.closed(requests, clients=4, seconds=plan.seconds)
        megabytes = server.rss / 1e6
    say("memory after load", mb=megabytes)
    return {"rss_mb": megabytes}


def environment(_: Plan) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory() as name:
        made = make_root(Path(name)) / "opt/isthmus"
        sizes = subprocess.run(["du", "-sk", made], check=True, capture_output=True, text=True).stdout
    megabytes = int(sizes.split()[0]) * 1_024 / 1e6
    say("environment", mb=megabytes)
    return {"env_mb": megabytes}
