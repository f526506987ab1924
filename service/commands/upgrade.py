"""`upgrade` carries a store over to a bundle of another space by mapping its vectors."""

import argparse
from functools import partial
from pathlib import Path

from service.commands.reembed import carry, largest_file
from service.retrieval.reembedding import Originals
from service.retrieval.upgrading import Plan, Upgrading
from service.settings import SettingsError, read_settings

HELP = "carry a store over to a bundle of another space, by mapping its vectors; the worst are embedded again"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="which is kept, whatever becomes of it")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW_STORE", help="to be filled while STORE is served")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="BUNDLE", help="the bundle that is to serve the store"
    )
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="BUNDLE",
        help="the bundle that filled the store: the map is learned from texts too, or from texts alone without media",
    )
    parser.add_argument("--media", type=Path, metavar="FOLDER", help="where the files of images, sounds and videos are")
    parser.add_argument("--media-key", metavar="KEY", help="the metadata key of a file's path; else the item's id")
    parser.add_argument(
        "--share", type=float, default=0.1, help="share of the items to embed again (0 to 1; default: 0.1)"
    )
    parser.add_argument(
        "--least",
        type=float,
        default=0.4,
        help="share of the first ten answers that must stay the same (0 to 1; default: 0.4)",
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object, in place of text")


def run(
    store: Path,
    new: Path | None,
    to: Path,
    earlier: Path | None,
    media: Path | None,
    media_key: str | None,
    share: float,
    least: float,
    as_json: bool = False,
) -> int:
    """Carry a store over: in place, or into a store beside it. Raises SettingsError, StoreError, BundleError."""
    for name, value in (("--share", share), ("--least", least)):
        if not 0 <= value <= 1:
            raise SettingsError(f"{name} {value:g}: give a number from 0 to 1")
    settings = read_settings(bundle=to)
    plan = Plan(share, least, None if earlier is None else settings.read_bundle(earlier))
    originals = Originals(media, media_key, largest_file(settings))
    return carry(store, new, settings, originals, as_json, partial(Upgrading, plan=plan))
