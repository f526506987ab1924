import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from service.contract.audio import decode_audio
from service.contract.bundle import OUTPUT, read_bundle
from service.contract.licences import Licence
from service.contract.patches import LogMelPatches
from tests.training.conftest import MakeRecipe
from training import pipeline
from training.bundle.export import ExportError, check_parity, export_tower
from training.encoders import load_encoder, weights_sha256
from training.features import preparer
from training.heads.projector import Head
from training.heads.trained import Trained, load_projectors
from training.pairs import read_pairs
from training.recipe import Recipe

PAPER = {"image": {"folder": "dinov2"}, "audio": {"folder": "yamnet"}, "text": {"folder": "roberta"}}


def random_heads(recipe: Recipe) -> Trained:
    torch.manual_seed(1)
    heads: dict[Any, Head] = {}
    for modality in recipe.encoders:
        head = Head(modality, load_encoder(recipe, modality).width, recipe.projector)
        heads[modality] = head.eval().requires_grad_(False)
    return Trained(heads, 0.07, {}, [])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["linear", "mlp", "token"])
@pytest.mark.parametrize("encoders", ["convolutional", "transformers"])
def test_a_bundle_serves_what_training_computed(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str, encoders: str
) -> None:
    recipe = make_recipe(
        projector={"kind": kind, "dimensions": 16, "hidden": 32},
        licences=["tones: as older recipes say it", {"of": "pictures", "licence": "CC0-1.0"}],
        terms=[{"of": "ImageNet", "terms": "for research"}],
        **({} if encoders == "convolutional" else {"encoders": PAPER}),
    )
    trained = replace(random_heads(recipe), licences=(Licence(of="merged heads", licence="CC-BY-NC-4.0"),))
    bundle = pipeline.export(recipe, pipeline.encoders(recipe), trained, {"x.top1": 1.5}, tmp_path / "bundle")
    manifest = read_bundle(bundle.path).manifest
    assert manifest == bundle.manifest
    assert set(manifest.towers) == {"image", "audio", "text"}
    assert manifest.evaluation["x.top1"] == 1.5
    assert [each.commercial for each in manifest.licences] == [None, True, False]
    assert load_projectors(bundle.path / "projectors.safetensors", recipe).licences == manifest.licences
    card = (bundle.path / "MODEL_CARD.md").read_text()
    assert "because of merged heads (CC-BY-NC-4.0); not known of tones (as older recipes say it)" in card
    assert "- ImageNet: for research" in card and manifest.terms == recipe.terms
    assert all(manifest.evaluation[f"parity.{m}"] >= 0.9999 for m in manifest.towers)
    assert {p.name for p in bundle.path.iterdir()} >= {"manifest.json", "MODEL_CARD.md", "projectors.safetensors"}
    for modality in manifest.towers:
        graph = onnx.load(bundle.tower_path(modality), load_external_data=False)
        assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.graph.initializer)


@pytest.mark.full
@pytest.mark.parametrize(
    ("image", "text"),
    [
        ({"folder": "dinov2", "pooling": "both"}, {"folder": "bert", "pooling": "both"}),
        (
            {"folder": "dinov2", "pooling": "mean", "layers": [1]},
            {"folder": "bert", "pooling": "cls", "layers": [0, 1]},
        ),
        ({"folder": "mobilenet", "layers": [3, 9]}, {"folder": "roberta"}),
    ],
    ids=["both", "layers", "convolutional layers"],
)
def test_chosen_features_are_served_too(
    make_recipe: MakeRecipe, tmp_path: Path, image: dict[str, Any], text: dict[str, Any]
) -> None:
    audio = {"folder": "yamnet", "layers": image.get("layers", [])}
    recipe = make_recipe(
        encoders={"image": image, "audio": audio, "text": text},
        projector={"kind": "linear", "dimensions": 16, "matryoshka": [4, 8]},
    )
    bundle = pipeline.export(recipe, pipeline.encoders(recipe), random_heads(recipe), {}, tmp_path / "bundle")
    assert all(bundle.manifest.evaluation[f"parity.{m}"] >= 0.9999 for m in bundle.manifest.towers)
    assert bundle.manifest.matryoshka == (4, 8)


