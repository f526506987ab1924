"""Does what only alignment can do hold? python -m benchmarks.beyond [NAME] [--data DATA] [--bundle build/starter]

The last line is one JSON object: of one NAME {"name", "holds", …its figures}; without a NAME, of all that need no data
(with --data of all), {"tried", "hold"}. To add a claim, add its module here: `measure(options)` returns `holds` and the
figures, and prints what people read.
"""

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "fdr": "fdr",
    "attach": "attach",
    "audit-api": "audit_api",
    "feedback": "feedback",
    "films": "films",
    "publish": "publish",
    "upgrade": "upgrade",
    "why": "why",
}
NEED_DATA = frozenset({"attach", "fdr", "feedback", "films", "publish", "upgrade", "why"})


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one claim, by name; a claim that cannot be measured does not hold."""
    module = importlib.import_module(f"benchmarks.beyond.{NAMES[name]}")
    try:
        return {"name": name, **module.measure(options)}
    except Exception as error:
        traceback.print_exc()
        return {"name": name, "holds": False, "error": f"{type(error).__name__}: {error}"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beyond", description=__doc__)
    parser.add_argument("name", nargs="?", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--data", type=Path, help="folder that holds data/flickr8k and so on")
    parser.add_argument("--cache", type=Path, default=Path("build/beyond"), help="folder for what is embedded once")
    options = parser.parse_args(arguments)
    if options.name in NEED_DATA and options.data is None:
        parser.error(f"{options.name} needs --data")
    tried = [options.name] if options.name else [name for name in NAMES if options.data or name not in NEED_DATA]
    results = []
    for name in tried:
        results.append(measured(name, options))
        print(json.dumps(results[-1]), flush=True)
    if not options.name:
        print(json.dumps({"tried": len(results), "hold": sum(result["holds"] for result in results)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
