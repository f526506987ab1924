"""The steps of a run, each a command of its own: pairs → features → train → evaluate → export."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle, Modality
from training.bundle.export import ExportError, export_bundle
from training.bundle.quantised import quantised
from training.data.leaks import subset, without_leaks
from training.distributed import Ranks, joined
from training.encoders import FrozenEncoder, load_encoder
from training.features import FeatureError, Item, cached_features, with_views
from training.files import default_cache
from training.fit.abstention import learn
from training.fit.hubs import uncorrected, with_querybank
from training.fit.ladder import train
from training.heads.captions import caption_features, captions, text_head
from training.heads.concepts import named
from training.heads.projector import Head
from training.heads.trained import Trained, licences_of, load_projectors, save_projectors, set_rise
from training.measure.emergent import check_queries, emergent_figures
from training.measure.gap import Paired, gap_figures
from training.measure.intervals import interval
from training.measure.page import write_page
from training.measure.prepared import Prepared
from training.measure.ranks import class_vectors, with_prompts, word_precision
from training.measure.results import Labelled, Result, captioned, figures_of, labelled
from training.measure.validation import Data, label_prompts, project
from training.pairs import BROKEN, SUFFIXES, PairError, Pairs, Split, read_pairs
from training.recipe import EmergentSpec, Recipe

Encoders = Mapping[Modality, FrozenEncoder]
AllPairs = Mapping[str, Mapping[Split, Pairs]]
Inputs = tuple[Encoders, AllPairs, dict[str, dict[Split, Prepared]]]
_SAMPLES = 16  # real items per modality that a graph is checked on
_SAMPLE_WORDS = ("dog", "violin", "thunderstorm in the mountains")


def pairs(recipe: Recipe, cache: Path | None = None) -> AllPairs:
    """Read and check the pairs of every source, without what leaks from a test split; print how many there are.

    What only later steps read is looked at too: a file that is not there must not end a run after hours.
    """
    captions(recipe)
    for field, file in {"attribution": recipe.attribution, "train.start": recipe.train.start}.items():
        if file is not None and not recipe.path(file).is_file():
            raise PairError(f"{field}: {recipe.path(file)} is not there")
    read = {name: read_pairs(recipe, name) for name in recipe.pairs}
    for name, spec in recipe.emergent.items():
        check_queries(name, spec, read[spec.queries]["test"])
    result: AllPairs = without_leaks(recipe, read, cache or default_cache())
    print(f"{'source':16}{'split':12}{'media':>9}{'texts':>9}{'pairs':>9}{'classes':>9}", file=sys.stderr)
    for name, splits in result.items():
        for split, part in splits.items():
            classes = len(part.classes) if part.labels is not None else 0
            counts = f"{len(part.media):>9,}{len(part.texts):>9,}{len(part.links):>9,}{classes or '':>9}"
            print(f"{name:16}{split:12}{counts}", file=sys.stderr)
    _check_contrast(recipe, result)
    paired = {source.modality for source in recipe.pairs.values()}
    for modality in [modality for modality in recipe.encoders if modality != "text" and modality not in paired]:
        print(f"encoders.{modality}: no pairs have such media, so there will be no such tower", file=sys.stderr)
    return result


def _check_contrast(recipe: Recipe, read: AllPairs) -> None:
    """Raises PairError where the train splits have not two media and two texts or classes to tell apart."""
    taught = [read[name]["train"] for name, source in recipe.pairs.items() if source.supervision == "pairs"]
    taught = [part for part in taught if part.weight]
    if recipe.texts or any(source.supervision == "concepts" for source in recipe.pairs.values()) or not taught:
        return  # names of concepts are texts too
    said = sum(len(part.texts if part.labels is None else np.unique(part.labels)) for part in taught)
    media = sum(len(part.media) for part in taught)
    if min(said, media) < 2:
        names = ", ".join(f"pairs.{part.name}" for part in taught)
        raise PairError(f"{names}: {media:,} media with {said:,} texts or classes to train on: nothing to tell apart")


def encoders(recipe: Recipe, cache: Path | None = None) -> Encoders:
    """Load the recipe's frozen encoders. Those that it wants in int8 are quantised once, and kept in the cache."""
    loaded = {modality: load_encoder(recipe, modality) for modality in recipe.encoders}
    return {
        modality: quantised(recipe, encoder, cache or default_cache())
        if recipe.encoders[modality].precision == "int8"
        else encoder
        for modality, encoder in loaded.items()
    }


