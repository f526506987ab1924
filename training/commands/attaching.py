"""Give eyes and ears to a text index that exists: train image and sound towers into the text space of its embedding
API.

The text side stays what the API gives, so that every stored vector stays valid: only projectors of images and sounds
are trained, from captions that the API embeds. What it gave is in the feature cache: a run that was cut off goes on.
The bundle forwards texts to the API; made from a file of vectors alone, it has no text tower.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.contract.bundle import check_target
from service.contract.endpoint import PROBE, of_one_model
from training import pipeline
from training.distributed import joined
from training.encode.endpoint import EndpointError
from training.encoders import FrozenEncoder
from training.features import cached_features, folder_of
from training.files import default_cache
from training.fit.ladder import train
from training.heads.bundled import PROJECTORS
from training.heads.concepts import named
from training.heads.projector import NoHead
from training.heads.trained import licences_of, save_projectors
from training.measure.validation import sampled
from training.recipe import SET_HELP, EncoderSource, Recipe, load_recipe

_OTHER_TEXTS, _TEMPERATURE = 4_096, 0.02
"""Chosen on the dev photographs of Flickr8k (docs/LOG.md)."""
_MEAN_OF = 20_000
"""Texts whose mean direction is taken."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="names the encoders and pairs; its text encoder is the API")
    parser.add_argument("--endpoint", metavar="URL", help="route of the API: …/v1/embeddings, …/api/embed or …/embed")
    parser.add_argument("--model", required=True, help="the model that the API is asked for")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="JSON lines, each a text and its vector")
    parser.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=SET_HELP)
    parser.add_argument("--work", type=Path, help="folder of this recipe's files (default: build/work/NAME)")
    parser.add_argument("--cache", type=Path, help="feature cache (default: ISTHMUS_CACHE or ~/.cache/isthmus)")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train the recipe's towers into the API's space, and write the bundle. Raises TrainingError."""
    check_target(options.out)
    recipe = load_recipe(options.recipe, options.overrides)
    cache, work = options.cache or default_cache(), options.work or Path("build/work") / recipe.name
    vectors = None if options.vectors is None else options.vectors.absolute()
    source = EncoderSource(endpoint=options.endpoint, model=options.model, vectors=vectors)
    recipe = recipe.model_copy(update={"encoders": {**recipe.encoders, "text": source}, "texts": {}})
    frozen = pipeline.encoders(recipe, cache)
    _check_cache(frozen["text"], cache)
    recipe = _in_space(recipe, frozen["text"].width)
    read = pipeline.pairs(recipe, cache)
    data = pipeline.features(recipe, frozen, read, cache)
    texts = [splits["train"].texts for splits in data.values() if len(splits["train"].texts)]
    head = NoHead("text", frozen["text"].width).eval()
    if texts:
        head.common = torch.from_numpy(sampled(head, texts, _MEAN_OF, np.random.default_rng(0)).mean(0))
    trained = train(recipe, data, work, frozen={"text": head}, names=named(recipe, frozen, cache))
    if joined().index:
        return {}
    trained = replace(trained, licences=licences_of(recipe))
    work.mkdir(parents=True, exist_ok=True)
    save_projectors(work / PROJECTORS, trained)
    figures = pipeline.evaluate(recipe, frozen, data, trained, cache, work)
    if options.endpoint is None:
        trained = replace(trained, heads={name: head for name, head in trained.heads.items() if name != "text"})
    bundle = pipeline.export(recipe, frozen, trained, figures, options.out)
    return {"bundle": str(bundle.path), "space": bundle.manifest.space, **bundle.manifest.evaluation}


def _check_cache(encoder: FrozenEncoder, cache: Path) -> None:
    """Raises EndpointError where the cache holds vectors that another model of the same name gave."""
    remote = encoder.remote
    assert remote is not None
    if remote.url is None:
        return
    [known] = np.asarray(cached_features(encoder, [PROBE], cache).pooled)
    if not of_one_model(known, remote.probe):
        raise EndpointError(
            f"{remote.url} gives other vectors for {remote.model} than when it made those in "
            f"{cache / folder_of(cache, encoder, False)}: delete that folder to have all texts embedded again"
        )


def _in_space(recipe: Recipe, dimensions: int) -> Recipe:
    """The recipe for heads that end in a space of so many dimensions, which nothing may be added to.

    Texts stay where they are, closer together than a projector would place them: unless the recipe says otherwise, it
    starts at a lower temperature, and media are told from more texts than a batch has.
    """
    changed = {"dimensions": dimensions, "querybank": 0, "matryoshka": ()}
    train, objective = recipe.train, recipe.train.objective
    if "other_texts" not in objective.model_fields_set:
        train = train.model_copy(update={"objective": objective.model_copy(update={"other_texts": _OTHER_TEXTS})})
    if "temperature" not in train.model_fields_set:
        train = train.model_copy(update={"temperature": _TEMPERATURE})
    return recipe.model_copy(update={"projector": recipe.projector.model_copy(update=changed), "train": train})
