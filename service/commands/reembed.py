"""`reembed`: carry a store over to a bundle of another space."""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from service.retrieval.reembedding import LEFT_OUT, Originals, Outcome, Source, command, reembed, replace_store, survey
from service.settings import read_settings

HELP = "carry a store over to a bundle of another space, by embedding again"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="which is kept, whatever becomes of it")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW_STORE", help="to be filled while STORE is served")
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle that is to serve the store")
    parser.add_argument("--media", type=Path, metavar="FOLDER", help="where the files of images, sounds and videos are")
    parser.add_argument("--media-key", metavar="KEY", help="the metadata key of a file's path; else the item's id")
    parser.add_argument("--dry-run", action="store_true", help="only say what can be embedded again and what not")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object, in place of text")


def run(
    store: Path,
    new: Path | None,
    bundle: Path,
    media: Path | None,
    media_key: str | None,
    dry_run: bool,
    as_json: bool = False,
) -> int:
    """Carry a store over to another bundle: in place, or into a store beside it. Raises StoreError, BundleError."""
    settings = read_settings(bundle=bundle)
    limits = settings.limits
    most = max(limits.image_bytes, limits.audio_bytes, limits.video_bytes)
    originals = Originals(media, media_key, most)
    if dry_run:
        outcome = survey(store, originals)
        if as_json:
            print(json.dumps(_as_json(outcome, store)))
            return 0
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
    if as_json:
        print(json.dumps(_as_json(outcome, new or store) | {"kept": None if kept is None else str(kept)}))
        return 0
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


def _as_json(outcome: Outcome, store: Path) -> dict[str, object]:
    counts = {"embedded": dict(outcome.embedded), "already": outcome.already, "label_sets": outcome.label_sets}
    return {"store": str(store), **counts, "left_out": dict(outcome.left_out)}


def _sources(outcome: Outcome) -> str:
    """Return what the items were embedded from."""
    named: dict[Source, str] = {
        "text": "from texts",
        "file": "from files",
        "preview": "from previews, smaller than their files were",
    }
    counts = [f"{outcome.embedded[source]:,} {name}" for source, name in named.items() if outcome.embedded[source]]
    if outcome.beginnings:
        counts.append(f"of {outcome.beginnings:,} sounds only the beginning")
    return ", ".join(counts) or "none"


def _print_left_out(outcome: Outcome) -> None:
    if outcome.left_out:
        print(f"{outcome.left_out.total():,} cannot be embedded again:")
    for reason, count in outcome.left_out.most_common():
        print(f"{count:10}  {reason}, such as {outcome.examples[reason]!r}")
