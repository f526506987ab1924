"""Isthmus as a model of MTEB, for its tasks of texts, images and sounds.

python -m benchmarks.mteb [--bundle build/starter | --url http://…] [--tasks NAME …] [--benchmark NAME] [--data FOLDER]
                          [--out build/bench/mteb]

`--tasks` and `--benchmark` name those of MTEB, whose data comes from the hub, so that they need a network (sounds need
`pip install 'mteb[audio]'` too). `--data` (shared/data) adds tasks of the same kinds over local data, each over what no
starter was trained on: captions and photographs of Flickr8k's test split, ESC-50's fold 5 by MTEB's own labels. Results
are MTEB's own files under `--out`. The last line is one JSON object: {task: main score}.
"""

import argparse
import csv
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import mteb
import numpy as np
import soundfile
from datasets import Dataset, Features, Image, Value
from datasets import Sequence as ListOf
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.tasks import ESC50ZeroshotClassification
from mteb.types import PromptType
from numpy.typing import NDArray

from benchmarks.servers import BenchmarkError, isthmus
from isthmus_client import Input, Isthmus

KINDS = ("text", "image", "audio")


class IsthmusEncoder(AbsEncoder):
    """A served bundle. An input of several kinds has the mean of their vectors, scaled to length 1."""

    def __init__(self, space: Isthmus) -> None:
        self.space = space
        served = space.models()[0]
        self.dimensions = served.dimensions
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"isthmus/{served.name}",
                "revision": served.space,
                "embed_dim": served.dimensions,
                "similarity_fn_name": ScoringFunction.COSINE,
                "modalities": [kind for kind in KINDS if kind in served.towers],
            }
        )

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **_: Any) -> NDArray[np.float32]:
        """Return the vectors (N, D) of what a data loader gives. Raises ValueError for a kind that is not read."""
        kinds = [kind for kind in KINDS if kind in inputs.dataset.features]
        if not kinds or "video" in inputs.dataset.features:
            raise ValueError(f"Isthmus embeds {', '.join(KINDS)}, and this task has {list(inputs.dataset.features)}")
        rows = (
            _input(kind, value)
            for batch in inputs
            for values in zip(*(batch[kind] for kind in kinds), strict=True)
            for kind, value in zip(kinds, values, strict=True)
        )
        role: Literal["query", "passage"] = "query" if prompt_type is PromptType.query else "passage"
        made = [embedding.vector for embedding in self.space.embed_many(rows, role=role, on_error="fail")]
        vectors = np.array(made, np.float32).reshape(-1, len(kinds), self.dimensions).mean(axis=1)
        unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


