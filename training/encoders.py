"""Frozen encoders from a hub id, a local folder, an installed package or an ONNX file.

The only place that knows model libraries. An encoder is never trained: its parameters need no gradient, it stays in
evaluation mode, and its weights' hash names it in caches and bundles.
"""

import hashlib
import importlib.util
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from service.contract.arrays import ArrayPreprocessing
from service.contract.bundle import Modality, Precision, Preprocessing, front_end_of
from service.contract.endpoint import EndpointPreprocessing
from service.contract.images import ImagePreprocessing
from service.contract.patches import LogMelPatches
from service.contract.sounds import AudioPreprocessing
from training.audio_encoders import AudioEncoder, ClapEncoder, WaveformEncoder, WhisperEncoder
from training.encode import efficientnet_lite, mobilenet_sounds, open_clip
from training.encode.endpoint import Endpoint
from training.graphs import session
from training.image_encoders import ClipEncoder, PooledEncoder, SiglipEncoder, pooled
from training.preprocessors import (
    LOCAL,
    EncoderError,
    Pooling,
    audio_preprocessing,
    dense_layer,
    image_preprocessing,
    said,
    sentence_modules,
    text_preprocessing,
    tokenizer_file,
    transformer_folder,
    transformers_tokenizer,
)
from training.recipe import BesideSource, EncoderSource, Recipe
from training.text_encoders import TWO_TOWERS, SentenceText, two_tower_text

Floats = NDArray[np.float32]
T = TypeVar("T", bound=BaseModel)
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
_LAST_LAYER_ONLY = (
    "align",
    "chinese_clip",
    "clap",
    "clap_audio_model",
    "clip",
    "clip_vision_model",
    "hubert",
    "siglip",
    "siglip_vision_model",
    "vision-text-dual-encoder",
    "wav2vec2",
    "wavlm",
)
_EXAMPLE_S = 1
_KIND = {"image": "image", "audio": "log_mel_patches", "text": "text"}
"""The kind of preprocessing that does not say its own."""
# Families that AutoModel does not read, or reads without their projection.
_WITH_PROJECTION = ("ClapAudioModel", "ClapAudioModelWithProjection", "CLIPVisionModelWithProjection")
_IMAGE_TYPES = (
    "align",
    "chinese_clip",
    "clip",
    "clip_vision_model",
    "convnext",
    "convnextv2",
    "dinov2",
    "dinov2_with_registers",
    efficientnet_lite.MODEL_TYPE,
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet",
    "siglip",
    "siglip_vision_model",
    "vision-text-dual-encoder",
    "vit",
)


class Classifier(nn.Module):
    """Pooled features (N, d) → scores (N, C) of the classes that the encoder's own classifier names.

    Images: softmax. Sounds: sigmoid to the power 8, so that a head's fourth root of the mean over a sound's patches is
    near the square of the highest patch's (a power mean): a bark is in one patch of a clip.
    """

    def __init__(self, linear: nn.Module, kept: Sequence[int], sounds: bool) -> None:
        super().__init__()
        self.linear, self.sounds = linear, sounds
        self.register_buffer("kept", torch.tensor(kept, dtype=torch.long))

    def forward(self, features: Tensor) -> Tensor:
        logits = self.linear(features)
        scores = torch.sigmoid(logits) ** 8 if self.sounds else torch.softmax(logits, -1)
        return scores[:, self.kept]  # type: ignore[index]


class SideBySide(nn.Module):
    """Encoders of one input as one: features side by side, then the mean of their scores of the same C concepts."""

    def __init__(self, encoders: Sequence[nn.Module], concepts: int) -> None:
        super().__init__()
        self.encoders, self.concepts = nn.ModuleList(encoders), concepts

    def forward(self, inputs: Tensor) -> Any:
        whole = side_by_side([_first(encoder(inputs)) for encoder in self.encoders], self.concepts)
        return (whole, whole[:, None]) if isinstance(self.encoders[0], ImageEncoder) else whole


