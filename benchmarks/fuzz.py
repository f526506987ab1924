"""Does the service do what openapi.yaml says, whatever it is asked? And do the decoders, whatever they are given?

python -m benchmarks.fuzz [--bundle build/starter] [--examples 100] [--files 20000] [--seed 0]

Schemathesis reads openapi.yaml and asks a live server over a socket, with a key of every scope and without: the
examples in it, the edges of every constraint, random requests (valid and not), and chains of requests that follow from
each other; every answer goes through all of its checks. Then honest files are damaged at random and given to the
wrappers around the decoders, which may refuse them as `contract.errors` says and do nothing else. Prints a report and,
as its last line, one JSON object.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from benchmarks import hostile_media as media
from benchmarks.commands import finish, parser_of
from benchmarks.servers import Server, isthmus
from service.api.keys import Scope, create_key
from service.contract.audio import AudioLimits, decode_audio
from service.contract.errors import InputError
from service.contract.images import ImageLimits, ImagePreprocessing, read_image
from service.engine.inputs import sniff

_ROOT = Path(__file__).parents[1]
_SPECIFICATION = _ROOT / "openapi.yaml"
_PATIENCE_S = 30
_TRUE = {
    # An item may be called `delete` or `move`: GET and DELETE of this path are then about that item.
    ("AllowHeaderMismatch", "OPTIONS /items/delete"),
    ("AllowHeaderMismatch", "OPTIONS /items/move"),
    # The lines of a job are judged one by one in the background: /jobs/{id}/errors names those that are wrong.
    ("AcceptedNegativeData", "POST /jobs"),
}
"""Differences from the specification that are right."""
_SPEC = ImagePreprocessing(height=32, width=32)


@dataclass
class Findings:
    tried: int = 0
    refused_as_documented: int = 0
    """How many of the damaged files were refused as the reference says."""
    drifts: int = 0
    """Answers that are not as openapi.yaml says, and an openapi.yaml that is not what the server says of itself."""
    crashed: int = 0
    """Answers of 500 and more, and exceptions that no wrapper should let through."""
    lost: int = 0
    """Nothing is to be lost here; the others of these lines have it."""
    unanswered: int = 0

    @property
    def bad(self) -> int:
        return self.drifts + self.crashed + self.unanswered


def specification(server: Server, key: str, examples: int, seed: int, findings: Findings) -> None:
    """Try every operation of openapi.yaml, with every check, also of what is refused without the key."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(str(Path(sys.executable).parent / "st"), "--config-file", str(_ROOT / "benchmarks/schemathesis.toml")),
            *("run", str(_SPECIFICATION), "--url", server.address, "--checks", "all", "--seed", str(seed)),
            *("--max-examples", str(examples), "--continue-on-failure", "--suppress-health-check", "all"),
            *("--request-timeout", str(_PATIENCE_S), "--report", "json", "--report-json-path", str(report)),
        ]
        command += ["--header", f"Authorization: Bearer {key}"]
        hooks = {"SCHEMATHESIS_HOOKS": "benchmarks.schemathesis_hooks", "PYTHONPATH": str(_ROOT)}
        subprocess.run(command, cwd=folder, env=os.environ | hooks, check=False)
        told = json.loads(report.read_text())
    findings.tried += told["test_cases"]["generated"]
    for failure in told["failures"]:
        for operation in failure["operations"]:
            if failure["type"] == "ServerError":
                findings.crashed += 1
            elif (failure["type"], operation) not in _TRUE:
                findings.drifts += 1
                print(f"differs from its specification: {operation}: {failure['type']}")
    findings.unanswered += len(told["errors"])
    if not told["complete"]:
        findings.drifts += 1
        print("schemathesis did not come to its end")


def files(count: int, seed: int, findings: Findings) -> None:
    """Gives so many damaged files to the wrappers in this process."""
    for name, data in itertools.islice(_damaged(seed), count):
        findings.tried += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _read(data)
        except InputError:
            findings.refused_as_documented += 1
        except Exception as error:
            findings.crashed += 1
            print(f"{name}: {type(error).__name__}: {error}")


def _damaged(seed: int) -> Iterator[tuple[str, bytes]]:
    honest = media.honest_images() | media.honest_sounds()
    for turn in itertools.count(seed):
        yield from media.damaged(honest, turn, cuts=1, flips=9).items()


def _read(data: bytes) -> None:
    if sniff(data) == "image":
        read_image(data, _SPEC, ImageLimits(max_pixels=4_000_000))
    else:
        decode_audio(data, _SPEC_RATE, AudioLimits(max_seconds=60))


_SPEC_RATE = 16_000


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("fuzz", __doc__)
    parser.add_argument("--examples", type=int, default=100, help="of each operation, at most, in each phase")
    parser.add_argument("--files", type=int, default=20_000, help="that are damaged")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        _, key = create_key(Path(folder) / "keys.json", "fuzz", get_args(Scope))
        with isthmus("isthmus", options.bundle, Path(folder) / "store", keys=Path(folder) / "keys.json") as server:
            specification(server, key, options.examples, options.seed, findings)
    files(options.files, options.seed, findings)
    print(json.dumps(vars(findings)))
    return int(bool(findings.bad))


if __name__ == "__main__":
    finish(main)
