import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from service.contract.bundle import Bundle, read_bundle
from service.towers import Tower, TowerError, open_towers
from tests import tiny_bundle


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return read_bundle(bundle_dir)


def test_each_tower_gives_unit_vectors_and_says_its_provider(bundle: Bundle) -> None:
    towers = open_towers(bundle, "cpu", 1)
    arrays = {
        "image": {"pixels": np.random.default_rng(0).random((3, 3, 32, 32), np.float32)},
        "audio": {
            "patches": np.random.default_rng(0).random((4, 1, 96, 64), np.float32),
            "weights": np.array([[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]], np.float32),
        },
        "text": {
            "input_ids": np.array([[2, 3], [4, 0], [5, 6]]),
            "attention_mask": np.array([[1, 1], [1, 0], [1, 1]]),
        },
    }
    assert set(towers) == set(arrays)
    for modality, tower in towers.items():
        vectors = tower.run(arrays[modality])
        assert vectors.shape == (3, tiny_bundle.DIMENSIONS)
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert tower.provider == "CPUExecutionProvider"


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_cuda_that_is_asked_for_and_not_obtained_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(TowerError, match="ISTHMUS_DEVICE is 'cuda'"):
        open_towers(bundle, "cuda", 1)


def test_auto_takes_the_cpu_where_there_is_no_cuda(bundle: Bundle) -> None:
    provider = Tower(bundle, "text", "auto", 1).provider
    expected = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    assert provider == "CPUExecutionProvider" or expected


def test_a_graph_that_takes_other_inputs_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy")
    shutil.copyfile(bundle.tower_path("text"), tmp_path / "copy" / "image.onnx")
    with pytest.raises(TowerError, match="the image tower takes"):
        Tower(Bundle(tmp_path / "copy", bundle.manifest), "image", "cpu", 1)


def test_a_file_that_is_no_graph_is_named(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy")
    (tmp_path / "copy" / "image.onnx").write_bytes(b"not a graph")
    with pytest.raises(TowerError, match=r"image\.onnx cannot be opened"):
        Tower(Bundle(tmp_path / "copy", bundle.manifest), "image", "cpu", 1)
