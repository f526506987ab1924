"""A real bundle, small enough to make in a second: three ONNX graphs, a tokenizer, a manifest. No torch.

The towers mean something, so that tests can expect an order: an image tower sees the mean colour of four quarters, an
audio tower the mean spectrum, a text tower the mean of its words' embeddings. The word "red" is embedded where a red
image lands, and so on for green and blue, and "tone" where a 440 Hz tone does.
"""

import datetime
import hashlib
import string
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace

from service.contract.arrays import ArrayPreprocessing
from service.contract.bundle import (
    EARLIER_ROWS,
    OUTPUT,
    ROWS,
    Bundle,
    Encoder,
    Manifest,
    Modality,
    Preprocessing,
    Projector,
    Tower,
    front_end_of,
    sha256_file,
    space_id,
    write_bundle,
)
from service.contract.images import ImagePreprocessing
from service.contract.licences import Licence
from service.contract.patches import LogMelPatches, log_mel_patches
from service.contract.tokens import TextPreprocessing

DIMENSIONS = 16
SIDE = 32
WORDS = ("[PAD]", "[UNK]", "red", "green", "blue", "tone", "a", "photo", "of", "the", "sound", "dog", "cat", "barks")
LETTERS = string.ascii_letters + string.digits
"""Other words are known by their letters, so that texts differ; those of another alphabet are unknown."""
PIECES = tuple(dict.fromkeys((*WORDS, *LETTERS, *(f"##{each}" for each in LETTERS))))
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
MAX_TOKENS = 32

IMAGE = ImagePreprocessing(height=SIDE, width=SIDE)
AUDIO = LogMelPatches()
TEXT = TextPreprocessing(max_length=MAX_TOKENS)


def build(
    target: Path,
    name: str = "tiny",
    seed: int = 0,
    text: TextPreprocessing = TEXT,
    licences: Sequence[Licence | str] = (),
    *,
    bert: bool = False,
    further: Mapping[str, Preprocessing] = MappingProxyType({}),
) -> Bundle:
    """Write the bundle to `target`. Another seed is another space. `bert`: with BERT's normaliser and words.

    `further` towers read arrays of rows of three numbers, and see the largest of each: the first is red, the second
    green, the third blue; or they read what one of the others reads, and see the same."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((3 * 4, DIMENSIONS)).astype(np.float32)
    audio = rng.standard_normal((AUDIO.n_mels, DIMENSIONS)).astype(np.float32)
    graphs: dict[Modality, onnx.ModelProto] = {
        "image": _image_graph(image),
        "audio": _audio_graph(audio),
        "text": _text_graph(_word_vectors(image, audio, rng)),
    }
    specs: dict[Modality, Preprocessing] = {"image": IMAGE, "audio": AUDIO, "text": text, **further}
    colours = np.stack([colour_features(colour) @ image for colour in COLOURS.values()])
    for modality, spec in further.items():
        read = front_end_of(spec)
        graphs[modality] = _array_graph(spec, colours) if isinstance(spec, ArrayPreprocessing) else graphs[read]
    with tempfile.TemporaryDirectory() as folder:
        files = {"tokenizer.json": Path(folder) / "tokenizer.json", "MODEL_CARD.md": Path(folder) / "MODEL_CARD.md"}
        _tokenizer(bert).save(str(files["tokenizer.json"]))
        files["MODEL_CARD.md"].write_text("# tiny\n\nMade by a test.\n")
        others = {each: sha256_file(path) for each, path in files.items()}
        towers: dict[Modality, Tower] = {}
        for modality, graph in graphs.items():
            path = files[f"{modality}.onnx"] = Path(folder) / f"{modality}.onnx"
            onnx.checker.check_model(graph)
            onnx.save(graph, path)
            weights = hashlib.sha256(f"{modality} {seed}".encode()).hexdigest()
            towers[modality] = Tower(
                file=f"{modality}.onnx",
                sha256=sha256_file(path),
                encoder=Encoder(source="test", weights_sha256=weights, licence="Apache-2.0"),
                projector=Projector(kind="linear", features=DIMENSIONS, weights_sha256=weights),
                preprocessing=specs[modality],
            )
        manifest = Manifest(
            name=name,
            created=datetime.date(2026, 1, 1).isoformat(),
            space=space_id(DIMENSIONS, towers),
            dimensions=DIMENSIONS,
            matryoshka=(8,),
            towers=towers,
            temperature=0.07,
            templates={"image": ["a photo of a {}"], "audio": ["the sound of a {}"]},
            evaluation={"test": True},
            licences=tuple(map(Licence.model_validate, licences)),
            files=others,
        )
        return write_bundle(target, manifest, files)


def colour_features(colour: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return what the image graph pools from a plain image: channel by channel, four quarters each."""
    return np.repeat((np.asarray(colour, np.float32) / 255 - 0.5) / 0.5, 4)