def _input(kind: str, value: Any) -> Input:
    """An item of a data loader as an input: a text, a PIL image as PNG, a waveform (channels, samples) as WAV."""
    if kind == "text":
        return value or " "
    buffer = io.BytesIO()
    if kind == "image":
        value.convert("RGB").save(buffer, "PNG")
    else:
        samples = np.asarray(value["array"], np.float32)
        soundfile.write(buffer, samples.T, value["sampling_rate"], format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _metadata(**described: Any) -> TaskMetadata:
    """The description of a task over local data."""
    given: dict[str, Any] = {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "prompt": None, "bibtex_citation": ""}
    given |= {"dataset": {"path": "local", "revision": "1"}, "reference": None, "sample_creation": "found"}
    unknown = ("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect")
    return TaskMetadata.model_validate(dict.fromkeys(unknown) | given | described)


class _Flickr8k(AbsTaskRetrieval):
    """Retrieval among the test split: `asked` and `stored` say what the queries and the documents are."""

    asked: str
    stored: str
    root: Path

    def load_data(self, *_: Any, **__: Any) -> None:
        names = (self.root / "flickr8k/split_test.txt").read_text().split()
        captions: dict[str, list[str]] = {name: [] for name in names}
        with (self.root / "flickr8k/captions.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["image"] in captions:
                    captions[row["image"]].append(row["caption"])
        photographs = {name: (name, str(self.root / "flickr8k/images" / name)) for name in names}
        first = {f"{name} 0": (name, captions[name][0]) for name in names}
        others = {f"{name} {n}": (name, text) for name in names for n, text in enumerate(captions[name][1:], 1)}
        sides = {"image": photographs, "first caption": first, "other captions": others, "captions": first | others}
        asked, stored = sides[self.asked], sides[self.stored]
        of_photograph: dict[str, list[str]] = {name: [] for name in names}
        for id, (name, _content) in stored.items():
            of_photograph[name].append(id)
        relevant = {id: dict.fromkeys(of_photograph[name], 1) for id, (name, _content) in asked.items()}
        split: Any = {"queries": _table(asked), "corpus": _table(stored), "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def _table(contents: dict[str, tuple[str, str]]) -> Dataset:
    values = [content for _, content in contents.values()]
    if Path(values[0]).is_file():
        return Dataset.from_dict({"id": list(contents), "image": values}).cast_column("image", Image())
    return Dataset.from_dict({"id": list(contents), "text": values})


class Flickr8kT2I(_Flickr8k):
    asked, stored = "captions", "image"
    metadata = _metadata(
        name="LocalFlickr8kT2IRetrieval",
        description="Photographs of Flickr8k's test split by their captions.",
        type="Any2AnyRetrieval",
        category="t2i",
        main_score="ndcg_at_10",
        modalities=["text", "image"],
    )


class Flickr8kI2T(_Flickr8k):
    asked, stored = "image", "captions"
    metadata = _metadata(
        name="LocalFlickr8kI2TRetrieval",
        description="Captions of Flickr8k's test split by their photograph.",
        type="Any2AnyRetrieval",
        category="i2t",
        main_score="ndcg_at_10",
        modalities=["text", "image"],
    )


class Flickr8kT2T(_Flickr8k):
    asked, stored = "first caption", "other captions"
    metadata = _metadata(
        name="LocalFlickr8kCaptionRetrieval",
        description="Captions of Flickr8k's test split by another caption of the same photograph.",
        type="Retrieval",
        category="t2t",
        main_score="ndcg_at_10",
        modalities=["text"],
    )


def _clips(root: Path, folds: Sequence[str], labels: Sequence[str]) -> Dataset:
    """ESC-50's clips of some folds with the places of their labels; without recordings that other folds share."""
    with (root / "esc50/index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    source = {row["file"]: row["file"].split("-")[1] for row in rows}
    elsewhere = {source[row["file"]] for row in rows if row["fold"] not in folds}
    chosen = [row for row in rows if row["fold"] in folds and source[row["file"]] not in elsewhere]
    places = {label: place for place, label in enumerate(labels)}
    sounds = []
    for row in chosen:
        samples, rate = soundfile.read(root / "esc50/audio" / row["file"], dtype="float32")
        sounds.append({"array": samples, "sampling_rate": rate})
    audio = {"array": ListOf(Value("float32")), "sampling_rate": Value("int64")}
    targets = [places[_OTHER_NAMES.get(row["class"]) or re.sub(r"\W+", "_", row["class"].lower())] for row in chosen]
    return Dataset.from_dict(
        {"audio": sounds, "target": targets}, features=Features({"audio": audio, "target": Value("int64")})
    )


_OTHER_NAMES = {"Door knock": "door_wood_knock"}
_LABELS = [label.removeprefix("This is a sound of ") for label in ESC50ZeroshotClassification().get_candidate_labels()]


class Esc50ZeroShot(ESC50ZeroshotClassification):
    """MTEB's task with its labels, over the fold that no starter was trained on."""

    root: Path
    metadata = _metadata(
        name="LocalESC50Fold5Zeroshot",
        description="Which of ESC-50's 50 classes a sound of fold 5 is of, by MTEB's texts.",
        type="AudioZeroshotClassification",
        category="a2t",
        main_score="accuracy",
        modalities=["audio", "text"],
    )

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset = {"test": _clips(self.root, ["5"], _LABELS)}
        self.data_loaded = True


class Esc50Probe(AbsTaskClassification):
    """Logistic regression on the vectors of folds 3 and 4, measured on fold 5."""

    root: Path
    input_column_name = "audio"
    label_column_name = "target"
    samples_per_label = 16
    metadata = _metadata(
        name="LocalESC50Classification",
        description="ESC-50's classes by a linear probe on 16 sounds of each.",
        type="AudioClassification",
        category="a2t",
        main_score="accuracy",
        modalities=["audio"],
    )

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset = {
            "train": _clips(self.root, ["3", "4"], _LABELS),
            "test": _clips(self.root, ["5"], _LABELS),
        }
        self.data_loaded = True


LOCAL: Sequence[type[Any]] = (Flickr8kT2T, Flickr8kT2I, Flickr8kI2T, Esc50ZeroShot, Esc50Probe)


def local_tasks(root: Path) -> list[AbsTask]:
    """The tasks over local data. Raises BenchmarkError where there is none."""
    for name in ("flickr8k/captions.csv", "esc50/index.csv"):
        if not (root / name).is_file():
            raise BenchmarkError(f"{root / name} is not there: --data is a folder that holds flickr8k and esc50")
    tasks = [task() for task in LOCAL]
    for task in tasks:
        task.root = root
    return tasks


def run(space: Isthmus, tasks: Sequence[AbsTask], out: Path) -> dict[str, float]:
    """Evaluate tasks, write MTEB's files, print a table, and return the main score of each."""
    encoder: Any = IsthmusEncoder(space)
    cache = mteb.ResultCache(cache_path=out)
    results = mteb.evaluate(encoder, tasks, cache=cache, encode_kwargs={"batch_size": 64}, overwrite_strategy="always")
    scores = {result.task_name: float(result.get_score()) for result in results.task_results}
    print(f"{'task':<36} {'score':>7}  {'main score'}")
    for task in tasks:
        if (name := task.metadata.name) in scores:
            print(f"{name:<36} {scores[name]:7.4f}  {task.metadata.main_score}")
    return scores


@contextmanager
def _opened(url: str | None, bundle: Path) -> Iterator[Isthmus]:
    with ExitStack() as closing:
        if url is None:
            store = Path(closing.enter_context(tempfile.TemporaryDirectory())) / "store"
            url = closing.enter_context(isthmus("isthmus", bundle, store)).address
        yield closing.enter_context(Isthmus(url))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--url", help="a running server; without it one is started with the bundle")
    parser.add_argument("--tasks", nargs="+", default=[], help="names of MTEB's tasks, of local ones too with --data")
    parser.add_argument("--benchmark", help='one of MTEB\'s, such as "MTEB(eng, v2)" or "MIEB(lite)"')
    parser.add_argument("--data", type=Path, help="where flickr8k and esc50 are")
    parser.add_argument("--out", type=Path, default=Path("build/bench/mteb"))
    arguments = parser.parse_args(argv)
    try:
        local = local_tasks(arguments.data) if arguments.data else []
        names = {task.metadata.name for task in local}
        chosen = [task for task in local if not arguments.tasks or task.metadata.name in arguments.tasks]
        if elsewhere := [name for name in arguments.tasks if name not in names]:
            chosen += mteb.get_tasks(tasks=elsewhere)
        if arguments.benchmark:
            chosen += mteb.get_benchmark(arguments.benchmark)
        if not chosen:
            raise BenchmarkError("nothing to run: name --tasks, a --benchmark, or a folder of --data")
        with _opened(arguments.url, arguments.bundle) as space:
            print(json.dumps(run(space, chosen, arguments.out)))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
