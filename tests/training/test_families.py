"""Encoders of every family are saved as transformers saves them, loaded, exported, served over HTTP.

What is served equals the transformers pipeline of the same folder, with the head behind it: its own preprocessing,
its own model, its own pooling.
"""

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer

from service.contract.audio import decode_audio
from service.contract.bundle import Manifest, read_bundle, sha256_file, space_id, write_bundle
from service.contract.images import decode_image
from service.contract.sounds import AudioPreprocessing
from service.engine.towers import Tower
from service.settings import Settings
from tests.conftest import serving
from tests.matrix import matrix
from tests.training import aligned, tiny
from tests.training.conftest import MakeRecipe
from training.bundle.export import write_tower
from training.encoders import load_encoder
from training.heads.projector import Head
from training.preprocessors import EncoderError

Reference = Callable[[Path, Any], torch.Tensor]
"""A model folder and an input → its features (1, d), by transformers alone."""


@dataclass(frozen=True)
class Family:
    save: Callable[[Path], None]
    reference: Reference
    choice: dict[str, Any] = field(default_factory=dict)
    """Of the recipe's encoder."""


def both(model: Any, processor: Any) -> Callable[[Path], None]:
    """Save a model, made by a call, and what prepares its inputs."""

    def save(folder: Path) -> None:
        torch.manual_seed(0)
        tiny.save(model(), folder)
        processor.save_pretrained(folder)

    return save


# Sounds: windows of two or three seconds, so that one of the test's sounds is longer.
CLAP = aligned.CLAP_AUDIO | {"projection_dim": 12}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WAVE = {
    "conv_dim": [8] * 3,
    "conv_kernel": [10, 3, 3],
    "conv_stride": [40, 4, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20,
    **SMALL,
}
LAYERED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


def clap_extractor(truncation: str) -> Any:
    mels = 64 if truncation == "fusion" else 16  # transformers fuses no other number
    return hf.ClapFeatureExtractor(feature_size=mels, max_length_s=2, truncation=truncation)


def clap_fused() -> Any:
    wide = {"spec_size": 256, "num_mel_bins": 64, "patch_size": 16, "patch_stride": [16, 16]}
    audio = hf.ClapAudioConfig(**CLAP | wide, enable_fusion=True)
    text = hf.ClapTextConfig(**SMALL, vocab_size=20, max_position_embeddings=16, projection_dim=12)
    return hf.ClapModel(hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=12))


def clap_reference(folder: Path, data: bytes) -> torch.Tensor:
    extractor = hf.ClapFeatureExtractor.from_pretrained(folder)
    fused = extractor.truncation == "fusion"
    model: Any = (hf.ClapModel if fused else hf.ClapAudioModelWithProjection).from_pretrained(folder)
    waveform = decode_audio(data, 48_000)
    longer = len(waveform) > extractor.nb_max_samples
    starts = [0] if fused else range(0, len(waveform), extractor.nb_max_samples)
    parts = [waveform] if fused else [waveform[start : start + extractor.nb_max_samples] for start in starts]
    vectors = []
    for part in parts:
        inputs = extractor([part], sampling_rate=48_000, return_tensors="pt")
        # Of sounds that are all short the extractor calls one longer, at random.
        inputs["is_longer"] = torch.tensor([[longer and fused]])
        if fused:
            vectors.append(model.audio_projection(model.audio_model(**inputs).pooler_output))
        else:
            vectors.append(model(**inputs).audio_embeds)
    return sum(vector * len(part) / len(waveform) for vector, part in zip(vectors, parts, strict=True))


def ast_reference(folder: Path, data: bytes) -> torch.Tensor:
    extractor, model = hf.ASTFeatureExtractor.from_pretrained(folder), hf.ASTModel.from_pretrained(folder)
    waveform = decode_audio(data, 16_000)
    hop = extractor.max_length * 160
    parts = [waveform[start : start + hop + 240] for start in range(0, len(waveform), hop)]
    vectors = [
        model(**extractor(part, sampling_rate=16_000, return_tensors="pt")).pooler_output * min(len(part), hop)
        for part in parts
    ]
    return sum(vectors) / sum(min(len(part), hop) for part in parts)  # type: ignore[return-value]


