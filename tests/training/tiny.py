"""A tiny data root: pictures whose colour is their class, tones whose pitch is their class, random encoders on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers as hf
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
SEEN = ["background", "red", "green", "blue"]
PITCHES = {"low": 200.0, "middle": 900.0, "high": 3500.0}
WORDS = [*COLOURS, *PITCHES, "a", "picture", "of", "the", "sound", "tone", "very", "plain", "photo", "something"]
FRONTEND = (
    '{"kind": "log_mel_patches", "sampling_rate": 16000, "window_length": 400, "hop_length": 160, "fft_length": 512,'
    ' "n_mels": 64, "f_min": 125.0, "f_max": 7500.0, "log_offset": 0.001, "patch_frames": 96, "patch_hop_frames": 48}'
)


def write_data(root: Path) -> None:
    """Captioned pictures (captions.csv), labelled tones (sounds.csv) and labelled folders of pictures (by_class/)."""
    rng = np.random.default_rng(0)
    captions, sounds = ["image,caption,part"], ["file,class,fold"]
    (root / "pictures").mkdir(parents=True)
    (root / "sounds").mkdir()
    for index in range(32):
        name = list(COLOURS)[index % len(COLOURS)]
        pixels = np.array(COLOURS[name]) + rng.normal(0, 12, (20, 30, 3))
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        picture.save(root / f"pictures/{index}.png")
        (root / "by_class" / name).mkdir(parents=True, exist_ok=True)
        picture.save(root / f"by_class/{name}/{index}.png")
        part = ("test", "validation", "train", "train")[index // 4 % 4]
        captions += [f"{index}.png,a picture of {name},{part}", f"{index}.png,very plain {name} photo,{part}"]
    for index in range(18):
        name = list(PITCHES)[index % len(PITCHES)]
        time = np.arange(16_000 + 800 * index) / 16_000
        soundfile.write(root / f"sounds/{index}.wav", 0.3 * np.sin(2 * np.pi * PITCHES[name] * time), 16_000)
        sounds.append(f"{index}.wav,{name}_tone,{index // 3 % 3}")
    (root / "captions.csv").write_text("\n".join(captions) + "\n")
    (root / "sounds.csv").write_text("\n".join(sounds) + "\n")


def write_encoders(root: Path) -> None:
    """Random encoders of the recipes' own classes, in the layouts that the loaders read."""
    torch.manual_seed(0)
    image = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "resample": 2}
    save(hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.1, min_depth=8)), root / "mobilenet")
    _write_json(root / "mobilenet/preprocessor_config.json", image | {"size": {"height": 32, "width": 32}})
    # Deep graphs take the exporter seconds: what is not about an architecture is trained on these of five layers.
    shallow = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    save(hf.ResNetModel(hf.ResNetConfig(**shallow)), root / "resnet")
    squashed = image | {"size": {"height": 32, "width": 32}, "image_processor_type": "ViTImageProcessor"}
    _write_json(root / "resnet/preprocessor_config.json", squashed)
    save(hf.ResNetModel(hf.ResNetConfig(num_channels=1, **shallow)), root / "resnet-sounds")
    (root / "resnet-sounds/frontend.json").write_text(FRONTEND)
    dino = hf.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)
    save(hf.Dinov2Model(dino), root / "dinov2")
    cropped = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    _write_json(root / "dinov2/preprocessor_config.json", image | cropped | {"resample": 3})
    save(hf.MobileNetV1Model(hf.MobileNetV1Config(num_channels=1, depth_multiplier=0.05, min_depth=8)), root / "yamnet")
    (root / "yamnet/frontend.json").write_text(FRONTEND)
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    save(hf.BertModel(hf.BertConfig(vocab_size=64, **sizes | {"num_hidden_layers": 1})), root / "bert")
    write_tokenizer(root / "bert", pad=0)
    _write_json(root / "bert/sentence_bert_config.json", {"max_seq_length": 16})
    roberta = hf.RobertaConfig(vocab_size=64, max_position_embeddings=34, pad_token_id=1, **sizes)
    save(hf.RobertaModel(roberta, add_pooling_layer=False), root / "roberta")
    write_tokenizer(root / "roberta", pad=1)


