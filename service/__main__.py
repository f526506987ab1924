"""python -m service serve | worker | index | load | keys | check | backup | restore | reembed | openapi | settings"""

import argparse
import asyncio
import ctypes
import datetime
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast, get_args

import uvicorn
import yaml
from fastapi import FastAPI

from service.api import listener
from service.api.app import create_app, open_parts, open_store
from service.api.auth import local_names
from service.api.keys import KeysError, Scope, create_key, read_keys, revoke_key
from service.api.protocol import Protocol, Unsent
from service.api.quotas import UNITS, Limit
from service.api.state import State
from service.commands import reference, starters
from service.commands.load import Progress, load
from service.commands.reembed import LEFT_OUT, Originals, Outcome, Source, command, reembed, replace_store, survey
from service.commands.starters import StarterError
from service.commands.worker import work
from service.contract.bundle import BundleError
from service.contract.licences import weights_line
from service.engine.handling import handling
from service.engine.towers import Tower, TowerError
from service.jobs import upkeep as jobs_upkeep
from service.settings import Settings, SettingsError, read_settings
from service.store import upkeep
from service.store.errors import StoreError
from service.store.schema import DEFAULT_COLLECTION, FILE
from service.telemetry import logs

log = logging.getLogger("service")

_M_MMAP_THRESHOLD = -3  # of malloc.h
_KEEP_ALIVE_S = 75
"""Longer than clients and proxies keep an idle connection (5 to 60 s): were the server the first to close one, a
request that is sent at that moment would be lost."""
_ANSWERING_S = 5
"""After the grace, for the answers (503) to reach their clients."""
_ARRIVING_S = 0.25
"""For the requests of connections that were made before the last moment to be accepted and begun."""

_FLAGS = (
    "bundle",
    "more-bundles",
    "modalities",
    "store",
    "milvus-uri",
    "host",
    "port",
    "device",
    "precision",
    "redis-url",
    "log-level",
    "keys",
)
"""Settings that `serve` takes as flags."""

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Says where it listens, once it does, and how its weights may be used. SIGHUP reloads the bundles. At its end
    whoever waits is answered.

    SIGTERM lets it drain first: for `drain_s` it goes on as before, but says in /readyz and by `Connection: close` that
    it is about to end, so that proxies turn to other replicas. Another signal, or Ctrl-C, cuts that short. Then nobody
    is let in any more, and who is in is answered, also where the request is yet to come.
    """

    def __init__(self, config: uvicorn.Config, grace_s: float, drain_s: float = 0.0) -> None:
        super().__init__(config)
        self.grace_s, self.drain_s = grace_s, drain_s
        self._hurried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is not None and (sig == signal.SIGINT or self.should_exit):
            self._loop.call_soon_threadsafe(self._hurried.set)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.state.begin_reload)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
            for name, model in self.state.models.items():
                print(f"serving {name}, {weights_line(model.manifest.parts)}")
            sys.stdout.flush()

    @property
    def state(self) -> State:
        state: State = self.lifespan.state["services"]
        return state

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.state.draining.set()
        if self.drain_s:
            log.info("draining for %s s", self.drain_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.drain_s):
                    await self._hurried.wait()
        for each in sockets or []:
            with suppress(OSError):  # another system than Linux: what waits to be accepted is lost
                listener.admit_nobody(each)
        await asyncio.sleep(_ARRIVING_S)
        # Uvicorn alone would let requests finish for so long, and cut off the others without an answer.
        grace = asyncio.get_running_loop().call_later(self.grace_s, self.state.begin_close)
        await super().shutdown(sockets)
        grace.cancel()


def serve(settings: Settings) -> None:
    """Serve until told to stop, then finish what is under way."""
    give_large_blocks_back()
    logs.configure(settings.log_level)
    if os.getpid() == 1:
        # The first process of a container gets no signal that it has no handler for: not while models are opened.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        bound = listener.bind(settings.host, settings.port)
    except OSError as error:
        message = f"ISTHMUS_HOST {settings.host!r}, ISTHMUS_PORT {settings.port}: cannot listen there: {error.strerror}"
        raise SettingsError(message) from None
    if settings.keys is None and local_names((), settings.host, keyed=False) is None:
        log.warning("there are no keys (ISTHMUS_KEYS): whoever reaches %s may read, write and delete", settings.host)
    app = create_app(settings, open_parts(settings))
    server = Server(uvicorn_config(app, settings), settings.shutdown_grace_s, settings.drain_s)
    server.run(sockets=[bound])


def give_large_blocks_back() -> None:
    """glibc learns to keep what is freed, up to 32 MB at a time, and for each thread: after some large bodies and
    pictures that is hundreds of megabytes. Blocks of 8 MB and more are to go back to the system at once."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 8 * 2**20)


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=cast("type[Protocol]", partial(Protocol, unsent=Unsent(settings.max_unsent_bytes))),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.shutdown_grace_s + _ANSWERING_S,
    )


