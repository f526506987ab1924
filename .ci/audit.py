"""Ask the advisory service about every pinned version, and say what was asked, and what could not be.

python .ci/audit.py [REQUIREMENTS …]     constraints.txt unless others are named

0: every version was looked up, and none has a known weakness. 1: some have. 2: not everything was looked up, which is
no good news about the rest. pip-audit by itself calls a package that its service does not know "skipped", and ends with
0 where that is all of them.
"""

import json
import subprocess
import sys
from pathlib import Path


def verdict(returncode: int, output: str, said: str) -> tuple[int, str]:
    """Return what pip-audit's JSON and messages come to: an exit code, and the text to print."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = said.strip().splitlines()[-1] if said.strip() else f"pip-audit ended with {returncode}"
        return 2, f"NOTHING WAS CHECKED: the advisory service did not answer.\n{reason[:300]}"
    checked = [each for each in packages if "skip_reason" not in each]
    skipped = [each for each in packages if "skip_reason" in each]
    lines = [
        f"{each['name']} {each['version']}: {weakness['id']}, fixed in {', '.join(weakness['fix_versions']) or 'none'}"
        for each in checked
        for weakness in each["vulns"]
    ]
    found = len(lines)
    if not checked:
        return 2, f"NOTHING WAS CHECKED: the advisory service knows none of the {len(packages)} packages."
    lines.append(f"{len(checked)} of {len(packages)} packages checked, {found} known weaknesses")
    if skipped:
        lines.append(f"NOT CHECKED: {', '.join(sorted(each['name'] for each in skipped))}")
    return (1 if found else 2 if skipped else 0), "\n".join(lines)


def main(requirements: list[str]) -> int:
    root = Path(__file__).parents[1]
    files = requirements or [str(root / "constraints.txt")]
    named = [part for file in files for part in ("-r", file)]
    options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *named, *options], capture_output=True, text=True, check=False
    )
    code, text = verdict(done.returncode, done.stdout, done.stderr)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
