"""Keep the starter's weights in half the room: python -m starter.half FOLDER

FOLDER holds projectors.safetensors, or encoder.onnx and encoder.json. Numbers become float16 where they are stored, and
float32 again where they are loaded (training.graphs, training.trained). Run it once: what is half already stays so.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from training.graphs import half_stored

_LARGE = 1_024  # numbers


def main(folder: Path) -> None:
    projectors, graph, card = folder / "projectors.safetensors", folder / "encoder.onnx", folder / "encoder.json"
    if projectors.exists():
        with safe_open(projectors, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            metadata = file.metadata()
        halves = {k: v.half() if v.dtype == torch.float32 and v.numel() > _LARGE else v for k, v in tensors.items()}
        save_file(halves, projectors, metadata)
    if graph.exists():
        program = half_stored(graph.read_bytes())
        graph.write_bytes(program)
        described = json.loads(card.read_text())
        described["sha256"] = hashlib.sha256(program).hexdigest()
        card.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
