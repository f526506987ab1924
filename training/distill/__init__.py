"""`python -m training distill RECIPE`: a small student learns a frozen teacher's features, and is exported as ONNX.

Reads top to bottom: files → views with the teacher's features (cached) → training → export. Ctrl-C keeps a
checkpoint, and the same command goes on from it. The folder written holds encoder.onnx and encoder.json, which says
how inputs are prepared; `encoders.<modality>.onnx` of a training recipe loads it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from service.contract.windows import LogMelWindows
from training.distill import staged
from training.distill.fit import best_student, measure, start_or_resume, train
from training.distill.graph import DistillError, export
from training.distill.recipe import load_distill_recipe
from training.distill.spectra import cached_spectra
from training.distill.teacher import files_of, prepare_views, views_of, weights_hash

__all__ = ["DistillError", "add_arguments", "main"]


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
    if recipe.student.staged:
        files, validation = files_of(recipe)
        teacher = staged.Teacher(recipe)
        labels = teacher.labels
        validation_views = views_of(recipe, validation, 1, args.work, weights_before, teacher.pooled)
        spec = recipe.preprocessing()
        stored: staged.Stored
        if isinstance(spec, LogMelWindows):
            stored = cached_spectra(files, spec, args.work)
        else:
            stored = staged.pictures(files, args.work)
        state = staged.begin(recipe, teacher, stored, args.work)
        done = staged.train(recipe, state, stored, teacher, validation_views)
    else:
        train_views, validation_views = prepare_views(recipe, args.work, weights_before)
        labels = []
        state = start_or_resume(recipe, train_views, args.work)
        done = train(recipe, state, train_views, validation_views)
    views = len(stored if recipe.student.staged else train_views.inputs)
    if not done:
        return {"finished": False, "step": state.step, "checkpoint": str(state.path)}
    if weights_hash(teacher_folder) != weights_before:
        raise DistillError(f"the teacher's weights in {teacher_folder} changed while the student was trained")
    student = best_student(state)
    export(recipe, student, validation_views, args.out, {"sha256": weights_before}, labels)
    figures = measure(student, validation_views, recipe)
    return {
        "finished": True,
        "name": recipe.name,
        "steps": state.step,
        "best_step": state.best_step,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "views": views,
        "validation": figures,
        "onnx_bytes": (args.out / "encoder.onnx").stat().st_size,
        "out": str(args.out),
    }
