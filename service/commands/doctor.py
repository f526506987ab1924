"""`isthmus doctor` checks a machine before serving. Each check runs whatever the others find.

Nothing but the standard library is imported before the packages have been looked at, so that it runs where they are
missing. What a *recipe* needs to be trained is `python -m training doctor`'s question.
"""

import os
import re
import shutil
import socket
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.commands import starters

if TYPE_CHECKING:
    from service.contract.bundle import Bundle
    from service.settings import Settings

_OLDEST_PYTHON = (3, 11)
_ROOM = 1_000_000_000
"""Bytes of disk below which a store soon has no room."""
_PROCESS = 150_000_000
"""Bytes that the process takes before its towers, roundly; towers take about twice their files."""
_WAIT_S = 2.0


@dataclass(frozen=True)
class Check:
    what: str
    state: Literal["ok", "note", "missing"]
    """Result of the check. note: serving works, but there is something to know. missing: serving does not work."""
    detail: str
    next_step: str | None = None


def examine(bundle: str | Path | None = None, store: str | None = None, port: str | None = None) -> Iterator[Check]:
    """Yield every check, in the order in which a start meets them. Arguments stand for their ISTHMUS_ variables."""
    yield _python()
    lacking = yield from _packages()
    yield from _runtimes()
    yield from _readers()
    if lacking:
        yield Check("the rest", "missing", "cannot be looked at before the packages are there")
        return
    from service.settings import SettingsError, read_settings

    with suppress(starters.StarterError):  # the look at the bundle says that there is none
        bundle = starters.chosen(bundle)
    try:
        settings = read_settings(bundle=bundle, store=store, port=port)
    except SettingsError as error:
        yield Check("settings", "missing", str(error), "correct the variable; service/settings.py describes them all")
        return
    named = sorted(name for name in os.environ if name.startswith("ISTHMUS_"))
    yield Check("settings", "ok", ", ".join(named) or "all at their defaults")
    opened = yield from _bundle(settings)
    yield from _store(settings, opened)
    yield _redis(settings)
    yield _port(settings)
    yield _disk(settings)
    if opened is not None:
        yield _memory(opened)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if tuple(sys.version_info[:2]) < _OLDEST_PYTHON:
        return Check("python", "missing", f"{version} is too old", "use Python 3.11 or later")
    return Check("python", "ok", f"{version}, {sys.executable}, {len(os.sched_getaffinity(0))} cores")


def _packages() -> Generator[Check, None, bool]:
    """Check the packages that the distribution says it needs; the generator returns whether any is missing."""
    try:
        distributions = [re.split(r"[^\w.-]", line)[0] for line in requires("isthmus") or () if "extra ==" not in line]
    except PackageNotFoundError:
        distributions = ["isthmus"]
    lacking = [name for name in distributions if not _is_installed(name)]
    for module, twins in (("faiss", "faiss-cpu or faiss-gpu-cu12"), ("onnxruntime", "onnxruntime or onnxruntime-gpu")):
        if find_spec(module) is None:
            lacking.append(twins)
    if lacking:
        in_checkout = "pip install -c constraints.txt -e ./isthmus_client -e '.[cpu,heif]'"
        step = f"pip install 'isthmus[cpu,heif]' (or [gpu,heif]; in a checkout: {in_checkout})"
        yield Check("packages", "missing", ", ".join(lacking), step)
    else:
        yield Check("packages", "ok", f"all {len(distributions) + 2} that serving needs")
    return bool(lacking)


def _is_installed(distribution: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(distribution))
    return False


def _readers() -> Iterator[Check]:
    """Check the optional packages that read further kinds of files."""
    for name, module, kinds, extra in (
        ("heic", "pillow_heif", "HEIC images", "heif"),
        ("video", "av", "videos, and sounds like AAC, M4A, 3GP and WebM", "video"),
    ):
        if find_spec(module) is None:
            yield Check(name, "note", f"{kinds} are refused", f"to read them: pip install 'isthmus[{extra}]'")
        else:
            yield Check(name, "ok", f"{kinds} are read")


def _runtimes() -> Iterator[Check]:
    """Check ONNX Runtime: the variant installed, and the devices that it can use."""
    twins = {name: version(name) for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)}
    if not twins:
        return
    versions = ", ".join(f"{name} {number}" for name, number in twins.items())
    if len(twins) == 2:
        step = "pip uninstall both, then install one: they write over each other's files"
        yield Check("onnxruntime", "missing", f"{versions}: two twins in one place", step)
        return
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    gpu = Path("/proc/driver/nvidia").exists()
    if gpu and "CUDA" not in providers:
        step = "for the GPU: pip uninstall onnxruntime faiss-cpu, then pip install 'isthmus[gpu,heif]'"
        yield Check("onnxruntime", "note", f"{versions} on {', '.join(providers)}: the GPU here is not used", step)
    else:
        yield Check("onnxruntime", "ok", f"{versions} on {', '.join(providers)}")


