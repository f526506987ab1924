from pathlib import Path
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest

from service.contract.bundle import Bundle, Tower, Variant, read_bundle
from service.engine import towers
from service.engine.providers import (
    CPU,
    CUDA,
    TENSORRT,
    TowerError,
    accelerators,
    chosen,
    requests,
    satisfied,
)
from service.settings import Gpus
from tests.service.fakes import fake_manifest

ON_A_GPU = (TENSORRT, CUDA, CPU)


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("auto", (CPU,), ("cpu",)),
        ("auto", ON_A_GPU, ("cuda", "cpu")),
        ("cpu", ON_A_GPU, ("cpu",)),
        ("cuda", ON_A_GPU, ("cuda",)),
        ("tensorrt", ON_A_GPU, ("cuda",)),
    ],
)
def test_what_is_tried(device: str, available: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert accelerators(device, available) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "available"), [("cuda", (CPU,)), ("tensorrt", (CPU,)), ("tensorrt", (CUDA, CPU))])
def test_a_device_that_onnx_runtime_was_not_built_for(device: str, available: tuple[str, ...]) -> None:
    with pytest.raises(TowerError, match=f"ISTHMUS_DEVICE is '{device}', but this ONNX Runtime has no"):
        accelerators(device, available)  # type: ignore[arg-type]


def test_what_is_asked_for() -> None:
    assert requests("cpu", "auto") == [(CPU, {})]
    names = [name for name, _ in requests("cuda", "cuda", 1)]
    assert names == [CUDA, CPU]
    assert requests("cuda", "auto", 1)[0][1]["device_id"] == "1"
    (first, options), (second, cuda), _ = requests("cuda", "tensorrt", 2, engines=Path("/engines"))
    assert (first, second) == (TENSORRT, CUDA)
    assert options["device_id"] == cuda["device_id"] == "2"
    assert options["trt_engine_cache_path"] == "/engines"
    assert "trt_engine_cache_enable" not in requests("cuda", "tensorrt")[0][1]


def test_what_was_obtained_is_looked_at() -> None:
    assert satisfied("auto", "text", [CPU]) == CPU
    assert satisfied("cuda", "text", [CUDA, CPU]) == CUDA
    with pytest.raises(TowerError, match=f"ISTHMUS_DEVICE is 'cuda', but the text tower got {CPU}"):
        satisfied("cuda", "text", [CPU])
    with pytest.raises(TowerError, match=f"ISTHMUS_DEVICE is 'tensorrt', but the image tower got {CUDA}"):
        satisfied("tensorrt", "image", [CUDA, CPU])


def described() -> Tower:
    variant = Variant(file="text.int8.onnx", sha256="0" * 64)
    changes = {"variants": {"int8": variant}, "defaults": {"cpu": "int8"}}
    return fake_manifest().towers["text"].model_copy(update=changes)


def test_the_precision_is_the_devices_default_or_the_one_that_is_named() -> None:
    assert chosen(described(), "text", "cpu", "auto") == "int8"
    assert chosen(described(), "text", "cuda", "auto") == "fp32"
    assert chosen(described(), "text", "cpu", "fp32") == "fp32"
    with pytest.raises(
        TowerError, match=r"ISTHMUS_PRECISION is 'fp16', and the bundle's text tower comes in fp32, int8"
    ):
        chosen(described(), "text", "cuda", "fp16")


class FakeSession:
    """Obtains what it is told to, counts its calls, and answers with its device."""

    obtains = CUDA
    opened: ClassVar[list["FakeSession"]] = []

    def __init__(self, path: Path, options: object, providers: list[tuple[str, dict[str, str]]]) -> None:
        self.path, self.asked, self.calls = path, providers, 0
        self.obtained = [self.obtains, CPU] if providers[0][0] != CPU and self.obtains != CPU else [CPU]
        FakeSession.opened.append(self)

    def get_providers(self) -> list[str]:
        return self.obtained

    def get_inputs(self) -> list[object]:
        return [type("Input", (), {"name": name})() for name in ("input_ids", "attention_mask")]

    def run(self, outputs: list[str], arrays: object, options: object) -> list[np.ndarray]:
        self.calls += 1
        return [np.full((1, 16), int(self.asked[0][1].get("device_id", -1)), np.float32)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """ONNX Runtime as it is on a machine with two GPUs."""
    monkeypatch.setattr(FakeSession, "opened", [])
    monkeypatch.setattr(FakeSession, "obtains", CUDA)
    monkeypatch.setattr(towers.onnxruntime, "get_available_providers", lambda: list(ON_A_GPU))
    monkeypatch.setattr(towers.onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(towers.onnxruntime, "InferenceSession", FakeSession)
    return FakeSession


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return read_bundle(bundle_dir)


def test_calls_go_to_several_gpus_in_turn(bundle: Bundle, gpu: type[FakeSession]) -> None:
    tower = towers.Tower(bundle, "text", "auto", 1, gpus=Gpus((0, 3)))
    assert tower.provider == CUDA
    assert [bool(tower.run({}).any()) for _ in range(5)] == [False, True, False, True, False]
    assert [session.calls for session in gpu.opened] == [3, 2]


def test_where_cuda_does_not_work_the_cpu_does_in_its_own_precision(bundle: Bundle, gpu: type[FakeSession]) -> None:
    gpu.obtains = CPU  # the driver is missing, say: ONNX Runtime falls back without a word
    text = bundle.manifest.towers["text"]
    variant = Variant(file=text.file, sha256=text.sha256)
    changed = text.model_copy(
        update={"variants": {"int8": variant, "fp16": variant}, "defaults": {"cpu": "int8", "cuda": "fp16"}}
    )
    both = Bundle(bundle.path, bundle.manifest.model_copy(update={"towers": {"text": changed}}))
    tower = towers.Tower(both, "text", "auto", 1)
    assert (tower.provider, tower.precision) == (CPU, "int8")
    with pytest.raises(TowerError, match="ISTHMUS_DEVICE is 'cuda', but the text tower got CPU"):
        towers.Tower(both, "text", "cuda", 1)
    gpu.obtains = CUDA
    assert towers.Tower(both, "text", "auto", 1).precision == "fp16"


@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="this ONNX Runtime has no CUDA")
def test_onnx_runtime_and_faiss_share_a_gpu(bundle: Bundle) -> None:
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        pytest.skip("this FAISS has no GPU")
    tower = towers.Tower(bundle, "text", "cuda", 1)
    vectors = tower.run({"input_ids": np.array([[2], [3]]), "attention_mask": np.array([[1], [1]])})
    index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatIP(vectors.shape[1]))
    index.add(vectors)
    _, found = index.search(tower.run({"input_ids": np.array([[3]]), "attention_mask": np.array([[1]])}), 1)
    assert found[0, 0] == 1
