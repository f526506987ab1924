"""Encoder + projector + L2 in one ONNX graph per modality, checked against torch, then written as a bundle."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.contract.bundle import OUTPUT, Bundle, Encoder, Modality, Projector, Tower, sha256_file, space_id
from service.contract.licences import combined
from service.contract.vectors import l2_normalise
from service.contract.waveforms import Waveforms
from training.bundle.card import model_card
from training.bundle.precision import make_variants
from training.bundle.write import CARD, write
from training.encoders import FrozenEncoder, Pooled, example_inputs, weights_sha256
from training.errors import TrainingError
from training.features import Item, feeds, preparer, runner
from training.graphs import HEAD, half_stored, session, to_onnx, whole_weights, with_earlier_rows
from training.heads.bundled import PROJECTORS
from training.heads.projector import Head
from training.heads.trained import Trained, round_heads, save_projectors
from training.recipe import ExportSpec, Recipe

PARITY = 0.9999
_AS_TRAINED = ExportSpec()


class ExportError(TrainingError):
    """A tower's graph does not compute what torch computes, or there was nothing to check it on."""


class Whole(nn.Module):
    """An encoder with its head: the inputs of its preprocessing → unit vectors (B, D)."""

    def __init__(self, encoder: FrozenEncoder, head: Head) -> None:
        super().__init__()
        self.features, self.head = Pooled(encoder), head

    def forward(self, *inputs: Tensor) -> Tensor:
        return _projected(self.head, *self.features(*inputs))


def _projected(head: Head, pooled: Tensor, states: Tensor, weights: Tensor) -> Tensor:
    vector: Tensor = head(pooled, states, weights) if head.needs_tokens else head(pooled)
    return vector


def export_tower(encoder: FrozenEncoder, head: Head, path: Path) -> None:
    """Write the one graph of a tower, dynamic in batch and length; no external data below 2 GB.

    That of sounds has the features of rows, and can be given those of earlier rows (contract.bundle.ROWS,
    EARLIER_ROWS).
    """
    if encoder.remote is not None:
        ones = np.ones((2, encoder.width), np.float32)
        model = to_onnx(_Rows(head).eval(), [ones], ["features"], [OUTPUT], [{0: torch.export.Dim("batch")}])
    elif encoder.onnx is None and encoder.modality != "audio":
        model = _traced(Whole(encoder, head), encoder, OUTPUT)
    else:
        model = _joined(encoder, head)
    model.graph.ClearField("value_info")  # shapes of the traced example, which a runtime infers anew
    for node in model.graph.node:
        scope = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
        if "/head: " in scope and not node.name.startswith(HEAD):
            node.name = HEAD + node.name  # as where a head was joined to an ONNX encoder
        del node.metadata_props[:]  # where in whose folders the exporter found it
    model.doc_string = ""
    onnx.save(model, path)
    onnx.checker.check_model(path)


class _Alone(nn.Module):
    """An encoder's features as an ONNX encoder gives them: of sounds, their rows'."""

    def __init__(self, encoder: FrozenEncoder) -> None:
        super().__init__()
        self.features = Pooled(encoder)

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.features.modality == "audio":
            rows: Tensor = self.features.encoder(*inputs)
            return rows
        pooled: Tensor = self.features(*inputs)[0]
        return pooled


def export_encoder(encoder: FrozenEncoder, path: Path) -> None:
    """Write an encoder without a head, as `FrozenEncoder.onnx` describes it."""
    onnx.save(_traced(_Alone(encoder), encoder, "features"), path)


def _traced(module: nn.Module, encoder: FrozenEncoder, output: str) -> onnx.ModelProto:
    """The graph of a module that takes the inputs of an encoder; of sounds those of rows, without their weights."""
    arrays = list(example_inputs(encoder.preprocessing, 2))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    text = encoder.modality == "text"
    shapes: list[dict[int, Any]] = [{0: batch, 1: length} if text else {0: batch} for _ in arrays]
    if isinstance(encoder.preprocessing, Waveforms):
        shapes[0][1] = torch.export.Dim("samples")
    return to_onnx(module.eval(), arrays, encoder.preprocessing.inputs[: len(arrays)], [output], [tuple(shapes)])


def check_parity(
    encoder: FrozenEncoder, head: Head, graph: Path, items: Sequence[Item], *, least: float = PARITY
) -> float:
    """Lowest cosine between the graph's vectors and those that training made, over real items.

    The items go through the graph in one batch and through training's own code one by one, so that batching is
    checked too. Raises ExportError below `least`.
    """
    if not items:
        raise ExportError(f"there is no {encoder.modality} input to check the graph on")
    prepare, run = preparer(encoder), runner(encoder, head.needs_tokens)
    prepared = [prepare(item) for item in items]
    inputs = {"features": run(prepared)["pooled"]} if encoder.remote else feeds(encoder.preprocessing, prepared)
    served = np.asarray(session(graph).run([OUTPUT], inputs)[0])
    with torch.inference_mode():
        trained = np.concatenate(
            [
                head(**{k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in run([one]).items()})
                for one in prepared
            ]
        )
    if served.shape != trained.shape or not np.isfinite(served).all():
        raise ExportError(f"the {encoder.modality} graph gives {served.shape}, and training {trained.shape}")
    lowest = float((l2_normalise(served) * l2_normalise(trained)).sum(1).min())
    if lowest < least:
        raise ExportError(f"the {encoder.modality} graph's vectors differ from training's: lowest cosine {lowest:.6f}")
    return lowest