def tone(hertz: float = 440.0, seconds: float = 1.0) -> NDArray[np.float32]:
    time = np.arange(int(seconds * AUDIO.sampling_rate)) / AUDIO.sampling_rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def _word_vectors(image: NDArray[np.float32], audio: NDArray[np.float32], rng: np.random.Generator) -> np.ndarray:
    table = rng.standard_normal((len(PIECES), DIMENSIONS))
    for word, colour in COLOURS.items():
        table[WORDS.index(word)] = colour_features(colour) @ image
    table[WORDS.index("tone")] = log_mel_patches(tone(), AUDIO).mean(axis=(0, 1, 2)) @ audio
    # Words that mean something outweigh those that do not, so that "a photo of a red dog" is red.
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    meant = np.isin(PIECES, ["tone", *COLOURS])[:, None]
    return (table / lengths * np.where(meant, 10.0, 1.0)).astype(np.float32)


def _tokenizer(bert: bool) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = Whitespace()
    if bert:
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), BertPreTokenizer()
    return tokenizer


def _image_graph(weights: NDArray[np.float32]) -> onnx.ModelProto:
    half = SIDE // 2
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["pooled"], kernel_shape=[half, half], strides=[half, half]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("MatMul", ["features", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], [OUTPUT], axis=1, p=2),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])]
    return _model(nodes, inputs, {"weights": weights})


def _array_graph(spec: ArrayPreprocessing, weights: NDArray[np.float32]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceMax", ["array", "rows"], ["features"], keepdims=0),
        helper.make_node("MatMul", ["features", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], [OUTPUT], axis=1, p=2),
    ]
    inputs = [helper.make_tensor_value_info("array", TensorProto.FLOAT, ["batch", *spec.prepared_shape])]
    return _model(nodes, inputs, {"weights": weights, "rows": np.array([1], np.int64)})


def _audio_graph(weights: NDArray[np.float32]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceMean", ["patches", "time_axes"], ["spectra"], keepdims=0),
        helper.make_node("MatMul", ["spectra", "matrix"], [ROWS]),
        helper.make_node("Concat", [EARLIER_ROWS, ROWS], ["rows"], axis=0),
        helper.make_node("MatMul", ["weights", "rows"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], [OUTPUT], axis=1, p=2),
    ]
    shape = ["patches_", 1, AUDIO.patch_frames, AUDIO.n_mels]
    inputs = [
        helper.make_tensor_value_info("patches", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["batch", "rows_"]),
    ]
    inputs.append(helper.make_tensor_value_info(EARLIER_ROWS, TensorProto.FLOAT, ["earlier", DIMENSIONS]))
    none = np.zeros((0, DIMENSIONS), np.float32)
    constants = {"matrix": weights, "time_axes": np.array([1, 2], np.int64), EARLIER_ROWS: none}
    model = _model(nodes, inputs, constants)
    model.graph.output.append(helper.make_tensor_value_info(ROWS, TensorProto.FLOAT, ["patches_", DIMENSIONS]))
    return model


def _text_graph(table: NDArray[np.float32]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"], axis=0),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["words", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
        helper.make_node("LpNormalization", ["summed"], [OUTPUT], axis=1, p=2),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    axes = {"last": np.array([2], np.int64), "middle": np.array([1], np.int64)}
    return _model(nodes, inputs, {"table": table, **axes})


def _model(nodes: list, inputs: list, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", DIMENSIONS])
    initialisers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tower", inputs, [output], initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
