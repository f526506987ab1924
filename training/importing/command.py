"""Make a bundle of a model that is aligned already, without training: CLIP, SigLIP, CLAP … or a text model alone.

Each tower becomes one ONNX graph with the model's own projection, and is checked against transformers on real inputs.
The model's logit scale becomes the temperature of /classify.
"""

import argparse
import importlib.util
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file

from service.contract.bundle import Bundle, Modality, Tower, check_target, space_id
from service.contract.licences import Licence
from training.bundle.card import model_card
from training.bundle.export import PARITY, write_tower
from training.bundle.precision import Encoders, make_variants, text_variants
from training.bundle.write import CARD, write
from training.encoders import FrozenEncoder, load_encoder, load_model, model_folder
from training.features import Item
from training.flags import add_flags
from training.heads.bundled import PROJECTORS
from training.heads.projector import NoHead
from training.importing import reference, samples
from training.importing.families import (
    FAMILIES,
    TEXTS,
    Family,
    ImportModelError,
    family_of,
    licence_of,
    softmax_of,
)
from training.preprocessors import transformer_folder
from training.recipe import EncoderSource, ProjectorSpec, Recipe, load_recipe

_OF_TEXTS = 0.05
"""Temperature of a text model, which tells none: the scale of 20 that sentence-transformers trains with by default."""
_FEWEST = 300
"""Texts: of the 200 that do not calibrate, half a point is one."""
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="a folder, an installed package that holds a model, or a hub id such as OWNER/NAME"
    )
    parser.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    parser.add_argument("--name", help="of the bundle (default: the model's)")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--licence", help="SPDX identifier of the model's licence (default: what its model card says)")
    parser.add_argument("--samples", type=Path, help="folder of photographs or sounds to check the graphs on")
    parser.add_argument("--texts", type=Path, help="a text per line to check the text graph on")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp16", "int8"), default=[], help="smaller variants, as far as they pass"
    )
    parser.add_argument("--recipe", type=Path, help="its pairs are what the variants' loss of R@1 is measured on")
    add_flags(parser, "--set")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Write the bundle. Raises TrainingError."""
    started = time.monotonic()
    check_target(options.out)
    if options.recipe is not None and not options.precisions:
        raise ImportModelError("--recipe is for --precisions: without it nothing is measured on pairs")
    source = _source(options)
    folder, named = model_folder(_recipe("model", source, ("text",)), source)
    kind = family_of(folder)
    recipe = _described(options, folder, named, FAMILIES[kind], source)
    print(f"{named}: {FAMILIES[kind].name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        towers: dict[Modality, Tower] = {}
        encoders: dict[Modality, FrozenEncoder] = {}
        items: dict[Modality, Sequence[Item]] = {}
        parity: dict[Modality, float] = {}
        for modality in FAMILIES[kind].modalities:
            encoders[modality] = encoder = _timed(f"{modality}: read", load_encoder, recipe, modality)
            items[modality] = samples.texts(options.texts)[: samples.MOST]
            if modality != "text":
                items[modality] = samples.media(modality, options.samples, work)
            written = (encoder, NoHead(modality, encoder.width).eval(), work, items[modality])
            towers[modality], parity[modality] = _timed(f"{modality}: exported and checked", write_tower, *written)
        model = load_model(transformer_folder(folder))
        for modality, encoder in encoders.items():
            compared = (model, folder, encoder, work / towers[modality].file, items[modality])
            cosine = _timed(f"{modality}: compared to transformers", _agree, *compared)
            parity[modality] = min(parity[modality], cosine)
        figures: dict[str, Any] = {f"parity.{modality}": round(value, 7) for modality, value in parity.items()}
        if options.precisions:
            towers, gates = _timed("variants", _variants, options, encoders, towers, work)
            figures |= gates
        softmax = (_OF_TEXTS, None) if kind == TEXTS else softmax_of(model)
        bundle = _write(recipe, encoders, towers, figures, softmax, work, options.out)
    seconds = time.monotonic() - started
    _print(bundle, figures, seconds)
    return {
        "bundle": str(bundle.path),
        "space": bundle.manifest.space,
        "family": kind,
        "dimensions": bundle.manifest.dimensions,
        "temperature": bundle.manifest.temperature,
        "seconds": round(seconds, 1),
        **figures,
    }


def _described(options: argparse.Namespace, folder: Path, named: str, family: Family, source: EncoderSource) -> Recipe:
    """The recipe that a model would have, with its licence and what its family has to say."""
    licence = options.licence or licence_of(folder)
    name = options.name or re.sub(r"[^A-Za-z0-9._-]+", "-", named.rpartition("/")[2]).strip("-._")[:64]
    recipe = _recipe(name, source.model_copy(update={"licence": licence}), family.modalities)
    description = f"{named} ({family.name}), imported: both towers have the model's own projections."
    if family.modalities == ("text",):
        description = f"{named}, a text model of sentence-transformers, imported."
    return recipe.model_copy(
        update={
            "description": description,
            "templates": {m: list(family.templates) for m in family.modalities if m != "text"},
            "licences": () if licence is None else (Licence.model_validate({"of": named, "licence": licence}),),
        }
    )


def _source(options: argparse.Namespace) -> EncoderSource:
    """A folder, a package that is installed, or else a hub id. Raises ImportModelError where it can be none."""
    given = Path(options.model).expanduser()
    if given.is_dir():
        if options.revision is not None:
            raise ImportModelError(f"--revision is of a hub id, and {options.model} is a folder")
        return EncoderSource(folder=given.resolve())
    if options.model.isidentifier() and (spec := importlib.util.find_spec(options.model)) is not None:
        roots = [Path(place) for place in spec.submodule_search_locations or ()]
        inside = sorted(path for root in roots for path in root.rglob("config.json") if _is_model(path.parent))
        if not inside:
            raise ImportModelError(f"the package {options.model} holds no model folder")
        root = next(root for root in roots if inside[0].is_relative_to(root))
        return EncoderSource(package=options.model, subfolder=str(inside[0].parent.relative_to(root)))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", options.model) or given.exists():
        raise ImportModelError(
            f"{options.model} is neither a folder, nor an installed package, nor a hub id (OWNER/NAME)"
        )
    return EncoderSource(hub=options.model, revision=options.revision)


def _is_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _recipe(name: str, source: EncoderSource, modalities: Sequence[Modality]) -> Recipe:
    """Makes a recipe without pairs, and perhaps of texts alone, which no recipe that is trained by may be."""
    return Recipe.model_construct(name=name, encoders=dict.fromkeys(modalities, source), pairs={})


def _timed(what: str, work: Callable[..., T], *arguments: Any) -> T:
    started = time.monotonic()
    result = work(*arguments)
    print(f"  {what:36}{time.monotonic() - started:8.1f} s", file=sys.stderr)
    return result


def _agree(model: Any, folder: Path, encoder: FrozenEncoder, graph: Path, items: Sequence[Item]) -> float:
    """Lowest cosine of a graph's vectors to those of transformers. Raises ImportModelError below PARITY."""
    if encoder.modality == "audio":
        items = reference.heard_whole(encoder, items)
        if not items:
            raise ImportModelError(
                "--samples: no sound is as short as the model's window, which transformers hears whole"
            )
    expected = reference.transformers_vectors(model, folder, encoder, items)
    vectors = reference.served(encoder, graph, items)
    if vectors.shape != expected.shape:
        raise ImportModelError(f"the {encoder.modality} tower gives {vectors.shape}, and transformers {expected.shape}")
    cosines = (vectors * expected).sum(1)
    worst = int(cosines.argmin())
    if not cosines[worst] >= PARITY:
        raise ImportModelError(
            f"the {encoder.modality} tower differs from transformers: of {items[worst]!s:.80} the cosine "
            f"is {cosines[worst]:.6f}, below {PARITY}"
        )
    return float(cosines[worst])


