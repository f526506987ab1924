"""Turn what a transformers folder says of its inputs into the contract's specification of the same.

docs/reference/encoders.md lists what is read here, and how it was checked. What cannot be served as transformers would
do it is refused, with the model's type and the setting.
"""

import hashlib
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, normalizers, processors
from torch import nn

from service.contract.images import ImagePreprocessing
from service.contract.patches import LogMelPatches
from service.contract.tokens import TextPreprocessing
from service.contract.waveforms import Waveforms
from service.contract.windows import LogMelWindows
from training.audio_encoders import samples_of_a_frame
from training.errors import TrainingError
from training.files import default_cache, write
from training.text_encoders import POOLINGS, TWO_TOWERS, Dense

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_PROCESSORS = ("ViT", "Siglip", "CLIP", "ChineseCLIP", "Bit", "ConvNext", "EfficientNet", "MobileNetV1", "MobileNetV2")
Pooling = Literal["mean", "cls", "both", "last"]
_POOLING: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
Hearing = LogMelPatches | LogMelWindows | Waveforms
_LONGEST_S = 30
"""The length of a stretch that a waveform encoder hears at once: the memory of its attention grows with the square."""


LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every from_pretrained: nothing is fetched, no code of a folder is run, and nobody is asked on stdin."""


class EncoderError(TrainingError):
    """An encoder cannot be loaded: the message names it and what is missing."""


def read_json(folder: Path, name: str) -> Any:
    """The file's content, or an empty dictionary where there is none."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _processor_settings(folder: Path, part: str) -> dict[str, Any]:
    """Return the settings of an image processor or feature extractor, saved alone or within a processor; or empty."""
    stated = read_json(folder, "preprocessor_config.json") or read_json(folder, "processor_config.json")
    settings: dict[str, Any] = stated.get(part, stated)
    return settings


def image_preprocessing(folder: Path, model_type: str) -> ImagePreprocessing:
    """Read a preprocessor_config.json as the image processor that it is for would. Raises EncoderError."""
    stated = _processor_settings(folder, "image_processor")
    if not stated:
        raise EncoderError(f"{folder} holds no preprocessor_config.json")
    import transformers

    stated = {key: value for key, value in stated.items() if value is not None}
    where = f"{folder}: {model_type}: preprocessor_config.json"
    kind = _processor(stated, model_type)
    if kind not in _PROCESSORS:
        raise EncoderError(f"{where}: image_processor_type {kind} is not read here ({', '.join(_PROCESSORS)} are)")
    if stated.get("resample", 2) not in _RESAMPLE:
        raise EncoderError(f"{where}: resample {stated['resample']} is none of Pillow's")
    # transformers knows what each processor takes where its file is silent, as older files are.
    try:
        processor = getattr(transformers, f"{kind}ImageProcessorPil")(**stated)
    except (TypeError, ValueError) as error:
        raise EncoderError(f"{where}: {said(error)}") from None
    if not processor.do_resize:
        raise EncoderError(f"{where}: do_resize is false: pictures would come in any size")
    size, crop = _sides(processor.size), _sides(getattr(processor, "crop_size", None))
    if set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise EncoderError(f"{where}: size {size}: only height and width, or shortest_edge alone, are read here")
    shortest, cropped = size.get("shortest_edge"), getattr(processor, "do_center_crop", None)
    if shortest is None and "do_center_crop" not in stated:
        cropped = False  # the crop that processors take by default belongs to a shortest edge
    final = crop if cropped else size
    squashed = None
    if kind == "ConvNext":
        if shortest is None or cropped:
            raise EncoderError(f"{where}: size {size}: a ConvNext processor takes shortest_edge, and crops by crop_pct")
        final = {"height": shortest, "width": shortest}
        # Below 384 it crops; from there on it squashes.
        shortest = int(shortest / processor.crop_pct) if shortest < 384 else None
    elif shortest is None and cropped and crop != size:
        squashed = (size["height"], size["width"])
    if "height" not in final:
        raise EncoderError(f"{where} fixes no input size: size is {size}, and do_center_crop is false")
    mean, std = _three(processor.image_mean), _three(processor.image_std)
    if not processor.do_normalize:
        mean, std = [0.0] * 3, [1.0] * 3
    if kind == "EfficientNet" and processor.rescale_offset and processor.do_rescale:
        mean = [value + 1 for value in mean]  # samples are moved to -1 … 1
    if kind == "EfficientNet" and processor.include_top:  # divided by the deviation once more
        std = [one * two for one, two in zip(std, _three(processor.image_std), strict=True)]
    # 255 · factor is folded into the statistics: (p · f - mean) / std = (p / 255 - mean / (255 f)) / (std / (255 f)).
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    try:
        return ImagePreprocessing(
            height=final["height"],
            width=final["width"],
            resize="shortest_edge" if shortest else "squash",
            shortest_edge=shortest,
            squashed=squashed,
            resample=cast(Any, _RESAMPLE[processor.resample]),
            mean=cast(Any, tuple(value / factor for value in mean)),
            std=cast(Any, tuple(value / factor for value in std)),
        )
    except ValidationError as error:
        raise EncoderError(f"{where}: {error.errors()[0]['msg']}") from None