def whisper_reference(folder: Path, data: bytes) -> torch.Tensor:
    extractor, model = hf.WhisperFeatureExtractor.from_pretrained(folder), hf.WhisperModel.from_pretrained(folder)
    waveform = decode_audio(data, 16_000)
    total = torch.zeros(1, 16)
    for start in range(0, len(waveform), extractor.n_samples):
        part = waveform[start : start + extractor.n_samples]
        inputs = extractor(part, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
        states = model.encoder(inputs["input_features"]).last_hidden_state
        own = -(-int(inputs["attention_mask"].sum()) // 2)
        total += states[:, :own].mean(1) * len(part) / len(waveform)
    return total


def waveform_reference(folder: Path, data: bytes) -> torch.Tensor:
    extractor, model = hf.Wav2Vec2FeatureExtractor.from_pretrained(folder), hf.AutoModel.from_pretrained(folder)
    inputs = extractor(decode_audio(data, 16_000), sampling_rate=16_000, return_tensors="pt")
    return model(**inputs).last_hidden_state.mean(1)  # type: ignore[no-any-return]


AST = hf.ASTConfig(**SMALL, max_length=200, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)
WHISPER = hf.WhisperConfig(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=150, num_mel_bins=16, vocab_size=20,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
SOUNDS = {
    "clap": Family(
        both(lambda: hf.ClapAudioModelWithProjection(hf.ClapAudioConfig(**CLAP)), clap_extractor("rand_trunc")),
        clap_reference,
    ),
    "clap fused": Family(both(clap_fused, clap_extractor("fusion")), clap_reference),
    "ast": Family(
        both(lambda: hf.ASTModel(AST), hf.ASTFeatureExtractor(max_length=200, num_mel_bins=16)), ast_reference
    ),
    "whisper": Family(
        both(lambda: hf.WhisperModel(WHISPER), hf.WhisperFeatureExtractor(feature_size=16, chunk_length=3)),
        whisper_reference,
    ),
    "wav2vec2": Family(
        both(lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVE)), hf.Wav2Vec2FeatureExtractor()), waveform_reference
    ),
    "hubert": Family(
        both(lambda: hf.HubertModel(hf.HubertConfig(**WAVE, **LAYERED)), hf.Wav2Vec2FeatureExtractor()),
        waveform_reference,
    ),
    "wavlm": Family(
        both(lambda: hf.WavLMModel(hf.WavLMConfig(**WAVE)), hf.Wav2Vec2FeatureExtractor()), waveform_reference
    ),
}


def image_reference(processor: Any, model: Any, pooled: Callable[[Any], torch.Tensor]) -> Reference:
    def reference(folder: Path, data: bytes) -> torch.Tensor:
        pixels = processor.from_pretrained(folder)(decode_image(data), return_tensors="pt")
        return pooled(model.from_pretrained(folder)(**pixels))

    return reference


def cls(output: Any) -> torch.Tensor:
    return output.last_hidden_state[:, 0]  # type: ignore[no-any-return]


def pooler(output: Any) -> torch.Tensor:
    return output.pooler_output.flatten(1)  # type: ignore[no-any-return]


def image(processor: Any, model: Any, config: Any, pooled: Any, **choice: Any) -> Family:
    return Family(both(lambda: model(config), processor), image_reference(type(processor), model, pooled), choice)


VIT = {**SMALL, "image_size": 32, "patch_size": 8}
CUT = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
CONVOLUTION = {"depths": [1, 1], "hidden_sizes": [8, 16]}


def clip() -> Any:
    text = hf.CLIPTextConfig(**SMALL, vocab_size=20, max_position_embeddings=16)
    vision = hf.CLIPVisionConfig(**VIT)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))


def clip_reference(folder: Path, data: bytes) -> torch.Tensor:
    model = hf.CLIPModel.from_pretrained(folder)
    pixels = hf.CLIPImageProcessorPil.from_pretrained(folder)(decode_image(data), return_tensors="pt")
    return model.visual_projection(model.vision_model(**pixels).pooler_output)  # type: ignore[no-any-return]


