"""Give rows what they measure on: features of a small recipe, the starter's vectors, heads trained in a moment."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract.bundle import Bundle, Modality, read_bundle
from training import pipeline
from training.features import Features, Item, cached_features
from training.fit.ladder import train
from training.heads.bundled import as_encoder
from training.heads.trained import Trained
from training.measure.prepared import Prepared
from training.measure.ranks import class_vectors, ranks
from training.measure.validation import overall, project, validate
from training.pairs import Pairs, Split
from training.recipe import Recipe, load_recipe

Floats = NDArray[np.float32]
Splits = Mapping[Split, Prepared]
RECIPE = Path(__file__).with_name("recipe.yaml")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Hits:
    """0 or 100 for each query of a direction (Q,), the mean over seeds, and the medium that each query belongs to."""

    right: NDArray[np.floating]
    owner: NDArray[np.int64]


class Lab:
    """Everything that rows share, made when it is first asked for and cached on disk as far as it is features."""

    def __init__(
        self,
        data: Path,
        cache: Path,
        bundle: Path = Path("build/starter"),
        overrides: Sequence[str] = (),
        recipe: Path = RECIPE,
    ) -> None:
        self.data, self.cache, self.bundle, self.overrides, self._recipe = data, cache, bundle, overrides, recipe

    def other(self, *overrides: str) -> "Lab":
        """Returns a lab with other encoders, by settings of the recipe."""
        return Lab(self.data, self.cache, self.bundle, overrides, self._recipe)

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self._recipe, [f"data.root={self.data.resolve()}", *self.overrides])

    @cached_property
    def pairs(self) -> pipeline.AllPairs:
        return pipeline.pairs(self.recipe, self.cache)

    @cached_property
    def encoders(self) -> pipeline.Encoders:
        return pipeline.encoders(self.recipe, self.cache)

    def encoded(self, modality: Modality, items: Sequence[Item], what: str = "", *, tokens: bool = False) -> Features:
        """Frozen features of items by the recipe's encoder, from the cache."""
        return cached_features(self.encoders[modality], items, self.cache, tokens=tokens, what=what)

    def splits(self, name: str, *, tokens: bool = False) -> dict[Split, Prepared]:
        """The pairs of a source with their features. Without tokens they are arrays in memory."""
        result: dict[Split, Prepared] = {}
        with_tokens = tokens or self.recipe.pairs[name].label is None  # one encoding of captions serves both
        for split, part in self.pairs[name].items():
            media = self.encoded(part.modality, part.media, f"{name} {split}", tokens=with_tokens)
            texts = self.encoded("text", part.texts, f"{name} {split} texts", tokens=with_tokens)
            if not tokens:
                media, texts = (Features(np.asarray(side.pooled), key=side.key) for side in (media, texts))
            result[split] = Prepared(part, media, texts)
        return result

    @cached_property
    def captions(self) -> dict[Split, Prepared]:
        """Flickr8k."""
        return self.splits("flickr8k")

    @cached_property
    def starter(self) -> Bundle:
        return read_bundle(self.bundle)

    def vectors(
        self, modality: Modality, items: Sequence[Item], what: str = "", bundle: Bundle | None = None
    ) -> Floats:
        """Unit vectors (N, D) of items by a bundle's tower, the starter's where none is named."""
        encoder = as_encoder(bundle or self.starter, modality)
        return np.asarray(cached_features(encoder, items, self.cache, what=what or f"starter {modality}").pooled)

    def labels(self, modality: Modality, classes: Sequence[str]) -> Floats:
        """The starter's unit vectors of class names (C, D), over its own templates."""
        templates = self.starter.manifest.templates[modality]
        prompts = [template.format(name) for name in classes for template in templates]
        return class_vectors(self.vectors("text", prompts, "prompts"), len(templates))

    def made(self, name: str) -> Path:
        """A folder for media that rows make."""
        folder = self.cache / "made" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fit(self, data: Mapping[str, Splits], seed: int = 0, **changes: Any) -> Trained:
        """Heads trained on sources; `changes` are of the recipe: projector={…}, train={…}."""
        values = self.recipe.model_dump()
        values["pairs"] = {name: values["pairs"].get(name, values["pairs"]["flickr8k"]) for name in data}
        values["projector"] |= changes.get("projector", {})
        values["train"] |= {"seed": seed, "baseline": False, **changes.get("train", {})}
        recipe = Recipe.model_validate(values)
        with tempfile.TemporaryDirectory() as work, _quiet():
            return train(recipe, data, Path(work), frozen=changes.get("frozen"))

    def score(self, trained: Trained, data: Mapping[str, Splits]) -> float:
        """The validation score of heads."""
        return overall(validate(self.recipe, trained.heads, data))

    def runs(self, splits: Splits, seeds: Sequence[int] = SEEDS, **changes: Any) -> list[Trained]:
        """Heads of captions alone, one per seed."""
        return [self.fit({"flickr8k": splits}, seed, **changes) for seed in seeds]

    def best(self, splits: Splits, grid: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], list[Trained]]:
        """Return, of several changes, the one with the best mean validation score over the seeds, and its heads."""
        all_runs = [self.runs(splits, **changes) for changes in grid]
        scores = [np.mean([self.score(run, {"flickr8k": splits}) for run in runs]) for runs in all_runs]
        top = int(np.argmax(scores))
        return grid[top], all_runs[top]

    def validated(self, runs: Sequence[Trained], splits: Splits) -> float:
        return float(np.mean([self.score(run, {"flickr8k": splits}) for run in runs]))


