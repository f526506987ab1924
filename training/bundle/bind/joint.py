"""The bundle of two joined spaces: B's files, A's towers with a map behind them, each graph checked."""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from service.contract.bundle import OUTPUT, Bundle, Encoder, Modality, Projector, Tower, sha256_file, space_id
from service.contract.images import ImagePreprocessing
from service.contract.licences import Licence, combined, markdown, parts
from training.bundle.bind.graphs import append, mix
from training.bundle.bind.maps import Map
from training.bundle.bind.routing import mixed
from training.bundle.export import PARITY
from training.bundle.write import CARD, write
from training.encoders import example_inputs
from training.errors import TrainingError
from training.features import collate, preparer
from training.graphs import session
from training.heads.bundled import PROJECTORS, as_encoder
from training.heads.trained import licences_json, read_file

Floats = NDArray[np.float32]


class JointError(TrainingError):
    """A joint graph does not compute what its parts compute."""


def write_joint(
    first: Bundle,
    second: Bundle,
    through: Map,
    weight: float,
    figures: Mapping[str, Any],
    texts: Sequence[str],
    name: str,
    target: Path,
) -> Bundle:
    """Write the bundle of B (`second`) and of what it lacks of A (`first`), moved there `through` a map.

    With weight 0 B's towers are the same bytes, and its space is admitted. `texts` check the text graph; the moved
    media graphs, whose encoders are untouched, are checked on noise. Raises JointError.
    """
    a, b = first.manifest, second.manifest
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        towers, parity = _towers(first, second, through, weight, texts, folder)
        licences, terms = combined(b.parts, a.parts), tuple(dict.fromkeys((*b.terms, *a.terms)))
        measured: dict[str, Any] = {**({} if weight else b.evaluation), **figures}
        measured |= {f"parity.{modality}": round(value, 7) for modality, value in parity.items()}
        space = space_id(b.dimensions, towers)
        _save_projectors(first, second, through, licences, folder / PROJECTORS)
        encoders = {tower.encoder.source: tower.encoder.licence for tower in towers.values()}
        stated = markdown(parts(licences, encoders), terms)
        (folder / CARD).write_text(_card(name, first, second, space, measured, stated), encoding="utf-8")
        graphs = {graph: second.path / graph for graph in b.files}
        for modality, tower in towers.items():
            for precision in tower.precisions:
                file, _ = tower.graph(precision)
                graphs[file] = (folder if modality in parity else second.path) / file
        return write(
            target,
            graphs,
            {other: folder / other for other in (PROJECTORS, CARD)},
            like=b,
            name=name,
            space=space,
            # With other texts, the texts of an older store are of another space.
            admits=() if weight else (*b.admits, b.space),
            matryoshka=(),  # a map keeps no order of dimensions
            towers=towers,
            means={m: mean for m, mean in b.means.items() if m not in parity},
            templates={str(m): list(prompts) for m, prompts in a.templates.items()} | dict(b.templates),
            evaluation=measured,
            licences=licences,
            terms=terms,
        )


def _towers(
    first: Bundle, second: Bundle, through: Map, weight: float, texts: Sequence[str], folder: Path
) -> tuple[dict[Modality, Tower], dict[Modality, float]]:
    """B's towers with what it lacks of A's, and the lowest cosine of each new graph, in `folder`, to its parts."""
    a, b = first.manifest, second.manifest
    towers: dict[Modality, Tower] = dict(b.towers)
    parity: dict[Modality, float] = {}
    for modality in [modality for modality in a.towers if modality not in b.towers]:
        moved = folder / f"{modality}.onnx"
        append(first.tower_path(modality), through, moved)
        inputs, names = _noise(a.towers[modality]), a.towers[modality].preprocessing.inputs
        expected = through(_run(first.tower_path(modality), names, inputs))
        parity[modality] = _agree(modality, _run(moved, names, inputs), expected)
        towers[modality] = _bound(moved, a.towers[modality], [a.towers[modality]], through, 1.0)
    if weight:
        both = folder / "text.onnx"
        mix(second.tower_path("text"), first.tower_path("text"), through, weight, both)
        prepare = preparer(as_encoder(second, "text"))
        spec = b.towers["text"].preprocessing
        inputs, names = collate(spec, [prepare(text) for text in texts]), spec.inputs
        ours, theirs = (_run(bundle.tower_path("text"), names, inputs) for bundle in (second, first))
        parity["text"] = _agree("text", _run(both, names, inputs), mixed(ours, through(theirs), weight))
        towers["text"] = _bound(both, b.towers["text"], [b.towers["text"], a.towers["text"]], through, weight)
    return towers, parity


