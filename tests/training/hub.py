"""Make what training/recipes/coco-clotho.yaml needs: the publishers' files, and a cache of the hub.

Files and folders are named and laid out as COCO and Clotho are; how many and how large they are is the caller's. The
encoders are random, of the classes and with the files that the hub has under their ids.
"""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
)

from tests.training import tiny

FEW = {"train2017": 200, "val2017": 16, "development": 30, "validation": 9, "evaluation": 9}
ALL = {"train2017": 118_287, "val2017": 5_000, "development": 3_839, "validation": 1_045, "evaluation": 1_045}
"""Media of COCO 2017 and of Clotho 2.1, by the folder that they lie in."""
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES: dict[bool, dict[str, dict[str, Any]]] = {
    False: {
        "image": SMALL | {"patch_size": 8, "image_size": 32},
        "audio": SMALL
        | {"intermediate_size": 48, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
        | {"max_length": 96},
        "text": SMALL | {"intermediate_size": 48, "vocab_size": 64},
    },
    True: {
        "image": {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
        "audio": {},
        "text": {"hidden_size": 384, "intermediate_size": 1536},
    },
}
"""Settings of the encoders, by whether they have the size of those on the hub."""
_DIFFERENT = 24  # media that are written; the others are hard links to them


def write_data(root: Path, counts: Mapping[str, int] = FEW, *, full: bool = False) -> None:
    """Captioned pictures by colour and tones by pitch. `full`: 640 × 480 pixels, 22.5 s, and no caption twice."""
    (root / "coco/annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        files = _media(root / "coco" / name, counts[name], ".jpg", full)
        images = [{"license": 4, "file_name": file, "id": number} for number, file in enumerate(files)]
        notes = [
            {"image_id": number, "id": 5 * number + index, "caption": caption}
            for number in range(len(files))
            for index, caption in enumerate(_captions(list(tiny.COLOURS), number, full))
        ]
        content = {"info": {}, "licenses": [], "images": images, "annotations": notes}
        (root / f"coco/annotations/captions_{name}.json").write_text(json.dumps(content))
    for name in ("development", "validation", "evaluation"):
        files = _media(root / "clotho" / name, counts[name], ".wav", full)
        with (root / f"clotho/clotho_captions_{name}.csv").open("w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["file_name", *(f"caption_{number}" for number in range(1, 6))])
            table.writerows([file, *_captions(list(tiny.PITCHES), i, full)] for i, file in enumerate(files))


def _captions(names: list[str], number: int, different: bool) -> list[str]:
    name, mark = names[number % len(names)], f" {number}" if different else ""
    patterns = ("a picture of {}", "very plain {} photo", "the sound of {}", "something {}", "a {} tone of the picture")
    return [pattern.format(name) + mark for pattern in patterns]


def _media(folder: Path, count: int, suffix: str, full: bool) -> list[str]:
    """Write the media of a folder, whose colour or pitch changes from each to the next; their names."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), [f"{number:012}{suffix}" for number in range(count)]
    for number, name in enumerate(names):
        if number >= _DIFFERENT:
            os.link(folder / names[number % _DIFFERENT], folder / name)
        elif suffix == ".jpg":
            colour = list(tiny.COLOURS.values())[number % len(tiny.COLOURS)]
            pixels = np.array(colour) + rng.normal(0, 12, (480, 640, 3) if full else (24, 32, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
        else:
            time = np.arange(int(44_100 * (22.5 if full else 0.5 + 0.05 * number))) / 44_100
            pitch = list(tiny.PITCHES.values())[number % len(tiny.PITCHES)]
            soundfile.write(folder / name, 0.3 * np.sin(2 * np.pi * pitch * time), 44_100)
    return names


def write_encoders(cache: Path, *, full: bool = False) -> None:
    """A cache of the hub with the recipe's three encoders. `full`: of the size that they have there."""
    torch.manual_seed(0)
    sizes = SIZES[full]
    folder = _repository(cache, "facebook/dinov2-small")
    tiny.save(Dinov2Model(Dinov2Config(**sizes["image"])), folder)
    edge, crop = (256, 224) if full else (36, 32)
    cut = {"size": {"shortest_edge": edge}, "crop_size": {"height": crop, "width": crop}}
    BitImageProcessorPil(**cut).save_pretrained(folder)
    folder = _repository(cache, "MIT/ast-finetuned-audioset-10-10-0.4593")
    heard = ASTConfig(**sizes["audio"])
    tiny.save(ASTForAudioClassification(heard), folder)
    ASTFeatureExtractor(max_length=heard.max_length, num_mel_bins=heard.num_mel_bins).save_pretrained(folder)
    folder = _repository(cache, "sentence-transformers/all-MiniLM-L12-v2")
    tiny.save(BertModel(BertConfig(**sizes["text"])), folder)
    tiny.write_tokenizer(folder, pad=0)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')


def _repository(cache: Path, name: str) -> Path:
    """The folder of a model in the hub's cache, as its client lays it out."""
    commit, repository = "0" * 40, cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder
