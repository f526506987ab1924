"""Does each capability of the systems that Isthmus descends from hold here?

    python -m benchmarks.family [--row N …] [--data DATA] [--out DIR] [--bundle build/starter] [--again]

Each row of benchmarks/family is measured by what runs now, and its outcome kept in DIR: a run that is stopped goes on
from there (`--again` measures anew). A line says number, system, proof, figure, 95 % interval and verdict: `holds`;
`settled`, where a fair try (three seeds, a sweep on validation, a control that the same test sees) gained nothing;
`fails`; `none`, where there is nothing to take. Features are kept in DIR/cache. The last line is one JSON object.
Rows of several languages and of speech want the packages of the extra `family`, and Debian's espeak-ng.
"""

import importlib
import json
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.commands import finish, parser_of
from benchmarks.family.lab import Lab
from benchmarks.family.rows import NOTHING_TO_TAKE, ROWS, SYSTEMS, Outcome

THEMES = ("equal", "spaces", "served", "senses", "heads", "texts", "neighbours", "points")
NAMES = {"holds": "hold", "settled": "settled", "fails": "fail", "none": "none"}


def outcome(number: int, lab: Lab) -> Outcome:
    """Measure one row; an error is a row that fails, and says so."""
    if number in NOTHING_TO_TAKE:
        return Outcome(f"nothing to take from {NOTHING_TO_TAKE[number]}", None, "none")
    if number not in ROWS:
        return Outcome("nothing here shows it yet", None, "fails")
    try:
        return ROWS[number].measure(lab)
    except Exception as error:
        traceback.print_exc()
        return Outcome(f"it could not be measured: {error}", None, "fails")


def measured(numbers: Sequence[int], lab: Lab, out: Path, again: bool) -> dict[int, dict[str, Any]]:
    """The outcome of each row, from `out` where it is there by the same data, bundle and settings; print its line."""
    results = {}
    options = [str(lab.data.resolve()), str(lab.bundle.resolve()), *lab.overrides]
    for number in numbers:
        path = out / f"row-{number:02}.json"
        result = json.loads(path.read_text()) if path.is_file() and not again else {}
        if result.get("options") != options:
            started = time.perf_counter()
            result = asdict(outcome(number, lab)) | {"seconds": round(time.perf_counter() - started, 1)}
            result |= {"options": options}
            path.write_text(json.dumps(result) + "\n")
        print(line(number, result), flush=True)
        results[number] = result
    return results


def line(number: int, result: dict[str, Any]) -> str:
    known = ROWS.get(number)
    title = f"{known.system}: {known.proof}" if known else NOTHING_TO_TAKE.get(number, "")
    bounds = "exact" if result["interval"] is None else f"[{result['interval'][0]:g}, {result['interval'][1]:g}]"
    return f"{number:2}  {title} | {result['figure']} | {bounds} | {result['verdict']}"


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("family", __doc__)
    parser.add_argument(
        "--row", type=int, nargs="+", choices=range(1, SYSTEMS + 1), metavar="N", help="these rows alone"
    )
    parser.add_argument("--data", type=Path, help="folder of data and encoders (default: ISTHMUS_DATA)")
    parser.add_argument("--out", type=Path, default=Path("build/family"), help="keeps outcomes and features")
    parser.add_argument("--again", action="store_true", help="measure rows whose outcome is there already")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="of the recipe"
    )
    options = parser.parse_args(arguments)
    data = options.data or Path(os.environ.get("ISTHMUS_DATA", "shared"))
    if not data.is_dir():
        parser.error(f"there is no folder {data}: give --data FOLDER, or set ISTHMUS_DATA")
    for theme in THEMES:
        importlib.import_module(f"benchmarks.family.{theme}")
    options.out.mkdir(parents=True, exist_ok=True)
    lab = Lab(data, options.out / "cache", options.bundle, options.overrides)
    results = measured(options.row or range(1, SYSTEMS + 1), lab, options.out, options.again)
    verdicts = [result["verdict"] for result in results.values()]
    counts = {NAMES[verdict]: verdicts.count(verdict) for verdict in NAMES}
    print(json.dumps({"rows": len(results), **counts}))
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    finish(main)