def _bound(graph: Path, like: Tower, towers: Sequence[Tower], through: Map, weight: float) -> Tower:
    """The manifest's entry of a graph made of towers and a map: hashes of all that defines its vectors."""
    encoders = list(dict.fromkeys(tower.encoder.weights_sha256 for tower in towers))
    encoder = towers[0].encoder
    if len(encoders) > 1:
        encoder = Encoder(
            source="+".join(tower.encoder.source for tower in towers),
            weights_sha256=hashlib.sha256("".join(encoders).encode()).hexdigest(),
            licence="; ".join(dict.fromkeys(tower.encoder.licence or "not stated" for tower in towers)),
        )
    digest = hashlib.sha256("".join(tower.projector.weights_sha256 for tower in towers).encode())
    digest.update(through.weight.tobytes() + through.bias.tobytes() + np.float32(weight).tobytes())
    projector = Projector(kind="bound", features=like.projector.features, weights_sha256=digest.hexdigest())
    # A variant of a tower would be of the vectors before the map.
    changes = {"file": graph.name, "sha256": sha256_file(graph), "encoder": encoder, "projector": projector}
    changes |= {"variants": {}, "defaults": {}}
    return like.model_copy(update=changes)


def _noise(tower: Tower) -> list[NDArray[Any]]:
    rng = np.random.default_rng(0)
    size = 2 if isinstance(tower.preprocessing, ImagePreprocessing) else 6
    shape, *lengths = example_inputs(tower.preprocessing, size)
    first = rng.standard_normal(shape.shape).astype(np.float32)
    if isinstance(tower.preprocessing, ImagePreprocessing):
        return [first]
    weights = np.zeros((2, size), np.float32)  # a sound of four rows, and one of two
    weights[0, :4], weights[1, 4:] = 1 / 4, 1 / 2
    return [first, *lengths, weights]


def _run(graph: Path, names: Sequence[str], inputs: Sequence[NDArray[Any]]) -> Floats:
    return np.asarray(session(graph).run([OUTPUT], dict(zip(names, inputs, strict=True)))[0])


def _agree(modality: Modality, joint: Floats, parts: Floats) -> float:
    lowest = float((joint * parts).sum(1).min())
    if joint.shape != parts.shape or not lowest >= PARITY:
        raise JointError(f"the joint {modality} graph differs from its parts: lowest cosine {lowest:.6f}")
    return lowest


def _save_projectors(first: Bundle, second: Bundle, through: Map, licences: Sequence[Licence], path: Path) -> None:
    """B's own tensors as they are; A's and the map under `bound.<space of A>.`."""
    tensors, metadata = read_file(second.path / PROJECTORS)
    prefix = f"bound.{first.manifest.space}"
    tensors |= {f"{prefix}.{key}": value for key, value in read_file(first.path / PROJECTORS)[0].items()}
    tensors[f"{prefix}.map.weight"] = torch.from_numpy(through.weight)
    tensors[f"{prefix}.map.bias"] = torch.from_numpy(through.bias)
    save_file(tensors, path, metadata | {"licences": licences_json(licences)})


def _card(name: str, first: Bundle, second: Bundle, space: str, measured: Mapping[str, Any], stated: str) -> str:
    a, b = first.manifest, second.manifest
    moved = ", ".join(modality for modality in a.towers if modality not in b.towers)
    lines = [
        f"# {name}",
        "",
        f"Space `{space}`: {moved} of {a.name} (`{a.space}`) moved into the space of {b.name} (`{b.space}`) by a map",
        "between their text towers. No pair joins the two, so that what is found across them is emergent.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in measured.items()),
        "",
        "## Licences",
        "",
        stated.rstrip(),
    ]
    for bundle in (second, first):
        if CARD in bundle.manifest.files:
            lines += ["", "---", "", (bundle.path / CARD).read_text(encoding="utf-8").rstrip()]
    return "\n".join(lines) + "\n"
