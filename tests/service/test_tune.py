"""The command `tune` with the real runtimes, the profile that it leaves, and the server that uses it."""

import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.commands import tune
from service.contract.bundle import Bundle, read_bundle
from service.engine import openvino, profile
from service.engine.batcher import Budget
from service.engine.handling import handling
from service.engine.inputs import Text
from service.engine.opening import open_engine
from service.engine.profile import Choice, Profile
from service.engine.providers import CPU, CUDA
from service.engine.towers import Tower, TowerError
from service.settings import Settings, SettingsError
from tests.conftest import serving

ROOT = Path(__file__).parents[2]
WORDS = [f"{a} {b} {c}" for a in ("red", "green", "blue") for b in ("dog", "cat", "photo") for c in ("barks", "sound")]
OTHER = {"runtime": "onnxruntime", "precision": "fp32", "threads": 1, "lanes": 1, "batch": 1}
needs_openvino = pytest.mark.skipif(openvino.installed() is None, reason="OpenVINO is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(WORDS))
    return file


def chosen(bundle: Bundle, **towers: Choice) -> Path:
    return profile.write(bundle, Profile(profile.machine(bundle), towers, {}))


def test_pictures_are_tried_in_calls_of_one_to_sixteen_each_once(bundle_dir: Path) -> None:
    best = tune._Tried("image", Choice("onnxruntime", "fp32", 1, 1, 2))
    shapes = [choice for choice, _ in tune._shapes(read_bundle(bundle_dir), best, Budget(2))]
    assert len(set(shapes)) == len(shapes) and {choice.batch for choice in shapes} == {1, 2, 4, 8, 16}


@needs_openvino
def test_what_it_measures_is_kept_and_says_what_was_tried(
    bundle_dir: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.run(str(bundle_dir), texts=texts, seconds=0.001, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert json.loads(Path(said["profile"]).read_bytes())["towers"] == said["towers"]
    assert set(said["towers"]) == {"image", "audio", "text"}
    tried = [(each["modality"], each["runtime"]) for each in said["measured"]["tried"]]
    assert {("text", "openvino"), ("image", "openvino")} <= set(tried) and ("audio", "openvino") not in tried
    assert all(each["cosine"] > 0.999 for each in said["measured"]["tried"])
    precisions = {each["precision"] for each in said["measured"]["tried"] if each["modality"] == "image"}
    assert precisions == {"fp32"}  # no picture was given to try others on


def test_without_the_extra_onnx_runtime_is_tried_alone(
    bundle_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "installed", lambda: None)
    assert tune.run(str(bundle_dir), seconds=0.001, as_json=True) == 0
    assert {each["runtime"] for each in json.loads(capsys.readouterr().out)["towers"].values()} == {"onnxruntime"}


def test_pairs_measure_r1_and_name_what_cannot_be_read(bundle_dir: Path, tmp_path: Path, png: Any) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for name in ("red", "green", "blue"):
        (media / f"{name}.png").write_bytes(png(name))
    file = tmp_path / "pairs.tsv"
    file.write_text("red.png\tred\ngreen.png\tgreen\nblue.png\tblue\n")
    bundle, settings = read_bundle(bundle_dir), Settings()
    ways = {name: handling(bundle, name, settings) for name in bundle.manifest.towers}
    given = tune._read(bundle, ways, media, file)
    assert set(given) == {"image", "text"}
    assert given["text"].partners is not None and given["text"].partners.shape == (3, 16)
    (media / "green.png").write_bytes(b"no picture")
    with pytest.raises(SettingsError, match="the image of pair 1"):
        tune._read(bundle, ways, media, file)


@pytest.mark.parametrize("wrong", [{"texts": Path("absent.txt")}, {"media": Path("absent")}])
def test_inputs_that_are_not_there_are_named(bundle_dir: Path, wrong: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="absent"):
        tune.run(str(bundle_dir), **wrong)


def test_an_interruption_writes_nothing(bundle_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_measure", interrupted)
    assert tune.run(str(bundle_dir)) == 130
    assert not cache.exists()


@needs_openvino
def test_a_server_uses_a_profile_and_says_so(bundle_dir: Path, tmp_path: Path) -> None:
    bundle = read_bundle(bundle_dir)
    with serving(Settings(bundle=bundle_dir, store=tmp_path / "store")) as client:
        before = client.post("/embed", json={"inputs": ["red dog"]}).json()["embeddings"][0]["embedding"]
    chosen(bundle, text=Choice("openvino", "fp32", threads=1, lanes=3, batch=64))
    with serving(Settings(bundle=bundle_dir, store=tmp_path / "store")) as client:
        towers = client.get("/models").json()["models"][0]["towers"]
        after = client.post("/embed", json={"inputs": ["red dog"]}).json()["embeddings"][0]["embedding"]
    assert [towers["text"][key] for key in ("provider", "precision", "lanes", "tuned")] == ["OpenVINO", "fp32", 3, True]
    assert towers["image"]["tuned"] is False
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"machine": {"processor": "another", "cores": 1}}, "it has another .*cores.*processor"),
        ({"towers": {"text": OTHER | {"runtime": "abacus"}}}, "abacus"),
        ({"towers": {"text": OTHER | {"threads": 0}}}, "no choice"),
        ({"towers": {"text": OTHER | {"lanes": 10**6}}}, "no choice"),
        ({"towers": {"text": OTHER | {"precision": "bf16"}}}, "no choice"),
        ({"towers": {"text": OTHER | {"precision": "fp16"}}}, "does not come in fp16"),
        ({"towers": {"smell": OTHER}}, "smell"),
        ({"towers": 7}, "cannot be read"),
    ],
)
def test_a_profile_that_does_not_fit_is_not_used(
    bundle_dir: Path, change: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = read_bundle(bundle_dir)
    path = chosen(bundle, text=Choice("onnxruntime", "fp32", threads=2, lanes=1, batch=64))
    assert profile.fitting(bundle, Settings())["text"].threads == 2
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    assert profile.fitting(bundle, Settings()) == {}
    assert re.search(why, caplog.text)


@pytest.mark.parametrize("given", [{"threads": 1}, {"precision": "fp32"}])
def test_settings_go_before_a_profile(
    bundle_dir: Path, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = read_bundle(bundle_dir)
    chosen(bundle, text=Choice("onnxruntime", "fp32", threads=2, lanes=1, batch=64))
    with caplog.at_level(logging.INFO):
        assert open_engine(Settings(**given), bundle).towers["text"].choice is None
    assert "is not used" in caplog.text


def test_a_profile_of_the_cpu_keeps_no_tower_from_a_gpu(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = read_bundle(bundle_dir)
    chosen(bundle, text=Choice("onnxruntime", "fp32", threads=2, lanes=1, batch=64))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, CPU])
    with caplog.at_level(logging.INFO):
        assert profile.fitting(bundle, Settings()) == {}
    assert "ISTHMUS_DEVICE=cpu" in caplog.text
    assert profile.fitting(bundle, Settings(device="cpu"))["text"].threads == 2


@needs_openvino
def test_threads_share_a_session_of_openvino(bundle_dir: Path) -> None:
    bundle = read_bundle(bundle_dir)
    how = handling(bundle, "text", Settings())
    tower = Tower(bundle, "text", "cpu", 1, choice=Choice("openvino", "fp32", threads=1, lanes=2, batch=64))
    own = Tower(bundle, "text", "cpu", 1)
    calls = [how.collate([how.prepare(Text(words)).value]) for words in WORDS]
    results: dict[int, Any] = {}

    def work(first: int) -> None:
        for place in range(first, len(calls), 4):
            results[place] = tower.run(calls[place])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, call in enumerate(calls):
        np.testing.assert_allclose(results[place], own.run(call), atol=1e-5)


@needs_openvino
def test_a_graph_that_openvino_cannot_read_is_named(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"nothing")
    with pytest.raises(TowerError, match=r"text\.onnx cannot be opened by OpenVINO"):
        Tower(read_bundle(bundle_dir), "text", "cpu", 1, choice=Choice("openvino", "fp32", 1, 1, 64))


@needs_openvino
@pytest.mark.skipif(not (ROOT / "build/starter/manifest.json").exists(), reason="build/starter is not built")
def test_the_starters_texts_in_bfloat16_pass_the_gate_of_full_precision() -> None:
    if not openvino.has_bf16():
        pytest.skip("this processor has no bfloat16")
    bundle = read_bundle(ROOT / "build/starter")
    how = handling(bundle, "text", Settings())
    inputs = [how.prepare(Text(text)) for text in tune._lines(bundle, None)[0]]
    own, bf16 = (
        tune._vectors(Tower(bundle, "text", "cpu", 1, choice=choice), how, inputs)
        for choice in (None, Choice("openvino", "bf16", 1, 1, 512))
    )
    assert np.sum(own * bf16, axis=1).mean() >= tune.FULL_COSINE
    assert not np.array_equal(own, bf16)