@pytest.mark.full
def test_every_item_is_its_own_whatever_else_is_in_the_batch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    trained, encoder = random_heads(recipe), load_encoder(recipe, "audio")
    export_tower(encoder, trained.heads["audio"], tmp_path / "audio.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "audio.onnx", providers=["CPUExecutionProvider"])
    media, spec = read_pairs(recipe, "tones")["train"].media, encoder.preprocessing
    assert isinstance(spec, LogMelPatches)
    sounds = [preparer(encoder)(path) for path in media]
    sounds.append(spec.prepare(np.tile(decode_audio(media[0].read_bytes(), spec.sampling_rate), 7)))

    def embed(batch: list[Any]) -> np.ndarray:
        patches, weights = spec.collate(batch)
        return np.asarray(session.run([OUTPUT], {"patches": patches, "weights": weights})[0])

    together = embed(sounds)
    for row, sound in zip(together, sounds, strict=True):
        assert float(row @ embed([sound])[0]) > 0.99999
        assert abs(np.linalg.norm(row) - 1) < 1e-5


def test_a_graph_that_computes_something_else_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    encoder, head = load_encoder(recipe, "text"), random_heads(recipe).heads["text"]
    export_tower(encoder, head, tmp_path / "text.onnx")
    assert encoder.module is not None
    assert weights_sha256(encoder.module) == encoder.weights_sha256, "the encoder is as it was"
    texts = read_pairs(recipe, "pictures")["test"].texts
    assert check_parity(encoder, head, tmp_path / "text.onnx", texts) >= 0.9999
    with torch.no_grad():
        head.pooled.skip.bias[0] += 1.0  # type: ignore[union-attr,index,operator]
    with pytest.raises(ExportError, match="text graph's vectors differ"):
        check_parity(encoder, head, tmp_path / "text.onnx", texts)
    with pytest.raises(ExportError, match="no text input"):
        check_parity(encoder, head, tmp_path / "text.onnx", [])


@pytest.mark.full
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_an_onnx_encoder_equals_the_one_it_was_made_from(
    make_recipe: MakeRecipe, tmp_path: Path, modality: Any
) -> None:
    recipe = make_recipe()
    encoder = load_encoder(recipe, modality)
    name = {"image": "pixels", "audio": "patches"}[modality]
    folder = tmp_path / "encoder"
    folder.mkdir()
    shape = {"image": (2, 3, 32, 32), "audio": (2, 1, 96, 64)}[modality]

    class Pooled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert encoder.module is not None
            output = encoder.module(x)
            return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    torch.onnx.export(
        Pooled().eval(), (torch.zeros(shape),), folder / "encoder.onnx", dynamo=True, input_names=[name],
        output_names=["features"], dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
    )  # fmt: skip
    described = {
        "name": "tiny-onnx",
        "modality": modality,
        "features": encoder.width,
        "preprocessing": encoder.preprocessing.model_dump(),
    }
    (folder / "encoder.json").write_text(json.dumps(described))
    values = {m: {"folder": f} for m, f in (("image", "mobilenet"), ("audio", "yamnet"), ("text", "bert"))}
    other = make_recipe(encoders=values | {modality: {"onnx": str(folder)}})
    joined, head = load_encoder(other, modality), random_heads(recipe).heads[modality]
    media = read_pairs(recipe, {"image": "pictures", "audio": "tones"}[modality])["test"].media
    export_tower(encoder, head, tmp_path / "torch.onnx")
    export_tower(joined, head, tmp_path / "joined.onnx")
    assert check_parity(joined, head, tmp_path / "joined.onnx", media) >= 0.9999
    assert check_parity(encoder, head, tmp_path / "joined.onnx", media) >= 0.9999
    graph = onnx.load(tmp_path / "joined.onnx").graph
    assert not any(node.metadata_props for node in graph.node)  # the exporter's stack traces, with this machine's paths
    if modality == "audio":
        first = {each.name: each.type.tensor_type.shape.dim[0].dim_param for each in graph.input}
        assert first["patches"] != first["weights"]  # ONNX Runtime reuses buffers by these names
