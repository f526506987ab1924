"""The frozen teacher, and the views of a recipe's files with the teacher's features of them."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from service.contract.images import ImagePreprocessing
from training.distill.graph import DistillError
from training.distill.recipe import DistillRecipe
from training.distill.views import Teacher, Views, cached_views, image_views, listed_files, sound_view
from training.graphs import onnx_bytes
from training.preprocessors import LOCAL
from training.recipe import RecipeError

_BATCH = 64


def weights_hash(folder: Path) -> str:
    """sha256 of the weight files (*.safetensors) of a transformers folder, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DistillError(f"the teacher's folder {folder} has no *.safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def files_of(recipe: DistillRecipe) -> tuple[list[Path], list[Path]]:
    """What is trained on, and what is validated on. Raises RecipeError where they share a file."""
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
    return files, validation


def prepare_views(recipe: DistillRecipe, work: Path, teacher_hash: str) -> tuple[Views, Views]:
    """The cached training views, and the plain views of the validation files."""
    files, validation = files_of(recipe)
    teacher = functools.cache(lambda: load_teacher(recipe))

    def views(chosen: list[Path], count: int) -> Views:
        return views_of(recipe, chosen, count, work, teacher_hash, lambda inputs: teacher()(inputs))

    return views(files, recipe.views.count), views(validation, 1)


def views_of(
    recipe: DistillRecipe, chosen: list[Path], count: int, work: Path, teacher_hash: str, teacher: Teacher
) -> Views:
    """The views of the files `chosen`, cached. Sounds have one: the first row of the plain sound."""
    root, spec = recipe.data.root, recipe.preprocessing()
    key = {
        "teacher": teacher_hash,
        "teacher_preprocessing": repr(recipe.teacher.preprocessing),
        "student_preprocessing": spec.model_dump(),
        "files": [f"{path.relative_to(root)} {path.stat().st_size}" for path in chosen],
        "count": count,
        "seed": recipe.seed,
    }
    if recipe.student.staged:
        key["layers"] = recipe.student.cuts
    view: Callable[[Path, np.random.Generator], Any]
    if isinstance(spec, ImagePreprocessing):
        assert recipe.teacher.preprocessing is not None
        view = functools.partial(image_views, count=count, student=spec, teacher=recipe.teacher.preprocessing)
    else:
        view = functools.partial(sound_view, spec=spec)
    return cached_views(work, key, chosen, view, teacher, recipe.train.threads)


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
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, **LOCAL)
    assert recipe.teacher.preprocessing is not None
    shape = (3, recipe.teacher.preprocessing.height, recipe.teacher.preprocessing.width)
    program = onnx_bytes(_Pooled(model.base_model).eval(), torch.zeros(2, *shape), "inputs", "pooled")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = recipe.train.threads
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])

    def teacher(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        starts = range(0, len(inputs), _BATCH)
        return np.concatenate(
            [session.run(["pooled"], {"inputs": inputs[start : start + _BATCH]})[0] for start in starts]
        )

    return teacher