IMAGES = {
    "dinov2": image(hf.BitImageProcessorPil(**CUT), hf.Dinov2Model, hf.Dinov2Config(**VIT), cls),
    "dinov2 registers": image(
        hf.BitImageProcessorPil(**CUT), hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**VIT),
        lambda output: output.last_hidden_state[:, 5:].mean(1), pooling="mean",
    ),
    "vit": image(hf.ViTImageProcessorPil(size={"height": 32, "width": 32}), hf.ViTModel, hf.ViTConfig(**VIT), cls),
    "siglip": image(
        hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}), hf.SiglipVisionModel,
        hf.SiglipVisionConfig(**VIT), pooler,
    ),
    "clip": Family(both(clip, hf.CLIPImageProcessorPil(**CUT)), clip_reference),
    "clip vision": image(hf.CLIPImageProcessorPil(**CUT), hf.CLIPVisionModel, hf.CLIPVisionConfig(**VIT), pooler),
    "clip projected": image(
        hf.CLIPImageProcessorPil(**CUT), hf.CLIPVisionModelWithProjection,
        hf.CLIPVisionConfig(**VIT, projection_dim=12),
        lambda output: output.image_embeds,
    ),
    "convnext": image(
        hf.ConvNextImageProcessorPil(size={"shortest_edge": 64}), hf.ConvNextModel,
        hf.ConvNextConfig(**CONVOLUTION, num_stages=2), pooler,
    ),
    "resnet": image(
        hf.ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.95), hf.ResNetModel,
        hf.ResNetConfig(**CONVOLUTION, embedding_size=8), pooler,
    ),
    "mobilenet v1": image(
        hf.MobileNetV1ImageProcessorPil(**CUT), hf.MobileNetV1Model, hf.MobileNetV1Config(depth_multiplier=0.1), pooler
    ),
    "mobilenet v2": image(
        hf.MobileNetV2ImageProcessorPil(**CUT), hf.MobileNetV2Model, hf.MobileNetV2Config(depth_multiplier=0.1), pooler
    ),
}  # fmt: skip


# Texts: the last token, CLS, the mean; with instructions and at length 1, as sentence-transformers' files say.
POOLING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda states: states[:, 0],
    "mean_tokens": lambda states: states.mean(1),
    "lasttoken": lambda states: states[:, -1],
}
QUERIES = ["a picture of red", "very plain blue photo of the something", "white"]
SIZES = {**SMALL, "vocab_size": 64, "max_position_embeddings": 34, "initializer_range": 0.5}


def sentence_files(folder: Path, mode: str, *, unit: bool, prompts: dict[str, str]) -> None:
    """Write what sentence-transformers saves beside a model."""
    modules = ["Transformer", "Pooling", *(["Normalize"] if unit else [])]
    described = [
        {"idx": i, "path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(described))
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{each}": each == mode for each in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (folder / "1_Pooling/config.json").write_text(json.dumps(modes))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))


TEXTS: dict[str, tuple[Any, Any, str, bool, dict[str, str]]] = {
    "bert": (hf.BertModel, hf.BertConfig(**SIZES), "mean_tokens", False, {}),
    "mpnet": (hf.MPNetModel, hf.MPNetConfig(**SIZES, pad_token_id=1), "cls_token", False, {"query": "the photo of "}),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**SIZES, pad_token_id=1), "lasttoken", True, {}),
    "xlm-roberta": (
        hf.XLMRobertaModel,
        hf.XLMRobertaConfig(**SIZES, pad_token_id=1),
        "mean_tokens",
        True,
        {"query": "a picture ", "document": "the sound of "},
    ),
}


@pytest.fixture(scope="module")
def sounds() -> list[bytes]:
    """Return sounds that are shorter and longer than a window."""
    return [aligned.sound("cat", seconds) for seconds in (0.4, 1.3, 4.5)]


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return aligned.pictures()[:3]