def check(path: Path) -> None:
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
    """Verify a store: pages, rows, vectors, and that its indexes hold what the rows hold; 1 where anything is wrong."""
    wrong = False
    for good, said in upkeep.check(path):
        print(f"{'ok' if good else 'WRONG':8}{said}", flush=True)
        wrong = wrong or not good
    return int(wrong)


def reembed_store(
    store: Path, new: Path | None, bundle: Path, media: Path | None, media_key: str | None, dry_run: bool
) -> int:
    """Carry a store over to another bundle: in its place, or into a store beside it. Raises StoreError, BundleError."""
    settings = read_settings(bundle=bundle)
    most = max(settings.max_image_bytes, settings.max_audio_bytes, settings.max_video_bytes)
    originals = Originals(media, media_key, most)
    if dry_run:
        outcome = survey(store, originals)
        print(f"{outcome.carried:,} items can be embedded again: {_sources(outcome)}")
        _print_left_out(outcome)
        return 0
    kept: Path | None = store
    try:
        if new is None:
            outcome, kept = asyncio.run(replace_store(store, settings, originals))
        else:
            outcome = asyncio.run(reembed(store, new, settings, originals))
    except KeyboardInterrupt:
        print(f"stopped: {store} is as it was; the same command goes on", file=sys.stderr)
        return 130
    if kept is None:
        print(f"{store}: there is nothing to do, it can be served with {bundle}")
        return 0
    print(f"{new or store}: {outcome.embedded.total():,} items embedded again ({_sources(outcome)}), ", end="")
    print(f"{outcome.already:,} were there, {outcome.label_sets:,} label sets")
    _print_left_out(outcome)
    print(f"The old store is {'as it was, in' if new else 'kept in'} {kept}")
    if outcome.left_out:
        print(f"{(new or kept) / LEFT_OUT} lists what only the old store has")
    if outcome.files_would_help:
        print("Where you have the files of its images and sounds, this embeds what has no vector of its file yet:")
        print(f"    {command(kept, bundle, new or store)} --media FOLDER")
    return 0


def _sources(outcome: Outcome) -> str:
    """What they were embedded from."""
    named: dict[Source, str] = {
        "text": "from texts",
        "file": "from files",
        "preview": "from previews, smaller than their files were",
    }
    said = [f"{outcome.embedded[source]:,} {name}" for source, name in named.items() if outcome.embedded[source]]
    if outcome.beginnings:
        said.append(f"of {outcome.beginnings:,} sounds only the beginning")
    return ", ".join(said) or "none"


def load_files(path: Path, collection: str, settings: Settings) -> None:
    """Write the items of Parquet files to the store that the settings name, which nobody else may have open."""
    manifest = settings.read_bundle().manifest
    store, _ = open_store(settings, [manifest])
    # Of a store in a directory the place is the directory's, wherever it is named from.
    place = settings.milvus_uri if settings.store == Path("milvus") else str(settings.store.resolve())
    began = time.monotonic()

    def said(progress: Progress) -> None:
        rate = progress.items / max(time.monotonic() - began, 1e-3)
        end = "\r" if sys.stderr.isatty() else "\n"
        line = f"{progress.files} of {progress.of} files, {progress.items:,} items, {rate:,.0f} a second"
        print(f"{line:<79}", end=end, file=sys.stderr, flush=True)

    async def run() -> int:
        try:
            return await load(path, store, manifest, collection, place, said)
        finally:
            await store.close()

    count = asyncio.run(run())
    print(f"{count:,} items of space {manifest.space} written to the collection {collection}")


def _print_left_out(outcome: Outcome) -> None:
    if outcome.left_out:
        print(f"{outcome.left_out.total():,} cannot be embedded again:")
    for reason, count in outcome.left_out.most_common():
        print(f"{count:10}  {reason}, such as {outcome.examples[reason]!r}")


