"""`python -m training curate FILE`: choose from a pool of captions or pairs what is worth training on.

Reads top to bottom: fingerprints of the evaluation sets → blocks of the pool, filtered, freed of leaks and encoded
(kept in the work folder: Ctrl-C costs a block) → candidates of each concept → allocation → tables and a report.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from training.curate.allocation import allocate
from training.curate.blocks import Preparation
from training.curate.cluster import Cluster
from training.curate.concepts import concept_names, overlap, prototypes
from training.curate.leaks import held_out
from training.curate.output import figures, report, write_report, write_rows
from training.curate.pool import ThisProcess, Workers, offer
from training.curate.recipe import CurateError, load_curation
from training.files import write
from training.flags import add_flags

__all__ = ["CurateError", "add_arguments", "main"]

_SHOWN = 10  # starved concepts in the terminal; the report has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("curation", type=Path, help="YAML, such as training/recipes/curate/flickr30k.yaml")
    parser.add_argument("--out", type=Path, help="folder of tables and report (default: build/curated/NAME)")
    parser.add_argument("--work", type=Path, help="folder of encoded blocks (default: build/work/NAME)")
    add_flags(parser, "--set")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on Ray Data: on this machine, or a cluster (auto, host:port) whose machines all see --work",
    )
    parser.add_argument("--workers", type=int, default=2, help="with --ray: processes that encode (default: 2)")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Curate, print, write. The last line has the counts by source, reason and evaluation set."""
    if options.workers < 1:
        raise CurateError("--workers must be at least 1")
    curation = load_curation(options.curation, options.overrides)
    out = options.out or Path("build/curated") / curation.name
    work = (options.work or Path("build/work") / curation.name).resolve()
    spec = curation.spec
    parts = [(name, path) for name in spec.pool for path in curation.files(name)]
    sets = held_out(curation, work)
    preparation = Preparation(curation, sets, work)
    names = concept_names(curation)
    vectors = prototypes(curation, names, preparation)
    running: AbstractContextManager[Workers] = nullcontext(ThisProcess())
    if options.ray is not None:
        running = Cluster(options.ray, options.workers)
    with running as workers:
        files = workers.prepare(Preparation(curation, sets, work), parts)
        candidates = workers.gather(offer(spec, vectors, files), files)
    allocation = allocate(names, candidates, spec)
    overlaps = overlap(names, sets, spec.near, preparation.read_texts) if sets else {}
    matching = dict(zip(names, candidates.matching, strict=True))
    said = report(curation, candidates, allocation, matching, overlaps)
    write_rows(curation, allocation.taken, out)
    write(out / "report.json", json.dumps(said, indent=1, ensure_ascii=False) + "\n")
    write_report(out / "report.html", said, spec.concepts.each if spec.concepts else 0)
    _print(said, out)
    return figures(said) | {"out": str(out)}


def _print(said: Mapping[str, Any], out: Path) -> None:
    def line(text: str) -> None:
        print(text, file=sys.stderr)

    for name, source in said["sources"].items():
        line(f"{name}: {source['rows']:,} rows, {source['kept']:,} kept, {source['capped']:,} over the cap")
        for reason, count in sorted(source["dropped"].items(), key=lambda item: -item[1]):
            line(f"  {count:>10,}  {reason}")
    line(f"repetitions refused: {said['duplicates']['exact']:,} exact, {said['duplicates']['near']:,} near")
    starved = sorted(said["starved"], key=lambda name: said["concepts"][name]["kept"])
    if said["concepts"]:
        least = ", ".join(f"{name} {said['concepts'][name]['kept']}" for name in starved[:_SHOWN])
        line(f"starved: {len(starved)} of {len(said['concepts'])} concepts" + (f": {least}" if least else ""))
    for name, shared in said["overlap"].items():
        if shared["classes"]:
            line(
                f"{name}: of {shared['classes']} classes concepts name {len(shared['exact'])} exactly, "
                f"{len(shared['lemma'])} in another form, {len(shared['near'])} nearly; {len(shared['free'])} are free"
            )
    line(f"report: {out / 'report.html'}")
