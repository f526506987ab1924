"""A torch module of one input as an ONNX program, for ONNX Runtime."""

import io

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
