"""Judge heads while they are trained, on the validation splits, and read off them what is learned at the end."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from service.contract.bundle import Modality
from training.features import Features, Item
from training.heads.concepts import Named
from training.heads.projector import Head
from training.measure.prepared import Prepared, tensors
from training.measure.ranks import class_vectors, mean_recall, top1, word_precision
from training.pairs import Pairs, Split
from training.recipe import MAX_TEMPERATURE, MIN_TEMPERATURE, Recipe

Heads = Mapping[Modality, Head]
Data = Mapping[str, Mapping[Split, Prepared]]
_BATCH = 4096
_TOKEN_BATCH = 64  # items with hundreds of local vectors
_VALIDATED_MEDIA = 2000  # bounds the cost of one validation
_MEAN_OF, _TOKEN_MEAN_OF = 20_000, 1_000  # vectors; the error of their mean is 1 / √n of the vectors' deviation
_SURE = 0.3  # share of the highest score from which a classifier counts as sure of it
_LEAST = 0.1  # percent: what a figure of 0 counts as


@torch.inference_mode()
def project(head: Head, features: Features, chosen: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Unit vectors (N, D) of frozen features, or of those rows of them that are `chosen`."""
    training = head.training
    head.eval()
    device = head.device
    parts = []
    chosen = np.arange(len(features)) if chosen is None else chosen
    batch = _TOKEN_BATCH if head.needs_tokens else _BATCH
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        inputs = {key: value.to(device).float() for key, value in tensors(features, rows, head.needs_tokens).items()}
        parts.append(head(**inputs).float().cpu().numpy())
    head.train(training)
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def validate(
    recipe: Recipe, heads: Heads, data: Data, names: Mapping[Modality, Named] | None = None
) -> dict[str, float]:
    """Mean R@1 of the two directions for captions, top-1 for labels, mean average precision of searches of one word,
    per source with a validation split; with `names`, also `image_names`: of the pictures that the encoder's classifier
    is sure of, the percentage whose bare name is the nearest.

    Words search the media of all sources of their modality, as in a collection of many kinds: what belongs to none
    of the words must not come before what does.
    """
    figures = {}
    vectors = {
        name: project(heads[splits["validation"].pairs.modality], splits["validation"].media)
        for name, splits in data.items()
        if len(splits["validation"].pairs.media)
    }
    for name, media in vectors.items():
        splits = data[name]
        validation = splits["validation"]
        if validation.pairs.labels is not None:
            figures[name], _ = top1(media, classes_of(recipe, heads["text"], splits), validation.pairs.labels)
        elif validation.pairs.words:
            gallery = np.concatenate([media, *_beside(validation.pairs, vectors, data)])
            figures[name] = word_precision(gallery, project(heads["text"], validation.texts), validation.pairs.links)
        else:
            keep = validation.pairs.links[:, 0] < _VALIDATED_MEDIA
            texts = project(heads["text"], validation.texts)
            figures[name] = mean_recall(media[:_VALIDATED_MEDIA], texts, validation.pairs.links[keep])
    if names and "image" in names and (agreed := _agreement(heads, names["image"], data)) is not None:
        figures["image_names"] = agreed
    return figures


def _agreement(heads: Heads, names: Named, data: Data) -> float | None:
    """Percent of the held-out pictures whose bare name, among all, is the nearest text where the encoder is sure of it.

    No label is read: the encoder's own classifier says what a picture shows. None where it is sure of nothing. Sounds
    are left out: several are in one clip, and their classifiers are weaker.
    """
    branch, bare = heads["image"].branch, project(heads["text"], names.bare)
    seen: set[Item] = set()
    right: list[bool] = []
    for splits in data.values():
        pairs, media = splits["validation"].pairs, splits["validation"].media
        if pairs.modality != "image" or not len(pairs.media) or seen.issuperset(pairs.media):
            continue
        seen.update(pairs.media)
        scores = torch.from_numpy(np.asarray(media.pooled[:, -names.count :], np.float32))
        sure = np.flatnonzero(branch.certainty(scores).numpy() >= _SURE)  # type: ignore[union-attr]
        if not len(sure):
            continue
        nearest = (project(heads["image"], media, sure) @ bare.T).argmax(1)
        right.extend(nearest == scores.argmax(1).numpy()[sure])
    return float(np.mean(right) * 100) if right else None


