from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from service.contract.bundle import read_bundle
from service.contract.tokens import pad_tokens
from service.engine.handling import handling
from service.engine.inputs import Media, Text
from service.settings import Settings
from tests.training.conftest import MakeRecipe
from training.encoders import load_encoder, weights_sha256
from training.features import FeatureError, cached_features, preparer
from training.pairs import read_pairs


def test_features_are_the_encoders_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    encoder = load_encoder(make_recipe(), "text")
    texts = ["a picture of red", "the sound of something very plain"]
    features = cached_features(encoder, texts, tmp_path, tokens=True)
    assert features.tokens is not None
    assert features.weights is not None
    assert features.tokens.shape == (2, 8, 24)
    assert np.allclose(features.weights.sum(1), 1)
    assert np.count_nonzero(features.weights[0]) == 6  # four words, [BOS] and [EOS]
    mean = (features.weights[..., None] * features.tokens).sum(1)
    assert np.allclose(mean, features.pooled, atol=2e-3)  # the tokens are kept in float16
    alone = cached_features(encoder, texts[:1], tmp_path)
    assert np.allclose(alone.pooled[0], features.pooled[0], atol=1e-5)


@pytest.mark.parametrize("tokens", [False, True])
def test_sounds_of_different_lengths_do_not_touch_each_other(
    make_recipe: MakeRecipe, tmp_path: Path, tokens: bool
) -> None:
    recipe = make_recipe()
    encoder, media = load_encoder(recipe, "audio"), read_pairs(recipe, "tones")["train"].media
    together = cached_features(encoder, media, tmp_path, tokens=tokens)
    for index, path in enumerate(media):
        alone = cached_features(encoder, [path], tmp_path, tokens=tokens)
        assert np.allclose(alone.pooled[0], together.pooled[index], atol=1e-5)


def test_an_interrupted_run_goes_on_where_it_was(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    encoder, media = load_encoder(recipe, "image"), read_pairs(recipe, "pictures")["train"].media
    whole = cached_features(encoder, media, tmp_path / "whole").pooled
    monkeypatch.setattr("training.features._CHUNK", {"image": 4})
    real = Path.read_bytes
    reads: list[str] = []

    def interrupted(path: Path) -> bytes:
        # Each file is read once for the key (16 reads), then once to be encoded.
        reads.append(path.name)
        if len(reads) == 26:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached_features(encoder, media, tmp_path / "cut")
    progress = next((tmp_path / "cut").glob("*/progress"))
    done = int(progress.read_text())
    assert 0 < done < len(media)
    reads.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or real(path))
        resumed = cached_features(encoder, media, tmp_path / "cut").pooled
    assert np.array_equal(resumed, whole) or np.allclose(resumed, whole, atol=1e-5)
    assert len(reads) == len(media) + len(media) - done  # the key reads all, the encoder only the rest


def test_texts_are_encoded_by_length_and_come_back_in_their_own_order(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(make_recipe(), "text")
    texts = ["a red square on the left of a green one", "red", "a blue circle", "green", "a red and a blue circle"]
    alone = [cached_features(encoder, [text], tmp_path).pooled[0] for text in texts]
    monkeypatch.setattr("training.features._CHUNK", {"text": 2})
    batches: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "training.features.pad_tokens",
        lambda rows, pad_id: batches.append(tuple(len(row.ids) for row in rows)) or pad_tokens(rows, pad_id),
    )
    together = cached_features(encoder, texts, tmp_path).pooled
    assert np.allclose(together, alone, atol=1e-5)
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_many_texts_have_the_vectors_of_few(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(make_recipe(), "text")
    texts = ["a picture of red", "plain", "the sound of something very plain"]
    few = cached_features(encoder, texts, tmp_path / "few").pooled
    monkeypatch.setattr("training.features._MANY", 1)
    many = cached_features(encoder, texts, tmp_path / "many").pooled
    lengths = np.linalg.norm(few, axis=1) * np.linalg.norm(many, axis=1)
    assert ((few * many).sum(1) / lengths).min() > 0.999


def test_the_key_changes_with_the_bytes_and_the_preprocessing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encoder = load_encoder(make_recipe(), "text")
    cached_features(encoder, ["red"], cache)
    cached_features(encoder, ["red"], cache)
    assert len(list(cache.iterdir())) == 1
    cached_features(encoder, ["blue"], cache)
    changed = make_recipe(
        encoders={
            "image": {"folder": "mobilenet"},
            "audio": {"folder": "yamnet"},
            "text": {"folder": "bert", "preprocessing": {"max_length": 8}},
        }
    )
    cached_features(load_encoder(changed, "text"), ["red"], cache)
    assert len(list(cache.iterdir())) == 3


def test_a_bad_file_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bad = tmp_path / "broken.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(FeatureError, match=r"broken\.png: neither an image"):
        cached_features(load_encoder(make_recipe(), "image"), [bad], tmp_path / "cache")


def test_no_items_are_no_features(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert cached_features(load_encoder(make_recipe(), "text"), [], tmp_path).pooled.shape == (0, 24)


def test_encoding_changes_no_weight(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    encoder = load_encoder(recipe, "image")
    cached_features(encoder, read_pairs(recipe, "pictures")["test"].media, tmp_path)
    assert isinstance(encoder.module, torch.nn.Module)
    assert weights_sha256(encoder.module) == encoder.weights_sha256


def test_training_and_serving_are_fed_the_same_bits(bundle_dir: Path, tmp_path: Path) -> None:
    """A camera's JPEG on its side, which is decoded scaled; a stereo sound of another rate; a text."""
    bundle, exif = read_bundle(bundle_dir), Image.Exif()
    exif[0x0112] = 6
    grain = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(grain).resize((900, 600), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=90, exif=exif)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * 44_100, 2))
    soundfile.write(tmp_path / "a.flac", noise, 44_100)
    for modality, item in (("image", tmp_path / "a.jpg"), ("audio", tmp_path / "a.flac"), ("text", "a red dog")):
        preprocessing = bundle.manifest.towers[modality].preprocessing
        encoder = SimpleNamespace(
            preprocessing=preprocessing, tokenizer=bundle_dir / "tokenizer.json", source="a bundle's"
        )
        trained = preparer(encoder)(item)
        content = Media(modality, item.read_bytes()) if isinstance(item, Path) else Text(item)
        served = handling(bundle, modality, Settings()).prepare(content).value
        if modality == "image":
            trained, served = {"pixels": trained}, {"pixels": served}
        elif modality == "audio":
            trained, served = vars(trained), vars(served)
        else:
            trained, served = {"ids": trained.ids}, {"ids": served.ids}
        assert trained.keys() == served.keys()
        for name, value in trained.items():
            assert np.array_equal(value, served[name]), name
