"""Frozen encoders in int8, for heads that learn from the features that will be served.

What quantisation does to a feature is the same whenever it is computed, so a head that is trained on such features
is used to it, and nothing has to be trained through the rounding (as quantisation-aware training would). The bundle's
tower is then int8 itself, and its space is another than that of the fp32 encoder.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from service.contract.bundle import sha256_file
from training.bundle.export import export_encoder
from training.bundle.precision import calibration_items
from training.bundle.quantise import batches, static
from training.encoders import FrozenEncoder
from training.features import preparer
from training.pairs import read_pairs
from training.recipe import Recipe


def quantised(recipe: Recipe, encoder: FrozenEncoder, cache: Path) -> FrozenEncoder:
    """The encoder as an int8 graph, from the cache if it was made before. Raises QuantiseError, PairError.

    Its identity is that graph's: calibrated on other items, it is another encoder.
    """
    read = {name: read_pairs(recipe, name) for name in recipe.pairs}
    items = calibration_items(read, encoder.modality, recipe.export.calibration)
    digest = hashlib.sha256(f"{encoder.weights_sha256}:{encoder.pooling}:{encoder.unit}:static".encode())
    digest.update(json.dumps(encoder.preprocessing.model_dump(mode="json"), sort_keys=True).encode())
    for item in items:
        digest.update(hashlib.sha256(item.encode() if isinstance(item, str) else item.read_bytes()).digest())
    path = cache / f"int8-{encoder.modality}-{digest.hexdigest()[:24]}.onnx"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            whole, small = encoder.onnx or Path(folder) / f"{encoder.modality}.onnx", Path(folder) / "int8.onnx"
            if encoder.onnx is None:
                export_encoder(encoder, whole)
            prepare = preparer(encoder)
            static(whole, small, batches(whole, encoder.preprocessing, [prepare(item) for item in items]))
            os.replace(small, path)
    return replace(encoder, module=None, onnx=path, weights_sha256=sha256_file(path), precision="int8")