def overall(figures: Mapping[str, float]) -> float:
    """Return one score of several sources: the geometric mean of their figures, in percent; 0 where there are none.

    R@1 over thousands of media, top-1 over a few classes and mean average precision differ in scale. A plain mean is
    ruled by whatever scale is widest; here the same relative gain counts the same in each.
    """
    if not figures:
        return 0.0
    return float(np.exp(np.mean(np.log(np.maximum(list(figures.values()), _LEAST)))))


def _beside(words: Pairs, vectors: Mapping[str, NDArray[np.float32]], data: Data) -> list[NDArray[np.float32]]:
    """Vectors of the held-out media of the other sources of this modality, without those that the words belong to."""
    seen = set(words.media)
    parts = []
    for name, media in vectors.items():
        pairs = data[name]["validation"].pairs
        if pairs.modality == words.modality:
            parts.append(media[[path not in seen for path in pairs.media]])
            seen.update(pairs.media)
    return parts


def calibrate(recipe: Recipe, heads: Heads, data: Data, learned: float) -> float:
    """The temperature that makes label scores most likely on the labelled validation splits (arXiv 1706.04599).

    Without such a split it is `learned`, the mean of the training temperatures.
    """
    sets = []
    for splits in data.values():
        validation = splits["validation"]
        if validation.pairs.labels is not None and len(validation.pairs.media):
            media = project(heads[validation.pairs.modality], validation.media)
            similarity = media @ classes_of(recipe, heads["text"], splits).T
            sets.append((torch.from_numpy(similarity).double(), torch.from_numpy(validation.pairs.labels)))
    if not sets:
        return learned
    candidates = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 200)
    losses = [sum(cross_entropy(scores / t, labels).item() for scores, labels in sets) for t in candidates]
    return float(candidates[int(np.argmin(losses))])


def means(heads: Heads, data: Data) -> dict[Modality, list[float]]:
    """Mean unit vector of each modality over the training media and texts, or over some thousands of them."""
    parts: dict[Modality, list[Features]] = {modality: [] for modality in heads}
    for splits in data.values():
        source = splits["train"]
        sides: list[tuple[Modality, Features]] = [(source.pairs.modality, source.media), ("text", source.texts)]
        for modality, features in sides:
            if len(features):
                parts[modality].append(features)
    rng, result = np.random.default_rng(0), {}
    for modality, several in parts.items():
        if several:
            count = _TOKEN_MEAN_OF if heads[modality].needs_tokens else _MEAN_OF
            result[modality] = sampled(heads[modality], several, count, rng).mean(0).round(6).tolist()
    return result


def sampled(head: Head, parts: Sequence[Features], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Unit vectors of some rows of several sets, each in its share of them; of all, where they are no more."""
    total = sum(map(len, parts))
    chosen = [
        np.arange(len(part))
        if total <= count
        else np.sort(rng.choice(len(part), max(1, count * len(part) // total), replace=False))
        for part in parts
    ]
    return np.concatenate([project(head, part, rows) for part, rows in zip(parts, chosen, strict=True)])


def label_prompts(recipe: Recipe, pairs: Pairs) -> list[str]:
    """Return every class of a labelled source in every template of its modality, class by class."""
    return [template.format(name) for name in pairs.classes for template in recipe.templates[pairs.modality]]


def classes_of(recipe: Recipe, text: Head, splits: Mapping[Split, Prepared]) -> NDArray[np.float32]:
    """One vector per class of a labelled source, from the caption features of all its splits together."""
    vectors: dict[str, NDArray[np.float32]] = {}
    for split in splits.values():
        vectors |= dict(zip(split.pairs.texts, project(text, split.texts), strict=True))
    prompts = label_prompts(recipe, splits["train"].pairs)
    templates = len(prompts) // len(splits["train"].pairs.classes)
    return class_vectors(np.stack([vectors[prompt] for prompt in prompts]), templates)
