"""Distillation end to end on a few generated sounds, with a tiny random teacher saved to disk."""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import save_file

from service.contract.audio import decode_audio
from service.contract.vectors import l2_normalise
from service.contract.windows import LogMelWindows, log_mel
from training import distill, graphs
from training.distill import fit, graph, spectra
from training.distill.graph import DistillError
from training.distill.recipe import DistillRecipe, load_distill_recipe
from training.distill.student import Student, stage_loss
from training.distill.teacher import Teacher, weights_hash
from training.distill.views import files_of, listed_files, plain_views
from training.encode.mobilenet_sounds import MobileNetSounds, blocks_of
from training.encoders import weights_sha256
from training.errors import TrainingError
from training.fit import loop
from training.recipe import RecipeError

TRAIN = {
    "steps": 12, "batch_size": 16, "learning_rate": 3e-3, "weight_decay": 0.0, "warmup_steps": 2, "cosine_weight": 1.0,
    "ema": 0.5, "validate_every": 4, "checkpoint_every": 3,
}  # fmt: skip


def settle(teacher: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Give random batch-norm layers the statistics of inputs: without, a deep random network answers with zeros."""
    with torch.no_grad():
        teacher.train()(inputs)
    teacher.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds, their list, and a random teacher."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "sounds").mkdir()
    for index in range(20):
        time = np.arange(20_000) / 16_000
        sound = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 4_000) * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(root / f"sounds/{index // 2}-{index % 2}.wav", sound, 16_000)
    rows = [f"{index // 2}-{index % 2}.wav,{index % 4}" for index in range(20)]
    (root / "sounds.csv").write_text("\n".join(["file,fold", *rows]) + "\n")
    torch.manual_seed(0)
    sound_teacher(root / "teacher")
    return root


def sound_teacher(folder: Path) -> None:
    """A random EfficientAT network of width 0.1 with three classes, as its folder is published."""
    network = MobileNetSounds.of_width(0.1, 3)
    settle(network, torch.randn(16, 1, 128, 50))
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    (folder / "labels.csv").write_text('index,mid,display_name\n0,/m/0,Speech\n1,/m/1,Dog\n2,/m/2,"Rain, drops"\n')
    (folder / "config.json").write_text(json.dumps({"arch": "EfficientAT MobileNetV3 width 0.1 (tiny)"}))


FRONT_END = {
    "sampling_rate": 32_000, "samples": 32_000, "frames": 100, "window_length": 800, "hop_length": 320,
    "fft_length": 1024, "window": "hann_symmetric", "preemphasis": 0.97, "preemphasis_of": "sound", "n_mels": 128,
    "f_max": 15_000, "mel_scale": "kaldi", "mel_norm": "none", "logarithm": "ln", "floor": 1e-5, "floor_by": "sum",
    "dynamic_range": None, "mean": -4.5, "std": 5.0, "short": "repeat", "lengths": False,
}  # fmt: skip


def tiny(root: Path, **train: Any) -> dict[str, Any]:
    clips = {"files": "sounds.csv", "folder": "sounds", "where": {"fold": [0, 1, 2]}, "group": r"^(\d+)-"}
    return {
        "name": "tiny",
        "modality": "audio",
        "licence": "none",
        "trained_on": ["generated sounds"],
        "data": {
            "root": str(root),
            "train": [{**clips, "hold_out": 0.3}],
            "validation": [{**clips, "hold_out": 0.3}],
        },
        "teacher": {"folder": "teacher"},
        "student": {
            "preprocessing": FRONT_END,
            "exported": {"samples": 64_000, "frames": 200},
            "width": 0.1,
            "ends": [1, 3],
        },
        "train": TRAIN | train,
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of cached views for every test; checkpoints are told apart by the recipe's name."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module", autouse=True)
def _teachers_graph_made_once() -> Iterator[None]:
    """Export a teacher once: it takes 3 seconds, and most tests have the same."""
    graphs_made: dict[tuple[str, Any], bytes] = {}

    def made_once(model: torch.nn.Module, example: torch.Tensor, *names: Any) -> bytes:
        key = weights_sha256(model), example.shape
        if key not in graphs_made:
            graphs_made[key] = graphs.onnx_bytes(model, example, *names)
        return graphs_made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.distill.teacher.onnx_bytes", made_once)
        yield


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(folder: Path, recipe: dict[str, Any], work: Path, *overrides: str) -> dict[str, Any]:
    path = written(folder, recipe)
    return distill.main(argparse.Namespace(recipe=path, out=folder / "out", work=work, overrides=list(overrides)))


def finished(recipe: DistillRecipe, work: Path) -> tuple[loop.Run, Student]:
    """A finished run and its student, from the checkpoint."""
    files, validation = files_of(recipe)
    teacher, stored = Teacher(recipe), spectra.cached_spectra(files, recipe.preprocessing(), work)
    state = fit.new_run(recipe, teacher, stored, work)
    teacher_hash = weights_hash(recipe.data.root / recipe.teacher.folder)
    fit.train(recipe, state, stored, teacher, plain_views(recipe, validation, teacher.pooled, teacher_hash, work))
    assert isinstance(state.model, Student)
    return state, state.model


def onnx_features(folder: Path, rows: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "out/encoder.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["patches"]
    assert [value.name for value in session.get_outputs()] == ["features"]
    return np.asarray(session.run(None, {"patches": rows})[0])


@pytest.mark.full
def test_a_student_learns_stage_by_stage_and_its_graph_has_the_teachers_maps_and_scores(
    data: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_hash(data / "teacher")
    result = run(tmp_path, tiny(data, steps=40), work)
    assert result["steps"] == 40
    assert weights_hash(data / "teacher") == before
    described = json.loads((tmp_path / "out/encoder.json").read_text())
    assert described["labels"] == ["Speech", "Dog", "Rain, drops"]
    spec = LogMelWindows.model_validate(described["preprocessing"])
    assert (spec.samples, spec.frames, spec.sampling_rate) == (64_000, 200, 32_000)
    rows = spec.prepare(decode_audio((data / "sounds/0-0.wav").read_bytes(), spec.sampling_rate)).rows
    features = onnx_features(tmp_path, rows)
    network = MobileNetSounds.of_width(0.1, 3)
    channels = [block.outside for block in (blocks_of(0.1)[0], blocks_of(0.1)[2])]
    assert features.shape == (len(rows), sum(channels) + network.width + 3) == (len(rows), described["features"])
    assert np.isfinite(features).all() and (features[:, -3:] >= 0).all() and (features[:, -3:] <= 1).all()
    recipe = load_distill_recipe(tmp_path / "recipe.yaml", [])
    teacher = Teacher(recipe)
    short = rows[:, :, : recipe.preprocessing().frames]  # what it was trained on
    maps = [map_.numpy() for map_ in teacher(short)[:-1]]
    np.testing.assert_allclose(
        teacher.pooled(short), np.concatenate([map_.mean((2, 3)) for map_ in maps], 1), atol=1e-5
    )
    state, student = finished(recipe, work)
    assert state.step == 40  # as the checkpoint left it: nothing is trained again
    stored = spectra.cached_spectra(files_of(recipe)[0], recipe.preprocessing(), work)
    fresh, last = (fit.new_run(recipe, teacher, stored, work).model for _ in range(2))
    last.load_state_dict(torch.load(state.path, weights_only=True)["model"])
    batch = spectra.batch(stored, recipe, 0)
    errors = [
        stage_loss(model.train(), batch, teacher(batch.numpy()), True).item()  # type: ignore[arg-type]
        for model in (fresh, last)
    ]
    assert errors[1] < 0.8 * errors[0]
    with torch.inference_mode():
        expected = student(torch.from_numpy(rows)).numpy()
        assert ((l2_normalise(features) * l2_normalise(expected)).sum(1) > 0.9999).all()  # weights are kept in float16
        # Of its teacher's maps a stage makes what it makes alone.
        taught = [student.standard(index, torch.from_numpy(map_)) for index, map_ in enumerate(maps)]
        apart = student.maps(torch.from_numpy(short), taught)
        assert torch.equal(apart[1], student.stages[1](taught[0]))

    program = (tmp_path / "out/encoder.onnx").read_bytes()
    # The same student, for shorter stretches: nothing is learned anew.
    shorter = run(tmp_path, tiny(data, steps=40), work, "student.exported={}")
    assert shorter["steps"] == 40 and shorter["validation"] == result["validation"]
    assert json.loads((tmp_path / "out/encoder.json").read_text())["preprocessing"]["frames"] == 100
    # A graph that is not the student's is not written.
    validation = plain_views(recipe, files_of(recipe)[1], teacher.pooled, before, work)
    monkeypatch.setattr(graph, "onnx_bytes", lambda *_: program)
    with torch.inference_mode():
        for parameter in student.parameters():
            parameter += 0.01
    with pytest.raises(DistillError, match="differ from torch"):
        graph.export(recipe, student, validation, tmp_path / "refused", before, teacher.labels)
    assert not (tmp_path / "refused").exists()


@pytest.mark.full
def test_a_sound_student_goes_on_as_another_recipes_best(data: Path, work: Path, tmp_path: Path) -> None:
    first = written(tmp_path, tiny(data) | {"name": "first"})
    first.rename(tmp_path / "first.yaml")
    second = tiny(data, start="first.yaml") | {"name": "second"}
    with pytest.raises(DistillError, match=r"first has 0 of its 12 steps: run it first"):
        run(tmp_path, second, work)
    run(tmp_path, tiny(data) | {"name": "first"}, work)
    loaded = load_distill_recipe(written(tmp_path, second), [])
    stored = spectra.cached_spectra(files_of(loaded)[0], loaded.preprocessing(), work)
    state = fit.new_run(loaded, Teacher(loaded), stored, work)
    earlier = load_distill_recipe(tmp_path / "first.yaml", [])
    best = torch.load(fit.checkpoint_path(earlier, work), weights_only=True)["best"]
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name


def test_mixtures_are_a_function_of_the_step_and_differ_between_steps(data: Path, work: Path, tmp_path: Path) -> None:
    recipe = load_distill_recipe(written(tmp_path, tiny(data)), [])
    files = files_of(recipe)[0]
    stored = spectra.cached_spectra(files, recipe.preprocessing(), work)
    assert len(stored) == len(files)
    one, again, other = (spectra.batch(stored, recipe, step) for step in (3, 3, 4))
    assert one.shape == (min(16, len(files)), 1, 100, 128) and torch.isfinite(one).all()
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_plain_clip_is_what_the_contract_hears(data: Path, work: Path, tmp_path: Path) -> None:
    """The stream gives, of a clip as long as the window that is not changed, the front end's own row."""
    recipe = load_distill_recipe(written(tmp_path, tiny(data)), [])
    spec = recipe.preprocessing()
    sound = tmp_path / "second.wav"
    soundfile.write(sound, np.random.default_rng(0).uniform(-0.3, 0.3, 31_900), 32_000)
    stored = spectra.cached_spectra([sound], spec, tmp_path / "cache")
    plain = np.ones(1, bool)
    power = spectra._powers(stored, np.zeros(1, np.int64), plain, spec, np.random.default_rng(0))
    heard = (torch.log(power + spec.floor) - spec.mean) / spec.std
    whole = log_mel(decode_audio(sound.read_bytes(), 32_000), spec)
    np.testing.assert_allclose(heard[0, : len(whole)], (whole + 4.5) / 5.0, atol=2e-3)  # kept as float16


def test_what_is_an_octave_lower_is_copied_up(data: Path) -> None:
    spec = LogMelWindows.model_validate(FRONT_END)
    hertz = spectra._centres(spec)
    tone = torch.zeros(1, spec.n_mels)
    tone[0, int(np.abs(hertz - 5_000).argmin())] = 1.0
    copied = tone @ spectra._octave_up(spec)
    assert abs(hertz[int(copied.argmax())] - 10_000) < 400
    low = torch.zeros(1, spec.n_mels)
    low[0, int(np.abs(hertz - 2_000).argmin())] = 1.0
    assert (low @ spectra._octave_up(spec)).sum() == 0  # 4 kHz is there already


def test_other_files_or_another_teacher_are_another_students_checkpoint(data: Path, work: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    recipe = load_distill_recipe(written(tmp_path, tiny(tmp_path / "data")), [])
    paths = [fit.checkpoint_path(recipe, work)]
    listed = tmp_path / "data/sounds.csv"
    listed.write_text(listed.read_text().replace("0-0.wav,0\n", ""))
    paths.append(fit.checkpoint_path(recipe, work))
    weights = next((recipe.data.root / recipe.teacher.folder).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    paths.append(fit.checkpoint_path(recipe, work))
    assert len(set(paths)) == 3


def test_a_student_that_diverges_is_an_error(data: Path, work: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"training diverged: .* is not finite at step"):
        run(tmp_path, tiny(data, learning_rate=1e30) | {"name": "diverges"}, work)


def test_a_run_that_dies_goes_on_to_the_same_weights(
    data: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, tiny(data) | {"name": "run"}, work)
    recipe = load_distill_recipe(tmp_path / "recipe.yaml", [])
    path = fit.checkpoint_path(recipe, work)
    whole = torch.load(path, weights_only=True)
    path.unlink()
    steps, follow = iter(range(12)), loop.follow

    def dying(*arguments: Any) -> None:
        if next(steps) == 7:
            raise KeyboardInterrupt
        follow(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "follow", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tiny(data) | {"name": "run"}, work)
    assert torch.load(path, weights_only=True)["step"] == 6  # one trained step is lost, and trained again
    monkeypatch.setattr(distill, "export", lambda *_: None)  # done above, and slow
    run(tmp_path, tiny(data) | {"name": "run"}, work)
    resumed = torch.load(path, weights_only=True)
    assert (resumed["step"], resumed["best_step"]) == (whole["step"], whole["best_step"]) == (12, whole["best_step"])
    for part in ("model", "averaged", "best"):
        assert all(torch.equal(tensor, resumed[part][name]) for name, tensor in whole[part].items()), part


def test_a_validation_row_is_what_the_contract_prepares(data: Path, work: Path, tmp_path: Path) -> None:
    recipe = load_distill_recipe(written(tmp_path, tiny(data)), [])
    spec, files = recipe.preprocessing(), files_of(recipe)[1]
    teacher = Teacher(recipe)
    views = plain_views(recipe, files, teacher.pooled, "hash", work)
    plain = spec.prepare(decode_audio(files[1].read_bytes(), 32_000)).rows
    np.testing.assert_array_equal(views.inputs[1], plain[0, 0].astype(np.float16))
    expected = teacher.pooled(views.inputs[1][None, None].astype(np.float32))
    np.testing.assert_allclose(views.features[1], expected[0], rtol=2e-3, atol=1e-3)


def test_held_out_groups_are_never_trained_on(data: Path) -> None:
    source = {"files": "sounds.csv", "folder": "sounds", "group": r"^(\d+)-", "hold_out": 0.4}
    kept, held = (listed_files(data, [source], held_out=value) for value in (False, True))
    assert len(kept) + len(held) == 20
    assert not {path.name.split("-")[0] for path in kept} & {path.name.split("-")[0] for path in held}


def test_training_on_a_validation_file_is_refused(data: Path, work: Path, tmp_path: Path) -> None:
    recipe = tiny(data)
    recipe["data"]["train"][0].pop("hold_out")
    recipe["data"]["validation"] = recipe["data"]["train"]
    with pytest.raises(RecipeError, match="is trained on"):
        run(tmp_path, recipe, work)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps"),
        ("train.stepps=3", "train.stepps"),
        ("train.restarts=[{at: 12}]", "train.restarts"),
        ("modality=image", "modality: image is gone, because EfficientNet-Lite"),
        ("student.exported={frames: 0}", "student.preprocessing.frames"),
        ("student.preprocessing.frames=0", "student.preprocessing.frames"),
        ("student.width=0", "student.width"),
    ],
)
def test_a_bad_recipe_names_the_key(data: Path, work: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, tiny(data), work, override)


@pytest.mark.parametrize("name", ["audio", "audio-free"])
def test_the_committed_recipes_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / f"training/recipes/distill-{name}.yaml"
    assert load_distill_recipe(path, []).name.startswith("isthmus-starter")


@pytest.mark.parametrize("place", ["audio", "free/audio"])
def test_the_committed_students_answer(place: str) -> None:
    folder, name, shape = Path(__file__).parents[2] / "starter" / place, "patches", (1, 500, 128)
    described = json.loads((folder / "encoder.json").read_text())
    session = onnxruntime.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
    inputs = np.random.default_rng(0).uniform(-1, 1, (3, *shape)).astype(np.float32)
    together = session.run(["features"], {name: inputs})[0]
    assert together.shape == (3, described["features"])
    np.testing.assert_allclose(session.run(["features"], {name: inputs[:1]})[0], together[:1], atol=1e-3)


def test_weights_in_half_the_room_are_whole_again_where_they_are_joined(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).eval()
    program = graphs.onnx_bytes(layer, torch.zeros(2, 64), "x", "y")
    half = graphs.half_stored(program)
    assert len(half) < 0.7 * len(program)
    whole = graphs.whole_weights(onnx.load_from_string(half))
    onnx.checker.check_model(whole)
    assert not any(node.op_type == "Cast" for node in whole.graph.node)
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}
    answers = [graphs.session(each).run(None, inputs)[0] for each in (program, half, whole.SerializeToString())]
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-3)
    np.testing.assert_allclose(answers[2], answers[1], atol=1e-6)


def test_a_table_in_half_the_room_is_cast_row_by_row() -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(300, 16).eval()
    program = graphs.to_onnx(table, [np.zeros((2, 3), np.int64)], ["ids"], ["rows"], [{0: torch.export.Dim("batch")}])
    half = onnx.load_from_string(graphs.half_stored(program.SerializeToString()))
    onnx.checker.check_model(half)
    assert [node.op_type for node in half.graph.node] == ["Gather", "Cast"], "the table itself is never whole"
    ids = {"ids": np.array([[0, 299, 7]])}
    rows = graphs.session(half.SerializeToString()).run(None, ids)[0]
    weights = table.weight.detach().numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(rows, weights[ids["ids"]])
