"""What the trainer adds to the command `isthmus`: entry points of `isthmus.commands`."""

from functools import partial

from isthmus_client.command_shared import imported, passed_on


def _run(name: str, arguments: tuple[str, ...]) -> int:
    return int(imported("training.__main__", "cpu,train").main([name, *arguments]))


train = passed_on(
    "train",
    "Train a space by a recipe: RECIPE --out FOLDER.\n\nThe same as `python -m training run`.",
    partial(_run, "run"),
)
evaluate = passed_on(
    "evaluate",
    "Measure a bundle on any data.\n\nThe same as `python -m training evaluate`.",
    partial(_run, "evaluate"),
)
