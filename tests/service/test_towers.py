import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.contract.bundle import (
    EARLIER_ROWS,
    MANIFEST,
    ROWS,
    Bundle,
    BundleError,
    Manifest,
    Modality,
    read_bundle,
    sha256_file,
)
from service.contract.patches import LogMelPatches
from service.contract.sounds import Sound, shares_of
from service.engine.handling import handling
from service.engine.towers import Arrays, Tower, TowerError, open_towers
from service.settings import Settings
from tests import tiny_bundle


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return read_bundle(bundle_dir)


def changed(bundle: Bundle, folder: Path, graphs: dict[Modality, Path], files: dict[str, Path] | None = None) -> Bundle:
    """A copy with other graphs and further files, and a manifest to which all that is right."""
    shutil.copytree(bundle.path, folder)
    whole = bundle.manifest.model_dump(mode="json")
    for modality, path in graphs.items():
        shutil.copyfile(path, folder / f"{modality}.onnx")
        whole["towers"][modality]["sha256"] = sha256_file(path)
    for name, path in (files or {}).items():
        shutil.copyfile(path, folder / name)
        whole["files"][name] = sha256_file(path)
    manifest = Manifest.model_validate(whole)
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle(folder, manifest)


TOKENS = {"input_ids": np.array([[2, 3]]), "attention_mask": np.array([[1, 1]])}


@pytest.fixture
def outside(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle whose text tower keeps its weights in a file beside the graph."""
    made = tmp_path / "made"
    made.mkdir()
    model = onnx.load(bundle.tower_path("text"))
    options = {"save_as_external_data": True, "location": "text.data", "size_threshold": 512}
    onnx.save(model, made / "text.onnx", **options)
    return changed(bundle, tmp_path / "outside", {"text": made / "text.onnx"}, {"text.data": made / "text.data"})


def test_weights_beside_the_graph_are_read(bundle: Bundle, outside: Bundle) -> None:
    assert (outside.path / "text.data").stat().st_size > 500
    vectors = [Tower(read_bundle(each.path), "text", "cpu", 1).run(TOKENS) for each in (bundle, outside)]
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize("name", ["text.onnx", "text.data", "tokenizer.json"])
@pytest.mark.parametrize("hashed", [True, False])
def test_what_is_swapped_after_a_bundle_was_read_is_not_opened(name: str, hashed: bool, outside: Bundle) -> None:
    read = read_bundle(outside.path, hashed=hashed)
    file = outside.path / name
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    def opened() -> None:
        Tower(read, "text", "cpu", 1)
        handling(read, "text", Settings())

    with pytest.raises(BundleError, match=f"{file} is damaged"):
        opened()


@pytest.mark.parametrize("name", ["text.onnx", "text.data"])
def test_what_was_checked_is_what_is_opened(
    name: str, bundle: Bundle, outside: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_bundle.build(tmp_path / "other", seed=1)
    opened = onnxruntime.InferenceSession

    def swapped(*given: Any, **named: Any) -> Any:
        """Between the check and the opening: every file of the bundle becomes another, in its place and by a rename."""
        (outside.path / "text.onnx").write_bytes(other.tower_path("text").read_bytes())
        (outside.path / "text.data").write_bytes(bytes((outside.path / "text.data").stat().st_size))
        os.replace(shutil.copy(other.tower_path("text"), tmp_path / "new"), outside.path / name)
        return opened(*given, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", swapped)
    served = Tower(read_bundle(outside.path), "text", "cpu", 1)
    monkeypatch.undo()
    np.testing.assert_array_equal(served.run(TOKENS), Tower(bundle, "text", "cpu", 1).run(TOKENS))


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
    model = onnx.load(bundle.tower_path("audio"))
    for values in (model.graph.input, model.graph.initializer, model.graph.output):
        for value in [each for each in values if each.name in (EARLIER_ROWS, ROWS)]:
            values.remove(value)
    concat = next(node for node in model.graph.node if EARLIER_ROWS in node.input)
    concat.input.remove(EARLIER_ROWS)
    onnx.save(model, tmp_path / "audio.onnx")
    older = changed(bundle, tmp_path / "copy", {"audio": tmp_path / "audio.onnx"})
    rows = np.random.default_rng(0).random((40, 1, 96, 64), np.float32)
    arrays = {"patches": rows, "weights": np.full((1, 40), 1 / 40, np.float32)}
    old, new = (Tower(each, "audio", "cpu", 1, call_seconds=1.0) for each in (older, bundle))
    np.testing.assert_allclose(old.run(arrays), new.run(arrays), rtol=1e-5, atol=1e-6)


def test_a_graph_that_takes_other_inputs_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    texts = changed(bundle, tmp_path / "copy", {"image": bundle.tower_path("text")})
    with pytest.raises(TowerError, match="the image tower takes"):
        Tower(texts, "image", "cpu", 1)


def test_a_file_that_is_no_graph_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"\x08\x09")  # a model of a version, and without a graph
    with pytest.raises(TowerError, match=r"image\.onnx cannot be opened"):
        Tower(changed(bundle, tmp_path / "one", {"image": tmp_path / "empty"}), "image", "cpu", 1)
    (tmp_path / "text").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"image\.onnx is not an ONNX graph"):
        Tower(changed(bundle, tmp_path / "two", {"image": tmp_path / "text"}), "image", "cpu", 1)
