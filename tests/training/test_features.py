import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from training import features, pipeline
from training.encoders import FrozenEncoder, load_encoder, weights_sha256
from training.features import FeatureError, cached_features, content_hashes, preparer
from training.pairs import read_pairs


def test_features_are_the_encoders_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    encoder = load_encoder(make_recipe(), "text")
    texts = ["a picture of red", "the sound of something very plain"]
    found = cached_features(encoder, texts, tmp_path, tokens=True)
    tokens, weights = np.asarray(found.tokens), np.asarray(found.weights)
    assert tokens.shape == (2, 8, 24)
    assert np.allclose(weights.sum(1), 1)
    assert np.count_nonzero(weights[0]) == 6  # four words, [BOS] and [EOS]
    assert not tokens[0, 6:].any()
    mean = (weights[..., None] * tokens).sum(1)
    assert np.allclose(mean, found.pooled, atol=2e-3)  # they are kept in float16
    assert found.tokens is not None
    assert np.array_equal(found.tokens[np.array([0])], tokens[:1, :6])  # as long as the longest that is asked for
    alone = cached_features(encoder, texts[:1], tmp_path / "alone")
    assert np.allclose(alone.pooled[0], found.pooled[0], atol=2e-3)


@pytest.mark.parametrize("tokens", [False, True])
def test_sounds_of_different_lengths_do_not_touch_each_other(
    make_recipe: MakeRecipe, tmp_path: Path, tokens: bool
) -> None:
    recipe = make_recipe()
    encoder, media = load_encoder(recipe, "audio"), read_pairs(recipe, "tones")["train"].media
    together = cached_features(encoder, media, tmp_path, tokens=tokens)
    for index, path in enumerate(media):
        alone = cached_features(encoder, [path], tmp_path / str(index), tokens=tokens)
        assert np.allclose(alone.pooled[0], together.pooled[index], rtol=2e-3, atol=2e-3)


