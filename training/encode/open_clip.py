"""CLIP models as open_clip saves them, rewritten as transformers saves its CLIP: the same numbers under other names.

A folder holds open_clip_config.json, open_clip_model.safetensors and a tokenizer.json. Read is the plain CLIP: a vision
transformer with a class token, and a causal text transformer that is read at the end of the text
(open_clip/transformer.py). What differs from it is refused by name.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.errors import TrainingError
from training.files import default_cache

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_COPIED = (*_TOKENIZER, "README.md")
_VERSION = 2
"""The version of what is written: a folder in the cache that an older version wrote is not used."""
_RESAMPLE = {"bicubic": 3, "bilinear": 2}
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The settings that are read, and those of which only the value of the plain CLIP is.
_READ = {
    "model_cfg": ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"),
    "vision_cfg": ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"),
}
_PLAIN: dict[str, dict[str, Any]] = {
    "model_cfg": {"custom_text": False, "multimodal_cfg": None, "init_logit_bias": None},
    "vision_cfg": {"ls_init_value": None, "attentional_pool": False, "pool_type": "tok", "final_ln_after_pool": False},
    "text_cfg": {"ls_init_value": None, "pool_type": "argmax", "no_causal_mask": False, "proj_bias": False},
}


_DEFAULTS: dict[str, dict[str, int]] = {
    "vision_cfg": {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224},
    "text_cfg": {"context_length": 77, "vocab_size": 49_408, "heads": 8, "width": 512, "layers": 12},
}
"""The values that open_clip takes where a config is silent (CLIPVisionCfg and CLIPTextCfg in its model.py)."""


class OpenClipError(TrainingError):
    """A folder of open_clip cannot be read: the message names the setting or the file."""


def is_folder(folder: Path) -> bool:
    """Return whether a folder is open_clip's alone: where transformers' files are there too, they are read."""
    if not (folder / CONFIG).is_file():
        return False
    path = folder / "config.json"
    return not path.is_file() or "model_type" not in json.loads(path.read_text(encoding="utf-8"))


def rewritten(folder: Path) -> Path:
    """A folder in the cache that holds the same model as transformers saves it. Raises OpenClipError."""
    if not (folder / WEIGHTS).is_file():
        raise OpenClipError(f"{folder} holds no {WEIGHTS}: a pickle is not read, since reading it may run anything")
    if not (folder / "tokenizer.json").is_file():
        raise OpenClipError(f"{folder} holds no tokenizer.json")
    digest = hashlib.sha256(str(_VERSION).encode())
    for name in (CONFIG, WEIGHTS, *_COPIED):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    target = default_cache() / f"open_clip-{digest.hexdigest()[:24]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            whole = Path(temporary) / "model"
            _write(folder, whole)
            if not target.is_dir():
                whole.rename(target)
    return target


def _write(folder: Path, target: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model_cfg = described.get("model_cfg", {})
    if absent := [key for key in ("embed_dim", *_DEFAULTS) if key not in model_cfg]:
        raise OpenClipError(f"{folder}: {CONFIG}: model_cfg has no {absent[0]}")
    vision, text = ({**defaults, **model_cfg[key]} for key, defaults in _DEFAULTS.items())
    for name, stated in (("model_cfg", model_cfg), ("vision_cfg", vision), ("text_cfg", text)):
        for key, value in stated.items():
            if key not in _READ[name] and (key not in _PLAIN[name] or value != _PLAIN[name][key]):
                raise OpenClipError(f"{folder}: {CONFIG}: {name}.{key} {value!r}: only the plain CLIP is read here")
    if not isinstance(vision["layers"], int):
        raise OpenClipError(f"{folder}: {CONFIG}: vision_cfg.layers {vision['layers']}: a ResNet is not read here")
    act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    config = CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        text_config={
            **_sizes(text, text["heads"], act),
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "eos_token_id": 2,  # read at the largest id of a text, as open_clip does
            "pad_token_id": 0,
        },
        vision_config={
            **_sizes(vision, vision["width"] // vision["head_width"], act),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
    )
    model = CLIPModel(config)
    try:
        model.load_state_dict(_renamed(load_file(folder / WEIGHTS)), strict=True)
    except (RuntimeError, KeyError) as error:
        raise OpenClipError(f"{folder}: {WEIGHTS} does not fit {CONFIG}: {error}") from None
    target.mkdir()
    model.save_pretrained(target)
    _preprocessor(folder, described.get("preprocess_cfg", {}), vision["image_size"], target)
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _sizes(stated: Mapping[str, Any], heads: int, act: str) -> dict[str, Any]:
    return {
        "hidden_size": stated["width"],
        "num_hidden_layers": stated["layers"],
        "num_attention_heads": heads,
        "intermediate_size": int(stated["width"] * stated.get("mlp_ratio", 4.0)),
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
    }


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Open_clip's tensors by the names of transformers; the three of an attention are one there."""
    left = {name: tensor for name, tensor in tensors.items() if name != "attn_mask"}  # a constant, no weight
    state = {
        "logit_scale": left.pop("logit_scale").reshape(()),
        "text_projection.weight": left.pop("text_projection").T,
        "visual_projection.weight": left.pop("visual.proj").T,
        "text_model.embeddings.token_embedding.weight": left.pop("token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": left.pop("positional_embedding"),
        "vision_model.embeddings.class_embedding": left.pop("visual.class_embedding"),
        "vision_model.embeddings.position_embedding.weight": left.pop("visual.positional_embedding"),
        "vision_model.embeddings.patch_embedding.weight": left.pop("visual.conv1.weight"),
    }
    for kind in ("weight", "bias"):
        state[f"text_model.final_layer_norm.{kind}"] = left.pop(f"ln_final.{kind}")
        state[f"vision_model.pre_layrnorm.{kind}"] = left.pop(f"visual.ln_pre.{kind}")
        state[f"vision_model.post_layernorm.{kind}"] = left.pop(f"visual.ln_post.{kind}")
    for name in [*left]:
        tower, middle, inside = name.partition("transformer.resblocks.")
        if not middle or tower not in ("", "visual."):
            continue
        tensor = left.pop(name)
        layer, _, rest = inside.partition(".")
        prefix = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{layer}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{prefix}self_attn.{part}_proj.{kind}"] = chunk
        else:
            module, _, kind = rest.rpartition(".")
            state[f"{prefix}{_MODULES[module]}.{kind}"] = tensor
    if left:
        raise OpenClipError(f"{WEIGHTS} holds {min(left)}: only the plain CLIP is read here")
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in state.items()}


_MODULES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _preprocessor(folder: Path, stated: Mapping[str, Any], size: Any, target: Path) -> None:
    mode, interpolation = stated.get("resize_mode", "shortest"), stated.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        raise OpenClipError(f"{folder}: {CONFIG}: preprocess_cfg: {mode} resizing by {interpolation} is not read here")
    height, width = size if isinstance(size, list) else (size, size)
    shortest = mode == "shortest"
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": min(height, width)} if shortest else {"height": height, "width": width},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": shortest,
        "resample": _RESAMPLE[interpolation],
        "image_mean": list(stated.get("mean", _MEAN)),
        "image_std": list(stated.get("std", _STD)),
    }
    (target / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