def features(
    recipe: Recipe, frozen: Encoders, read: AllPairs, cache: Path, share: bool = False
) -> dict[str, dict[Split, Prepared]]:
    """Frozen features of every medium and text, from the cache as far as they are there.

    Media that cannot be read are counted, named and left out; where they are more than a few, FeatureError is raised.
    Of a process's share they are left out alone: many of a share can be few of the whole.
    """
    tokens = recipe.projector.needs_tokens
    result: dict[str, dict[Split, Prepared]] = {}
    for name, splits in read.items():
        result[name] = {}
        for split, part in splits.items():
            broken: dict[int, str] = {}
            encoder, what = frozen[part.modality], f"{name} {split}"
            views = recipe.encoders[part.modality].views
            online = views == "online" and split == "train"
            media = cached_features(
                encoder,
                part.media,
                cache,
                tokens=tokens and not online,
                lenient=True,
                what=f"{what} media",
                broken=broken,
            )
            if broken:
                if not share:
                    _tell_broken(what, broken, len(part.media), cache)
                part = subset(part, np.array([place not in broken for place in range(len(part.media))]))
                media = cached_features(encoder, part.media, cache, tokens=tokens and not online)
            if split == "train" and views and len(part.media):
                media = with_views(encoder, part.media, media, cache, views, tokens=tokens, what=f"{what} media")
            texts = cached_features(frozen["text"], part.texts, cache, tokens=tokens, what=f"{what} texts")
            result[name][split] = Prepared(part, media, texts)
    return result


def prepare(recipe: Recipe, cache: Path) -> Inputs:
    """Load encoders, pairs and features. Under torchrun each process encodes a share; then all read what is cached."""
    ranks = joined()
    with ranks.first():
        read, frozen = pairs(recipe, cache), encoders(recipe, cache)
    if ranks.count > 1:
        features(recipe, frozen, share_of(read, ranks), cache, share=True)
        ranks.collect(None)  # until all have
    with ranks.first():
        return frozen, read, features(recipe, frozen, read, cache)


def share_of(read: AllPairs, ranks: Ranks) -> AllPairs:
    """This process's share of all media and texts, of which it encodes the features."""

    def own(part: Pairs) -> Pairs:
        media, texts = (ranks.share_of(len(items)) for items in (part.media, part.texts))
        return replace(
            part,
            media=part.media[media],
            texts=part.texts[texts],
            links=part.links[:0],
            labels=None if part.labels is None else part.labels[media],
        )

    return {name: {split: own(part) for split, part in splits.items()} for name, splits in read.items()}


def _tell_broken(what: str, broken: Mapping[int, str], total: int, cache: Path) -> None:
    """Say how many media cannot be read, and write all of them down. Raises FeatureError where they are too many."""
    reasons = [broken[place] for place in sorted(broken)]
    if len(broken) > max(1, BROKEN * total):
        raise FeatureError(f"{what}: {len(broken):,} of {total:,} media cannot be read, the first: {reasons[0]}")
    listed = cache / f"broken-{what.replace(' ', '-')}.txt"
    listed.write_text("\n".join(reasons) + "\n", encoding="utf-8")
    print(f"{what}: {len(broken):,} of {total:,} media cannot be read and are left out: {reasons[0]}", file=sys.stderr)
    print(f"all of them: {listed}", file=sys.stderr)


def fit(recipe: Recipe, frozen: Encoders, data: Data, cache: Path, work: Path) -> Trained:
    """Train the projectors; write projectors.safetensors and training.json into `work`."""
    given: dict[Modality, Head] = {}
    names = named(recipe, frozen, cache)
    if recipe.texts:
        texts = caption_features(recipe, frozen["text"], cache)
        given = {"text": text_head(recipe, frozen["text"], texts)}
    trained = train(recipe, data, work, given, names)
    if joined().index:
        return trained
    if given and recipe.projector.querybank:
        trained = with_querybank(recipe, trained, data, names, captions=[texts])
    return _finished(recipe, frozen, data, trained, work)