def audio_preprocessing(folder: Path, config: Any) -> Hearing:
    """Read a preprocessor_config.json of CLAP, AST, Whisper or wav2vec 2.0, or a frontend.json. Raises EncoderError."""
    frontend = read_json(folder, "frontend.json")
    if frontend.get("kind") == "log_mel_patches":
        return LogMelPatches.model_validate({k: v for k, v in frontend.items() if k in LogMelPatches.model_fields})
    stated = _processor_settings(folder, "feature_extractor")
    model_type = config.model_type
    read = _FRONT_ENDS.get(model_type)
    if read is None:
        raise EncoderError(
            f"{folder}: {model_type} has no audio front end here: needed is a frontend.json of kind log_mel_patches, "
            f"or a model of type {', '.join(_FRONT_ENDS)}"
        )
    if not stated:
        raise EncoderError(f"{folder}: {model_type}: there is no preprocessor_config.json")
    where = f"{folder}: {model_type}: preprocessor_config.json"
    if stated.get("padding_value", 0.0) != 0.0:
        raise EncoderError(f"{where}: padding_value {stated['padding_value']}: only 0 is read here")
    if stated.get("dither", 0.0) != 0.0:
        raise EncoderError(f"{where}: dither {stated['dither']} adds noise: two runs would differ")
    try:
        return read(stated, config, where)
    except ValidationError as error:
        raise EncoderError(f"{where}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


def _clap(stated: dict[str, Any], config: Any, where: str) -> Hearing:
    """ClapFeatureExtractor. A sound longer than a window is fused or cut, where it would draw windows at random."""
    rate, hop = stated.get("sampling_rate", 48_000), stated.get("hop_length", 480)
    window, samples = stated.get("fft_window_size", 1024), int(stated.get("max_length_s", 10) * rate)
    fused = getattr(config, "audio_config", config).enable_fusion
    truncation, padding = stated.get("truncation", "fusion"), stated.get("padding", "repeatpad")
    if truncation not in ("fusion", "rand_trunc") or fused != (truncation == "fusion"):
        raise EncoderError(f"{where}: truncation {truncation} does not go with the model's enable_fusion {fused}")
    short = {"repeatpad": "repeat_whole", "repeat": "repeat", "pad": "silence"}
    if padding not in short:
        raise EncoderError(f"{where}: padding {padding} is none of {', '.join(short)}")
    if stated.get("top_db") is not None:
        raise EncoderError(f"{where}: top_db is not read here (transformers does not apply it either)")
    return LogMelWindows(
        sampling_rate=rate,
        samples=samples,
        frames=samples // hop + 1,
        window_length=window,
        hop_length=hop,
        fft_length=window,
        n_mels=stated.get("feature_size", 64),
        f_min=stated.get("frequency_min", 0),
        f_max=stated.get("frequency_max", 14_000),
        mel_scale="htk" if fused else "slaney",
        mel_norm="none" if fused else "slaney",
        logarithm="db",
        dynamic_range=None,
        mean=0.0,
        std=1.0,
        short=cast(Any, short[padding]),
        long="fusion" if fused else "windows",
        lengths=False,
    )


def _ast(stated: dict[str, Any], config: Any, where: str) -> Hearing:
    """ASTFeatureExtractor: Kaldi's filter bank, as transformers computes it without torchaudio."""
    rate, frames = stated.get("sampling_rate", 16_000), stated.get("max_length", 1024)
    if frames != config.max_length:
        raise EncoderError(f"{where}: max_length {frames} is not the model's {config.max_length}")
    scaled = stated.get("do_normalize", True)
    return LogMelWindows(
        sampling_rate=rate,
        samples=(frames - 1) * 160 + 400,
        frames=frames,
        window_length=400,
        hop_length=160,
        fft_length=512,
        window="hann_symmetric",
        centred=False,
        remove_dc=True,
        preemphasis=0.97,
        n_mels=stated.get("num_mel_bins", 128),
        f_min=20.0,
        f_max=rate // 2,
        mel_scale="kaldi",
        mel_norm="none",
        logarithm="ln",
        floor=1.192092955078125e-07,
        dynamic_range=None,
        mean=stated.get("mean", -4.2677393) if scaled else 0.0,
        std=2 * stated.get("std", 4.5689974) if scaled else 1.0,
        short="zeros",
        lengths=False,
    )


def _whisper(stated: dict[str, Any], config: Any, where: str) -> Hearing:
    """WhisperFeatureExtractor."""
    rate, hop = stated.get("sampling_rate", 16_000), stated.get("hop_length", 160)
    window, samples = stated.get("n_fft", 400), stated.get("chunk_length", 30) * rate
    if stated.get("do_normalize", False):
        raise EncoderError(f"{where}: do_normalize is not read here")
    if samples // hop != 2 * config.max_source_positions:
        raise EncoderError(
            f"{where}: chunk_length gives {samples // hop} frames; the model takes {2 * config.max_source_positions}"
        )
    return LogMelWindows(
        sampling_rate=rate,
        samples=samples,
        frames=samples // hop,
        window_length=window,
        hop_length=hop,
        fft_length=window,
        n_mels=stated.get("feature_size", 80),
    )


def _waveform(stated: dict[str, Any], config: Any, where: str) -> Hearing:
    """Wav2Vec2FeatureExtractor."""
    rate = stated.get("sampling_rate", 16_000)
    geometry = list(zip(config.conv_kernel, config.conv_stride, strict=True))
    return Waveforms(
        sampling_rate=rate,
        max_samples=_LONGEST_S * rate,
        min_samples=samples_of_a_frame(geometry),
        normalise=stated.get("do_normalize", True),
    )


_FRONT_ENDS = {
    "clap": _clap,
    "clap_audio_model": _clap,
    "audio-spectrogram-transformer": _ast,
    "whisper": _whisper,
    "wav2vec2": _waveform,
    "hubert": _waveform,
    "wavlm": _waveform,
}


def transformers_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers makes of a folder. Raises EncoderError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # of many kinds, by what is missing
        raise EncoderError(f"{folder}: transformers reads no tokenizer there: {said(error)}") from None


def said(error: Exception) -> str:
    """Return what transformers says went wrong, without its advice, such as to trust the code of a folder."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer that transformers makes of a folder, as a tokenizer.json: the folder's own where it says the same.

    Else it is kept in the cache: a class of transformers may do what the file does not say (BERT's takes lower case
    from tokenizer_config.json). Where transformers makes no tokenizer, the folder's file serves. Raises EncoderError.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = transformers_tokenizer(folder)
    except EncoderError:
        if path.is_file():
            return path
        raise
    siglip = type(tokenizer).__name__ == "SiglipTokenizer"
    backend = _siglip_backend(tokenizer) if siglip else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EncoderError(
            f"{folder} holds no tokenizer.json, and {type(tokenizer).__name__} of transformers makes none"
        )
    content = _without_lengths(backend)
    if path.is_file() and content == _without_lengths(Tokenizer.from_file(str(path))):
        return path
    made = default_cache() / f"tokenizer-{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"
    if not made.is_file():
        write(made, content)
    return made


def _without_lengths(tokenizer: Any) -> str:
    """Return what a tokenizer does to a text, as JSON: how far it pads and cuts is said by the preprocessing."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    content: str = tokenizer.to_str()
    return content


def _siglip_backend(tokenizer: Any) -> Tokenizer:
    """SiglipTokenizer.canonicalize_text and its SentencePiece model, which transformers runs in Python.

    Tokens are the same but for texts that hold `</s>` or `<unk>` themselves.
    """
    from transformers.convert_slow_tokenizer import SpmConverter

    backend: Tokenizer = SpmConverter(tokenizer).converted()
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    backend.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, end_id)])
    steps: list[Any] = [normalizers.Lowercase()] if tokenizer.do_lower_case else []
    steps += [normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return backend


def text_preprocessing(folder: Path, config: Any) -> TextPreprocessing:
    """Length and instructions from sentence-transformers' own files where there are, else length from the positions.

    Of a model of two towers from its tokenizer, and from the positions of its text tower. Raises EncoderError.
    """
    name, stated = _sentence_config(transformer_folder(folder))
    if stated.get("do_lower_case"):
        raise EncoderError(f"{folder}: {config.model_type}: {name}: do_lower_case is not read here")
    of_text = config.text_config if config.model_type in TWO_TOWERS else config
    positions = getattr(of_text, "max_position_embeddings", 512)
    pad = getattr(of_text, "pad_token_id", 0) or 0
    if of_text.model_type in ("roberta", "xlm-roberta", "mpnet", "camembert", "clap_text_model"):
        positions -= pad + 1  # their position ids start after the padding id
    if config.model_type in TWO_TOWERS:
        tokenizer = transformers_tokenizer(folder)
        return TextPreprocessing(
            max_length=min(tokenizer.model_max_length, positions), pad_id=tokenizer.pad_token_id or 0
        )
    asked = read_json(folder, "config_sentence_transformers.json")
    prompts = asked.get("prompts") or {}
    default = prompts.get(asked.get("default_prompt_name"), "")
    passage = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default)
    longest = stated.get("max_seq_length")
    if longest is None and (folder / "modules.json").is_file():  # newer ones keep it with the tokenizer
        longest = read_json(transformer_folder(folder), "tokenizer_config.json").get("model_max_length")
    return TextPreprocessing(
        max_length=min(longest or positions, positions),
        pad_id=pad,
        query_prefix=prompts.get("query", default),
        passage_prefix=passage,
    )


