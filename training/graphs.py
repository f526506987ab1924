"""Torch modules as ONNX programs, and sessions that run them beside other work."""

import io
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn


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


def session(program: Path | bytes) -> onnxruntime.InferenceSession:
    """On the CPU, with threads that sleep while they wait: beside another job, spinning takes its cores for nothing."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
