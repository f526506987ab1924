"""Every family of aligned models: saved by its own library, imported by the command, served over HTTP.

What is served equals what transformers makes of the same folder, in one batch of unequal inputs.
"""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

from examples import sounds as examples
from service.contract.audio import decode_audio
from service.contract.bundle import read_bundle
from service.contract.images import decode_image
from service.settings import Settings
from tests.conftest import serving
from tests.matrix import matrix
from tests.training import aligned
from training.__main__ import main

# The exporter of torch itself uses what a newer torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

TEXTS = [
    "a cat",
    "a cat!",
    "A DOG at the beach, and the cat in the garden",
    "temple",
    "3 apples, 2 pears!",
    "Two people in red jackets walk over a bridge while it snows, and a train passes below them.",
    "rain on a tin roof",
    "一只猫坐在窗台上。",
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Of odd sizes: patches of colours, some large and some small."""
    rng, files = np.random.default_rng(0), []
    for index, size in enumerate(((97, 61), (45, 133), (64, 64), (210, 150), (50, 38))):
        patches = rng.uniform(0, 255, (2 + index, 3, 3)) * (0.4 if index == 1 else 1)
        files.append(io.BytesIO())
        Image.fromarray(patches.astype(np.uint8)).resize(size, Image.Resampling.NEAREST).save(files[-1], "PNG")
    return [file.getvalue() for file in files]


@pytest.fixture(scope="module")
def sounds() -> list[bytes]:
    """From a third of a second to a whole window of the tiny models, which is of two seconds."""
    files = []
    for name, seconds in (
        ("cat", 0.3),
        ("siren", 1.1),
        ("cat", 1.9),
        ("church_bell", 2.0),
        ("siren", 1.13),
        ("rain", 0.7),
    ):
        waveform = examples.synthesise(name)[int(0.2 * examples.RATE) :][: int(seconds * examples.RATE)]
        files.append(io.BytesIO())
        soundfile.write(files[-1], waveform, examples.RATE, format="WAV")
    return [file.getvalue() for file in files]


def imported(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The last line of the command, which must have come to its end."""
    code = main(["import", str(folder), "--out", str(out), *flags])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    last: dict[str, Any] = json.loads(captured.out.strip().splitlines()[-1])
    return last


def unit(output: Any) -> np.ndarray:
    return np.asarray(torch.nn.functional.normalize(output.pooler_output, dim=-1).numpy())


@torch.inference_mode()
def text_vectors(model: Any, folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = model.config.text_config.max_position_embeddings - (2 if model.config.model_type == "clap" else 0)
    padding = "max_length" if model.config.model_type == "siglip" else True
    inputs = tokenizer(texts, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
    return unit(model.get_text_features(**inputs))


@torch.inference_mode()
def picture_vectors(model: Any, folder: Path, files: list[bytes]) -> np.ndarray:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return unit(model.get_image_features(**processor([decode_image(file) for file in files], return_tensors="pt")))


@torch.inference_mode()
def sound_vectors(model: Any, folder: Path, files: list[bytes]) -> np.ndarray:
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    waveforms = [decode_audio(file, extractor.sampling_rate) for file in files]
    inputs = extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    inputs["is_longer"] = torch.zeros(len(files), 1, dtype=torch.bool)  # else one, at random
    return unit(model.get_audio_features(**inputs))


def vectors_of(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([each["embedding"] for each in response.json()["embeddings"]])


def agree(served: np.ndarray, expected: np.ndarray) -> None:
    """The same vectors, of inputs that are told well apart."""
    assert ((served * expected).sum(1) >= 0.9999).all()
    cosines = (expected @ expected.T)[np.triu_indices(len(expected), 1)]
    assert cosines.max() - cosines.min() >= 0.5


@pytest.mark.parametrize("name", matrix(aligned.SAVE, "clip"))
def test_a_family_is_served_as_transformers_computes_it(
    name: str, tmp_path: Path, pictures: list[bytes], sounds: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    aligned.SAVE[name](folder)
    last = imported(folder, tmp_path / "bundle", capsys)
    model = AutoModel.from_pretrained(folder).eval()
    medium = "audio" if model.config.model_type == "clap" else "image"
    assert last["parity.text"] >= 0.9999 and last[f"parity.{medium}"] >= 0.9999
    files, media = (
        (sounds, sound_vectors(model, folder, sounds))
        if medium == "audio"
        else (pictures, picture_vectors(model, folder, pictures))
    )
    texts = text_vectors(model, folder, TEXTS)
    with serving(Settings(bundle=tmp_path / "bundle", store=tmp_path / "store", device="cpu", threads=1)) as client:
        agree(vectors_of(client.post("/embed", json={"inputs": TEXTS})), texts)
        agree(vectors_of(client.post("/embed", files=[("file", file) for file in files])), media)
        alone = client.post("/embed", json={"inputs": [TEXTS[0]]})  # padded by nothing
        told = client.post(
            "/classify",
            files=[("file", files[0])],
            data={"request": json.dumps({"labels": TEXTS, "templates": ["{}"], "top_k": len(TEXTS)})},
        )
    assert vectors_of(alone)[0] @ texts[0] >= 0.9999
    assert told.status_code == 200, told.text
    logits = scale_of(model) * media[0] @ texts.T + bias_of(model)
    scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    labels = told.json()["results"][0]["labels"]
    assert [each["label"] for each in labels] == [TEXTS[place] for place in np.argsort(-logits)]
    for each in labels:
        place = TEXTS.index(each["label"])
        assert each["score"] == pytest.approx(scores[place], abs=1e-3)
        if hasattr(model, "logit_bias"):
            assert each["probability"] == pytest.approx(1 / (1 + np.exp(-logits[place])), abs=1e-3)
        else:
            assert "probability" not in each


def scale_of(model: Any) -> float:
    if hasattr(model, "temperature"):
        return 1 / model.temperature.item()
    scale: float = getattr(model, "logit_scale_a", getattr(model, "logit_scale", None)).exp().item()
    return scale


def bias_of(model: Any) -> float:
    return model.logit_bias.item() if hasattr(model, "logit_bias") else 0.0


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned") / "Tiny CLIP"
    aligned.clip(folder)
    return folder


def test_the_manifest_says_whose_model_it_is(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\n\nthe cat at the cinema\n")
    last = imported(clip, tmp_path / "bundle", capsys, "--texts", str(texts))
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert manifest.name == "Tiny-CLIP" and last["family"] == "clip" and last["seconds"] > 0
    assert [(each.of, each.licence, each.commercial) for each in manifest.parts] == [("Tiny CLIP", "mit", True)]
    assert {tower.projector.kind for tower in manifest.towers.values()} == {"none"}
    assert manifest.templates == {"image": ["a photo of a {}."]} and manifest.bias is None
    assert "imported" in (tmp_path / "bundle/MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ({"model_type": "blip"}, [], r"is of type blip: .* Read are: ALIGN \(align\), .*SigLIP.*sentence-transformers"),
        ({"model_type": "siglip2"}, [], "siglip2: it takes pictures of any shape"),
        ({"model_type": None}, [], "no model folder"),
        ({}, ["--revision", "main"], "--revision is of a hub id"),
        ({}, ["--texts", "absent.txt"], "absent.txt cannot be read"),
        ({}, ["--samples", "{folder}"], "holds no image file"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    flags: list[str],
    said: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(clip, folder)
    aligned.described(folder, **change)
    flags = [flag.format(folder=folder) for flag in flags]
    assert main(["import", str(folder), "--out", str(tmp_path / "bundle"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said, error), error
    assert not (tmp_path / "bundle").exists()