def _sentence_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and content of the first of the files in which sentence-transformers keeps a text model's settings."""
    names = [f"sentence_{kind}_config.json" for kind in _SENTENCE_CONFIGS]
    return next(((name, stated) for name in names if (stated := read_json(folder, name))), (names[0], {}))


_SENTENCE_CONFIGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
"""Names in the order in which sentence-transformers tries them (Transformer.load_config); older ones name the model."""


@dataclass(frozen=True)
class SentenceModules:
    """The modules that sentence-transformers puts behind a text model."""

    poolings: tuple[str, ...]
    """Several are side by side; empty where no file states one."""
    dense: tuple[Path, ...]
    """Folders of Dense layers, in their order."""
    normalised: bool

    @property
    def plain(self) -> Pooling | None:
        """The one pooling that needs no module of its own."""
        if self.dense or len(self.poolings) > 1:
            return None
        return _POOLING.get(self.poolings[0]) if self.poolings else "mean"


def transformer_folder(folder: Path) -> Path:
    """Return the folder of the text model itself: older sentence-transformers have one of its own for it."""
    modules = read_json(folder, "modules.json") or []
    first = modules[0] if modules and modules[0]["type"].endswith(".Transformer") else {}
    inside = folder / first.get("path", "")
    return inside if (inside / "config.json").is_file() else folder