def back_up(store: Path, file: Path, jobs: Path | None) -> None:
    """Raises StoreError."""
    folder = _beside(file)
    if folder.exists():
        raise StoreError(f"{folder} is there already: it is not overwritten")
    staged = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        # The jobs first: what they say is done must be in what is copied of the store.
        held = jobs_upkeep.stage(jobs or store / "jobs", staged)
        items = upkeep.backup(store, file)
        if held is not None:
            staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    print(f"{file}: {items} items")
    if held is not None:
        print(f"{folder}: {held}")


def restore(file: Path, store: Path, jobs: Path | None) -> None:
    """Raises StoreError."""
    folder, target = _beside(file), jobs or store / "jobs"
    if folder.is_dir():
        jobs_upkeep.refuse_jobs(target)
    print(f"{store}: {upkeep.restore(file, store)} items")
    if folder.is_dir():
        print(f"{target}: {jobs_upkeep.restore(folder, target)}")


def _beside(file: Path) -> Path:
    """Where the jobs of a backup are."""
    return file.with_name(f"{file.name}.jobs")


def manage_keys(action: str, file: Path | None, **options: Any) -> None:
    """Raises KeysError, SettingsError."""
    path = file or read_settings().keys
    if path is None:
        raise SettingsError("ISTHMUS_KEYS is not set: it, or --file, names the file of the keys")
    match action:
        case "create":
            key, clear = create_key(path, **options)
            print(f"{key.id} is added to {path}. This is the key; it is shown only now:", file=sys.stderr)
            print(clear)
        case "list":
            now = datetime.datetime.now(datetime.UTC)
            for key in read_keys(path):
                limits = " ".join(map(str, key.limits)) or "no limits"
                until = f", until {key.expires:%Y-%m-%d}" if key.expires else ""
                made = f"made {key.created:%Y-%m-%d}{until}"
                print(
                    f"{key.id}  {key.state(now):7}  {','.join(sorted(key.scopes)):16}  {key.name}  ({made}; {limits})"
                )
        case "revoke":
            key = revoke_key(path, options["id"])
            print(f"{key.id} ({key.name}) is revoked; servers that read {path} see it within a second or two")


def _add_keys(parser: argparse.ArgumentParser) -> None:
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--file", type=Path, metavar="FILE", help="of the keys; else ISTHMUS_KEYS")
    actions = parser.add_subparsers(dest="action", required=True)
    made = actions.add_parser("create", parents=[file], help="add a key to the file, and print it: once")
    made.add_argument("--name", required=True, help="whose it is, or what for")
    made.add_argument("--scopes", required=True, type=_scopes, metavar="SCOPES", help="of read,write,admin")
    made.add_argument(
        "--limit",
        dest="limits",
        action="append",
        default=[],
        type=_limit,
        metavar="UNIT=AMOUNT/PERIOD",
        help=f"such as items=1000/minute; repeated. Units: {', '.join(UNITS)}",
    )
    made.add_argument("--days", type=int, metavar="N", help="until it expires; else it does not")
    actions.add_parser("list", parents=[file], help="all of them, the revoked too")
    gone = actions.add_parser("revoke", parents=[file], help="for ever")
    gone.add_argument("id", metavar="ID")


def _scopes(text: str) -> list[Scope]:
    scopes = [each.strip() for each in text.split(",")]
    if unknown := [each for each in scopes if each not in get_args(Scope)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(get_args(Scope))}")
    return cast("list[Scope]", scopes)


