import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import BitImageProcessorPil

from service.contract.images import ImagePreprocessing, decode_image, preprocess_image
from service.contract.patches import LogMelPatches
from service.contract.tokens import TextPreprocessing
from tests.training import aligned
from tests.training.conftest import MakeRecipe
from training.bundle.export import check_parity, export_tower
from training.encoders import FrozenEncoder, load_encoder, weights_sha256
from training.features import cached_features, runner
from training.heads.projector import Head
from training.preprocessors import EncoderError
from training.recipe import ProjectorSpec, RecipeError


def test_what_a_folder_says_becomes_the_preprocessing(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        encoders={"image": {"folder": "dinov2"}, "audio": {"folder": "yamnet"}, "text": {"folder": "roberta"}}
    )
    image = load_encoder(recipe, "image").preprocessing
    assert image == ImagePreprocessing(
        height=32, width=32, resize="shortest_edge", shortest_edge=40, resample="bicubic"
    )
    assert load_encoder(recipe, "audio").preprocessing == LogMelPatches()
    # 34 positions less the two that RoBERTa keeps for padding
    assert load_encoder(recipe, "text").preprocessing == TextPreprocessing(max_length=32, pad_id=1)


def test_pixels_are_those_of_transformers_own_processor(make_recipe: MakeRecipe, tiny_root: Path) -> None:
    recipe = make_recipe(encoders={"image": {"folder": "dinov2"}, "text": {"folder": "bert"}}, pairs={})
    spec = load_encoder(recipe, "image").preprocessing
    assert isinstance(spec, ImagePreprocessing)
    picture = decode_image((tiny_root / "pictures/3.png").read_bytes()).resize((80, 80))
    processor = BitImageProcessorPil.from_pretrained(tiny_root / "dinov2")
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    ours = preprocess_image(picture, spec)
    # Cropping in the resize differs from cropping after it by the rounding of one 8-bit level.
    assert np.abs(theirs - ours).max() <= 2.01 / 127.5
    assert np.abs(theirs - ours).mean() < 0.004