def sentence_modules(folder: Path, model_type: str) -> SentenceModules:
    """Read modules.json, and the pooling. Raises EncoderError for a module or a pooling that is not served here."""
    modules = read_json(folder, "modules.json") or []
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    where = f"{folder}: {model_type}: modules.json"
    if others := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Dense", "Normalize")]:
        raise EncoderError(f"{where}: a module {others[0]} is not served here")
    order = [("Transformer", "Pooling", "Dense", "Normalize").index(kind) for kind in kinds]
    if order != sorted(order):
        raise EncoderError(f"{where}: modules in the order {', '.join(kinds)} are not served here")
    paths = [folder / module["path"] for module in modules]
    place = next((path for path, kind in zip(paths, kinds, strict=True) if kind == "Pooling"), folder / "1_Pooling")
    stated, where = read_json(place, "config.json"), f"{folder}: {model_type}: {place.name}/config.json"
    if stated.get("include_prompt", True) is False:
        raise EncoderError(f"{where}: include_prompt false is not served here")
    given = stated.get("pooling_mode")
    if given is None:
        switches = {
            key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token"): on
            for key, on in stated.items()
            if key.startswith("pooling_mode_")
        }
        switches = {"mean_sqrt_len_tokens" if key == "mean_sqrt_len" else key: on for key, on in switches.items()}
        given = [key for key in sorted(switches, key=_place) if switches[key]]
    poolings = (given,) if isinstance(given, str) else tuple(given)
    if unknown := [name for name in poolings if name not in POOLINGS]:
        raise EncoderError(f"{where}: pooling by {', '.join(unknown)} is not served here")
    dense = tuple(path for path, kind in zip(paths, kinds, strict=True) if kind == "Dense")
    return SentenceModules(poolings, dense, "Normalize" in kinds)