def refit(recipe: Recipe, frozen: Encoders, data: Data, trained: Trained, cache: Path, work: Path) -> Trained:
    """Choose and fit the correction of hubs anew, for heads that stay as they are; write into `work` as `fit` does."""
    texts = [caption_features(recipe, frozen["text"], cache)] if recipe.texts else []
    set_rise(trained.heads, recipe.projector.rise)
    corrected = with_querybank(recipe, uncorrected(trained), data, named(recipe, frozen, cache), captions=texts)
    return _finished(recipe, frozen, data, corrected, work)


def _finished(recipe: Recipe, frozen: Encoders, data: Data, trained: Trained, work: Path) -> Trained:
    """The heads with what is learned once they are chosen; write projectors.safetensors and training.json."""
    learned = learn(recipe, trained.heads, data, trained.temperature)
    learned_from = {modality: frozen[modality].weights_sha256 for modality in trained.heads}
    trained = replace(trained, abstention=learned, licences=licences_of(recipe), encoders=learned_from)
    work.mkdir(parents=True, exist_ok=True)
    save_projectors(work / "projectors.safetensors", trained)
    record = {"history": trained.history, **trained.ladder, **trained.timing}
    (work / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return trained


def evaluate(recipe: Recipe, frozen: Encoders, data: Data, trained: Trained, cache: Path, work: Path) -> dict[str, Any]:
    """Figures on every test split; write evaluation.json and report.html into `work`."""
    figures: dict[str, Any] = {}
    results: dict[str, Result] = {}
    paired: dict[Split, list[Paired]] = {"test": [], "validation": []}
    for name, splits in data.items():
        test = splits["test"].pairs
        if not len(test.media):
            continue
        figures[f"{name}.concept_informed"] = bool(recipe.labels_seen(test.modality))
        media, texts = _projected(trained, splits["test"])
        if test.words:
            figures[f"{name}.map"] = word_precision(media, texts, test.links)
            continue
        for split, sets in paired.items():
            part = splits[split]
            if len(part.pairs.links):
                vectors = (media, texts) if split == "test" else _projected(trained, part)
                sets.append(Paired(name, test.modality, *vectors, part.pairs.links, test.labels is None))
        if test.labels is None:
            results[name] = captioned(test, media, texts)
        else:
            classes = _classes(recipe, frozen, trained, test, cache)
            results[name] = told = labelled(test, media, classes, trained.temperature)
            figures |= _unseen(splits, told)
        figures |= {f"{name}.{key}": value for key, value in figures_of(results[name]).items()}
    for name, spec in recipe.emergent.items():
        figures |= _emergent(name, spec, data, trained)
    figures |= gap_figures(paired["test"], paired["validation"], trained.means)
    figures["temperature"] = round(trained.temperature, 5)
    figures |= {f"abstention.{kind}.auroc": round(detector.auroc, 4) for kind, detector in trained.abstention.items()}
    figures |= trained.ladder
    work.mkdir(parents=True, exist_ok=True)
    (work / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_page(work / "report.html", recipe.name, figures, results, history=trained.history)
    return figures


def _projected(trained: Trained, part: Prepared) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors of the media and texts of a split."""
    return project(trained.heads[part.pairs.modality], part.media), project(trained.heads["text"], part.texts)


def _unseen(splits: Mapping[Split, Prepared], result: Labelled) -> dict[str, Any]:
    """Return whether training saw the classes of a test split, and top-1 of those that it did not."""
    name, labels, train = result.pairs.name, result.pairs.labels, splits["train"].pairs.labels
    assert labels is not None
    known = np.isin(labels, [] if train is None else train)
    figures: dict[str, Any] = {f"{name}.seen": bool(known.all())}
    if not known.all():
        right = (result.rank[~known] < 1) * 100.0
        kind = "zero_shot" if train is None else "unseen"
        figures |= {f"{name}.{kind}.top1": round(float(right.mean()), 2), f"{name}.{kind}.top1.ci95": interval(right)}
    return figures


def _emergent(name: str, spec: EmergentSpec, data: Data, trained: Trained) -> dict[str, Any]:
    queries, gallery = data[spec.queries]["test"], [data[pairs]["test"] for pairs in spec.gallery]
    vectors, *media = (project(trained.heads[one.pairs.modality], one.media) for one in (queries, *gallery))
    return emergent_figures(name, spec, queries.pairs, vectors, [one.pairs for one in gallery], np.concatenate(media))


def _classes(recipe: Recipe, frozen: Encoders, trained: Trained, test: Pairs, cache: Path) -> NDArray[np.float32]:
    """A vector per class: of its own prompts where the recipe has some, else of its name in the templates."""
    prompts_of = recipe.pairs[test.name].prompts
    rows = [(index, prompt) for index, label in enumerate(test.classes) for prompt in prompts_of.get(label, [])]

    def encoded(prompts: Sequence[str]) -> NDArray[np.float32]:
        tokens, what = recipe.projector.needs_tokens, f"{test.name} prompts"
        return project(trained.heads["text"], cached_features(frozen["text"], prompts, cache, tokens=tokens, what=what))

    classes = class_vectors(encoded(label_prompts(recipe, test)), len(recipe.templates[test.modality]))
    if not rows:
        return classes
    return with_prompts(classes, encoded([prompt for _, prompt in rows]), np.array([index for index, _ in rows]))


def export(
    recipe: Recipe,
    frozen: Encoders,
    trained: Trained,
    evaluation: Mapping[str, Any],
    out: Path,
    samples: Path | None = None,
) -> Bundle:
    """Export the bundle, each graph checked on real inputs: from `samples`, else from the recipe's test pairs."""
    return export_bundle(recipe, frozen, trained, out, evaluation=evaluation, samples=_samples(recipe, frozen, samples))


def saved(recipe: Recipe, projectors: Path, frozen: Encoders) -> Trained:
    """The projectors of an earlier `train` step, with its history where training.json lies beside them.

    Raises TrainingError where there are none, or where they learned from other encoders. An int8 encoder is quantised
    anew on each machine, and its weights are not compared.
    """
    if not projectors.is_file():
        raise PairError(f"{projectors} is not there: run the train step first")
    trained, record = load_projectors(projectors, recipe), projectors.with_name("training.json")
    for modality, head in trained.heads.items():
        if (encoder := frozen.get(modality)) is None:
            continue
        width = head.width + (0 if head.branch is None else len(head.branch.names))
        known = trained.encoders.get(modality) if encoder.precision != "int8" else None
        if width != encoder.width or known not in (None, encoder.weights_sha256):
            raise PairError(
                f"{projectors} learned from the features of another encoder than encoders.{modality} is now "
                f"({encoder.source}): run the train step again"
            )
    return replace(trained, history=json.loads(record.read_text())["history"]) if record.is_file() else trained


def _samples(recipe: Recipe, frozen: Encoders, folder: Path | None) -> dict[Modality, Sequence[Item]]:
    prompts = [t.format(word) for ts in recipe.templates.values() for t in ts for word in _SAMPLE_WORDS]
    result: dict[Modality, Sequence[Item]] = {}
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for modality in frozen:
            suffixes = SUFFIXES.get(modality, SUFFIXES["array"])
            result[modality] = [path for path in files if path.suffix.lower() in suffixes][:_SAMPLES]
        return result | {"text": prompts}
    for name, source in recipe.pairs.items():
        split = read_pairs(recipe, name)
        part = split["test"] if len(split["test"].media) else split["train"]
        result[source.modality] = [*result.get(source.modality, []), *part.media[:_SAMPLES]]
        result["text"] = [*result.get("text", []), *part.texts[:_SAMPLES]]
    if not result:
        raise ExportError("nothing to check the graphs on: give --samples FOLDER")
    return result
