"""The trainer adds these commands to `isthmus`, by entry points of `isthmus.commands`.

The flags are named here too, for the completion of shells, which cannot wait for torch; a test compares them.
"""

from functools import partial

import click

from isthmus_client.command_shared import imported, passed_on

_RECIPE = ("--cache", "--set", "--work")


def _run(called: str, name: str, arguments: tuple[str, ...]) -> int:
    return int(imported("training.__main__", "cpu,train").main([name, *arguments], called=f"isthmus {called}"))


def _same(called: str, what: str, flags: tuple[str, ...], name: str | None = None) -> click.Command:
    """The command of `python -m training` with this name, or with another."""
    name = name or called
    help = f"{what}\n\nThe same as `python -m training {name}`."
    return passed_on(called, help, partial(_run, called, name), flags)


train = _same("train", "Train a space by a recipe: RECIPE --out FOLDER.", (*_RECIPE, "--out"), "run")
evaluate = _same(
    "evaluate",
    "Measure a bundle on any data.",
    (*_RECIPE, "--by", "--compare", "--data", "--out", "--root", "--templates", "--where"),
)
select = _same(
    "select",
    "Rank pairs of encoders by how alike they are, before any training.",
    (
        *("--batch", "--by", "--cache", "--items", "--neighbours", "--out", "--pairs", "--queries", "--seed", "--set"),
        "--split",
    ),
)
curate = _same(
    "curate",
    "Choose from a pool of captions or pairs what is worth training on.",
    ("--out", "--ray", "--set", "--work", "--workers"),
)
add_modality = _same("add-modality", "Train a new tower against a bundle that stays as it is.", (*_RECIPE, "--out"))
attach = _same(
    "attach",
    "Train image and sound towers into the text space of an embedding API.",
    (*_RECIPE, "--endpoint", "--model", "--out", "--vectors"),
)
bind = _same(
    "bind",
    "Join two spaces through the texts that both can read.",
    ("--cache", "--name", "--out", "--recipe", "--set", "--texts", "--weight"),
)
export = _same(
    "export",
    "Write the bundle of trained projectors: one checked ONNX graph per modality.",
    (*_RECIPE, "--evaluation", "--out", "--projectors", "--samples"),
)
import_model = _same(
    "import",
    "Make a bundle of a CLIP, SigLIP, CLAP or text model that you have, without training: MODEL --out FOLDER.",
    ("--licence", "--name", "--out", "--precisions", "--recipe", "--revision", "--samples", "--set", "--texts"),
)