def test_the_same_weights_have_the_same_hash_and_others_do_not(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    first, second = load_encoder(recipe, "text"), load_encoder(recipe, "text")
    assert first.weights_sha256 == second.weights_sha256
    assert second.module is not None
    with torch.no_grad():
        next(second.module.parameters()).view(-1)[0] += 1e-3
    assert weights_sha256(second.module) != first.weights_sha256


def test_tokens_are_merged_over_a_grid(make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path) -> None:
    """Eight of 4 × 4 patches are means of two, in training and in the exported tower; pooled features stay."""

    def encoder(tokens: int | None) -> FrozenEncoder:
        image = {"folder": "dinov2"} | ({"tokens": tokens} if tokens else {})
        return load_encoder(make_recipe(encoders={"image": image, "text": {"folder": "bert"}}, pairs={}), "image")

    media = [tiny_root / f"pictures/{number}.png" for number in range(4)]
    whole, merged = encoder(None), encoder(8)
    own = cached_features(whole, media, tmp_path, tokens=True)
    half = cached_features(merged, media, tmp_path, tokens=True)
    cells = np.asarray(own.tokens, np.float32).reshape(4, 4, 4, -1)
    expected = cells.reshape(4, 4, 2, 2, -1).mean(3).reshape(4, 8, -1)
    assert np.allclose(np.asarray(half.tokens), expected, atol=4e-3)
    assert np.allclose(np.asarray(half.weights), 1 / 8) and np.array_equal(half.pooled, own.pooled)
    head = Head("image", merged.width, ProjectorSpec(kind="token", dimensions=16)).eval()
    export_tower(merged, head, tmp_path / "image.onnx")
    assert check_parity(merged, head, tmp_path / "image.onnx", media) > 0.9999
    with pytest.raises(EncoderError, match=r"tokens: 7 make no grid of its 4 × 4: choose among 6, 8"):
        encoder(7)
    with pytest.raises(RecipeError, match="tokens are for images"):
        make_recipe(encoders={"image": {"folder": "dinov2"}, "text": {"folder": "bert", "tokens": 4}}, pairs={})


def test_pooling_and_layers_choose_the_features(make_recipe: MakeRecipe) -> None:
    def encode(**choice: Any) -> tuple[FrozenEncoder, dict[str, np.ndarray]]:
        recipe = make_recipe(encoders={"image": {"folder": "dinov2", **choice}, "text": {"folder": "bert"}}, pairs={})
        encoder = load_encoder(recipe, "image")
        pixels = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
        return encoder, runner(encoder, True)([pixels, pixels * 0.5])

    plain, rows = encode()
    mean = rows["tokens"].mean(1)
    for pooling, expected in (("cls", rows["pooled"]), ("mean", mean), ("both", np.hstack([rows["pooled"], mean]))):
        encoder, chosen = encode(pooling=pooling)
        assert np.allclose(chosen["pooled"], expected, atol=1e-5)
        assert encoder.width == expected.shape[1]
        assert encoder.weights_sha256 != plain.weights_sha256  # its features are cached apart
    mixed, chosen = encode(layers=[0, 1])
    assert mixed.width == 3 * plain.width
    assert np.allclose(chosen["pooled"][:, -plain.width :], rows["pooled"], atol=1e-6)
    assert not np.allclose(chosen["pooled"][:, : plain.width], rows["pooled"])


@pytest.mark.full
def test_scales_average_the_vectors_of_a_picture_and_of_smaller_ones_of_it(make_recipe: MakeRecipe) -> None:
    def load(**choice: Any) -> FrozenEncoder:
        encoders = {"image": {"folder": "mobilenet", "preprocessing": {"height": 64, "width": 64}, **choice}}
        return load_encoder(make_recipe(encoders=encoders | {"text": {"folder": "bert"}}, pairs={}), "image")

    plain, scaled = load(), load(scales=[32, 48])
    assert scaled.width == plain.width
    assert len({plain.weights_sha256, scaled.weights_sha256, load(scales=[32]).weights_sha256}) == 3
    pixels = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    smaller = [interpolate(torch.from_numpy(pixels), (size, size), mode="bicubic").numpy() for size in (32, 48)]
    expected = np.mean([runner(plain, False)(list(view))["pooled"] for view in (pixels, *smaller)], axis=0)
    for many in (False, True):  # in torch, and as a graph in ONNX Runtime
        got = runner(scaled, False, many=many)(list(pixels))["pooled"]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(runner(plain, False)(list(pixels))["pooled"] - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoders": {"image": {"folder": "mobilenet", "scales": [16]}}}, "different sizes from 32"),
        ({"encoders": {"image": {"folder": "mobilenet", "scales": [64, 64]}}}, "different sizes from 32"),
        ({"encoders": {"image": {"onnx": "mobilenet", "scales": [64]}}}, "scales cannot be chosen"),
        ({"encoders": {"audio": {"folder": "yamnet", "scales": [64]}}}, "encoders.audio: scales are for images"),
        (
            {"encoders": {"image": {"folder": "mobilenet", "scales": [64]}}, "projector": {"kind": "token"}},
            "and not for token heads",
        ),
    ],
)
def test_scales_that_cannot_be_are_refused(make_recipe: MakeRecipe, changes: dict[str, Any], said: str) -> None:
    encoders = changes["encoders"] | {"text": {"folder": "bert"}}
    with pytest.raises(RecipeError, match=said):
        make_recipe(**changes | {"encoders": encoders, "pairs": {}})