def side_by_side(vectors: Sequence[Tensor], concepts: int) -> Tensor:
    """Vectors (B, d + C) of several encoders → (B, Σd + C): features side by side, then the mean of the C scores."""
    width = [vector.shape[1] - concepts for vector in vectors]
    parts = [vector[:, :features] for vector, features in zip(vectors, width, strict=True)]
    if concepts:
        parts.append(
            torch.stack([vector[:, features:] for vector, features in zip(vectors, width, strict=True)]).mean(0)
        )
    return torch.cat(parts, -1)


class SeveralScales(nn.Module):
    """An image encoder's vector averaged over the size that pixels (B, 3, H, W) come in and further squares of them.

    A convolution that was trained at one size sees small things at a larger one and whole scenes at its own (test-time
    scales of VGG, arXiv 1409.1556). The one local vector is the whole image's.
    """

    def __init__(self, encoder: nn.Module, sizes: Sequence[int], height: int, width: int) -> None:
        super().__init__()
        self.encoder, self.sizes = encoder, list(sizes)
        # As matrix products: ONNX Runtime's own cubic resize takes longer than the encoder. No part of the weights.
        for size in sizes:
            self.register_buffer(f"down_{size}", _resize(height, size), persistent=False)
            self.register_buffer(f"across_{size}", _resize(width, size).T, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        smaller = [getattr(self, f"down_{size}") @ pixels @ getattr(self, f"across_{size}") for size in self.sizes]
        whole = torch.stack([_first(self.encoder(view)) for view in (pixels, *smaller)]).mean(0)
        return whole, whole[:, None]


class MergedTokens(nn.Module):
    """An image encoder whose local vectors (B, N, d) are averaged over a coarser grid, given as weights (cells, N).

    SimVLG (arXiv 2310.03291) merges tokens by likeness; a fixed grid is one matrix product in every runtime.
    """

    def __init__(self, encoder: nn.Module, grid: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        whole, local = self.encoder(pixels)
        return whole, self.grid @ local


@torch.inference_mode()
def _merged(encoder: nn.Module, spec: ImagePreprocessing, cells: int) -> MergedTokens:
    """The encoder with so many local vectors. Raises EncoderError where its own make no such grid."""
    count = encoder(torch.from_numpy(example_inputs(spec, 1)[0]))[1].shape[1]
    high = round((count * spec.height / spec.width) ** 0.5)
    wide = count // high
    shapes = itertools.product(range(1, high + 1), range(1, wide + 1))
    # Of the shapes of one count the last, which is nearest to the grid's own, stays.
    by_shape = sorted(shapes, key=lambda shape: -abs(math.log(shape[0] * wide / (shape[1] * high))))
    grids = {rows * columns: (rows, columns) for rows, columns in by_shape}
    if high * wide != count or cells not in grids:
        near = ", ".join(map(str, sorted(sorted(grids), key=lambda other: abs(other - cells))[:4]))
        raise EncoderError(f"encoders.image.tokens: {cells} make no grid of its {high} × {wide}: choose among {near}")
    cells_alone = torch.eye(count).reshape(count, 1, high, wide)
    grid = adaptive_avg_pool2d(cells_alone, grids[cells]).reshape(count, cells).T.contiguous()
    return MergedTokens(encoder, grid).eval()


class Adapted(nn.Module):
    """An image encoder for pixels (B, 3, H, W) that were prepared for another, brought to its size and statistics."""

    def __init__(
        self, encoder: nn.Module, given: ImagePreprocessing, needed: ImagePreprocessing, size: int | None
    ) -> None:
        super().__init__()
        self.encoder, self.resized = encoder, size is not None and (size, size) != (given.height, given.width)
        if size is not None and self.resized:
            self.register_buffer("down", _resize(given.height, size), persistent=False)
            self.register_buffer("across", _resize(given.width, size).T, persistent=False)
        factor = torch.tensor(given.std) / torch.tensor(needed.std)
        offset = (torch.tensor(given.mean) - torch.tensor(needed.mean)) / torch.tensor(needed.std)
        self.changed = given.mean != needed.mean or given.std != needed.std
        self.register_buffer("factor", factor[:, None, None], persistent=False)
        self.register_buffer("offset", offset[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Any:
        if self.resized:
            pixels = self.down @ pixels @ self.across  # type: ignore[operator]
        if self.changed:
            pixels = pixels * self.factor + self.offset  # type: ignore[operator]
        return self.encoder(pixels)


def _resize(length: int, size: int) -> Tensor:
    """(size, length): cubic interpolation. Without a low-pass it comes nearest to resizing the picture itself."""
    return interpolate(torch.eye(length)[None, None], (size, length), mode="bicubic")[0, 0]


class ImageEncoder(nn.Module):
    """pixels (B, 3, H, W) → whole-image vector (B, d) and local vectors (B, N, d).

    `layers` puts those hidden states before the last one along d; cells of a convolution's layers differ in size, so
    there the whole image is then the one local vector.
    """

    def __init__(self, model: nn.Module, pooling: str | None = None, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.pooling, self.layers = model, pooling, list(layers)
        self.classifier: Classifier | None = None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = _run(self.model, self.layers, pixels)
        states = output.last_hidden_state
        if states.dim() == 4:  # a convolutional map (B, d, h, w): each cell is a local vector
            features = output.pooler_output.flatten(1)
            lower = [output.hidden_states[layer].mean((2, 3)) for layer in self.layers]
            whole = torch.cat([*lower, features, *([] if self.classifier is None else [self.classifier(features)])], -1)
            return whole, whole[:, None] if self.layers else states.flatten(2).transpose(1, 2)
        states = torch.cat([*(output.hidden_states[layer] for layer in self.layers), states], -1)
        registers = getattr(self.model.config, "num_register_tokens", 0)
        local = states[:, 1 + registers :]
        return pooled(states[:, 0], local, self.pooling), local


class TextEncoder(nn.Module):
    """input_ids, attention_mask (B, L) → token states (B, L, d); `sentence` pools them."""

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.layers = model, list(layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = _run(self.model, self.layers, input_ids=input_ids, attention_mask=attention_mask)
        return torch.cat([*(output.hidden_states[layer] for layer in self.layers), output.last_hidden_state], -1)


class Pooled(nn.Module):
    """The one way from an encoder's inputs to its features, for the cache, for export and for int8.

    The inputs of its preprocessing → pooled features (B, d), local ones, and the weights (B, N) that average those. Of
    sounds the local ones are packed rows (P, d) with weights (B, P), and the pooled ones their weighted sums.
    """

    def __init__(self, encoder: "FrozenEncoder") -> None:
        super().__init__()
        assert encoder.module is not None
        self.encoder, self.modality = encoder.module, encoder.modality
        self.pooling, self.unit = encoder.pooling, encoder.unit

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.modality == "image":
            whole, local = self.encoder(*inputs)
            return whole, local, torch.full_like(local[..., 0], 1.0 / local.shape[1])
        if self.modality == "audio":
            *rows, weights = inputs
            states = self.encoder(*rows)
            return weights @ states, states, weights
        ids, mask = inputs
        states = self.encoder(ids, mask)
        # A module that pools inside has one local vector of each text.
        weights = torch.ones_like(states[..., 0]) if states.shape[1] == 1 else mask.to(states.dtype)
        weights = weights / weights.sum(1, keepdim=True)
        return sentence(states, weights, self.pooling, self.unit), states, weights


def sentence(states: Tensor, weights: Tensor, pooling: str, unit: bool) -> Tensor:
    """Token states (B, L, d) with averaging weights (B, L) → sentence vectors (B, d), or (B, 2 d) where both.

    Padding is on the right, with weight 0. With `unit` the vectors have length 1.
    """
    if pooling == "last":
        last = (weights > 0).sum(1) - 1
        pooled = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
    elif pooling == "cls":
        pooled = states[:, 0]
    else:
        pooled = (weights[:, None] @ states)[:, 0]
        if pooling == "both":
            pooled = torch.cat([states[:, 0], pooled], -1)
    return normalize(pooled, dim=-1) if unit else pooled


def _run(model: nn.Module, layers: list[int], *inputs: Tensor, **named: Tensor) -> Any:
    return model(*inputs, **named, **({"output_hidden_states": True} if layers else {}))


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder with everything that defines its features. Exactly one of module, onnx and remote is set."""

    modality: Modality
    source: str
    width: int
    """Length of a feature vector."""
    weights_sha256: str
    preprocessing: Preprocessing
    licence: str | None
    module: nn.Module | None = None
    onnx: Path | None = None
    """A graph with one output: (B, d) for images and texts; for sounds (P, d) of their patches, or (B, d) where it
    takes the patches' weights too, as a bundle's tower does."""
    remote: Endpoint | None = None
    """What gives the vectors of texts elsewhere."""
    tokenizer: Path | None = None
    pooling: Pooling = "mean"
    """How a text's token states become a sentence vector."""
    unit: bool = False
    """Whether that vector is brought to length 1, as sentence-transformers' Normalize does."""
    concepts: tuple[str, ...] = ()
    """What its own classifier names; their scores are the last of the `width` numbers of a feature vector."""
    parts: tuple["FrozenEncoder", ...] = ()
    """The encoders that are side by side, each alone, so that its features serve other recipes too (`side_by_side`)."""
    precision: Precision = "fp32"


def load_encoder(recipe: Recipe, modality: Modality) -> FrozenEncoder:
    """Load the recipe's encoder of a modality, frozen. Raises EncoderError."""
    source = recipe.encoders[modality]
    if source.onnx is not None:
        return _from_onnx(recipe.path(source.onnx), modality, source)
    if source.endpoint is not None or source.vectors is not None:
        return _from_endpoint(recipe, source)
    folder, name = model_folder(recipe, source)
    wrapper: nn.Module
    wrapper, concepts, config = _wrapped(folder, modality, source.concepts, source.pooling, source.layers)
    _check_choice(recipe, modality, source, config)
    others = [] if not source.beside else _beside(recipe, modality, folder, config, concepts)
    if others:
        first, name = wrapper, "+".join([name, *(other for other, _, _ in others)])
        wrapper = SideBySide([first, *(module for _, module, _ in others)], len(concepts))
    wrapper.eval().requires_grad_(False)
    # Channels-last halves the time of depthwise convolutions on a CPU (docs/LOG.md) and changes no other model.
    wrapper.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tokenizer, unit = None, False
    pooling: Pooling = "mean"  # images and sounds are pooled inside their modules
    preprocessing: Preprocessing
    if modality == "image":
        preprocessing = _changed(source, _image_preprocessing(folder, config))
        if source.scales:
            wrapper = SeveralScales(wrapper, source.scales, preprocessing.height, preprocessing.width).eval()
        if source.tokens:
            wrapper = _merged(wrapper, preprocessing, source.tokens)
    elif modality == "audio":
        preprocessing = cast(Preprocessing, _changed(source, _audio_preprocessing(folder, config)))
    else:
        tokenizer = tokenizer_file(transformer_folder(folder))
        preprocessing = _changed(source, text_preprocessing(folder, config))
        wrapper, pooling, unit = _pooled_text(wrapper, source, folder, name, config.model_type)
    try:
        width = _width(wrapper, preprocessing)
    except IndexError:
        raise EncoderError(f"encoders.{modality}: {name} has no hidden state {max(source.layers)}") from None
    whole = FrozenEncoder(
        modality=modality,
        source=name,
        width=2 * width if modality == "text" and pooling == "both" else width,
        weights_sha256=_identity(wrapper, source, unit),
        preprocessing=preprocessing,
        licence=source.licence,
        module=wrapper,
        tokenizer=tokenizer,
        pooling=pooling,
        unit=unit,
        concepts=concepts,
    )
    if not others or source.scales:
        return whole
    first_identity = _identity(first, source.model_copy(update={"beside": []}), unit)
    alone = [(first, first_identity), *((module, identity) for _, module, identity in others)]
    parts = [
        replace(whole, module=module, weights_sha256=identity, width=_width(module, preprocessing))
        for module, identity in alone
    ]
    return replace(whole, parts=tuple(parts))


def _pooled_text(
    wrapper: nn.Module, source: EncoderSource, folder: Path, name: str, model_type: str
) -> tuple[nn.Module, Pooling, bool]:
    """A text encoder, how its token states become a sentence vector, and whether that is brought to length 1."""
    pooling: Pooling = "cls"  # of a module that pools inside: its one local vector is the text's
    unit = False
    if model_type not in TWO_TOWERS:
        modules = sentence_modules(folder, model_type)
        if source.pooling is not None and modules.dense:
            raise EncoderError(f"encoders.text: {name} has Dense layers behind its pooling: none can be chosen")
        if plain := source.pooling or modules.plain:
            pooling = plain
        else:
            layers = [dense_layer(path) for path in modules.dense]
            wrapper = SentenceText(wrapper, modules.poolings or ("mean",), layers).eval().requires_grad_(False)
        unit = modules.normalised
    return wrapper, pooling, unit if source.normalise is None else source.normalise


def _image_preprocessing(folder: Path, config: Any) -> ImagePreprocessing:
    if config.model_type == efficientnet_lite.MODEL_TYPE:
        return efficientnet_lite.preprocessing(config.version)
    return image_preprocessing(folder, config.model_type)


def _audio_preprocessing(folder: Path, config: Any) -> AudioPreprocessing:
    if config.model_type == mobilenet_sounds.MODEL_TYPE:
        return mobilenet_sounds.front_end(folder)
    return audio_preprocessing(folder, config)


def _beside(
    recipe: Recipe, modality: Modality, folder: Path, config: Any, concepts: tuple[str, ...]
) -> list[tuple[str, nn.Module, str]]:
    """The encoders that the recipe puts beside the one of `folder`: their names, modules and identities."""
    source, encoders = recipe.encoders[modality], []
    for other in source.beside:
        place, name = model_folder(recipe, other)
        wrapper, other_concepts, other_config = _wrapped(place, modality, source.concepts, source.pooling, other.layers)
        if other_concepts != concepts:
            raise EncoderError(f"encoders.{modality}: the classifiers of {folder.name} and of {name} differ in names")
        identity = f"{weights_sha256(wrapper)}:{other.layers}:{source.pooling}"
        if modality == "image":
            given = _changed(source, _image_preprocessing(folder, config))
            needed = _image_preprocessing(place, other_config)
            wrapper = Adapted(wrapper, given, needed, other.size)
            identity += f":{other.size}:{needed.mean}:{needed.std}"
        encoders.append((name, wrapper.eval().requires_grad_(False), hashlib.sha256(identity.encode()).hexdigest()))
    return encoders


def _wrapped(
    folder: Path, modality: Modality, scored: bool, pooling: str | None, layers: Sequence[int]
) -> tuple[Any, tuple[str, ...], Any]:
    """The encoder of a folder, the names that its own classifier scores, where they are asked for, and its config."""
    if modality == "image" and efficientnet_lite.weights_file(folder) is not None:
        model: Any = efficientnet_lite.load(folder)
    elif not (transformer_folder(folder) / "config.json").is_file():
        raise EncoderError(f"encoders.{modality}: {folder} holds no config.json: it is not a model folder")
    elif modality == "audio" and mobilenet_sounds.is_folder(folder):
        model = mobilenet_sounds.MobileNetSoundsModel(*mobilenet_sounds.load(folder))
    else:
        model = load_model(transformer_folder(folder))
    if modality == "text" and model.config.model_type in TWO_TOWERS:
        wrapper: Any = two_tower_text(model, transformers_tokenizer(folder))
    else:
        wrapper = _module(model, modality, pooling, layers)
    if not scored:
        return wrapper, (), model.config
    names = model.config.id2label
    kept = [index for index in sorted(names) if names[index] != "background"]
    linear: Any = getattr(model, "classifier", None) or _linear_classifier(folder, modality, model)
    wrapper.classifier = Classifier(cast(nn.Module, linear), kept, sounds=modality == "audio")
    return wrapper, tuple(names[index] for index in kept), model.config


def _linear_classifier(folder: Path, modality: Modality, model: Any) -> nn.Module:
    """The classifier of a transformers folder, which must read the pooled features alone. Raises EncoderError."""
    from transformers import AutoModelForImageClassification

    whole, report = AutoModelForImageClassification.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **LOCAL
    )
    _refuse_missing(folder, report["missing_keys"])
    linear: Any = getattr(whole.eval(), "classifier", None)
    example = torch.rand(2, *((3, 64, 64) if modality == "image" else (1, 96, 64)))
    with torch.inference_mode():
        try:
            agrees = torch.allclose(linear(model(example).pooler_output.flatten(1)), whole(example).logits, atol=1e-4)
        except (TypeError, AttributeError, RuntimeError, ValueError):
            agrees = False
    if not agrees:
        raise EncoderError(f"encoders.{modality}: {folder} has no classifier that reads the pooled features alone")
    return cast(nn.Module, linear)


def _module(model: Any, modality: Modality, pooling: str | None, layers: Sequence[int]) -> nn.Module:
    """The wrapper that gives a model's features."""
    match model.config.model_type:
        case "align" | "vision-text-dual-encoder" if modality == "image":
            return PooledEncoder(model)
        case "chinese_clip" | "clip" | "clip_vision_model" if modality == "image":
            return ClipEncoder(model, pooling)
        case "siglip" | "siglip_vision_model" if modality == "image":
            return SiglipEncoder(model, pooling)
        case "clap" | "clap_audio_model" if modality == "audio":
            return ClapEncoder(model)
        case "whisper" if modality == "audio":
            return WhisperEncoder(model, layers)
        case "wav2vec2" | "hubert" | "wavlm" if modality == "audio":
            return WaveformEncoder(model)
    if modality == "image":
        return ImageEncoder(model, pooling, layers)
    return AudioEncoder(model, layers) if modality == "audio" else TextEncoder(model, layers)


def weights_sha256(module: nn.Module) -> str:
    """Hash of every parameter and buffer: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{array.dtype}:{tuple(array.shape)}".encode())
        digest.update(array.view(-1).view(torch.uint8).numpy().tobytes() if array.dim() else array.numpy().tobytes())
    return digest.hexdigest()


def _identity(wrapper: nn.Module, source: EncoderSource, unit: bool) -> str:
    """The weights' hash; where features were chosen or are brought to length 1, of that too: another encoder."""
    weights = weights_sha256(wrapper)
    if not source.layers and source.pooling is None and not source.scales and not source.tokens and not unit:
        return weights
    others = (f":{source.scales}" if source.scales else "") + (":unit" if unit else "")
    others += f":tokens {source.tokens}" if source.tokens else ""
    others += "".join(f":{other.layers}:{other.size}" for other in source.beside if other.layers or other.size)
    return hashlib.sha256(f"{weights}:{source.layers}:{source.pooling}{others}".encode()).hexdigest()


def _check_choice(recipe: Recipe, modality: Modality, source: EncoderSource, config: Any) -> None:
    where, kind = f"encoders.{modality}", config.model_type
    if modality == "image" and kind not in _IMAGE_TYPES:
        raise EncoderError(f"{where}: the model type {kind} is not read here ({', '.join(_IMAGE_TYPES)} are)")
    convolutional = not hasattr(config, "num_hidden_layers")
    if modality == "text" and kind in TWO_TOWERS and source.pooling is not None:
        raise EncoderError(f"{where}: pooling cannot be chosen for {kind}: it has its own (docs/reference/encoders.md)")
    if source.pooling == "last" and modality != "text":
        raise EncoderError(f"{where}: last pooling is for texts")
    if source.normalise is not None and modality != "text":
        raise EncoderError(f"{where}: normalise is for texts")
    if convolutional and source.pooling in ("cls", "both"):
        raise EncoderError(f"{where}: {source.pooling} pooling needs a CLS state, and it has none")
    if convolutional and modality == "image" and source.layers and recipe.projector.needs_tokens:
        raise EncoderError(
            f"{where}: layers of a convolution have no common cells: no {recipe.projector.kind} projector"
        )
    if kind.startswith("siglip") and source.pooling in ("cls", "both"):
        raise EncoderError(f"{where}: {source.pooling} pooling needs a CLS state, and {kind} has none")
    own_way = modality == "audio" and not convolutional
    if own_way and source.pooling is not None:
        raise EncoderError(f"{where}: pooling cannot be chosen for {kind}: it has its own (docs/reference/encoders.md)")
    if source.layers and kind in _LAST_LAYER_ONLY:
        raise EncoderError(f"{where}: layers cannot be chosen for {kind}")
    for name in ("add_adapter", "conv_pos_batch_norm"):
        if getattr(config, name, False):
            raise EncoderError(f"{where}: {kind} with {name} is not supported")


def model_folder(recipe: Recipe, source: EncoderSource | BesideSource) -> tuple[Path, str]:
    """The model folder, as transformers saves it, and the name that the manifest and the model card give it.

    Raises EncoderError, OpenClipError.
    """
    folder, name = _resolve(recipe, source)
    return (open_clip.rewritten(folder) if open_clip.is_folder(folder) else folder), name


def _resolve(recipe: Recipe, source: EncoderSource | BesideSource) -> tuple[Path, str]:
    if source.folder is not None:
        return recipe.path(source.folder) / source.subfolder, source.folder.name
    if source.package is not None:
        spec = importlib.util.find_spec(source.package)
        if spec is None or not spec.submodule_search_locations:
            raise EncoderError(f"the package {source.package} is not installed")
        return Path(spec.submodule_search_locations[0]) / source.subfolder, source.package
    from huggingface_hub import snapshot_download  # only a hub id needs a network

    assert isinstance(source, EncoderSource) and source.hub is not None
    try:
        folder = snapshot_download(source.hub, revision=source.revision, allow_patterns=_FILES)
    except Exception as error:
        raise EncoderError(f"the hub model {source.hub} cannot be had: {type(error).__name__}: {error}") from error
    return Path(folder) / source.subfolder, source.hub


def load_model(folder: Path) -> Any:
    """The model of a transformers folder, in float32. Raises EncoderError where it lacks weights or needs own code."""
    import transformers
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    unread = f"{folder}: transformers does not read this model without code of the folder, which is not run here"
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError) as error:
        raise EncoderError(f"{unread}: {said(error)}") from None
    named = (config.architectures or [""])[0]
    architecture = getattr(transformers, named) if named in _WITH_PROJECTION else AutoModel
    # A pooler or a classifier that the features do not pass through may be missing from, or left over in, the file.
    level, _ = logging.get_verbosity(), logging.set_verbosity_error()
    try:
        model, report = architecture.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **LOCAL,
        )
    except OSError as error:
        raise EncoderError(f"{folder} holds no weights that are read (model.safetensors): {error}") from None
    except ValueError as error:
        raise EncoderError(f"{unread}: {said(error)}") from None
    finally:
        logging.set_verbosity(level)
    _refuse_missing(folder, [key for key in report["missing_keys"] if not key.startswith("pooler.")])
    if hasattr(model, "pooler") and isinstance(model.pooler, nn.Module) and report["missing_keys"]:
        model.pooler = None  # random weights would make the hash, and so the cache key, random
    return model


def _refuse_missing(folder: Path, keys: Collection[str]) -> None:
    if keys:
        raise EncoderError(f"{folder} lacks weights: {', '.join(sorted(keys)[:3])} …")


def _changed(source: EncoderSource, spec: T) -> T:
    try:
        return type(spec).model_validate({**spec.model_dump(), **source.preprocessing})
    except ValidationError as error:
        raise EncoderError(f"preprocessing: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


def _stated(source: EncoderSource, modality: Modality, values: dict[str, Any]) -> Preprocessing:
    try:
        stated: Preprocessing = TypeAdapter(Preprocessing).validate_python(
            {"kind": _KIND.get(modality, "array"), **values}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise EncoderError(
            f"encoders.{modality}: encoder.json: preprocessing: {'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"
        ) from None
    if front_end_of(stated) != (source.front_end or modality):
        raise EncoderError(f"encoders.{modality}: encoder.json: {stated.kind} is no preprocessing of its front end")
    return _changed(source, stated)


class _Described(BaseModel):
    """Holds what an encoder.json says."""

    name: str = Field(min_length=1)
    modality: str
    features: int = Field(gt=0, strict=True)
    preprocessing: dict[str, Any]
    licence: str | None = None
    labels: tuple[str, ...] = ()


def _from_onnx(folder: Path, modality: Modality, source: EncoderSource) -> FrozenEncoder:
    card, graph = folder / "encoder.json", folder / "encoder.onnx"
    if not card.is_file() or not graph.is_file():
        raise EncoderError(f"{folder} needs encoder.onnx and encoder.json")
    try:
        described = _Described.model_validate_json(card.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise EncoderError(": ".join([str(card), *map(str, first["loc"]), first["msg"]])) from None
    if described.modality != modality:
        raise EncoderError(f"{folder} is an {described.modality} encoder, not {modality}")
    spec = _stated(source, modality, described.preprocessing)
    if isinstance(spec, ArrayPreprocessing):
        opened = session(graph)
        names = [value.name for value in (*opened.get_inputs(), *opened.get_outputs())]
        if names != [*spec.inputs, "features"]:
            raise EncoderError(f"{graph} has the input and output {names}: they must be called array and features")
    if source.concepts and not described.labels:
        raise EncoderError(f"encoders.{modality}: {folder} has no labels in its encoder.json: no concepts")
    return FrozenEncoder(
        modality=modality,
        source=described.name,
        width=described.features,
        weights_sha256=hashlib.sha256(graph.read_bytes()).hexdigest(),
        preprocessing=spec,
        licence=source.licence or described.licence,
        onnx=graph,
        tokenizer=folder / "tokenizer.json" if modality == "text" else None,
        concepts=described.labels if source.concepts else (),
    )


def _from_endpoint(recipe: Recipe, source: EncoderSource) -> FrozenEncoder:
    remote = Endpoint.open(
        source.endpoint, source.model, None if source.vectors is None else recipe.path(source.vectors)
    )
    spec = EndpointPreprocessing(shape=remote.shape, model=source.model, probe=tuple(remote.probe.tolist()))
    # Not the probe, which an API may give with other last digits: but another file is another encoder.
    stored = "" if source.vectors is None else hashlib.sha256(recipe.path(source.vectors).read_bytes()).hexdigest()
    return FrozenEncoder(
        modality="text",
        source=source.model,
        width=len(remote.probe),
        weights_sha256=hashlib.sha256(f"{remote.shape}:{source.endpoint}:{source.model}:{stored}".encode()).hexdigest(),
        preprocessing=_changed(source, spec),
        licence=source.licence,
        remote=remote,
    )


@torch.inference_mode()
def _width(module: nn.Module, spec: Preprocessing) -> int:
    return int(_first(module(*[torch.from_numpy(array) for array in example_inputs(spec, 1)])).shape[-1])


def example_inputs(spec: Preprocessing, batch: int) -> Sequence[NDArray[Any]]:
    """Arrays of the right shapes for an encoder: what tracing and width detection feed it."""
    if isinstance(spec, ImagePreprocessing):
        return [np.zeros((batch, 3, spec.height, spec.width), np.float32)]
    if isinstance(spec, LogMelPatches):
        return [np.zeros((batch, 1, spec.patch_frames, spec.n_mels), np.float32)]
    if isinstance(spec, AudioPreprocessing):
        sound = spec.prepare(np.zeros(_EXAMPLE_S * spec.sampling_rate, np.float32))
        return spec.collate([sound] * batch)[:-1]
    if isinstance(spec, EndpointPreprocessing):
        return [np.ones((batch, len(spec.probe)), np.float32)]
    if isinstance(spec, ArrayPreprocessing):
        return [np.zeros((batch, *spec.prepared_shape), np.float32)]
    return [np.full((batch, 5), 4, np.int64), np.ones((batch, 5), np.int64)]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
