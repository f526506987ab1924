"""A student as an encoder folder: encoder.onnx, checked against torch, and encoder.json."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from service.contract.vectors import l2_normalise
from training.distill.recipe import DistillRecipe
from training.distill.student import student_inputs
from training.distill.views import Views
from training.errors import TrainingError
from training.graphs import half_stored, onnx_bytes, session

_ONNX_TOLERANCE = 1e-4


class DistillError(TrainingError):
    """The student cannot be trained or exported; the message says why."""


def export(
    recipe: DistillRecipe, student: nn.Module, views: Views, out: Path, teacher_sha256: str, labels: Sequence[str]
) -> None:
    """Write encoder.onnx and encoder.json, once ONNX Runtime gives torch's features of real inputs to within 1e-4.

    Its weights are kept in float16, which may cost no more than 1e-4 of the features' cosine. `labels` are what the
    last features are scores of. Raises DistillError where either is more.
    """
    spec = recipe.exported()
    inputs = student_inputs(views.inputs[:7])  # a longer window has the same stretch again
    inputs = inputs.repeat(1, 1, -(-spec.frames // inputs.shape[2]), 1)[:, :, : spec.frames]
    student = copy.deepcopy(student).to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    program = onnx_bytes(student, inputs[:2], "patches", "features")
    with torch.inference_mode():
        expected = student(inputs).numpy()
    for size in (1, len(inputs)):
        difference = float(np.abs(_features(program, inputs[:size].numpy()) - expected[:size]).max())
        if not difference <= _ONNX_TOLERANCE:
            raise DistillError(f"ONNX Runtime's features differ from torch's by {difference:.2g}")
    program = half_stored(program)
    rounded = _features(program, inputs.numpy())
    cosines = (l2_normalise(rounded) * l2_normalise(expected)).sum(axis=1)
    if not cosines.min() >= 1 - _ONNX_TOLERANCE:
        raise DistillError(f"with its weights in float16 the student's features turn: cosine {cosines.min():.5f}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "encoder.onnx").write_bytes(program)
    card = {
        "name": recipe.name,
        "modality": recipe.modality,
        "preprocessing": spec.model_dump(mode="json"),
        "features": expected.shape[1],
        "licence": " ".join(recipe.licence.split()),
        "trained_on": recipe.trained_on,
        "teacher": {"folder": str(recipe.teacher.folder), "sha256": teacher_sha256},
        "sha256": hashlib.sha256(program).hexdigest(),
        "labels": list(labels),
    }
    (out / "encoder.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _features(program: bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(session(program).run(["features"], {"patches": inputs})[0])
