"""Tiny random models of the families that `isthmus import` reads, saved as their own libraries save them.

Their weights are so large that different inputs get different vectors: a tower that lost its way would be noticed.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import nn

from examples import sounds as examples

WIDTH = 24
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {**SMALL, "image_size": 32, "patch_size": 8}
CUT = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def pictures() -> list[bytes]:
    """Five files of odd sizes: patches of colours, some large and some small."""
    rng, files = np.random.default_rng(0), []
    for index, size in enumerate(((97, 61), (45, 133), (64, 64), (210, 150), (50, 38))):
        patches = rng.uniform(0, 255, (2 + index, 3, 3)) * (0.4 if index == 1 else 1)
        files.append(io.BytesIO())
        Image.fromarray(patches.astype(np.uint8)).resize(size, Image.Resampling.NEAREST).save(files[-1], "PNG")
    return [file.getvalue() for file in files]


def sound(name: str, seconds: float) -> bytes:
    """A file of so much of one of the examples' sounds."""
    waveform, file = examples.synthesise(name)[int(0.2 * examples.RATE) :], io.BytesIO()
    soundfile.write(file, waveform[: int(seconds * examples.RATE)], examples.RATE, format="WAV")
    return file.getvalue()


def wide(model: nn.Module, gain: float = 1.6, seed: int = 0) -> nn.Module:
    """Weights by their fan-in, times a gain; embeddings of unit size."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 1, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, gain / fan_in**0.5, generator=generator)
    return model.eval()


def apart(model: Any, gain: float = 5.0) -> Any:
    """Do as `wide`; the text tower, which reads the state of its first token, looks at the others the more."""
    wide(model)
    wide(model.text_model, gain, seed=1)
    return model


def byte_symbols() -> list[str]:
    """The 256 characters that byte-level tokenizers write bytes as, in the order of GPT-2's table."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(others))]


def clip_tokenizer() -> hf.CLIPTokenizer:
    symbols = byte_symbols()
    merges = [("a", "t</w>"), ("t", "h"), ("th", "e</w>"), ("i", "n"), ("c", "at</w>")]
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return hf.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=40)


def clip(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 40, **special}
    config = hf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=WIDTH, logit_scale_init_value=3.2)
    wide(hf.CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hf.CLIPImageProcessorPil(**CUT).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A tiny CLIP\n")


def bert_tokenizer() -> hf.BertTokenizer:
    """Letters, digits, punctuation and a few Chinese signs; everything else is unknown."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    signs = list("一只猫坐在窗台上。张的照片")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{each}" for each in letters), *signs]
    return hf.BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=64)


def roberta_tokenizer() -> hf.RobertaTokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_symbols()]
    return hf.RobertaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=62
    )


def siglip2_tokenizer(**settings: Any) -> hf.Siglip2Tokenizer:
    """Return a tokenizer of lower case, with bytes for what has no piece and without merges."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,!"]
    return hf.Siglip2Tokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], **settings)


