"""Flags that several commands of the trainer share, each said once."""

import argparse
from pathlib import Path
from typing import Any

from training.files import default_cache
from training.recipe import SET_HELP


def add_flags(parser: argparse._ActionsContainer, *names: str) -> None:
    """Adds the flags that are named to a parser, or to a group of one."""
    flags: dict[str, dict[str, Any]] = {
        "recipe": {"type": Path, "help": "YAML file; see training/recipes/"},
        "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "dest": "overrides", "help": SET_HELP},
        "--work": {"type": Path, "help": "folder of this recipe's files (default: build/work/NAME)"},
        "--cache": {
            "type": Path,
            "default": default_cache(),
            "help": "feature cache (default: ISTHMUS_CACHE or ~/.cache/isthmus)",
        },
    }
    for name in names:
        parser.add_argument(name, **flags[name])