def encoded(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[Path]:
    """The files that are decoded from now on; the `stop_at`th is interrupted."""
    files: list[Path] = []
    real = features.preparer

    def counted(encoder: FrozenEncoder) -> Any:
        prepare = real(encoder)

        def one(item: Any) -> Any:
            if len(files) + 1 == stop_at:
                raise KeyboardInterrupt
            files.append(item)
            return prepare(item)

        return one

    monkeypatch.setattr(features, "preparer", counted)
    return files


def test_an_interrupted_run_goes_on_where_it_was(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    encoder, media = load_encoder(recipe, "image"), read_pairs(recipe, "pictures")["train"].media
    whole = np.asarray(cached_features(encoder, media, tmp_path / "whole").pooled)
    monkeypatch.setattr("training.features._CHUNK", {"image": 4})
    with monkeypatch.context() as patch:
        encoded(patch, stop_at=11)
        with pytest.raises(KeyboardInterrupt):
            cached_features(encoder, media, tmp_path / "cut")
    files = encoded(monkeypatch)
    resumed = np.asarray(cached_features(encoder, media, tmp_path / "cut").pooled)
    assert np.allclose(resumed, whole, atol=1e-3)
    assert 0 < len(files) < len(media)


def test_one_changed_added_or_broken_item_encodes_one(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    encoder = load_encoder(recipe, "image")
    media = []
    for path in read_pairs(recipe, "pictures")["train"].media[:8]:
        media.append(tmp_path / path.name)
        shutil.copy(path, media[-1])
    monkeypatch.setattr(features, "_SETTLED_S", -1.0)  # they were written just now
    before = np.asarray(cached_features(encoder, media, tmp_path / "cache").pooled)
    files = encoded(monkeypatch)
    reads: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or real(path))
    assert np.array_equal(cached_features(encoder, media, tmp_path / "cache").pooled, before)
    assert not files
    assert not reads  # their names, sizes and times say that they are what they were

    Image.new("RGB", (20, 30), (9, 9, 9)).save(media[3])
    changed = np.asarray(cached_features(encoder, media, tmp_path / "cache").pooled)
    assert files == [media[3]]
    assert [row for row in range(8) if not np.array_equal(changed[row], before[row])] == [3]

    added = [media[5], tmp_path / "new.png", *media]  # in another order, one of them twice
    Image.new("RGB", (20, 30), (99, 9, 9)).save(added[1])
    cached_features(encoder, added, tmp_path / "cache")
    assert files == [media[3], added[1]]

    media[0].write_bytes(b"no picture")
    broken: dict[int, str] = {}
    rows = np.asarray(cached_features(encoder, media, tmp_path / "cache", lenient=True, broken=broken).pooled)
    assert files == [media[3], added[1], media[0]]
    assert list(broken) == [0]
    assert str(media[0]) in broken[0]
    assert np.isnan(rows[0]).all()
    assert np.array_equal(rows[1:], changed[1:])


def test_a_setting_that_changes_nothing_names_no_cache_and_an_earlier_one_is_taken_over(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    encoder, media = load_encoder(recipe, "image"), read_pairs(recipe, "pictures")["train"].media[:3]
    with monkeypatch.context() as earlier:
        earlier.setattr(features, "effective", lambda spec: spec.model_dump(mode="json"))
        before = np.array(cached_features(encoder, media, tmp_path).pooled)
        [former] = tmp_path.glob("image-*")
    files = encoded(monkeypatch)
    assert np.array_equal(cached_features(encoder, media, tmp_path).pooled, before)
    assert not files and former not in tmp_path.glob("image-*")


def test_a_file_in_the_place_of_another_is_read_though_size_and_time_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_SETTLED_S", -1.0)
    file, other = tmp_path / "a.wav", tmp_path / "b.wav"
    for path, content in ((file, b"A" * 99), (other, b"B" * 99)):
        path.write_bytes(content)
        os.utime(path, (1, 1))
    assert content_hashes([file], tmp_path / "cache", {}) == [hashlib.sha256(b"A" * 99).digest()]
    other.replace(file)  # as tar and rsync put files in place
    assert content_hashes([file], tmp_path / "cache", {}) == [hashlib.sha256(b"B" * 99).digest()]


def test_a_torn_record_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_SETTLED_S", -1.0)
    monkeypatch.setattr(features, "_RECORDS", 2)
    files = [tmp_path / f"{number}.bin" for number in range(5)]
    for path in files:
        path.write_bytes(path.name.encode())
    content_hashes(files[:2], tmp_path / "cache", {})
    with (tmp_path / "cache/contents").open("ab") as stream:
        stream.write(b"x" * 20)  # the process was killed here
    expected = content_hashes(files, tmp_path / "cache", {})
    assert (tmp_path / "cache/contents").stat().st_size == 5 * 48
    reads: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or real(path))
    assert content_hashes(files, tmp_path / "cache", {}) == expected
    assert not reads


def test_another_tokenizer_is_another_encoder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    encoder = load_encoder(make_recipe(), "text")
    assert encoder.tokenizer is not None
    stated = json.loads(encoder.tokenizer.read_text())
    words = stated["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stated))
    other = replace(encoder, tokenizer=tmp_path / "tokenizer.json")
    first = cached_features(encoder, ["red", "blue"], tmp_path / "cache")
    second = cached_features(other, ["red", "blue"], tmp_path / "cache")
    assert first.identity != second.identity  # and so no checkpoint of the one goes on with the other
    assert not np.array_equal(first.pooled[0], first.pooled[1])
    assert np.allclose(np.asarray(second.pooled), np.asarray(first.pooled)[::-1], atol=1e-3)


@pytest.mark.parametrize("size", [1, 4])
def test_an_item_without_finite_features_is_named_and_fails_alone(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    class Spoilt(torch.nn.Module):
        """A white picture makes all of its batch NaN."""

        def __init__(self, encoder: torch.nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            whole, local = self.encoder(pixels)
            return whole + torch.where(pixels > 0.999, torch.nan, 0).sum(), local

    monkeypatch.setattr("training.features._CHUNK", {"image": size})
    media = [tmp_path / f"{grey}.png" for grey in (0, 10, 255, 20, 30)]
    for path in media:
        Image.new("RGB", (20, 20), (int(path.stem),) * 3).save(path)
    encoder = load_encoder(make_recipe(), "image")
    assert encoder.module is not None
    encoder = replace(encoder, module=Spoilt(encoder.module), weights_sha256="spoilt")
    broken: dict[int, str] = {}
    rows = np.asarray(cached_features(encoder, media, tmp_path / "cache", lenient=True, broken=broken).pooled)
    assert list(broken) == [2]
    assert broken[2].startswith(f"{media[2]}: resnet gives it features that are no numbers, or beyond ±65504")
    assert np.isnan(rows[2]).all()
    assert np.isfinite(rows[[0, 1, 3, 4]]).all()
    with pytest.raises(FeatureError, match=r"255\.png: resnet gives it features that are no numbers"):
        cached_features(encoder, media, tmp_path / "cache")


def test_bf16_features_are_near_those_of_fp32(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another arithmetic is another folder; encoder and machine choose it, and not how many texts there are."""
    encoder = load_encoder(make_recipe(), "text")
    texts = ["a picture of red", "the sound of something very plain", "blue", "a white sound of green"]
    monkeypatch.setattr(features, "_CHUNK", {"text": 1})
    monkeypatch.setattr(features, "_MANY", 4)
    monkeypatch.setattr(features, "_has_bf16", lambda: True)
    plain = np.asarray(cached_features(encoder, texts, tmp_path / "one").pooled)
    monkeypatch.setattr(features, "_LARGE", 0)
    whole = cached_features(encoder, texts, tmp_path / "one")
    cached_features(encoder, texts[:2], tmp_path / "two")
    parts = cached_features(encoder, texts, tmp_path / "two")
    small = np.asarray(whole.pooled)
    assert whole.identity == parts.identity
    assert np.array_equal(small, parts.pooled)
    assert not np.array_equal(small, plain)
    cosines = (small * plain).sum(1) / np.linalg.norm(small, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() > 0.999


def test_texts_are_encoded_by_length_and_come_back_in_their_own_order(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(make_recipe(), "text")
    texts = ["a red square on the left of a green one", "red", "a blue circle", "green", "a red and a blue circle"]
    alone = [cached_features(encoder, [text], tmp_path / "alone").pooled[0] for text in texts]
    monkeypatch.setattr("training.features._CHUNK", {"text": 2})
    batches: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "training.features.pad_tokens",
        lambda rows, pad_id: batches.append(tuple(len(row.ids) for row in rows)) or pad_tokens(rows, pad_id),
    )
    together = cached_features(encoder, texts, tmp_path).pooled
    assert np.allclose(together, alone, rtol=1e-3, atol=1e-3)
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_the_key_changes_with_the_bytes_and_the_preprocessing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encoder = load_encoder(make_recipe(), "text")
    red = cached_features(encoder, ["red"], cache)
    assert red.identity == cached_features(encoder, ["red"], cache).identity
    assert len(list(cache.iterdir())) == 1
    assert cached_features(encoder, ["blue"], cache).identity != red.identity
    changed = make_recipe(
        encoders={
            "image": {"folder": "mobilenet"},
            "audio": {"folder": "yamnet"},
            "text": {"folder": "bert", "preprocessing": {"max_length": 8}},
        }
    )
    assert cached_features(load_encoder(changed, "text"), ["red"], cache).identity != red.identity
    assert len(list(cache.iterdir())) == 2  # a folder of each encoder with its preprocessing


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


def test_a_set_with_some_broken_files_finishes_counts_and_names_them(
    make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_root, tmp_path / "data")
    recipe = make_recipe(data={"root": str(tmp_path / "data")})
    read = pipeline.pairs(recipe, tmp_path / "cache")
    part = read["pictures"]["train"]
    part.media[3].write_bytes(b"no picture")
    data = pipeline.features(recipe, pipeline.encoders(recipe), read, tmp_path / "cache")
    found = data["pictures"]["train"]
    assert len(found.media) == len(found.pairs.media) == len(part.media) - 1
    assert part.media[3] not in found.pairs.media
    assert np.isfinite(np.asarray(found.media.pooled)).all()
    texts = {part.media[medium]: part.texts[text] for medium, text in part.links if medium != 3}
    assert {found.pairs.media[medium]: found.pairs.texts[text] for medium, text in found.pairs.links} == texts
    told = capsys.readouterr().err
    assert f"pictures train: 1 of {len(part.media)} media cannot be read and are left out: {part.media[3]}" in told
    assert str(part.media[3]) in (tmp_path / "cache/broken-pictures-train.txt").read_text()
    for path in part.media[:5]:
        path.write_bytes(b"no picture")
    with pytest.raises(FeatureError, match=r"pictures train: 5 of 16 media cannot be read, the first: .*\.png"):
        pipeline.features(recipe, pipeline.encoders(recipe), read, tmp_path / "cache")