def _place(pooling: str) -> int:
    return POOLINGS.index(pooling) if pooling in POOLINGS else len(POOLINGS)


def dense_layer(folder: Path) -> Dense:
    """A Dense layer of sentence-transformers. Raises EncoderError."""
    stated, weights = read_json(folder, "config.json"), folder / "model.safetensors"
    if not stated or not weights.is_file():
        raise EncoderError(f"{folder}: a Dense layer needs config.json and model.safetensors")
    named = stated.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = _ACTIVATIONS.get(named.rpartition(".")[2]) if named.startswith("torch.nn.") else None
    others = sorted(
        key
        for key in ("module_input_name", "module_output_name")
        if stated.get(key, "sentence_embedding") not in (None, "sentence_embedding")
    )
    if activation is None or others:
        raise EncoderError(
            f"{folder}: a Dense layer with {named}{''.join(f', {key}' for key in others)} is not served here"
        )
    layer = Dense(stated, activation())
    try:
        layer.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise EncoderError(f"{weights} does not fit its config.json: {error}") from None
    return layer


_ACTIVATIONS = {kind.__name__: kind for kind in (nn.GELU, nn.Identity, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Tanh)}


def _processor(stated: dict[str, Any], model_type: str) -> str:
    """ViTImageProcessorFast, ViTImageProcessorPil, ViTFeatureExtractor … → ViT; where none is named, the model's."""
    from transformers.models.auto.image_processing_auto import (  # type: ignore[attr-defined]
        IMAGE_PROCESSOR_MAPPING_NAMES,
    )

    of_model = IMAGE_PROCESSOR_MAPPING_NAMES.get(re.sub("_vision_model|_with_registers", "", model_type))
    name: str = stated.get("image_processor_type") or stated.get("feature_extractor_type") or ""
    name = name or (of_model or {"pil": model_type})["pil"]
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    return name


def _sides(size: Any) -> dict[str, int]:
    """The sides that a processor's size names."""
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _three(value: float | Sequence[float]) -> list[float]:
    return [value] * 3 if isinstance(value, int | float) else list(value)