@pytest.fixture
def served(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., tuple[Head, Settings]]:
    """Export a folder's encoder with a random head, write the bundle of that one tower, and serve it."""

    def serve(folder: Path, modality: Any, choice: dict[str, Any], items: list[Any]) -> tuple[Head, Settings]:
        encoders = {modality: {"folder": str(folder), **choice}}
        recipe = make_recipe(
            encoders={"text": {"folder": "bert"}, "image": {"folder": "mobilenet"}} | encoders, pairs={}
        )
        encoder = load_encoder(recipe, modality)
        torch.manual_seed(1)
        head = Head(modality, encoder.width, recipe.projector.model_copy(update={"kind": "linear", "power": 1.0}))
        head.eval().requires_grad_(False)
        head.pooled.linear.bias.zero_()  # type: ignore[union-attr,operator]  # which would drown faint features
        built = tmp_path / "built"
        built.mkdir()
        tower, parity = write_tower(encoder, head, built, items)
        assert parity >= 0.9999
        files = {tower.file: built / tower.file}
        if encoder.tokenizer is not None:
            files["tokenizer.json"] = encoder.tokenizer
        towers = {modality: tower}
        dimensions = recipe.projector.dimensions
        manifest = Manifest(
            name="family",
            created=datetime.date(2026, 1, 1).isoformat(),
            space=space_id(dimensions, towers),
            dimensions=dimensions,
            towers=towers,
            temperature=0.07,
            files={name: sha256_file(path) for name, path in files.items() if name != tower.file},
        )
        write_bundle(tmp_path / "bundle", manifest, files)
        return head, Settings(bundle=tmp_path / "bundle", store=tmp_path / "store", device="cpu", threads=1)

    return serve


def files_of(tmp_path: Path, contents: list[bytes]) -> list[Path]:
    paths = [tmp_path / f"{index}.bin" for index in range(len(contents))]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    return paths


def check(vectors: list[list[float]], features: list[torch.Tensor], head: Head) -> None:
    """The served vectors are those of the features, and tell the inputs apart."""
    with torch.inference_mode():
        expected = head(torch.cat(features)).numpy()
    assert ((np.array(vectors) * expected).sum(1) >= 0.9999).all()
    others = expected @ expected.T - np.eye(len(expected))
    assert others.max() < 0.99999