def _bundle(settings: "Settings") -> Generator[Check, None, "Bundle | None"]:
    """Check the files by their checksums, then a small input through every tower. Ends with the bundle, if it is
    one."""
    from service.contract.bundle import BundleError
    from service.contract.endpoint import EndpointPreprocessing
    from service.engine.handling import handling
    from service.engine.towers import Tower, TowerError
    from service.settings import SettingsError

    try:
        bundle = settings.read_bundle(hashed=True)
    except (BundleError, SettingsError) as error:
        yield Check("bundle", "missing", str(error), starters.NEXT)
        return None
    manifest = bundle.manifest
    yield Check("bundle", "ok", f"{settings.bundle}: {manifest.name}, space {manifest.space}, checksums hold")
    for modality in manifest.towers:
        if settings.modalities and modality not in settings.modalities:
            continue
        if isinstance(manifest.towers[modality].preprocessing, EndpointPreprocessing):
            detail = "is asked at ISTHMUS_ENDPOINT: texts leave this machine"
            step = "set ISTHMUS_ENDPOINT to the address of the embedding API"
            yield Check(
                f"tower.{modality}", "ok" if settings.endpoint else "missing", detail, "" if settings.endpoint else step
            )
            continue
        try:
            how = handling(bundle, modality, settings)
            tower = Tower(
                bundle, modality, settings.device, settings.call_threads, settings.precision, settings.towers_on_gpus
            )
            length = tower.run(how.collate([how.canary.value])).shape[1]
        except (BundleError, TowerError) as error:
            step = "ISTHMUS_DEVICE=cpu serves without a GPU" if settings.device != "cpu" else "export the bundle again"
            yield Check(f"tower.{modality}", "missing", str(error), step)
        else:
            yield Check(f"tower.{modality}", "ok", f"embeds, {length} numbers, on {tower.provider}")
    return bundle


def _store(settings: "Settings", bundle: "Bundle | None") -> Iterator[Check]:
    from service.retrieval.reembedding import command
    from service.store import schema, upkeep
    from service.store.errors import StoreError, filled_elsewhere

    place = settings.store
    file = place / schema.FILE
    if not file.is_file():
        parent = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            yield Check("store", "missing", f"{parent} cannot be written", "name another folder by ISTHMUS_STORE")
        else:
            yield Check("store", "ok", f"{place} is made at the first start")
        return
    try:
        space, filler, count = upkeep.contents(place)
    except StoreError as error:
        step = f"python -m service check {place} says more; python -m service restore brings a backup back"
        yield Check("store", "missing", str(error), step)
        return
    if bundle is not None and count and not bundle.manifest.accepts(space):
        message = filled_elsewhere(str(place), space, filler, bundle.manifest)
        yield Check("store", "missing", message, f"carry it over: {command(place, settings.bundle)}")
    elif not os.access(file, os.W_OK):
        yield Check("store", "missing", f"{file} cannot be written", "let the user that serves own it")
    else:
        yield Check("store", "ok", f"{place}: {count:,} items of the space {space}")


def _redis(settings: "Settings") -> Check:
    import redis

    if settings.redis_url is None:
        return Check("redis", "ok", "none is named: the cache is in the process (ISTHMUS_REDIS_URL names one)")
    try:
        with redis.Redis.from_url(settings.redis_url, socket_timeout=_WAIT_S, socket_connect_timeout=_WAIT_S) as client:
            number = client.info("server")["redis_version"]
    except redis.RedisError:
        step = "start it, or correct ISTHMUS_REDIS_URL; without it everything is served, and nothing cached"
        return Check("redis", "note", "ISTHMUS_REDIS_URL is set, and nothing answers there", step)
    return Check("redis", "ok", f"Redis {number} answers")


def _port(settings: "Settings") -> Check:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    where = f"{settings.host}:{settings.port}"
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        served = _answers(settings)
        if served:
            return Check("port", "note", f"{where}: a server of this kind listens there already, and is {served}")
        step = "end what listens there, or take another: --port, ISTHMUS_PORT (0 picks a free one)"
        return Check("port", "missing", f"{where}: {error.strerror}", step)
    return Check("port", "ok", f"{where} is free")


def _answers(settings: "Settings") -> str | None:
    """Return `ready` or `not ready` of an Isthmus server at the port; None where it is something else."""
    import httpx2

    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    try:
        body = httpx2.get(f"http://{host}:{settings.port}/readyz", timeout=_WAIT_S, trust_env=False).json()
        return {"ready": "ready", "not_ready": "not ready"}.get(body.get("status"))
    except (httpx2.HTTPError, ValueError, AttributeError):
        return None


def _disk(settings: "Settings") -> Check:
    place = next(
        folder for folder in (settings.store.absolute(), *settings.store.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free at {place}"
    if free < _ROOM:
        return Check("disk", "note", detail, "make room, or move the store: ISTHMUS_STORE; a full disk refuses writes")
    return Check("disk", "ok", detail)


def _memory(bundle: "Bundle") -> Check:
    from service.contract.bundle import MANIFEST

    files = sum(file.stat().st_size for file in bundle.path.iterdir() if file.name != MANIFEST)
    needed_bytes = _PROCESS + 2 * files
    available = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    detail = f"{available / 1e9:.1f} GB available, about {needed_bytes / 1e9:.1f} GB needed before any items"
    if available < needed_bytes:
        return Check("memory", "note", detail, "ISTHMUS_MODALITIES=text,image loads fewer towers")
    return Check("memory", "ok", detail)
