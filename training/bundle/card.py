"""The model card of a bundle: what it is made of, what it was trained on, what was measured, what to mind."""

from collections.abc import Mapping
from typing import Any

from service.contract.bundle import Modality, Tower
from service.contract.licences import markdown, parts
from training.recipe import Recipe


def model_card(recipe: Recipe, towers: Mapping[Modality, Tower], evaluation: Mapping[str, Any], space: str) -> str:
    """Markdown, from the recipe and from figures that were measured; nothing in it is written by hand."""
    lines = [
        f"# {recipe.name}",
        "",
        recipe.description,
        "",
        f"Space `{space}`, {recipe.projector.dimensions} dimensions.",
    ]
    lines += ["", "## Towers", "", "| modality | encoder (frozen) | licence | projector |", "|---|---|---|---|"]
    for modality, tower in towers.items():
        encoder = tower.encoder
        lines.append(f"| {modality} | {encoder.source} | {encoder.licence or 'not stated'} | {tower.projector.kind} |")
    if recipe.pairs:
        lines += ["", "## Pairs", ""]
    for name, source in recipe.pairs.items():
        texts = "captions" if source.text else "labels in templates"
        lines.append(f"- {name}: {source.modality} with {texts}")
    encoders = {tower.encoder.source: tower.encoder.licence for tower in towers.values()}
    if evaluation:
        lines += ["", "## Measured", "", "| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in evaluation.items()]
        lines += [
            "",
            "R@k and top-1 in percent. `seen` says whether the evaluated classes were among the training labels. "
            "`parity` is the lowest cosine between the exported graph and training, on real "
            "inputs; of an imported model, between it and transformers.",
        ]
    lines += ["", "## Licences", "", markdown(parts(recipe.licences, encoders), recipe.terms).rstrip()]
    if recipe.notes:
        lines += ["", "## To mind", "", recipe.notes.strip()]
    return "\n".join(lines) + "\n"