def mean_hits(hits: Sequence[Mapping[str, Hits]]) -> dict[str, Hits]:
    """The mean over runs of the hits of the same queries."""
    return {
        direction: Hits(np.mean([hit[direction].right for hit in hits], axis=0), hits[0][direction].owner)
        for direction in hits[0]
    }


def recall(media: Floats, texts: Floats, links: NDArray[np.int64], k: int = 1) -> dict[str, Hits]:
    """Hits in the top k, both directions: m2t and t2m."""
    return {
        direction: Hits((rank < k) * 100.0, owner) for direction, (rank, owner) in ranks(media, texts, links).items()
    }


def tested(runs: Sequence[Trained], part: Prepared) -> dict[str, Hits]:
    """R@1 of heads on a split, the mean over the runs."""
    return mean_hits(
        [
            recall(
                project(run.heads[part.pairs.modality], part.media),
                project(run.heads["text"], part.texts),
                part.pairs.links,
            )
            for run in runs
        ]
    )


def both_ways(hits: Mapping[str, Hits]) -> Hits:
    """One number per medium: the mean of its own R@1 and of that of its captions, where it has any of its own."""
    owners = np.unique(np.concatenate([hit.owner for hit in hits.values()]))
    sums, there = np.zeros(len(owners)), np.zeros(len(owners))
    for hit in hits.values():
        place = np.searchsorted(owners, hit.owner)
        counts = np.bincount(place, minlength=len(owners))
        sums += np.bincount(place, hit.right, len(owners)) / np.maximum(counts, 1)
        there += counts > 0
    return Hits(sums / there, owners)


def subset(prepared: Prepared, links: NDArray[np.int64]) -> Prepared:
    """Returns the same media and texts with other links."""
    return replace(prepared, pairs=replace(prepared.pairs, links=links))


def drawn(
    rng: np.random.Generator, vectors: Floats, labels: NDArray[np.int64], classes: NDArray[np.int64], count: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Draws up to `count` media of each class; returns them and their labels."""
    places = np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:count] for label in classes])
    return vectors[places], labels[places]


def some(splits: Splits, media: int, first: int = 0) -> Splits:
    """`media` training media from the `first` on, and their texts."""
    part = splits["train"]
    keep = (part.pairs.links[:, 0] >= first) & (part.pairs.links[:, 0] < first + media)
    links = part.pairs.links[keep]
    used, texts = np.unique(links[:, 1], return_inverse=True)
    pairs = replace(
        part.pairs,
        media=part.pairs.media[first : first + media],
        texts=[part.pairs.texts[i] for i in used],
        links=np.stack([links[:, 0] - first, texts.reshape(-1)], 1),
    )
    rows = ((part.media, np.arange(first, first + len(pairs.media))), (part.texts, used))
    features = [Features(np.array(side.pooled[chosen])) for side, chosen in rows]
    return {**splits, "train": Prepared(pairs, *features)}


def shuffled(splits: Splits, share: float) -> Splits:
    """A share of the training media with the captions of one another."""
    part, rng = splits["train"], np.random.default_rng(0)
    wrong = rng.permutation(len(part.pairs.media))[: int(share * len(part.pairs.media))]
    moved = np.arange(len(part.pairs.media))
    moved[wrong] = np.roll(wrong, 1)
    links = part.pairs.links.copy()
    links[:, 0] = moved[links[:, 0]]
    return {**splits, "train": replace(part, pairs=replace(part.pairs, links=links))}


def picture(path: Path, make: Callable[[], Image.Image]) -> Path:
    """A picture that is made once."""
    if not path.is_file():
        make().save(path)
    return path


def files_of(pairs: Pairs) -> list[Path]:
    """The media of pairs that are files of their own, as all of this recipe's are."""
    return [Path(str(medium)) for medium in pairs.media]


def paired_texts(pairs: Pairs) -> NDArray[np.int64]:
    """The first text of each medium, (media,)."""
    order = np.lexsort((pairs.links[:, 1], pairs.links[:, 0]))
    _, first = np.unique(pairs.links[order, 0], return_index=True)
    return pairs.links[order[first], 1]


def pytest_passes(*names: str) -> tuple[int, int]:
    """Run tests of this repository in a process of their own: how many passed, and how many there were.

    Raises RuntimeError where there are none: 0 of 0 prove nothing.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rN", *names],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    for word in done.stdout.strip().splitlines()[-1].replace("errors", "error").split(", ") if done.stdout else []:
        count, _, kind = word.strip("= ").partition(" ")
        kind = kind.split(" ")[0]
        if count.isdigit() and kind in counts:
            counts[kind] = int(count)
    if not sum(counts.values()):
        raise RuntimeError(f"no test ran of {' '.join(names)}: {(done.stdout + done.stderr)[-200:]}")
    return counts["passed"], sum(counts.values())


class _quiet:
    """Keeps progress and tables of training out of the rows' lines."""

    def __enter__(self) -> None:
        self._kept, self._null = sys.stderr, open(os.devnull, "w")
        sys.stderr = self._null

    def __exit__(self, *_: object) -> None:
        sys.stderr = self._kept
        self._null.close()
