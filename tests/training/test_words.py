"""Searches of one word: read from texts, measured by validation and evaluation, learned from only where they weigh."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training import tiny
from tests.training.conftest import MakeRecipe
from training import pipeline
from training.fit.alignment import new_heads
from training.fit.ladder import train
from training.measure.ranks import word_precision
from training.measure.validation import project, validate
from training.pairs import read_pairs
from training.recipe import Recipe, RecipeError

COLOUR = "(?:of |plain )(\\w+)"  # "a picture of red", "very plain red photo"


def with_words(root: Path, make: MakeRecipe, **changes: Any) -> Recipe:
    """The tiny recipe with the colours of its captions as words beside the captions."""
    pairs = tiny.recipe_values(root)["pairs"]
    return make(pairs={**pairs, "colours": pairs["pictures"] | {"words": COLOUR, "weight": 0} | changes})


def test_words_are_texts_of_their_own(tiny_root: Path, make_recipe: MakeRecipe) -> None:
    read = read_pairs(with_words(tiny_root, make_recipe), "colours")
    for split, media in (("train", 16), ("validation", 8), ("test", 8)):
        part = read[split]  # type: ignore[index]
        assert part.words and set(part.texts) == set(tiny.COLOURS) and len(part.media) == media
        said = [part.texts[text] for medium, text in part.links if part.media[medium].name == part.media[0].name]
        assert set(said) == {list(tiny.COLOURS)[int(part.media[0].stem) % len(tiny.COLOURS)]}


def test_each_form_of_a_word_is_a_text_of_its_own(tiny_root: Path, make_recipe: MakeRecipe) -> None:
    plain = read_pairs(with_words(tiny_root, make_recipe), "colours")["train"]
    read = read_pairs(with_words(tiny_root, make_recipe, words="(picture|o)", word_forms=["a {}", "{}!"]), "colours")
    assert {"an o", "o!", "a picture", "picture!"} == set(read["train"].texts)
    read = read_pairs(with_words(tiny_root, make_recipe, word_forms=["{}", "a {}"]), "colours")
    assert len(read["train"].links) == 2 * len(plain.links)
    with pytest.raises(RecipeError, match="'a word' does not have"):
        with_words(tiny_root, make_recipe, word_forms=["a word"])
    with pytest.raises(RecipeError, match="words is not given"):
        with_words(tiny_root, make_recipe, words=None, word_forms=["a {}"])


def test_words_that_cannot_be_found_are_refused(tiny_root: Path, make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="words is not a regular expression"):
        with_words(tiny_root, make_recipe, words="(")
    pairs = tiny.recipe_values(tiny_root)["pairs"]
    with pytest.raises(RecipeError, match="no column is named as text"):
        make_recipe(pairs={**pairs, "tones": pairs["tones"] | {"words": ".+"}})
    with pytest.raises(RecipeError, match="none has the supervision pairs and a weight"):
        make_recipe(pairs={"pictures": pairs["pictures"] | {"weight": 0}})


def test_precision_of_words_is_the_mean_over_those_that_were_asked() -> None:
    media = np.eye(3, dtype=np.float32)
    texts = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [1.0, 0.0, 0.0]], np.float32)
    links = np.array([[0, 0], [1, 1], [2, 1]])  # the last word belongs to none
    assert word_precision(media, texts, links) == pytest.approx(100 * (1 + (1 / 2 + 2 / 3) / 2) / 2, abs=0.01)


def test_words_are_measured_and_change_nothing_that_is_learned(
    tiny_root: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    weights = []
    for recipe in (make_recipe(), with_words(tiny_root, make_recipe)):
        # One validation, at the end: what is kept does not depend on what it measures.
        once = recipe.train.model_copy(update={"validate_every": 1000, "baseline": False})
        recipe = recipe.model_copy(update={"train": once})
        frozen, cache = pipeline.encoders(recipe), tmp_path / "cache"
        data = pipeline.features(recipe, frozen, pipeline.pairs(recipe, cache), cache)
        trained = train(recipe, data, tmp_path / str(len(weights)))
        weights.append(trained.heads["image"].state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    measured = validate(recipe, trained.heads, data)
    assert set(measured) == {"pictures", "tones", "colours"}
    figures = pipeline.evaluate(recipe, frozen, data, trained, cache, tmp_path)
    assert 0 < figures["colours.map"] <= 100
    assert not any(key.startswith("colours.i2t") for key in figures)


def test_words_search_all_that_is_held_out_once(
    tiny_root: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 pictures of their own first, and those of the other table that are not among them; no sounds."""
    pairs = tiny.recipe_values(tiny_root)["pairs"]
    others = pairs["pictures"] | {"splits": {"train": ["train"], "validation": ["validation", "test"]}}
    words = pairs["pictures"] | {"words": COLOUR}
    recipe = make_recipe(pairs={"others": others, "words": words, "again": words, "tones": pairs["tones"]})
    frozen, cache = pipeline.encoders(recipe), tmp_path / "cache"
    data = pipeline.features(recipe, frozen, pipeline.pairs(recipe, cache), cache)
    heads = new_heads(recipe, data, {}, recipe.projector)
    monkeypatch.setattr("training.measure.validation.word_precision", lambda media, texts, links: media)
    figures = validate(recipe, heads, data)
    assert figures["words"].shape[0] == figures["again"].shape[0] == 16  # type: ignore[attr-defined]
    own = project(heads["image"], data["words"]["validation"].media)
    np.testing.assert_array_equal(figures["words"][:8], own)  # type: ignore[index]
