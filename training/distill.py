"""`python -m training distill RECIPE`: a small student learns a frozen teacher's features, and is exported as ONNX.

Reads top to bottom: files → views with the teacher's features (cached) → training → export. Ctrl-C keeps a
checkpoint, and the same command goes on from it. The folder written holds encoder.onnx and encoder.json, which says
how inputs are prepared; `encoders.<modality>.onnx` of a training recipe loads it.
"""

import argparse
import copy
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from service.contract.audio import AudioPreprocessing
from service.contract.images import ImagePreprocessing
from training.recipe import RecipeError, read_yaml
from training.students import Student, distillation_loss
from training.views import Teacher, Views, audio_views, cached_views, image_views, listed_files

_ONNX_TOLERANCE = 1e-4
_TEACHER_BATCH = 64


class DistillError(RuntimeError):
    """The student cannot be trained or exported; the message says why."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(_Model):
    root: Path = Path(".")
    train: list[dict[str, Any]] = Field(min_length=1)
    """See training.views.listed_files; what `hold_out` holds out is added to the validation files."""
    validation: list[dict[str, Any]] = Field(min_length=1)


class TeacherSpec(_Model):
    folder: Path
    """A transformers model folder, under data.root."""
    preprocessing: ImagePreprocessing | None = None


class ViewSpec(_Model):
    count: int = Field(default=5, gt=0)
    patches: int = Field(default=10, gt=0)
    """Of each view of a sound, evenly spaced."""


class StudentSpec(_Model):
    preprocessing: dict[str, Any]
    stem: list[int]
    widths: list[int]
    depths: list[int]


class TrainSpec(_Model):
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)
    cosine_weight: float = Field(ge=0)
    ema: float = Field(ge=0, lt=1)
    validate_every: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)
    bfloat16: bool = False
    threads: int = Field(default=1, gt=0)


class DistillRecipe(_Model):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    modality: Literal["image", "audio"]
    licence: str
    trained_on: list[str]
    seed: int = 0
    data: DataSpec
    teacher: TeacherSpec
    views: ViewSpec = ViewSpec()
    student: StudentSpec
    train: TrainSpec

    def preprocessing(self) -> ImagePreprocessing | AudioPreprocessing:
        kind = ImagePreprocessing if self.modality == "image" else AudioPreprocessing
        return kind.model_validate(self.student.preprocessing)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML, such as training/recipes/distill-image.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for encoder.onnx and encoder.json")
    parser.add_argument("--work", type=Path, default=Path(".cache/distill"), help="folder for views and checkpoints")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """A whole run. Returns its figures, with `finished: False` when it was interrupted (and can go on)."""
    recipe = load_distill_recipe(args.recipe, args.set)
    torch.set_num_threads(recipe.train.threads)
    teacher_folder = recipe.data.root / recipe.teacher.folder
    weights_before = weights_hash(teacher_folder)
    train_views, validation_views = prepare_views(recipe, args.work, weights_before)
    state = start_or_resume(recipe, train_views, args.work)
    if not train(recipe, state, train_views, validation_views):
        return {"finished": False, "step": state.step, "checkpoint": str(state.path)}
    if weights_hash(teacher_folder) != weights_before:
        raise DistillError(f"the teacher's weights in {teacher_folder} changed while the student was trained")
    student = best_student(state)
    export(recipe, student, validation_views, args.out, {"sha256": weights_before})
    figures = measure(student, validation_views, recipe)
    return {
        "finished": True,
        "name": recipe.name,
        "steps": state.step,
        "best_step": state.best_step,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "views": len(train_views.inputs),
        "validation": figures,
        "onnx_bytes": (args.out / "encoder.onnx").stat().st_size,
        "out": str(args.out),
    }


def load_distill_recipe(path: Path, overrides: list[str]) -> DistillRecipe:
    try:
        recipe = DistillRecipe.model_validate(read_yaml(path, overrides))
        recipe.preprocessing()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(f"{path}: {where}: {first['msg']}") from None
    if recipe.modality == "image" and recipe.teacher.preprocessing is None:
        raise RecipeError(f"{path}: teacher.preprocessing: an image teacher needs its height and width")
    if len(recipe.student.widths) != len(recipe.student.depths):
        raise RecipeError(f"{path}: student.depths: one depth for each of student.widths")
    return recipe


def weights_hash(folder: Path) -> str:
    """sha256 of the weight files (*.safetensors) of a transformers folder, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DistillError(f"the teacher's folder {folder} has no *.safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Views


def prepare_views(recipe: DistillRecipe, work: Path, teacher_hash: str) -> tuple[Views, Views]:
    """The cached training views, and the plain views of the validation files."""
    root = recipe.data.root
    files = listed_files(root, recipe.data.train, held_out=False)
    held_out = [source for source in recipe.data.train if source.get("hold_out")]
    # A validation source that holds out is the held-out part of a training source, and is not listed twice.
    plain = [source for source in recipe.data.validation if not source.get("hold_out")]
    validation = listed_files(root, plain, held_out=False) if plain else []
    if held_out:
        validation = sorted({*validation, *listed_files(root, held_out, held_out=True)})
    if common := set(files) & set(validation):
        raise RecipeError(f"data.validation: {min(common)} is trained on")
    teacher = functools.cache(lambda: load_teacher(recipe))
    return tuple(  # type: ignore[return-value]
        cached_views(
            work,
            {
                "teacher": teacher_hash,
                "teacher_preprocessing": repr(recipe.teacher.preprocessing),
                "student_preprocessing": recipe.preprocessing().model_dump(),
                "files": [f"{path.relative_to(root)} {path.stat().st_size}" for path in chosen],
                "count": count,
                "patches": recipe.views.patches,
                "seed": recipe.seed,
            },
            chosen,
            view_of(recipe, files, count),
            lambda inputs: teacher()(inputs),
            recipe.train.threads,
        )
        for chosen, count in ((files, recipe.views.count), (validation, 1))
    )


def view_of(recipe: DistillRecipe, files: list[Path], count: int) -> Callable[[Path, np.random.Generator], Any]:
    spec = recipe.preprocessing()
    if isinstance(spec, ImagePreprocessing):
        assert recipe.teacher.preprocessing is not None
        return functools.partial(image_views, count=count, student=spec, teacher=recipe.teacher.preprocessing)
    patches = recipe.views.patches
    return lambda path, rng: audio_views(path, files, rng, count, spec, patches)


class _Pooled(nn.Module):
    """The teacher's pooled features, (B, d)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        pooled: Tensor = self.model(inputs).pooler_output
        return pooled.flatten(1)


def load_teacher(recipe: DistillRecipe) -> Teacher:
    """The frozen teacher as an ONNX Runtime session, which on a CPU runs depthwise convolutions four times faster."""
    folder = recipe.data.root / recipe.teacher.folder
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    if recipe.modality == "image":
        assert recipe.teacher.preprocessing is not None
        shape = (3, recipe.teacher.preprocessing.height, recipe.teacher.preprocessing.width)
    else:
        spec = recipe.preprocessing()
        assert isinstance(spec, AudioPreprocessing)
        shape = (1, spec.patch_frames, spec.n_mels)
    program = onnx_bytes(_Pooled(model.base_model).eval(), torch.zeros(2, *shape), "inputs", "pooled")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = recipe.train.threads
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])

    def teacher(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        starts = range(0, len(inputs), _TEACHER_BATCH)
        return np.concatenate(
            [session.run(["pooled"], {"inputs": inputs[start : start + _TEACHER_BATCH]})[0] for start in starts]
        )

    return teacher


# Training


@dataclass
class TrainingState:
    """What a checkpoint holds; `best` is the averaged student of the lowest validation loss."""

    path: Path
    student: Student
    averaged: Student
    optimiser: torch.optim.Optimizer
    best: dict[str, Tensor]
    best_loss: float = float("inf")
    best_step: int = 0
    step: int = 0

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save(
            {
                "student": self.student.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "best": self.best,
                "best_loss": self.best_loss,
                "best_step": self.best_step,
                "step": self.step,
            },
            partial,
        )
        os.replace(partial, self.path)


def start_or_resume(recipe: DistillRecipe, views: Views, work: Path) -> TrainingState:
    """A fresh student, or the checkpoint of this recipe. The number of steps may differ."""
    torch.manual_seed(recipe.seed)
    sample = np.asarray(views.features[:: max(1, len(views.features) // 20_000)], np.float32)
    # A dimension that hardly ever fires must not outweigh the others.
    deviation = np.maximum(sample.std(axis=0), 0.1 * np.median(sample.std(axis=0)) + 1e-6)
    student = Student(  # type: ignore[call-overload]
        3 if recipe.modality == "image" else 1,
        recipe.student.stem,
        recipe.student.widths,
        recipe.student.depths,
        torch.from_numpy(sample.mean(axis=0)),
        torch.from_numpy(deviation),
    ).to(memory_format=torch.channels_last)
    matrices = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.train.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.train.learning_rate,
    )
    free = {"steps", "threads", "validate_every", "checkpoint_every"}
    identity = recipe.model_dump(mode="json", exclude={"train": free, "licence": True, "trained_on": True})
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    averaged = copy.deepcopy(student)
    state = TrainingState(
        work / f"{recipe.name}-{digest}.pt", student, averaged, optimiser, copy.deepcopy(averaged.state_dict())
    )
    if state.path.exists():
        saved = torch.load(state.path, weights_only=True)
        student.load_state_dict(saved["student"])
        averaged.load_state_dict(saved["averaged"])
        optimiser.load_state_dict(saved["optimiser"])
        state.best, state.best_loss = saved["best"], saved["best_loss"]
        state.best_step, state.step = saved["best_step"], saved["step"]
    return state


def train(recipe: DistillRecipe, state: TrainingState, views: Views, validation: Views) -> bool:
    """Train to the recipe's last step. True when it was reached; False after Ctrl-C, which keeps a checkpoint."""
    spec = recipe.train
    student, averaged = state.student, state.averaged
    with tqdm(total=spec.steps, initial=state.step, desc=recipe.name) as bar:
        try:
            while state.step < spec.steps:
                rows = batch_rows(len(views.inputs), spec.batch_size, state.step, recipe.seed)
                inputs = student_inputs(views.inputs[rows], recipe.preprocessing())
                target = torch.from_numpy(views.features[rows].astype(np.float32))
                for group in state.optimiser.param_groups:
                    group["lr"] = learning_rate(spec, state.step)
                student.train()
                with torch.autocast("cpu", torch.bfloat16, enabled=spec.bfloat16):
                    predicted = student.standardised(inputs)
                loss = distillation_loss(student, predicted, target, spec.cosine_weight)
                state.optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                state.optimiser.step()
                follow(averaged, student, min(spec.ema, (1 + state.step) / (10 + state.step)))
                state.step += 1
                bar.update()
                if state.step % spec.validate_every == 0 or state.step == spec.steps:
                    figures = measure(averaged, validation, recipe)
                    tqdm.write(json.dumps({"step": state.step, "train_loss": round(loss.item(), 4), **figures}))
                    if figures["loss"] < state.best_loss:
                        state.best_loss, state.best_step = figures["loss"], state.step
                        state.best = copy.deepcopy(averaged.state_dict())
                if state.step % spec.checkpoint_every == 0 or state.step == spec.steps:
                    state.save()
        except KeyboardInterrupt:
            state.save()
            tqdm.write(f"interrupted at step {state.step}; the same command goes on from {state.path}")
            return False
    return True


def batch_rows(total: int, size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The rows of one step, from a fresh shuffle each epoch; a function of the step, so that a resumed run sees the
    batches that an uninterrupted one would."""
    size = min(size, total)
    each_epoch = total // size
    epoch, position = divmod(step, each_epoch)
    return _shuffled(total, seed, epoch)[position * size : (position + 1) * size]


@functools.lru_cache(maxsize=1)
def _shuffled(total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(total)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % of the peak."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return float(spec.learning_rate * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress))))


@torch.no_grad()
def follow(averaged: nn.Module, student: nn.Module, decay: float) -> None:
    """Exponential moving average of weights and of batch-norm statistics, in place."""
    for old, new in zip(averaged.state_dict().values(), student.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def student_inputs(stored: NDArray[Any], spec: ImagePreprocessing | AudioPreprocessing) -> Tensor:
    """Stored views → the student's float32 input, as the contract's preprocessing gives it."""
    if isinstance(spec, AudioPreprocessing):
        return torch.from_numpy(stored.astype(np.float32))[:, None]
    pixels = torch.from_numpy(np.array(stored)).permute(0, 3, 1, 2).float() / 255.0
    return (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]


@torch.inference_mode()
def measure(student: Student, views: Views, recipe: DistillRecipe) -> dict[str, float]:
    """Loss, mean cosine of raw and of mean-centred features, and explained variance (R²) against the teacher."""
    student.eval()
    predicted = []
    for start in range(0, len(views.inputs), 256):
        inputs = student_inputs(views.inputs[start : start + 256], recipe.preprocessing())
        predicted.append(student.standardised(inputs))
    standardised, target = torch.cat(predicted), torch.from_numpy(views.features.astype(np.float32))
    wanted = (target - student.mean) / student.deviation
    cosine = nn.functional.cosine_similarity(standardised * student.deviation + student.mean, target).mean()
    centred = nn.functional.cosine_similarity(standardised, wanted).mean()
    unexplained = (standardised - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
    loss = distillation_loss(student, standardised, target, recipe.train.cosine_weight)
    figures = {"loss": loss, "cosine": cosine, "cosine_centred": centred, "r2": 1 - unexplained}
    return {name: round(float(value), 4) for name, value in figures.items()}


# Export


def best_student(state: TrainingState) -> Student:
    student = copy.deepcopy(state.averaged)
    student.load_state_dict(state.best)
    return student.eval()


def onnx_bytes(model: nn.Module, example: Tensor, input_name: str, output_name: str) -> bytes:
    """One self-contained ONNX program with a dynamic first dimension."""
    program = torch.onnx.export(
        model,
        (example,),
        input_names=[input_name],
        output_names=[output_name],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    stream = io.BytesIO()
    program.save(stream, external_data=False)  # type: ignore[arg-type]
    return stream.getvalue()


def export(recipe: DistillRecipe, student: Student, views: Views, out: Path, teacher: dict[str, str]) -> None:
    """Write encoder.onnx and encoder.json, once ONNX Runtime gives torch's features of real inputs to within 1e-4.

    Raises DistillError when it does not.
    """
    spec = recipe.preprocessing()
    inputs = student_inputs(views.inputs[:7], spec).contiguous()
    input_name = "pixels" if recipe.modality == "image" else "patches"
    student = copy.deepcopy(student).to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    program = onnx_bytes(student, inputs[:2], input_name, "features")
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = student(inputs).numpy()
    for size in (1, len(inputs)):
        difference = float(
            np.abs(session.run(["features"], {input_name: inputs[:size].numpy()})[0] - expected[:size]).max()
        )
        if not difference <= _ONNX_TOLERANCE:
            raise DistillError(f"ONNX Runtime's features differ from torch's by {difference:.2g}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "encoder.onnx").write_bytes(program)
    card = {
        "name": recipe.name,
        "modality": recipe.modality,
        "preprocessing": spec.model_dump(mode="json"),
        "features": expected.shape[1],
        "licence": " ".join(recipe.licence.split()),
        "trained_on": recipe.trained_on,
        "teacher": {"folder": str(recipe.teacher.folder), **teacher},
        "sha256": hashlib.sha256(program).hexdigest(),
    }
    (out / "encoder.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    print(json.dumps(main(parser.parse_args())))