@pytest.mark.parametrize(
    ("image", "projector", "message"),
    [
        ({"folder": "dinov2", "layers": [7]}, {"kind": "linear"}, "image: dinov2 has no hidden state 7"),
        ({"folder": "mobilenet", "pooling": "cls"}, {"kind": "linear"}, "image: cls pooling needs a CLS state"),
        ({"folder": "mobilenet", "layers": [3]}, {"kind": "token"}, "no common cells: no token projector"),
    ],
)
def test_features_that_an_encoder_has_not_are_refused(
    make_recipe: MakeRecipe, image: dict[str, Any], projector: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(encoders={"image": image, "text": {"folder": "bert"}}, pairs={}, projector=projector)
    with pytest.raises(EncoderError, match=message):
        load_encoder(recipe, "image")


def test_an_encoder_is_frozen(make_recipe: MakeRecipe) -> None:
    encoder = load_encoder(make_recipe(), "image")
    assert encoder.module is not None
    assert not encoder.module.training
    assert not any(p.requires_grad for p in encoder.module.parameters())


def test_an_installed_package_is_a_source(
    make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tiny_bert_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model").symlink_to(tiny_root / "bert")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = make_recipe(
        encoders={
            "image": {"folder": "mobilenet"},
            "audio": {"folder": "yamnet"},
            "text": {"package": "tiny_bert_package", "subfolder": "model"},
        }
    )
    assert load_encoder(recipe, "text").weights_sha256 == load_encoder(make_recipe(), "text").weights_sha256
    assert "tiny_bert_package" not in sys.modules  # its files are read; its code is not run


def test_a_hub_id_is_a_source_once_it_is_in_the_hub_cache(
    make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny-bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(tiny_root / "bert")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoders = {"image": {"folder": "mobilenet"}, "audio": {"folder": "yamnet"}, "text": {"hub": "someone/tiny-bert"}}
    encoder = load_encoder(make_recipe(encoders=encoders), "text")
    assert encoder.source == "someone/tiny-bert"
    assert encoder.weights_sha256 == load_encoder(make_recipe(), "text").weights_sha256
    encoders["text"] = {"hub": "someone/absent"}
    with pytest.raises(EncoderError, match="someone/absent cannot be had"):
        load_encoder(make_recipe(encoders=encoders), "text")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"folder": "absent"}, "no config.json"),
        ({"package": "no_such_package_here"}, "is not installed"),
        ({"onnx": "absent"}, "encoder.onnx and encoder.json"),
        ({"folder": "bert"}, "the model type bert is not read here"),
        ({"folder": "mobilenet", "preprocessing": {"height": 0}}, "height"),
        ({"folder": "mobilenet", "preprocessing": {"heigth": 32}}, "heigth"),
    ],
)
def test_what_is_wrong_with_an_encoder_is_named(
    make_recipe: MakeRecipe, source: dict[str, object], message: str
) -> None:
    recipe = make_recipe(encoders={"image": source, "audio": {"folder": "yamnet"}, "text": {"folder": "bert"}})
    with pytest.raises(EncoderError, match=message):
        load_encoder(recipe, "image")


def test_a_text_of_one_local_vector_has_all_of_its_weight(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A model of two towers pools inside: a head of tokens gets that vector, and ships."""
    aligned.clip(tmp_path / "clip")
    recipe = make_recipe(
        encoders={
            "image": {"folder": "dinov2"},
            "audio": {"folder": "yamnet"},
            "text": {"folder": str(tmp_path / "clip")},
        },
        projector={"kind": "token", "dimensions": 16, "dropout": 0.0},
    )
    encoder, texts = load_encoder(recipe, "text"), ["a cat", "the cat in the garden", "at the cinema"]
    kept = cached_features(encoder, texts, tmp_path / "cache", tokens=True)
    assert np.asarray(kept.weights).tolist() == [[1.0]] * 3
    assert np.allclose(np.asarray(kept.tokens)[:, 0], kept.pooled, rtol=1e-3, atol=1e-3)
    head = Head("text", encoder.width, recipe.projector).eval()
    export_tower(encoder, head, tmp_path / "text.onnx")
    assert check_parity(encoder, head, tmp_path / "text.onnx", texts) >= 0.9999
