import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.contract.bundle import EARLIER_ROWS, ROWS, Bundle, read_bundle
from service.contract.patches import LogMelPatches
from service.contract.sounds import Sound, shares_of
from service.towers import Arrays, Tower, TowerError, open_towers
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seconds=st.floats(0.01, 30.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sound_of_any_length_is_encoded_in_calls_of_a_bounded_size(
    bundle: Bundle, counts: list[int], seconds: float, seed: int
) -> None:
    spec = bundle.manifest.towers["audio"].preprocessing
    assert isinstance(spec, LogMelPatches)
    rng = np.random.default_rng(seed)
    sounds = [
        Sound(rng.random((count, 1, 96, 64), np.float32), shares_of([1] * count), np.ones(count, np.int64))
        for count in counts
    ]
    arrays = dict(zip(spec.inputs, spec.collate(sounds), strict=True))
    whole, pieces = (Tower(bundle, "audio", "cpu", 1, call_seconds=each) for each in (1e6, seconds))
    pieces._session = counting = Counting(pieces._session)
    pieces._turns = itertools.cycle([counting])
    np.testing.assert_allclose(pieces.run(arrays), whole.run(arrays), rtol=1e-5, atol=1e-6)
    most = max(1, int(seconds / 0.48))
    assert max(counting.rows) <= most
    assert sum(counting.rows) == sum(counts), "every row is encoded once"


class Counting:
    """A session that says how many rows each of its calls had."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session, self.rows = session, list[int]()

    def run(self, outputs: list[str], arrays: Arrays, options: onnxruntime.RunOptions) -> list[NDArray[np.float32]]:
        self.rows.append(len(arrays["patches"]))
        made: list[NDArray[np.float32]] = self._session.run(outputs, arrays, options)
        return made


def test_a_bundle_of_before_there_were_pieces_is_served_by_one_call(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy")
    model = onnx.load(bundle.tower_path("audio"))
    for values in (model.graph.input, model.graph.initializer, model.graph.output):
        for value in [each for each in values if each.name in (EARLIER_ROWS, ROWS)]:
            values.remove(value)
    concat = next(node for node in model.graph.node if EARLIER_ROWS in node.input)
    concat.input.remove(EARLIER_ROWS)
    onnx.save(model, tmp_path / "copy" / "audio.onnx")
    rows = np.random.default_rng(0).random((40, 1, 96, 64), np.float32)
    arrays = {"patches": rows, "weights": np.full((1, 40), 1 / 40, np.float32)}
    old, new = (
        Tower(Bundle(path, bundle.manifest), "audio", "cpu", 1, call_seconds=1.0)
        for path in (tmp_path / "copy", bundle.path)
    )
    np.testing.assert_allclose(old.run(arrays), new.run(arrays), rtol=1e-5, atol=1e-6)


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
