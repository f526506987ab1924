"""`reembed` carries a store over to a bundle of another space."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from service.retrieval.reembedding import (
    LEFT_OUT,
    Filling,
    Originals,
    Outcome,
    Source,
    command,
    reembed,
    replace_store,
    survey,
)
from service.settings import Settings, read_settings

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
    if not dry_run:
        return carry(store, new, settings, Originals(media, media_key, largest_file(settings)), as_json)
    outcome = survey(store, Originals(media, media_key, largest_file(settings), settings.read_bundle()))
    if as_json:
        print(json.dumps(_as_json(outcome, store)))
        return 0
    print(f"{outcome.carried:,} items can be embedded again: {_sources(outcome)}")
    _print_left_out(outcome)
    return 0


def largest_file(settings: Settings) -> int:
    limits = settings.limits
    return max(limits.image_bytes, limits.audio_bytes, limits.video_bytes)


def carry(
    store: Path,
    new: Path | None,
    settings: Settings,
    originals: Originals,
    as_json: bool,
    filling: Callable[..., Filling] = Filling,
) -> int:
    """Carry a store over as `filling` does, say what became of it, and return the exit status."""
    kept: Path | None = store
    try:
        if new is None:
            outcome, kept = asyncio.run(replace_store(store, settings, originals, filling))
        else:
            outcome = asyncio.run(reembed(store, new, settings, originals, filling))
    except KeyboardInterrupt:
        print(f"stopped: {store} is as it was; the same command goes on", file=sys.stderr)
        return 130
    if as_json:
        print(json.dumps(_as_json(outcome, new or store) | {"kept": None if kept is None else str(kept)}))
        return 0
    if kept is None:
        print(f"{store}: there is nothing to do, it can be served with {settings.bundle}")
        return 0
    embedded = outcome.embedded.total() - outcome.embedded["mapped"]
    mapped = f"{outcome.embedded['mapped']:,} items mapped, " if outcome.learned else ""
    print(f"{new or store}: {mapped}{embedded:,} items embedded again ({_sources(outcome)}), ", end="")
    print(f"{outcome.already:,} were there, {outcome.label_sets:,} label sets")
    for kind, figures in outcome.learned.items():
        print(f"{kind}: {told(figures)}")
    _print_left_out(outcome)
    print(f"The old store is {'as it was, in' if new else 'kept in'} {kept}")
    if outcome.left_out:
        print(f"{(new or kept) / LEFT_OUT} lists what only the old store has")
    if outcome.files_would_help:
        print("Where you have the files of its images and sounds, this embeds what has no vector of its file yet:")
        print(f"    {command(kept, settings.bundle, new or store)} --media FOLDER")
    return 0


def told(figures: Mapping[str, Any]) -> str:
    """Return how good an adapter is, in words."""
    if "texts" in figures:
        return (
            f"mapped as {figures['texts']:,} texts are, which was tested on no item of this kind: "
            f"{figures['kept']:.0%} of the first ten answers to everyday words stay as the old bundle gave them"
        )
    texts = f", and {figures['share_of_texts']:.0%} as texts are" if figures["share_of_texts"] else ""
    return (
        f"mapped as {figures['pairs']:,} items are{texts}. Of those, when left out, vectors are {figures['error']:.3f} "
        f"off (1 - cosine), {figures['kept']:.0%} of the first ten answers to everyday words stay the same, and "
        f"estimated errors go with the real ones by {figures['correlation']:.2f} (rank correlation)"
    )


def _as_json(outcome: Outcome, store: Path) -> dict[str, object]:
    counts = {"embedded": dict(outcome.embedded), "already": outcome.already, "label_sets": outcome.label_sets}
    learned = {"learned": outcome.learned} if outcome.learned else {}
    return {"store": str(store), **counts, **learned, "left_out": dict(outcome.left_out)}


def _sources(outcome: Outcome) -> str:
    """Return what the items were embedded from."""
    names: dict[Source, str] = {
        "text": "from texts",
        "file": "from files",
        "preview": "from previews, smaller than their files were",
    }
    counts = [f"{outcome.embedded[source]:,} {name}" for source, name in names.items() if outcome.embedded[source]]
    if outcome.beginnings:
        counts.append(f"of {outcome.beginnings:,} sounds only the beginning")
    return ", ".join(counts) or "none"


def _print_left_out(outcome: Outcome) -> None:
    if outcome.left_out:
        print(f"{outcome.left_out.total():,} cannot be embedded again:")
    for reason, count in outcome.left_out.most_common():
        print(f"{count:10}  {reason}, such as {outcome.examples[reason]!r}")
