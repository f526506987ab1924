"""The vectors that transformers itself makes of an aligned model: its processors, its model, its projections."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.audio import decode_audio
from service.contract.bundle import OUTPUT, Modality
from service.contract.images import ImagePreprocessing, decode_image, preprocess_image
from service.contract.tokens import TextPreprocessing
from service.contract.vectors import l2_normalise
from service.contract.windows import LogMelWindows
from training.encoders import FrozenEncoder
from training.features import Item, feeds, item_bytes, preparer
from training.graphs import session
from training.preprocessors import LOCAL, dense_layer, sentence_modules, transformer_folder, transformers_tokenizer
from training.text_encoders import TWO_TOWERS

Floats = NDArray[np.float32]


def served(encoder: FrozenEncoder, graph: Path, items: Sequence[Item]) -> Floats:
    """Vectors (N, d) of a tower's graph over items in one batch, each file decoded whole."""
    spec, prepare = encoder.preprocessing, preparer(encoder)
    if isinstance(spec, ImagePreprocessing):
        prepared: list[Any] = [preprocess_image(decode_image(item_bytes(item)), spec) for item in items]
    else:
        prepared = [prepare(item) for item in items]
    inputs = feeds(spec, prepared)
    return l2_normalise(session(graph).run([OUTPUT], inputs)[0])


def heard_whole(encoder: FrozenEncoder, items: Sequence[Item]) -> list[Item]:
    """Returns the sounds that are no longer than a window: of others transformers draws parts at random."""
    spec = encoder.preprocessing
    if not isinstance(spec, LogMelWindows):
        return list(items)
    return [item for item in items if len(decode_audio(item_bytes(item), spec.sampling_rate)) <= spec.samples]


@torch.inference_mode()
def transformers_vectors(model: Any, folder: Path, encoder: FrozenEncoder, items: Sequence[Item]) -> Floats:
    """Vectors (N, d) of items by a whole model of transformers and the processors of its folder."""
    alone = encoder.modality == "text" and model.config.model_type not in TWO_TOWERS
    return l2_normalise((_sentences if alone else _VECTORS[encoder.modality])(model, folder, encoder, items).numpy())


def _texts(model: Any, folder: Path, encoder: FrozenEncoder, items: Sequence[Item]) -> torch.Tensor:
    spec = encoder.preprocessing
    assert isinstance(spec, TextPreprocessing)
    padding = "max_length" if model.config.model_type == "siglip" else True  # as SigLIP was trained
    inputs = transformers_tokenizer(folder)(
        list(map(str, items)), padding=padding, truncation=True, max_length=spec.max_length, return_tensors="pt"
    )
    vectors: torch.Tensor = model.get_text_features(**inputs).pooler_output
    return vectors


def _sentences(model: Any, folder: Path, encoder: FrozenEncoder, items: Sequence[Item]) -> torch.Tensor:
    """Embed texts by sentence-transformers' model, one at a time, so that nothing is padded and nothing masked."""
    spec = encoder.preprocessing
    assert isinstance(spec, TextPreprocessing)
    tokenizer, modules = transformers_tokenizer(transformer_folder(folder)), sentence_modules(folder, encoder.source)
    layers, vectors = [dense_layer(path) for path in modules.dense], []
    for item in items:
        text = spec.prefixed(str(item), "query")
        inputs = tokenizer(text, truncation=True, max_length=spec.max_length, return_tensors="pt")
        states = model(**inputs).last_hidden_state[0]
        vector = torch.cat([_POOLED[name](states) for name in modules.poolings or ("mean",)])
        for layer in layers:
            vector = layer(vector)
        vectors.append(vector)
    return torch.stack(vectors)


_POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.amax(0),
    "mean": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean": lambda states: torch.arange(1.0, len(states) + 1) @ states / (len(states) * (len(states) + 1) / 2),
}
"""States (L, d) of a text → (d,): the poolings of sentence-transformers."""


def _images(model: Any, folder: Path, encoder: FrozenEncoder, items: Sequence[Item]) -> torch.Tensor:
    from transformers import AutoImageProcessor

    # Its other backend resizes by torchvision, whose pixels differ.
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **LOCAL)
    pictures = [decode_image(item_bytes(item)) for item in items]
    vectors: torch.Tensor = model.get_image_features(**processor(pictures, return_tensors="pt")).pooler_output
    return vectors


def _sounds(model: Any, folder: Path, encoder: FrozenEncoder, items: Sequence[Item]) -> torch.Tensor:
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder, **LOCAL)
    rate = extractor.sampling_rate
    sounds = [decode_audio(item_bytes(item), rate) for item in items]
    inputs = extractor(sounds, sampling_rate=rate, return_tensors="pt")
    # Of sounds that are all short the extractor calls one longer, at random.
    inputs["is_longer"] = torch.zeros(len(sounds), 1, dtype=torch.bool)
    vectors: torch.Tensor = model.get_audio_features(**inputs).pooler_output
    return vectors


_VECTORS: dict[Modality, Callable[[Any, Path, FrozenEncoder, Sequence[Item]], torch.Tensor]] = {
    "text": _texts,
    "image": _images,
    "audio": _sounds,
}