@pytest.mark.parametrize("name", matrix(SOUNDS, "clap"))
@torch.inference_mode()
def test_sounds(name: str, tmp_path: Path, sounds: list[bytes], served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family, folder = SOUNDS[name], tmp_path / "model"
    family.save(folder)
    head, settings = served(folder, "audio", family.choice, files_of(tmp_path, sounds))
    with serving(settings) as client:
        response = client.post("/embed", files=[("file", data) for data in sounds])
        alone = client.post("/embed", files=[("file", sounds[0][:-2])])  # a sample fewer: past the cache
    assert response.status_code == alone.status_code == 200, response.text
    vectors = [each["embedding"] for each in response.json()["embeddings"]]
    # CLAP draws the windows of a longer sound at random from three thirds; the middle ones are taken here.
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    check(vectors, [family.reference(folder, data) for data in sounds], head)
    assert np.dot(alone.json()["embeddings"][0]["embedding"], vectors[0]) > 0.99
    # A sound that is longer than a call may be has the same vector.
    bundle = read_bundle(settings.bundle)
    spec = bundle.manifest.towers["audio"].preprocessing
    assert isinstance(spec, AudioPreprocessing)
    prepared = [spec.prepare(decode_audio(data, spec.sampling_rate)) for data in sounds]
    arrays = dict(zip(spec.inputs, spec.collate(prepared), strict=True))
    whole, pieces = (Tower(bundle, "audio", "cpu", 1, call_seconds=seconds) for seconds in (600.0, 0.1))
    np.testing.assert_allclose(pieces.run(arrays), whole.run(arrays), atol=1e-5)


@pytest.mark.parametrize("name", matrix(IMAGES, "clip"))
@torch.inference_mode()
def test_images(name: str, tmp_path: Path, pictures: list[bytes], served: Any) -> None:
    family, folder = IMAGES[name], tmp_path / "model"
    family.save(folder)
    head, settings = served(folder, "image", family.choice, files_of(tmp_path, pictures))
    with serving(settings) as client:
        response = client.post("/embed", files=[("file", data) for data in pictures])
    assert response.status_code == 200, response.text
    vectors = [each["embedding"] for each in response.json()["embeddings"]]
    check(vectors, [family.reference(folder, data) for data in pictures], head)


@pytest.mark.parametrize("name", matrix(TEXTS, "xlm-roberta"))
@torch.inference_mode()
def test_texts(name: str, tmp_path: Path, served: Any) -> None:
    model, config, mode, unit, prompts = TEXTS[name]
    folder = tmp_path / "model"
    torch.manual_seed(0)
    tiny.save(model(config), folder)
    tiny.write_tokenizer(folder, pad=config.pad_token_id)
    sentence_files(folder, mode, unit=unit, prompts=prompts)
    head, settings = served(folder, "text", {}, QUERIES)
    with serving(settings) as client:
        for role, prompt in (("query", prompts.get("query", "")), ("passage", prompts.get("document", ""))):
            response = client.post("/embed", json={"inputs": QUERIES, "role": role})
            assert response.status_code == 200, response.text
            vectors = [each["embedding"] for each in response.json()["embeddings"]]
            check(vectors, [text_features(folder, prompt + text, mode, unit) for text in QUERIES], head)
            assert client.post("/embed", json={"inputs": [" "], "role": role}).status_code == 422
        stored = [{"id": str(index), "text": text} for index, text in enumerate(QUERIES)]
        assert client.post("/items", json={"items": stored}).status_code == 200
        asked = client.post("/search", json={"query": QUERIES[0], "include": ["vector"]}).json()["results"]
        spoken = client.post("/v1/embeddings", json={"model": "family", "input": QUERIES, "role": "passage"}).json()
        assert client.post("/embed", json={"inputs": QUERIES, "role": "stored"}).status_code == 422
    passages = np.array([each["embedding"] for each in spoken["data"]])
    by_id = {each["id"]: each for each in asked}
    query = head(text_features(folder, prompts.get("query", "") + QUERIES[0], mode, unit)).numpy()[0]
    for index, passage in enumerate(passages):
        np.testing.assert_allclose(by_id[str(index)]["vector"], passage, atol=1e-5)
        assert by_id[str(index)]["score"] == pytest.approx(float(passage @ query), abs=1e-3)


def text_features(folder: Path, text: str, mode: str, unit: bool) -> torch.Tensor:
    ids = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids])
    states = hf.AutoModel.from_pretrained(folder)(ids).last_hidden_state
    pooled = POOLING[mode](states)
    return torch.nn.functional.normalize(pooled, dim=-1) if unit else pooled


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"modules.json": [{"path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}]}, "bert.*module LSTM"),
        (
            {"modules.json": [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]},
            "2_Dense: a Dense layer",
        ),
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "median"]}}, "bert.*pooling by median"),
        ({"1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False}}, "bert.*include_prompt"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "bert.*do_lower_case"),
    ],
)
def test_sentence_models_that_cannot_be_served_are_refused_by_name(
    make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path, files: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(tiny_root / "bert", folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    recipe = make_recipe(encoders={"image": {"folder": "mobilenet"}, "text": {"folder": str(folder)}}, pairs={})
    with pytest.raises(EncoderError, match=said):
        load_encoder(recipe, "text")


@pytest.mark.parametrize(
    ("family", "modality", "choice", "said"),
    [
        ("clip vision", "image", {"layers": [0]}, "layers cannot be chosen for clip_vision_model"),
        ("siglip", "image", {"pooling": "cls"}, "siglip_vision_model has none"),
        ("vit", "image", {"pooling": "last"}, "last pooling is for texts"),
        ("vit", "image", {"normalise": True}, "normalise is for texts"),
        ("whisper", "audio", {"pooling": "mean"}, "pooling cannot be chosen for whisper"),
        ("wav2vec2", "audio", {"layers": [1]}, "layers cannot be chosen for wav2vec2"),
        ("ast", "image", {}, "the model type audio-spectrogram-transformer is not read here"),
        ("vit", "audio", {}, "vit has no audio front end here"),
    ],
)
def test_choices_that_a_family_has_not_are_refused_by_name(
    make_recipe: MakeRecipe, tmp_path: Path, family: str, modality: str, choice: dict[str, Any], said: str
) -> None:
    (SOUNDS | IMAGES)[family].save(tmp_path)
    encoders = {
        "text": {"folder": "bert"},
        "image": {"folder": "mobilenet"},
        modality: {"folder": str(tmp_path), **choice},
    }
    with pytest.raises(EncoderError, match=said):
        load_encoder(make_recipe(encoders=encoders, pairs={}), modality)  # type: ignore[arg-type]