def _limit(text: str) -> Limit:
    try:
        return Limit.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def index(folder: Path, url: str | None, collection: str, settings: Settings) -> int:
    """Index a folder; 1 where a file was refused, 2 where it cannot go on, 130 where it was stopped by Ctrl-C."""
    from service.commands import index_folder  # what it needs of its own, no server has to load

    async def run() -> index_folder.Outcome:
        key = settings.api_key.get_secret_value() if settings.api_key else None
        async with index_folder.reached(url, key) if url else index_folder.opened(settings) as target:
            return await index_folder.index_folder(folder, collection, target, settings)

    try:
        outcome = asyncio.run(run())
    except KeyboardInterrupt:
        print("stopped: run it again to go on", file=sys.stderr)
        return 130
    except index_folder.Stopped as stopped:
        print(f"error: {stopped}", file=sys.stderr)
        return 2
    print(f"{outcome.indexed:,} indexed, {outcome.unchanged:,} unchanged, {len(outcome.refused):,} refused")
    for name, why in outcome.refused:
        print(f"  {name}: {why}")
    return int(bool(outcome.refused))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description="The Isthmus service.")
    commands = parser.add_subparsers(dest="command", required=True)
    flags = commands.add_parser("serve", help="serve a bundle; each flag overrides its ISTHMUS_ variable")
    for name in _FLAGS:
        flags.add_argument(f"--{name}", metavar=name.upper())
    flags.add_argument("--starter", metavar="NAME", help="an installed starter other than the default, such as free")
    working = commands.add_parser("worker", help="embed parts of jobs that servers hand out through Redis")
    for name in ("bundle", "modalities", "device", "precision", "redis-url", "log-level"):
        working.add_argument(f"--{name}", metavar=name.upper())
    indexed = commands.add_parser(
        "index", help="index a folder of photographs, sounds and texts; again for what is new"
    )
    indexed.add_argument("folder", type=Path, metavar="FOLDER")
    indexed.add_argument("--url", help="of a running server (ISTHMUS_API_KEY: its key); without it, a store is opened")
    indexed.add_argument("--collection", default=DEFAULT_COLLECTION)
    for name in ("bundle", "store", "modalities", "device", "precision"):
        indexed.add_argument(f"--{name}", metavar=name.upper())
    checked = commands.add_parser("check", help="verify a bundle, or a store, which may be served meanwhile")
    checked.add_argument("path", type=Path, metavar="BUNDLE or STORE")
    saved = commands.add_parser("backup", help="copy a store, which may be served meanwhile, into one file")
    saved.add_argument("store", type=Path, metavar="STORE")
    saved.add_argument("file", type=Path, metavar="FILE", help="its jobs go into the folder FILE.jobs")
    restored = commands.add_parser("restore", help="make a store of a backup")
    restored.add_argument("file", type=Path, metavar="FILE")
    restored.add_argument("store", type=Path, metavar="STORE", help="a directory that holds no store")
    for each in (saved, restored):
        each.add_argument("--jobs", type=Path, metavar="FOLDER", help="where its jobs are (ISTHMUS_JOBS), if not in it")
    moved = commands.add_parser("reembed", help="carry a store over to a bundle of another space, by embedding again")
    moved.add_argument("store", type=Path, metavar="STORE", help="which is kept, whatever becomes of it")
    moved.add_argument("new", type=Path, nargs="?", metavar="NEW_STORE", help="to be filled while STORE is served")
    moved.add_argument("--bundle", type=Path, required=True, help="the bundle that is to serve the store")
    moved.add_argument("--media", type=Path, metavar="FOLDER", help="where the files of images, sounds and videos are")
    moved.add_argument("--media-key", metavar="KEY", help="the metadata key of a file's path there; else the item's id")
    moved.add_argument("--dry-run", action="store_true", help="say what can be embedded again and what not, do nothing")
    moved.add_argument("--leave-out", action="store_true", help="(what 1.14 needed to go on; it always does now)")
    taken = commands.add_parser("load", help="take in the Parquet files that `python -m training embed` wrote")
    taken.add_argument("path", type=Path, metavar="FOLDER or FILE")
    taken.add_argument("--collection", default=DEFAULT_COLLECTION, metavar="NAME")
    for name in ("bundle", "store", "milvus-uri"):
        taken.add_argument(f"--{name}", metavar=name.upper(), help="as for serve")
    _add_keys(commands.add_parser("keys", help="make, list and revoke API keys"))
    commands.add_parser("openapi", help="print the OpenAPI document")
    commands.add_parser("settings", help="print docs/configuration.md: every setting")
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command in ("serve", "worker", "index", "load") and options.get("url") is None:
            options["bundle"] = starters.chosen(options["bundle"], options.pop("starter", None))
        if command == "serve":
            serve(read_settings(**options))
        elif command == "index":
            folder, url, collection = (options.pop(name) for name in ("folder", "url", "collection"))
            return index(folder, url, collection, read_settings(**options))
        elif command == "worker":
            settings = read_settings(**options)
            logs.configure(settings.log_level)
            asyncio.run(work(settings))
        elif command == "check" and (options["path"] / FILE).exists():
            return check_store(options["path"])
        elif command == "check":
            check(options["path"])
        elif command == "keys":
            manage_keys(**options)
        elif command == "backup":
            back_up(**options)
        elif command == "restore":
            restore(**options)
        elif command == "load":
            load_files(options.pop("path"), options.pop("collection"), read_settings(**options))
        elif command == "reembed":
            options.pop("leave_out")
            return reembed_store(**options)
        elif command == "settings":
            print(reference.markdown([name.replace("-", "_") for name in _FLAGS]), end="")
        else:
            document = create_app(read_settings()).openapi()
            print(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), end="")
    except (SettingsError, BundleError, TowerError, StarterError, StoreError, KeysError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
