"""Token vectors from the real exporter, through the server, against the same thing written out."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from service.contract.bundle import OUTPUT, TOKEN_MASK, TOKENS, space_id
from service.settings import Settings
from tests.conftest import serving
from tests.matrix import matrix
from tests.training import tiny
from tests.training.conftest import MakeRecipe
from tests.training.test_export import PAPER, random_heads
from training import pipeline
from training.bundle.token_vectors import TokenError, check_has_tokens, token_vectors
from training.encoders import load_encoder
from training.features import collate, preparer
from training.heads.projector import Head
from training.pairs import read_pairs
from training.recipe import ProjectorSpec

# The exporter of torch itself uses what a newer torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
@pytest.mark.parametrize("kind", ["linear", "mlp", "token", "attention"])
def test_a_token_is_what_the_head_makes_of_it_alone(kind: Any, modality: Any) -> None:
    torch.manual_seed(0)
    head = Head(modality, 12, ProjectorSpec(kind=kind, dimensions=16, hidden=8)).eval()
    pooled, tokens = torch.randn(3, 12), torch.randn(3, 4, 12)
    one = torch.ones(1, 1)
    with torch.inference_mode():
        found = token_vectors(head, pooled, tokens, torch.full((3, 4), 0.25))
        # The same items, packed as sounds are: patches of all in a row, and weights that say whose they are.
        owners = torch.eye(3).repeat_interleave(4, dim=1) / 4
        torch.testing.assert_close(token_vectors(head, pooled, tokens.flatten(0, 1), owners), found.flatten(0, 1))
        for item in range(3):
            for place in range(4):
                token = tokens[item, place]
                own = pooled[item] if head.needs_tokens else token
                alone = head(own[None], token[None, None], one) if head.needs_tokens else head(own[None])
                torch.testing.assert_close(found[item, place], alone[0], rtol=1e-4, atol=1e-5)


# At the tiny pictures' own size a convolution has one cell.
CONVOLUTIONAL = {
    "image": {"folder": "mobilenet", "preprocessing": {"height": 64, "width": 64}},
    "audio": {"folder": "yamnet"},
    "text": {"folder": "bert"},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers": ("token", PAPER),
    "transformers without sounds": ("token", {name: PAPER[name] for name in ("image", "text")}),
    "convolutional": ("mlp", CONVOLUTIONAL),
}


@pytest.mark.full
@pytest.mark.parametrize("family", matrix(FAMILIES, "transformers without sounds"))
def test_a_served_bundle_reranks_by_its_tokens(
    make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path, family: str
) -> None:
    kind, encoders = FAMILIES[family]
    pairs = tiny.recipe_values(tiny_root)["pairs"]
    recipe = make_recipe(
        projector={"kind": kind, "dimensions": 16, "hidden": 32},
        export={"tokens": True},
        encoders=encoders,
        pairs={name: pairs[name] for name in pairs if pairs[name]["modality"] in encoders},
    )
    bundle = pipeline.export(recipe, pipeline.encoders(recipe), random_heads(recipe), {}, tmp_path / "bundle")
    assert all(tower.tokens for tower in bundle.manifest.towers.values())
    plain = {name: tower.model_copy(update={"tokens": False}) for name, tower in bundle.manifest.towers.items()}
    assert space_id(bundle.manifest.dimensions, plain) == bundle.manifest.space, "with and without are one space"
    pictures, sounds = read_pairs(recipe, "pictures")["test"].media[:4], []
    if "audio" in encoders:
        sounds = read_pairs(recipe, "tones")["test"].media[:3]
        sounds = sorted(sounds, key=lambda path: -path.stat().st_size)  # of different lengths

    def run(modality: Any, item: Any) -> tuple[np.ndarray, np.ndarray]:
        """An item's vector and its tokens, by the graph itself, alone."""
        encoder = load_encoder(recipe, modality)
        session = onnxruntime.InferenceSession(bundle.tower_path(modality), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        arrays = collate(encoder.preprocessing, [preparer(encoder)(item)])
        vectors, tokens, mask = session.run([OUTPUT, TOKENS, TOKEN_MASK], dict(zip(names, arrays, strict=True)))
        own = tokens if tokens.ndim == 2 else tokens[0][mask[0] > 0]
        np.testing.assert_allclose(np.linalg.norm(own, axis=1), 1, atol=1e-5)
        return vectors[0], own

    items = {path.name: run("image", path) for path in pictures} | {path.name: run("audio", path) for path in sounds}
    assert not sounds or len({len(tokens) for _, tokens in items.values()}) > 1
    words = "a plain picture of something red"
    query, query_tokens = run("text", words)
    expected = {
        name: 0.5 * float(query @ vector) + 0.5 * float((query_tokens @ tokens.T).max(1).mean())
        for name, (vector, tokens) in items.items()
    }
    settings = Settings(bundle=bundle.path, store=tmp_path / "store", device="cpu", threads=1)
    with serving(settings) as client:
        assert client.put("/collections/rich", json={"tokens": True}).json()["tokens"] is True
        given = [{"id": path.name, "image": _b64(path), "collection": "rich"} for path in pictures]
        given += [{"id": path.name, "audio": _b64(path), "collection": "rich"} for path in sounds]
        assert client.post("/items", json={"items": given}).json()["upserted"] == len(items)
        body = {"query": words, "collection": "rich", "rerank": {"method": "maxsim"}, "include": ["explain"]}
        results = client.post("/search", json=body).json()["results"]
        assert [each["id"] for each in results] == sorted(expected, key=lambda name: -expected[name])
        for each in results:
            assert each["score"] == pytest.approx(expected[each["id"]], abs=2e-3)  # kept as float16
            assert len(each["explain"]["heat"]) == len(items[each["id"]][1])
        # The item's own picture comes first under transport, which then costs next to nothing.
        file = {"image": _b64(pictures[1])}
        moved = {"query": file, "collection": "rich", "rerank": {"method": "transport", "weight": 1}}
        found = client.post("/search", json=moved).json()["results"]
        assert found[0]["id"] == pictures[1].name and found[0]["score"] == pytest.approx(1, abs=0.02)
        assert client.post("/search", json=body | {"collection": "default"}).status_code == 422


def test_encoders_without_tokens_are_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        encoders={
            "image": {"folder": "mobilenet", "layers": [3, 9]},
            "audio": {"folder": "yamnet"},
            "text": {"folder": "bert", "pooling": "both"},
        }
    )
    with pytest.raises(TokenError, match="mobilenet has one vector per image"):
        check_has_tokens(load_encoder(recipe, "image"))
    with pytest.raises(TokenError, match="bert pools CLS and mean side by side"):
        check_has_tokens(load_encoder(recipe, "text"))
    check_has_tokens(load_encoder(recipe, "audio"))


def _b64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
