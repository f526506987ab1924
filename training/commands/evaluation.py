"""Measure a recipe's projectors on its test splits, or a bundle on any data: a folder per class, or a table of
`file,label` or `file,caption`. `--compare` gives the paired difference of two bundles."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from service.contract.bundle import MANIFEST, Bundle, Modality, Preprocessing, read_bundle
from training import pipeline
from training.data.leaks import subset
from training.features import Item, cached_features
from training.flags import add_flags
from training.heads.bundled import as_encoder
from training.measure.data import DataError, Wording, name_of, read_data, read_wording, write_items
from training.measure.intervals import interval
from training.measure.page import items, write_page
from training.measure.ranks import class_vectors, with_prompts
from training.measure.results import Floats, Result, between, captioned, figures_of, hits, labelled
from training.pairs import Pairs
from training.recipe import load_recipe

_Data = dict[Literal["image", "audio"], Pairs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", type=Path, metavar="RECIPE|BUNDLE", help="YAML file, or a bundle folder")
    add_flags(parser, "--cache")
    recipe = parser.add_argument_group("a recipe")
    add_flags(recipe, "--set", "--work")
    bundle = parser.add_argument_group("bundles")
    bundle.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two bundles: B minus A, paired")
    bundle.add_argument(
        "--data", type=Path, help="folder per class, or .csv, .tsv, .jsonl of file,label or file,caption"
    )
    bundle.add_argument("--root", type=Path, help="where the table's files lie (default: the table's folder)")
    bundle.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="rows to take; repeatable")
    bundle.add_argument("--by", choices=("label", "caption"), help="for a table that has both")
    bundle.add_argument(
        "--templates", type=Path, help="prompts: .txt, one a line, or YAML of templates, names, prompts"
    )
    bundle.add_argument("--out", type=Path, help="folder of the report (default: build/evaluation/BUNDLE-DATA)")


def main(options: argparse.Namespace) -> dict[str, Any]:
    if options.compare is None and options.target is None:
        raise DataError("evaluate what? Give a recipe, a bundle folder, or --compare A B")
    if options.compare is not None and options.target is not None:
        raise DataError(f"--compare takes both bundles itself: {options.target} is one too many")
    if options.compare is None and not options.target.is_dir():
        return _recipe(options)
    if options.data is None:
        raise DataError("on which data? Give --data FOLDER or --data INDEX.csv")
    bundles = [read_bundle(path) for path in options.compare or [options.target]]
    wording = read_wording(options.templates)
    data = read_data(options.data, options.root, _where(options.where), options.by, wording.names)
    _check(wording, data)
    if options.compare:
        return _compare(bundles, data, wording, options)
    return _bundle(bundles[0], data, wording, options)


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    if options.data is not None:
        raise DataError(f"--data is for a bundle, and {options.target} is no folder with a {MANIFEST}")
    recipe = load_recipe(options.target, options.overrides)
    work = options.work or Path("build/work") / recipe.name
    frozen, _, data = pipeline.prepare(recipe, options.cache)
    trained = pipeline.saved(recipe, work / "projectors.safetensors", frozen)
    return pipeline.evaluate(recipe, frozen, data, trained, options.cache, work)


def _bundle(bundle: Bundle, data: _Data, wording: Wording, options: argparse.Namespace) -> dict[str, Any]:
    results, figures = _measured(bundle, data, wording, options.cache)
    out = options.out or Path("build/evaluation") / f"{bundle.manifest.name}-{name_of(options.data)}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_items(out / "items.csv", items(results))
    title = f"{bundle.manifest.name} on {name_of(options.data)}"
    specs: dict[str, Preprocessing] = {modality: bundle.manifest.towers[modality].preprocessing for modality in data}
    write_page(out / "report.html", title, figures, results, specs=specs)
    for key, value in figures.items():
        if not key.endswith(".ci95"):
            between_them = "  {} – {}".format(*figures[f"{key}.ci95"]) if f"{key}.ci95" in figures else ""
            print(f"{key:26}{value!s:>10}{between_them}", file=sys.stderr)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return figures


def _measured(bundle: Bundle, data: _Data, wording: Wording, cache: Path) -> tuple[dict[str, Result], dict[str, Any]]:
    results: dict[str, Result] = {}
    figures: dict[str, Any] = {}
    for modality, pairs in data.items():
        results[modality], measured = _measure(bundle, pairs, wording, cache)
        # Of one modality the keys say enough; of two, each names its own.
        figures |= measured if len(data) == 1 else {f"{modality}.{key}": value for key, value in measured.items()}
    return results, figures | between(results)


def _measure(bundle: Bundle, pairs: Pairs, wording: Wording, cache: Path) -> tuple[Result, dict[str, Any]]:
    """Encode and judge one modality of a data set by a bundle's own graphs.

    Media that cannot be decoded are left out and counted as `unreadable`. Raises DataError where nothing is left, or
    where the bundle lacks a tower.
    """
    modality, towers = pairs.modality, bundle.manifest.towers
    if lacking := [needed for needed in (modality, "text") if needed not in towers]:
        has = ", ".join(towers)
        raise DataError(f"{bundle.path} has no {lacking[0]} tower, which {pairs.name} needs; it has {has}")

    def encoded(modality: Modality, items: Sequence[Item], what: str, lenient: bool = False) -> Floats:
        features = cached_features(as_encoder(bundle, modality), items, cache, lenient=lenient, what=what)
        return np.array(features.pooled)

    media = encoded(modality, pairs.media, f"{pairs.name} {modality}", lenient=True)
    good = ~np.isnan(media[:, 0])
    if not good.any():
        first = f"the first: {pairs.media[0]}"
        raise DataError(f"{pairs.name}: none of {len(good)} {modality} files can be decoded; {first}")
    kept, vectors = subset(pairs, good, texts=True), media[good]
    result: Result
    if kept.labels is None:
        result = captioned(kept, vectors, encoded("text", kept.texts, f"{pairs.name} captions"))
    else:
        templates = wording.of(modality, bundle.manifest.templates.get(modality, []))
        prompts = [template.replace("{}", name) for name in kept.classes for template in templates]
        class_prompts = [
            (index, prompt) for index, name in enumerate(kept.classes) for prompt in wording.prompts_of(name)
        ]
        texts = encoded("text", [*prompts, *(prompt for _, prompt in class_prompts)], f"{pairs.name} prompts")
        classes = class_vectors(texts[: len(prompts)], len(templates))
        classes = with_prompts(
            classes, texts[len(prompts) :], np.array([index for index, _ in class_prompts], np.int64)
        )
        result = labelled(kept, vectors, classes, bundle.manifest.temperature)
    figures = figures_of(result)
    if len(kept.media) < len(pairs.media):
        figures["unreadable"] = len(pairs.media) - len(kept.media)
    seen = towers[modality].labels
    return result, figures | {"concept_informed": None if seen is None else bool(seen)}


def _compare(bundles: list[Bundle], data: _Data, wording: Wording, options: argparse.Namespace) -> dict[str, Any]:
    """B minus A over the same queries, with the bootstrapped interval of the paired difference."""
    (first, a), (second, b) = (_measured(bundle, data, wording, options.cache) for bundle in bundles)
    figures: dict[str, Any] = {}
    print(f"{'':22}{'A':>8}{'B':>8}{'B - A':>8}   95 %", file=sys.stderr)
    for modality, result in first.items():
        other = hits(second[modality])
        for key, (right, owner) in hits(result).items():
            name = key if len(data) == 1 else f"{modality}.{key}"
            difference = other[key][0] - right
            figures |= {
                f"a.{name}": a[name],
                f"b.{name}": b[name],
                f"difference.{name}": round(float(difference.mean()), 2),
                f"difference.{name}.ci95": interval(difference, owner),
            }
            low, high = figures[f"difference.{name}.ci95"]
            sure = "" if low <= 0 <= high else "  *"
            print(
                f"{name:22}{a[name]:>8}{b[name]:>8}{figures[f'difference.{name}']:>8}   {low} – {high}{sure}",
                file=sys.stderr,
            )
    print("*: the interval does not hold 0", file=sys.stderr)
    return figures


def _where(conditions: list[str]) -> dict[str, set[str]]:
    result: dict[str, set[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise DataError(f"--where {condition}: COLUMN=VALUE is needed")
        result.setdefault(column, set()).add(value)
    return result


def _check(wording: Wording, data: _Data) -> None:
    known = {name for pairs in data.values() for name in pairs.classes} | set(wording.names)
    if unknown := sorted(set(wording.prompts) - known):
        raise DataError(f"--templates: prompts for {unknown[0]}, which is no class of the data")