def write_tower(
    encoder: FrozenEncoder, head: Head, folder: Path, items: Sequence[Item], spec: ExportSpec = _AS_TRAINED
) -> tuple[Tower, float]:
    """Export one tower into `folder` and check it there: its entry of a manifest, and its parity over `items`."""
    graph = folder / f"{encoder.modality}.onnx"
    export_tower(encoder, head, graph)
    if spec.weights == "fp16":
        graph.write_bytes(half_stored(graph.read_bytes()))
    parity = check_parity(encoder, head, graph, items)
    tower = Tower(
        file=graph.name,
        sha256=sha256_file(graph),
        precision=encoder.precision,
        encoder=Encoder(source=encoder.source, weights_sha256=encoder.weights_sha256, licence=encoder.licence),
        projector=Projector(kind=head.kind, features=encoder.width, weights_sha256=weights_sha256(head)),
        preprocessing=encoder.preprocessing,
    )
    return tower, parity


def export_bundle(
    recipe: Recipe,
    encoders: Mapping[Modality, FrozenEncoder],
    trained: Trained,
    target: Path,
    *,
    evaluation: Mapping[str, Any],
    samples: Mapping[Modality, Sequence[Item]],
) -> Bundle:
    """Export, check and write the bundle. `samples` are the real items that each graph is checked on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        towers: dict[Modality, Tower] = {}
        graphs: dict[str, Path] = {}
        others: dict[str, Path] = {}
        parity: dict[Modality, float] = {}
        half = recipe.export.weights == "fp16"
        if half:
            round_heads(trained)
        for modality, head in trained.heads.items():
            encoder = encoders[modality]
            tower, parity[modality] = write_tower(encoder, head, folder, samples.get(modality, []), recipe.export)
            towers[modality] = tower.model_copy(update={"labels": recipe.labels_seen(modality)})
            if encoder.tokenizer is not None:
                others["tokenizer.json"] = encoder.tokenizer
        space = space_id(recipe.projector.dimensions, towers)
        towers, gates = make_variants(recipe, encoders, towers, folder)
        for tower in towers.values():
            graphs |= {file: folder / file for file in (tower.file, *(v.file for v in tower.variants.values()))}
        # What the projectors learned from by another recipe, as merged ones did, is theirs all the same.
        recipe = recipe.model_copy(update={"licences": combined(recipe.licences, trained.licences)})
        save_projectors(folder / PROJECTORS, replace(trained, licences=recipe.licences), half=half)
        figures = dict(evaluation) | {f"parity.{m}": round(value, 7) for m, value in parity.items()} | gates
        (folder / CARD).write_text(model_card(recipe, towers, figures, space), encoding="utf-8")
        others |= {name: folder / name for name in (PROJECTORS, CARD)}
        if recipe.attribution is not None:
            others["ATTRIBUTION.md"] = recipe.path(recipe.attribution)
        return write(
            target,
            graphs,
            others,
            name=recipe.name,
            space=space,
            dimensions=recipe.projector.dimensions,
            matryoshka=recipe.projector.matryoshka,
            towers=towers,
            temperature=trained.temperature,
            means=trained.means,
            abstention=trained.abstention,
            templates={modality: list(prompts) for modality, prompts in recipe.templates.items()},
            evaluation=figures,
            licences=recipe.licences,
            terms=recipe.terms,
        )


class _Rows(nn.Module):
    """A head on what an encoder's graph gives: pooled features; of sounds, their rows' with averaging weights."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            vector: Tensor = self.head(features)
            return vector
        return _projected(self.head, weights @ features, features, weights)


def _joined(encoder: FrozenEncoder, head: Head) -> onnx.ModelProto:
    """The head's graph behind that of its encoder, which may be ONNX already."""
    if encoder.onnx is None:
        first = _traced(_Alone(encoder), encoder, "features")
    elif head.needs_tokens:
        raise ExportError(f"{encoder.source} is an ONNX encoder with pooled features only: no token projector")
    else:
        first = whole_weights(onnx.load(encoder.onnx))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    arrays: list[NDArray[Any]] = [np.ones((2, encoder.width), np.float32)]
    shapes: list[dict[int, Any]] = [{0: batch}]
    names = ["head_features"]
    if encoder.modality == "audio":
        arrays = [np.ones((6, encoder.width), np.float32), np.full((2, 6), 1 / 3, np.float32)]
        shapes, names = [{0: length}, {0: batch, 1: length}], ["head_features", "weights"]
    second = to_onnx(_Rows(head).eval(), arrays, names, [OUTPUT], shapes)
    opset = max(_opset(first), _opset(second))
    first, second = (
        model if _opset(model) == opset else onnx.version_converter.convert_version(model, opset)
        for model in (first, second)
    )
    first.ir_version = second.ir_version = max(first.ir_version, second.ir_version)
    if encoder.modality == "audio":
        for value in (*first.graph.input, *first.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "length"  # rows, of which a batch has any number
        for value in (*second.graph.input, *second.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == "length":
                    dim.dim_param = "rows"  # earlier ones too; a runtime takes what has one name to be as long
    first = onnx.compose.add_prefix(first, "encoder/", rename_inputs=False)
    second = onnx.compose.add_prefix(second, HEAD, rename_inputs=False, rename_outputs=False)
    joined = onnx.compose.merge_models(first, second, io_map=[("encoder/features", "head_features")])
    if encoder.modality == "audio":
        with_earlier_rows(joined, "encoder/features", encoder.width)
    opsets = {entry.domain: entry.version for entry in joined.opset_import}
    del joined.opset_import[:]  # each of them twice
    joined.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items())
    return joined


def _opset(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if not entry.domain)
