"""State how long and how often the parts of `python -m benchmarks` measure, and where they keep things."""

import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    bundle: Path
    folder: Path
    """The folder of what is made once: peers' environments, models, results."""
    scratch: Path
    """The folder of stores; empty at the beginning, gone in the end."""
    seconds: float
    """How long one run of one contender takes."""
    rounds: int
    overload_s: float
    soak_s: float
    starts: int = 5

    def fresh(self) -> Path:
        """A folder for a store that nothing is in."""
        return Path(tempfile.mkdtemp(dir=self.scratch))