def _variants(
    options: argparse.Namespace, encoders: Encoders, towers: Mapping[Modality, Tower], work: Path
) -> tuple[dict[Modality, Tower], dict[str, Any]]:
    """The towers with the variants that pass, and their figures. Raises ImportModelError where none can be judged."""
    if len(towers) == 1:
        texts = samples.texts(options.texts)
        if len(texts) < _FEWEST:
            raise ImportModelError(
                f"--precisions: variants are judged on {_FEWEST} texts at least: give a file of them by --texts"
            )
        tower, figures = text_variants(encoders["text"], towers["text"], work, texts, options.precisions)
        return {"text": tower}, figures
    if options.recipe is None:
        raise ImportModelError("--precisions: the loss of R@1 is measured on pairs: name a recipe of them by --recipe")
    given = load_recipe(options.recipe, options.overrides).only(set(encoders))
    export = given.export.model_copy(update={"precisions": ("fp32", *options.precisions)})
    return make_variants(given.model_copy(update={"export": export}), encoders, towers, work)


def _write(
    recipe: Recipe,
    encoders: Mapping[Modality, FrozenEncoder],
    towers: Mapping[Modality, Tower],
    figures: Mapping[str, Any],
    softmax: tuple[float, float | None],
    work: Path,
    target: Path,
) -> Bundle:
    widths = {encoder.width for encoder in encoders.values()}
    if len(widths) > 1:
        raise ImportModelError(f"the towers' vectors have {sorted(widths)} numbers: they share no space")
    dimensions = widths.pop()
    recipe = recipe.model_copy(update={"projector": ProjectorSpec(dimensions=dimensions)})
    space = space_id(dimensions, towers)
    save_file({}, work / PROJECTORS, {"kinds": "{}", "means": "{}"})  # each tower has its projection in its encoder
    (work / CARD).write_text(model_card(recipe, towers, figures, space), encoding="utf-8")
    others = {name: work / name for name in (PROJECTORS, CARD)}
    if (tokenizer := encoders["text"].tokenizer) is not None:
        others["tokenizer.json"] = tokenizer
    graphs = {tower.graph(precision)[0] for tower in towers.values() for precision in tower.precisions}
    return write(
        target,
        {graph: work / graph for graph in graphs},
        others,
        name=recipe.name,
        space=space,
        dimensions=dimensions,
        towers=towers,
        temperature=softmax[0],
        bias=softmax[1],
        templates={modality: list(prompts) for modality, prompts in recipe.templates.items()},
        evaluation=dict(figures),
        licences=recipe.licences,
    )


def _print(bundle: Bundle, figures: Mapping[str, Any], seconds: float) -> None:
    print(f"{'tower':8}{'file':16}{'MB':>8}{'parity':>12}", file=sys.stderr)
    for modality, tower in bundle.manifest.towers.items():
        size = (bundle.path / tower.file).stat().st_size / 1e6
        print(f"{modality:8}{tower.file:16}{size:>8.1f}{figures[f'parity.{modality}']:>12.6f}", file=sys.stderr)
    print(f"imported in {seconds:.1f} s: isthmus serve --bundle {bundle.path}", file=sys.stderr)
