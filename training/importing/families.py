"""The families of aligned models that are read, and what a folder says of the model in it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from service.contract.bundle import Modality
from training.errors import TrainingError
from training.preprocessors import read_json


class ImportModelError(TrainingError):
    """A model cannot become a bundle: the message says why, and what can be done."""


@dataclass(frozen=True)
class Family:
    name: str
    modalities: tuple[Modality, ...]
    templates: tuple[str, ...] = ()
    """Templates for the labels of its media, as the model's authors give them."""


TEXTS = "sentence-transformers"
FAMILIES: dict[str, Family] = {
    "align": Family("ALIGN", ("image", "text"), ("a photo of a {}.",)),
    "chinese_clip": Family("Chinese-CLIP", ("image", "text"), ("一张{}的照片。",)),
    "clap": Family("CLAP", ("audio", "text"), ("This is a sound of {}.",)),
    "clip": Family("CLIP", ("image", "text"), ("a photo of a {}.",)),
    "siglip": Family("SigLIP, SigLIP 2 of one resolution", ("image", "text"), ("This is a photo of {}.",)),
    "vision-text-dual-encoder": Family("vision-text dual encoders", ("image", "text"), ("a photo of a {}.",)),
    TEXTS: Family("sentence-transformers' text models", ("text",)),
}
"""The families by `model_type`; a text model alone is of any type that transformers reads."""
_WHY_NOT = {
    "jina_clip": "its code comes with its weights (trust_remote_code), and no code of a model folder is run here",
    "siglip2": "it takes pictures of any shape (NaFlex), and pictures have one size here: take the checkpoint of one "
    "resolution instead, such as siglip2-base-patch16-224",
}
READ = (
    ", ".join(f"{family.name} ({kind})" for kind, family in FAMILIES.items() if kind != TEXTS)
    + ", and text "
    + ("models of sentence-transformers (modules.json)")
)


def family_of(folder: Path) -> str:
    """The key of FAMILIES that a model folder is of. Raises ImportModelError with the list of what is read."""
    kind = read_json(folder, "config.json").get("model_type")
    if kind in FAMILIES:
        return str(kind)
    if (folder / "modules.json").is_file():
        return TEXTS
    if kind is None:
        raise ImportModelError(
            f"{folder} is no model folder: it holds no config.json with a model_type. Read are: {READ}"
        )
    why = _WHY_NOT.get(kind, "it is none of the families of aligned models that are read")
    raise ImportModelError(f"{folder} is of type {kind}: {why}. Read are: {READ}")


def softmax_of(model: Any) -> tuple[float, float | None]:
    """Temperature and bias of a two-tower model: its logits are similarity / temperature + bias."""
    bias = getattr(model, "logit_bias", None)
    with torch.inference_mode():
        if hasattr(model, "temperature"):
            temperature = float(model.temperature)
        else:
            scale = model.logit_scale_a if hasattr(model, "logit_scale_a") else model.logit_scale
            temperature = float(torch.exp(-scale))
        return temperature, None if bias is None else float(bias)


def licence_of(folder: Path) -> str | None:
    """Return the licence that the model card in a folder states: an SPDX identifier, as far as the card has one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        stated = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    if not isinstance(stated, dict):
        return None
    licence = stated.get("license")
    if isinstance(licence, list):
        licence = " AND ".join(map(str, licence)) or None
    if licence in (None, "other", "unknown"):
        licence = stated.get("license_name")
    return None if licence is None else str(licence)
