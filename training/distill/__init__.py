"""`python -m training distill RECIPE`: a small student of sounds learns its teacher's features, and becomes ONNX.

Reads top to bottom: files → teacher → training → export. After Ctrl-C the same command goes on from the last
checkpoint. The folder written holds encoder.onnx and encoder.json, which says how inputs are prepared;
`encoders.<modality>.onnx` of a training recipe loads it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from training.distill.fit import new_run, train
from training.distill.graph import DistillError, export
from training.distill.recipe import load_distill_recipe
from training.distill.spectra import cached_spectra
from training.distill.student import Student, measure
from training.distill.teacher import Teacher, weights_hash
from training.distill.views import files_of, plain_views
from training.flags import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML, such as training/recipes/distill-audio.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for encoder.onnx and encoder.json")
    parser.add_argument("--work", type=Path, default=Path(".cache/distill"), help="folder for views and checkpoints")
    add_flags(parser, "--set")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train and export a student; return its figures. Raises TrainingError."""
    recipe = load_distill_recipe(args.recipe, args.overrides)
    torch.set_num_threads(recipe.train.threads)
    folder = recipe.data.root / recipe.teacher.folder
    weights_before = weights_hash(folder)
    files, validation_files = files_of(recipe)
    teacher = Teacher(recipe)
    validation = plain_views(recipe, validation_files, teacher.pooled, weights_before, args.work)
    stored = cached_spectra(files, recipe.preprocessing(), args.work)
    state = new_run(recipe, teacher, stored, args.work)
    train(recipe, state, stored, teacher, validation)
    if weights_hash(folder) != weights_before:
        raise DistillError(f"the teacher's weights in {folder} changed while the student was trained")
    student = state.model
    assert isinstance(student, Student)
    export(recipe, student, validation, args.out, weights_before, teacher.labels)
    return {
        "name": recipe.name,
        "steps": state.step,
        "best_step": state.best_step,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "views": len(stored),
        "validation": measure(student, validation, recipe),
        "onnx_bytes": (args.out / "encoder.onnx").stat().st_size,
        "out": str(args.out),
    }