def siglip(folder: Path, **settings: Any) -> None:
    """Write a SigLIP 2 of one resolution: texts are padded on the right, and no mask is made."""
    settings = {"padding_side": "right", "model_input_names": ["input_ids"]} | settings
    tokenizer = siglip2_tokenizer(**settings)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 32}
    config = hf.SiglipConfig(text_config=text, vision_config=VIT)
    model: Any = wide(hf.SiglipModel(config))
    model.logit_scale.data.fill_(2.5)
    model.logit_bias.data.fill_(-9.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def siglip_masked(folder: Path) -> None:
    """It does what hf.Siglip2Tokenizer does by itself: padding on the left, and a mask."""
    siglip(folder, padding_side="left", model_input_names=["input_ids", "attention_mask"])


def siglip_1(folder: Path) -> None:
    """Write a SigLIP 1 as it was published: a SentencePiece model, which transformers runs in Python, without case
    and punctuation; no mask is made."""
    siglip(folder)
    (folder / "tokenizer.json").unlink()
    words = ["a", "the", "cat", "dog", "at", "beach", "in", "garden", "temple", "apples", "people", "walk", "over"]
    rng = np.random.default_rng(0)
    signs = "abcdefghijklmnopqrstuvwxyz0123456789一只猫坐在窗台上"
    lines = [" ".join(signs), *(" ".join(rng.choice(words, 6)) for _ in range(500))]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    named = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 24, "model_input_names": ["input_ids"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


CLAP_TEXT = {**SMALL, "max_position_embeddings": 64, "projection_dim": WIDTH, "pad_token_id": 1}
CLAP_AUDIO = {
    "spec_size": 64,
    "num_mel_bins": 16,
    "patch_embeds_hidden_size": 8,
    "depths": [1, 1],
    "window_size": 4,
    "num_attention_heads": [2, 2],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "projection_dim": WIDTH,
}
FUSED = {"spec_size": 256, "num_mel_bins": 64, "patch_size": 16, "patch_stride": [16, 16], "enable_fusion": True}


def clap(folder: Path, fused: bool = False) -> None:
    tokenizer = roberta_tokenizer()
    audio = CLAP_AUDIO | (FUSED if fused else {})
    text = CLAP_TEXT | {"vocab_size": len(tokenizer)}
    config = hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH, logit_scale_init_value=14.0)
    model = apart(hf.ClapModel(config))
    tokenizer.save_pretrained(folder)
    mels = 64 if fused else 16  # transformers fuses no other number
    extractor = hf.ClapFeatureExtractor(
        feature_size=mels, max_length_s=2, truncation="fusion" if fused else "rand_trunc"
    )
    extractor.save_pretrained(folder)
    centre(model, extractor)
    model.save_pretrained(folder)


@torch.inference_mode()
def centre(model: Any, extractor: Any) -> None:
    """Take the mean over some sounds off: what an average over a spectrogram has in common would drown the rest."""
    rng = np.random.default_rng(0)
    time = np.arange(80_000) / 48_000
    waveforms = [np.sin(2 * np.pi * 300 * 2**octave * time) for octave in range(4)] + [rng.normal(0, 0.2, 80_000)]
    inputs = extractor(waveforms, sampling_rate=48_000, return_tensors="pt")
    inputs["is_longer"] = torch.zeros(len(waveforms), 1, dtype=torch.bool)
    heard = model.audio_projection(model.audio_model(**inputs).pooler_output)
    model.audio_projection.linear2.bias.data -= heard.mean(0)


def clap_fused(folder: Path) -> None:
    clap(folder, fused=True)


def align(folder: Path) -> None:
    tokenizer = bert_tokenizer()
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    vision = {
        "image_size": 64,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 5],
        "in_channels": [32, 16],
        "out_channels": [16, WIDTH],
        "depthwise_padding": [],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 4],
        "hidden_dim": WIDTH,
    }
    config = hf.AlignConfig(text_config=text, vision_config=vision, projection_dim=WIDTH, temperature_init_value=0.2)
    model = apart(hf.AlignModel(config))
    wide(model.vision_model, seed=2)  # of few seeds are pictures told apart by so few channels
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hf.EfficientNetImageProcessorPil(
        size={"height": 77, "width": 77},
        crop_size={"height": 64, "width": 64},
        do_center_crop=True,
        resample=2,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    ).save_pretrained(folder)


def chinese_clip(folder: Path) -> None:
    """It has vocab.txt alone, as its authors' folders do, and no tokenizer.json."""
    tokenizer = bert_tokenizer()
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    config = hf.ChineseCLIPConfig(text_config=text, vision_config=VIT, projection_dim=WIDTH, logit_scale_init_value=2.9)
    apart(hf.ChineseCLIPModel(config)).save_pretrained(folder)
    words = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", encoding="utf-8")
    hf.ChineseCLIPImageProcessorPil(**CUT).save_pretrained(folder)


def dual_encoder(folder: Path) -> None:
    tokenizer = bert_tokenizer()
    text = hf.BertConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=64)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(hf.ViTConfig(**VIT), text, projection_dim=WIDTH)
    wide(hf.VisionTextDualEncoderModel(config), gain=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


class OpenBlock(nn.Module):
    """A block of open_clip's transformers, with its names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Any, mask: Any = None) -> Any:
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, need_weights=False, attn_mask=mask)[0]
        inner = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](inner * torch.sigmoid(1.702 * inner))  # quick GELU


class OpenTransformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenBlock(width, heads) for _ in range(layers))

    def forward(self, x: Any, mask: Any = None) -> Any:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenVision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(32))
        self.positional_embedding = nn.Parameter(torch.randn(17, 32))
        self.ln_pre, self.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        self.transformer = OpenTransformer(32, 2, 2)
        self.proj = nn.Parameter(torch.randn(32, WIDTH))

    def forward(self, pixels: Any) -> Any:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The CLIP of open_clip (transformer.py, model.py), as small as it gets."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual, self.transformer = OpenVision(), OpenTransformer(32, 2, 2)
        self.token_embedding = nn.Embedding(vocabulary, 32)
        self.positional_embedding = nn.Parameter(torch.randn(40, 32))
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.randn(32, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(3.1))

    def encode_text(self, ids: Any) -> Any:
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def open_clip(folder: Path) -> OpenClip:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    model: Any = wide(OpenClip(len(tokenizer)), gain=2.5)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
    sizes = {"layers": 2, "width": 32}
    text = {**sizes, "context_length": 40, "vocab_size": len(tokenizer), "heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "head_width": 16}
    described = {
        "model_cfg": {"embed_dim": WIDTH, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.25], "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return model


SAVE: dict[str, Callable[[Path], None]] = {
    "clip": clip,
    "siglip": siglip,
    "siglip masked": siglip_masked,
    "siglip 1": siglip_1,
    "clap": clap,
    "clap fused": clap_fused,
    "align": align,
    "chinese_clip": chinese_clip,
    "dual encoder": dual_encoder,
}


def described(folder: Path, **values: Any) -> None:
    """Change a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
