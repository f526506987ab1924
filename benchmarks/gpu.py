"""Measure towers on a GPU, of large shapes with random weights, on CUDA and TensorRT, in fp32 and fp16.

python -m benchmarks.gpu [--rounds 5] [--shapes dinov2_large roberta_large] [--folder build/gpu]      (`make bench-gpu`)

The shapes are those of DINOv2-L (images of 224 × 224) and all-roberta-large-v1 (texts of 64 tokens) with a linear head;
speed does not depend on the weights. For each: items per second, and the provider that was obtained, per batch size;
where there are several GPUs, images on all at once against one. And whether FAISS's GPU index and ONNX Runtime work in
one process.

Without a CUDA device it says "not run: no CUDA device", gives null for every figure, and ends with 0. The last line is
one JSON object.
"""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.commands import finish, parser_of
from service.contract.bundle import OUTPUT
from service.engine.providers import CUDA, TENSORRT, Device, requests
from service.engine.towers import session_options

DIMENSIONS = 512
BATCHES = (1, 8, 32)
SHAPES = ("dinov2_large", "roberta_large")
WAYS: Mapping[str, tuple[Device, str]] = {
    "cuda.fp32": ("cuda", "fp32"),
    "cuda.fp16": ("cuda", "fp16"),
    "tensorrt.fp16": ("tensorrt", "fp16"),
}
NOT_RUN = "not run: no CUDA device"
_TOKENS = 64
_SECONDS = 1.0


def keys() -> list[str]:
    """Return every figure, measured or not."""
    rates = [f"{shape}.{way}.b{batch}" for shape in SHAPES for way in WAYS for batch in BATCHES]
    providers = [f"{shape}.{way}.provider" for shape in SHAPES for way in WAYS]
    return [*rates, *providers, "gpus", "all_gpus_over_one", "faiss_beside"]


def devices() -> int:
    """CUDA devices that ONNX Runtime can use; 0 without its GPU build or a driver."""
    if CUDA not in onnxruntime.get_available_providers():
        return 0
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() or _driver_devices()


def _driver_devices() -> int:
    """Counts the devices as the driver does: the trainer's torch may be one for CPUs."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def build(shape: str, folder: Path) -> dict[str, Path]:
    """The tower's graph in fp32 and fp16, written once."""
    from transformers import Dinov2Config, Dinov2Model, RobertaConfig, RobertaModel

    from service.contract.images import ImagePreprocessing
    from service.contract.tokens import TextPreprocessing
    from training.bundle.export import export_tower
    from training.bundle.quantise import half
    from training.encoders import FrozenEncoder, ImageEncoder, TextEncoder, weights_sha256
    from training.heads.projector import Head
    from training.recipe import ProjectorSpec

    paths = {precision: folder / f"{shape}.{precision}.onnx" for precision in ("fp32", "fp16")}
    if all(path.is_file() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    wrapper: Any
    preprocessing: Any
    if shape == "dinov2_large":
        large = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=224)
        wrapper = ImageEncoder(Dinov2Model(large))
        preprocessing = ImagePreprocessing(height=224, width=224)
    else:
        sizes: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        config = RobertaConfig(
            vocab_size=50265, intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1, **sizes
        )
        wrapper = TextEncoder(RobertaModel(config, add_pooling_layer=False))
        preprocessing = TextPreprocessing(max_length=256, pad_id=1)
    wrapper.eval().requires_grad_(False)
    modality: Any = "image" if shape == "dinov2_large" else "text"
    encoder = FrozenEncoder(modality, shape, 1024, weights_sha256(wrapper), preprocessing, None, module=wrapper)
    head = Head(modality, 1024, ProjectorSpec(kind="linear", dimensions=DIMENSIONS)).eval()
    export_tower(encoder, head, paths["fp32"])
    half(paths["fp32"], paths["fp16"])
    return paths


def feeds(shape: str, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if shape == "dinov2_large":
        return {"pixels": rng.standard_normal((rows, 3, 224, 224), np.float32)}
    ids = rng.integers(5, 50_000, (rows, _TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def opened(path: Path, device: Device, gpu: int = 0) -> onnxruntime.InferenceSession:
    onnxruntime.preload_dlls()
    asked = requests("cuda", device, gpu, engines=path.parent)
    return onnxruntime.InferenceSession(path, session_options(0), providers=asked)


def rate(call: Any, rows: int) -> float:
    """Items per second of calls one after the other."""
    for _ in range(3):
        call()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < _SECONDS:
        call()
        calls += 1
    return calls * rows / (time.perf_counter() - started)


def measure(shapes: list[str], folder: Path, rounds: int, gpus: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"gpus": gpus, "faiss_beside": faiss_beside()}
    available = onnxruntime.get_available_providers()
    for shape in shapes:
        paths = build(shape, folder)
        for way, (device, precision) in WAYS.items():
            if device == "tensorrt" and TENSORRT not in available:
                continue
            session = opened(paths[precision], device)
            figures[f"{shape}.{way}.provider"] = session.get_providers()[0]
            for batch in BATCHES:
                given = feeds(shape, batch)
                turns = [rate(lambda s=session, g=given: s.run([OUTPUT], g), batch) for _ in range(rounds)]
                figures[f"{shape}.{way}.b{batch}"] = round(float(np.median(turns)), 1)
        if shape == "dinov2_large" and gpus > 1:
            figures["all_gpus_over_one"] = round(all_over_one(paths["fp16"], gpus), 2)
    return figures


def all_over_one(path: Path, gpus: int) -> float:
    """Images per second with a session on every GPU, each called from a thread, ÷ with one."""
    sessions = [opened(path, "cuda", gpu) for gpu in range(gpus)]
    given = feeds("dinov2_large", 32)
    one = rate(lambda: sessions[0].run([OUTPUT], given), 32)
    rates = [0.0] * gpus

    def work(index: int) -> None:
        rates[index] = rate(lambda: sessions[index].run([OUTPUT], given), 32)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates) / one


def faiss_beside() -> bool | None:
    """Return whether FAISS finds on the GPU, in this process, what it should; None without FAISS for GPUs."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return None
    vectors = np.random.default_rng(0).standard_normal((1000, DIMENSIONS), np.float32)
    index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(DIMENSIONS))
    index.add(vectors)
    _, nearest = index.search(vectors[:10], 1)
    return bool((nearest[:, 0] == np.arange(10)).all())


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("gpu", __doc__, bundle=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--folder", type=Path, default=Path("build/gpu"), help="where graphs and engines are kept")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = dict.fromkeys(keys())
    gpus = devices()
    if gpus:
        figures |= measure(options.shapes, options.folder, options.rounds, gpus)
        for key, value in figures.items():
            print(f"{key:44}{value if value is not None else 'not run':>24}")
    else:
        print(NOT_RUN)
    print(json.dumps({"run": bool(gpus), "why": None if gpus else NOT_RUN, **figures}))
    return 0


if __name__ == "__main__":
    finish(main)