def write_classifiers(root: Path) -> None:
    """Random encoders that kept their classifiers: two that see, one that hears, one of another kind."""
    torch.manual_seed(3)
    for folder in ("first", "second"):
        colours = hf.MobileNetV2Config(depth_multiplier=0.1, min_depth=8, id2label=dict(enumerate(SEEN)))
        save(hf.MobileNetV2ForImageClassification(colours), root / folder)
        shutil.copy(root / "mobilenet/preprocessor_config.json", root / folder)
    pitches = hf.MobileNetV1Config(num_channels=1, depth_multiplier=0.05, min_depth=8, id2label={0: "low", 1: "high"})
    save(hf.MobileNetV1ForImageClassification(pitches), root / "hearing")
    (root / "hearing/frontend.json").write_text(FRONTEND)
    dino = hf.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=64)
    save(hf.Dinov2ForImageClassification(dino), root / "other")
    shutil.copy(root / "dinov2/preprocessor_config.json", root / "other")


def concept_values(root: Path, **tones: Any) -> dict[str, Any]:
    """Changes to recipe_values: encoders with concepts, and tones captioned by their encoder's own classifier."""
    pairs = recipe_values(root)["pairs"]
    unlabelled = {"supervision": "concepts", "splits": {"train": ["0", "1"], "test": ["2"]}}
    return {
        "data": {"root": str(root)},
        "encoders": {
            "image": {"folder": "first", "beside": ["second"], "concepts": True},
            "audio": {"folder": "hearing", "concepts": True, "labels": "tones"},
            "text": {"folder": "bert"},
        },
        "pairs": {"pictures": pairs["pictures"], "tones": pairs["tones"] | unlabelled | tones},
    }


def recipe_values(root: Path, **changes: Any) -> dict[str, Any]:
    """A small recipe over everything that write_data and write_encoders wrote."""
    return {
        "name": "tiny",
        "data": {"root": str(root)},
        "encoders": {
            "image": {"folder": "resnet"},
            "audio": {"folder": "resnet-sounds", "licence": "none"},
            "text": {"folder": "bert"},
        },
        "pairs": {
            "pictures": {
                "modality": "image",
                "table": "captions.csv",
                "folder": "pictures",
                "media": "image",
                "text": "caption",
                "split_column": "part",
                "splits": {"train": ["train"], "validation": ["validation"], "test": ["test"]},
            },
            "tones": {
                "modality": "audio",
                "table": "sounds.csv",
                "folder": "sounds",
                "label": "class",
                "split_column": "fold",
                "splits": {"train": ["0"], "validation": ["1"], "test": ["2"]},
            },
        },
        "templates": {"image": ["a picture of {}"], "audio": ["the sound of {}", "{}"]},
        "projector": {"kind": "mlp", "dimensions": 16, "hidden": 32, "dropout": 0.0},
        "train": {"steps": 40, "batch_size": 8, "warmup_steps": 4, "validate_every": 10, "learning_rate": 0.01},
        **changes,
    }


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def save(model: Any, folder: Path) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # as initialised, deep random convolutions shrink everything to zero
            torch.nn.init.kaiming_normal_(module.weight)
    model.save_pretrained(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))


def write_tokenizer(folder: Path, pad: int) -> None:
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"] if pad == 0 else ["[BOS]", "[PAD]", "[EOS]", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos, eos = tokenizer.token_to_id("[BOS]"), tokenizer.token_to_id("[EOS]")
    tokenizer.post_processor = processors.TemplateProcessing(
        "[BOS] $A [EOS]", special_tokens=[("[BOS]", bos), ("[EOS]", eos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    # Else transformers reads the words as the model's own class would: WordPiece, byte pairs …
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
