"""Rows of several senses at once: clips of a sound and a picture put together here, documents, films, panoramas.

A clip is a recording of ESC-50's test fold and a test picture of Caltech101 or Flickr8k that shows what makes the sound
(the classes of `emergent.sound_to_image` of training/recipes/best.yaml). Vectors are the starter's; clips of one
recording are drawn together.
"""

from dataclasses import dataclass
from functools import cache, partial, reduce
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from benchmarks.family.lab import SEEDS, Floats, Lab, files_of, picture, pytest_passes
from benchmarks.family.rows import Outcome, gain, holds, row, shown, tried
from benchmarks.family.served import captioned, cropped, labelled
from service.contract.audio import decode_audio
from service.contract.vectors import l2_normalise
from service.engine.inputs import weighted_sum
from training.measure.emergent import shown as media_that_show
from training.measure.intervals import interval
from training.measure.ranks import label_ranks
from training.recipe import load_recipe

_RATE = 32_000
_PICTURES = 4  # to each sound


@dataclass(frozen=True)
class Clips:
    sounds: list[Path]
    pictures: list[Path]
    labels: NDArray[np.int64]
    recording: NDArray[np.int64]
    """The recording that a clip is of: clips of one recording are no independent samples."""
    classes: list[str]


@cache
def clips(lab: Lab, split: Any, count: int = _PICTURES) -> Clips:
    """Clips of a split, each sound with so many pictures.

    `validation` has the pictures of Flickr8k's validation and Caltech101's training.

    `all` has the test pictures and every recording that `validation` has not: the starter learned from folds 1 to 4
    without their labels.
    """
    spec = load_recipe(Path("training/recipes/best.yaml"), [f"data.root={lab.data.resolve()}"]).emergent[
        "sound_to_image"
    ]
    seen: tuple[Any, Any] = ("validation", "train") if split == "validation" else ("test", "test")
    galleries = [lab.pairs["flickr8k"][seen[0]], lab.pairs["caltech101"][seen[1]]]
    showing = [media_that_show(gallery, spec.shows) for gallery in galleries]
    files = {
        label: [
            path
            for gallery, rows in zip(galleries, showing, strict=True)
            for path, right in zip(files_of(gallery), rows[label], strict=True)
            if right
        ]
        for label in spec.shows
    }
    rng, sounds, pictures, labels, recording = np.random.default_rng(0), [], [], [], []
    classes = [label for label in spec.shows if len(files[label]) >= 2 * _PICTURES]
    folds: dict[str, tuple[Any, ...]] = {"validation": ("train",), "test": ("test",)}
    number = 0
    for fold in folds.get(split, ("test", "validation", "train")):
        heard = lab.pairs["esc50"][fold]
        assert heard.labels is not None
        for place, (path, label) in enumerate(zip(files_of(heard), heard.labels, strict=True)):
            number, name = number + 1, heard.classes[label]
            of_validation = fold == "train" and place % 3 == 0
            if name in classes and of_validation == (split == "validation"):
                for at in rng.choice(len(files[name]), count, replace=False):
                    sounds.append(path)
                    pictures.append(files[name][at])
                    labels.append(classes.index(name))
                    recording.append(number)
    return Clips(sounds, pictures, np.array(labels), np.array(recording), classes)


def names(lab: Lab, of: Clips) -> Floats:
    """One vector for each class, of its prompts for pictures and for sounds."""
    return l2_normalise(lab.labels("image", of.classes) + lab.labels("audio", of.classes))


def streams(
    lab: Lab, of: Clips, sound_db: float | None = None, picture_db: float | None = None
) -> tuple[Floats, Floats]:
    """Vectors of the sounds and of the pictures, each with noise at so many decibels below it, or clean."""
    sounds, pictures = of.sounds, of.pictures
    if sound_db is not None:
        sounds = [_noisy_sound(path, sound_db, lab.made("sounds")) for path in sounds]
    if picture_db is not None:
        folder = lab.made("pictures")
        pictures = [
            picture(
                folder / f"{path.parent.name}-{path.stem}{picture_db:+g}.png",
                partial(_noisy_picture, path, picture_db),
            )
            for path in pictures
        ]
    return lab.vectors("audio", sounds, "clips"), lab.vectors("image", pictures, "clips")


def _noisy_sound(path: Path, decibels: float, folder: Path) -> Path:
    made = folder / f"{path.stem}{decibels:+g}.wav"
    if not made.is_file():
        samples = decode_audio(path.read_bytes(), _RATE)
        noise = np.random.default_rng(len(path.stem)).standard_normal(len(samples))
        loud = float(np.sqrt((samples**2).mean())) or 1e-3
        mixed = samples + noise * loud * 10 ** (-decibels / 20)
        soundfile.write(made, mixed / max(1.0, np.abs(mixed).max()), _RATE, subtype="PCM_16")
    return made


def _noisy_picture(path: Path, decibels: float) -> Image.Image:
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
    noise = np.random.default_rng(pixels.shape[0]).standard_normal(pixels.shape)
    return Image.fromarray(np.clip(pixels + noise * pixels.std() * 10 ** (-decibels / 20), 0, 255).astype(np.uint8))


def together(*parts: Floats) -> Floats:
    """The vector of items with several parts, as the service's `compose` makes it."""
    return np.stack([weighted_sum(vectors, [1.0] * len(vectors)) for vectors in zip(*parts, strict=True)])


def right(vectors: Floats, classes: Floats, labels: NDArray[np.int64]) -> NDArray[np.floating]:
    return (label_ranks(vectors @ classes.T, labels) < 1) * 100.0


def _fusing(lab: Lab, noise: tuple[float | None, float | None], count: int) -> Outcome:
    """The weight of the picture beside the sound is chosen on validation."""
    hits_of: dict[tuple[str, float], NDArray[np.floating]] = {}
    for split in ("validation", "all"):
        of = clips(lab, split, count)
        sound, image = streams(lab, of, *noise)
        for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
            vectors = np.stack([weighted_sum([a, v], [1.0, weight]) for a, v in zip(sound, image, strict=True)])
            hits_of[split, weight] = right(vectors, names(lab, of), of.labels)
        hits_of[split, np.inf] = right(image, names(lab, of), of.labels)
    weight = max((0.25, 0.5, 0.75, 1.0), key=lambda key: hits_of["validation", key].mean())
    both, alone, seen = (hits_of["all", key] for key in (weight, 0.0, np.inf))
    value, bounds = gain(both, alone if alone.mean() >= seen.mean() else seen, of.recording)
    told = (
        f"A {alone.mean():.1f}, V {seen.mean():.1f}, A+V {both.mean():.1f} % of {len(both)} clips, {len(of.classes)} "
    )
    told += f"classes; {shown(f'both (V at {weight}) over the better', value, bounds)}"
    return Outcome(told, bounds, holds(value >= 0 and bounds[0] > -1))


@row(33, "VALOR", "text against sound, picture and both of a clip: both are at least as good as either")
def groups(lab: Lab) -> Outcome:
    return _fusing(lab, (None, None), _PICTURES)


@row(3, "AVSR from unimodal SSL", "noise at 0 dB on both streams: fused at least as good as the best of them")
def noisy(lab: Lab) -> Outcome:
    return _fusing(lab, (0.0, 0.0), 1)


def gated(sharpness: float, second: bool, classes: Floats, *parts: Floats) -> tuple[Floats, NDArray[np.floating]]:
    """Sums weighted by how far each part's best label leads its second, or the mean of all, and the weights (P, N)."""
    margins = []
    for part in parts:
        similar = np.sort(part @ classes.T, axis=1)
        margins.append(similar[:, -1] - (similar[:, -2] if second else similar.mean(1)))
    weights = np.exp(sharpness * np.stack(margins))
    weights /= weights.sum(0)
    pairs = zip(zip(*parts, strict=True), weights.T, strict=True)
    return np.stack([weighted_sum(list(pair), list(weights_of)) for pair, weights_of in pairs]), weights


@row(4, "SSMA segmentation", "a gate by confidence leaves the input that has noise, and beats the plain mean")
def gate(lab: Lab) -> Outcome:
    """The control takes the clean input alone wherever that is right: a choice that knows the noise."""
    noise: tuple[tuple[float | None, float | None], ...] = ((-10.0, None), (None, -10.0))
    of = clips(lab, "validation")
    score = {
        knobs: float(
            np.mean(
                [
                    right(gated(*knobs, names(lab, of), *streams(lab, of, *share))[0], names(lab, of), of.labels)
                    for share in noise
                ]
            )
        )
        for knobs in [(sharpness, second) for sharpness in (2.0, 5.0, 10.0, 20.0) for second in (False, True)]
    }
    best = max(score, key=lambda key: score[key])
    of = clips(lab, "test")
    classes, clean = names(lab, of), gated(*best, names(lab, of), *streams(lab, of))[1]
    better, base, known, moved = [], [], [], []
    for place, share in enumerate(noise):
        parts = streams(lab, of, *share)
        vectors, weights = gated(*best, classes, *parts)
        better.append(right(vectors, classes, of.labels))
        base.append(right(together(*parts), classes, of.labels))
        known.append(right(parts[1 - place], classes, of.labels))
        moved.append(clean[place] - weights[place])
    value, bounds = gain(np.mean(better, 0), np.mean(base, 0), of.recording)
    ideal = np.mean([np.maximum(*both) for both in zip(known, base, strict=True)], 0)
    oracle = gain(ideal, np.mean(base, 0), of.recording)
    shift = interval(np.mean(moved, 0), of.recording)
    told = f"weight of the noisy input falls by {np.mean(moved):.3f} ({shift[0]} to {shift[1]}) with {best}; "
    told += f"{shown('over the plain mean', value, bounds)} on {np.mean(base):.1f}; {shown('control', *oracle)}"
    return Outcome(told, bounds, tried(bounds, oracle[1]) if shift[0] > 0 else "fails")


@row(13, "4M", "any subset of an item's parts gives a unit vector that still finds its class")
def subsets(lab: Lab) -> Outcome:
    of = clips(lab, "test")
    sound, image = streams(lab, of)
    texts = lab.vectors("text", [f"this is about {of.classes[label]}" for label in of.labels], "clips")
    parts = {"A": sound, "V": image, "T": texts}
    classes, worst, told, unit = names(lab, of), None, [], True
    for count in (1, 2, 3):
        for chosen in combinations(parts, count):
            vectors = together(*(parts[name] for name in chosen))
            unit = unit and bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6))
            hits = right(vectors, classes, of.labels)
            told.append(f"{'+'.join(chosen)} {hits.mean():.1f}")
            if worst is None or hits.mean() < worst.mean():
                worst = hits
    assert worst is not None
    bounds = interval(worst, of.recording)
    passed, total = pytest_passes("tests/service/test_fused.py::test_it_is_the_weighted_sum_of_its_parts")
    chance = 100 / len(of.classes)
    text = f"top-1 {', '.join(told)} %, chance {chance:.1f}; all of length 1: {unit}; {passed} of {total} tests pass"
    return Outcome(text, bounds, holds(unit and bounds[0] > chance and passed == total))


@row(17, "C3Net", "a query of text, picture and sound against each alone and their plain mean")
def composed(lab: Lab) -> Outcome:
    """Items are a Caltech101 picture, an ESC-50 sound and a caption; a query has another of each. Three draws."""
    grid = [(t, i, a) for t in (0.7, 1.0, 1.5) for i in (0.7, 1.0, 1.5, 2.0) for a in (0.5, 1.0, 1.5)]
    measured: dict[tuple[str, str], list[NDArray[np.floating]]] = {}
    for split in ("validation", "test"):
        for seed in SEEDS:
            items, parts = _triples(lab, split, seed)
            queries = parts | {
                str(weights): l2_normalise(np.tensordot(weights, np.stack(list(parts.values())), 1)) for weights in grid
            }
            for name, vectors in queries.items():
                similar = vectors @ items.T
                once = ((similar >= similar.diagonal()[:, None]).sum(1) == 1) * 100.0
                measured.setdefault((split, name), []).append(once)
    hits = {key: np.mean(values, axis=0) for key, values in measured.items()}
    best = max(map(str, grid), key=lambda name: hits["validation", name].mean())
    single = max(("text", "picture", "sound"), key=lambda name: hits["test", name].mean())
    over_single = gain(hits["test", best], hits["test", single])
    over_mean = gain(hits["test", best], hits["test", str((1.0, 1.0, 1.0))])
    told = f"R@1 {hits['test', best].mean():.1f} with weights {best}; {shown(f'over {single}', *over_single)}; "
    told += shown("over the plain mean", *over_mean)
    return Outcome(told, over_mean[1], holds(over_single[1][0] > 0 and over_mean[1][0] > 0))


def _triples(lab: Lab, split: Any, seed: int) -> tuple[Floats, dict[str, Floats]]:
    """Vectors of 1,000 composed items, and of another text, picture and sound for each."""
    rng = np.random.default_rng(seed)
    _, texts, links = captioned(lab, split)
    photos = np.unique(links[:, 0])
    captions = [rng.choice(links[links[:, 0] == place, 1], 2, replace=False) for place in photos]
    sides = [[texts[[caption[end] for caption in captions]] for end in (0, 1)]]
    for name in ("caltech101", "esc50"):
        vectors, labels, _ = labelled(lab, name, "train" if split == "validation" else split)
        pairs = [
            rng.choice(np.flatnonzero(labels == label), 2, replace=False) for label in rng.choice(labels, len(photos))
        ]
        sides.append([vectors[[pair[end] for pair in pairs]] for end in (0, 1)])
    return together(*(first for first, _ in sides)), {
        name: second for name, (_, second) in zip(("text", "picture", "sound"), sides, strict=True)
    }


@row(37, "COSMO", "documents of pictures and captions in turn, as one vector, against captions alone, asked by both")
def documents(lab: Lab) -> Outcome:
    """A document has three photographs and a caption of each; it is asked for by another caption, and by a part of one
    of its photographs. The pictures' weight is chosen on validation."""
    measured: dict[tuple[str, float], dict[str, NDArray[np.floating]]] = {}
    for split in ("validation", "test"):
        images, texts, links = captioned(lab, split)
        texts_of = [links[links[:, 0] == place, 1] for place in range(498)]
        photos = np.arange(498).reshape(-1, 3)
        first, last = (texts[[caption[end] for caption in texts_of]] for end in (0, -1))
        asked = {"captions": last, "parts of pictures": cropped(lab, split)[:498, 0]}
        for weight in (0.0, 0.25, 0.5, 1.0):
            parts = [w * side[photos[:, place]] for place in range(3) for w, side in ((weight, images), (1.0, first))]
            gallery = l2_normalise(np.sum(parts, axis=0))
            measured[split, weight] = {
                kind: ((queries @ gallery.T).argmax(1) == np.arange(498) // 3) * 100.0
                for kind, queries in asked.items()
            }
    whole = {key: np.mean(list(values.values()), axis=0) for key, values in measured.items()}
    best = max((0.25, 0.5, 1.0), key=lambda weight: whole["validation", weight].mean())
    value, bounds = gain(whole["test", best], whole["test", 0.0], np.arange(498) // 3)
    each_kind = "; ".join(
        shown(kind, *gain(measured["test", best][kind], measured["test", 0.0][kind], np.arange(498) // 3))
        for kind in measured["test", best]
    )
    told = f"{shown(f'pictures at {best}', value, bounds)} R@1 on {whole['test', 0.0].mean():.1f} of 166 documents; "
    return Outcome(told + each_kind, bounds, holds(bounds[0] > 0))


@row(45, "ALIGN", "a picture and a word together find what shows both, against either alone; noisy pairs still train")
def arithmetic(lab: Lab) -> Outcome:
    import csv

    folder = lab.data / "data" / "corel5k"
    with (folder / "index.csv").open() as file:
        table = [photograph for photograph in csv.DictReader(file) if photograph["split"] == "test"]
    images = lab.vectors("image", [folder / photograph["file"] for photograph in table], "corel5k")
    tags = [set(photograph["tags"].replace(", ", ",").split(",")) for photograph in table]
    common = [tag for tag in sorted(set().union(*tags)) if 8 <= sum(tag in tag_set for tag_set in tags) <= 150]
    words = dict(zip(common, lab.vectors("text", common, "tags"), strict=True))
    measured: dict[float, list[float]] = {share: [] for share in (0.0, 0.3, 0.5, 0.7, 1.0)}
    owner = []
    for place, shown_tags in enumerate(tags):
        for about, added in product(shown_tags & set(common), set(common) - shown_tags):
            relevant = np.array([about in tag_set and added in tag_set for tag_set in tags])
            if relevant.sum() >= 3:
                owner.append(place)
                for share, values in measured.items():
                    similar = images @ ((1 - share) * images[place] + share * words[added])
                    similar[place] = -np.inf
                    values.append(100.0 * float(relevant[np.argsort(-similar)[:10]].mean()))
    queries = np.array(owner)
    half = queries % 2 == 0
    hits = {share: np.array(values) for share, values in measured.items()}
    best = max((0.3, 0.5, 0.7), key=lambda share: hits[share][half].mean())
    single = max((0.0, 1.0), key=lambda share: hits[share][half].mean())
    value, bounds = gain(hits[best][~half], hits[single][~half], queries[~half])
    told = f"precision at ten: {shown(f'word at {best}', value, bounds)} on {hits[single][~half].mean():.1f} alone"
    return Outcome(f"{told}, {(~half).sum()} queries", bounds, holds(bounds[0] > 0))


@row(6, "All in One", "a film is the mean of its frames: text → film R@1; one frame is that picture")
def films(lab: Lab) -> Outcome:
    """Films pan over a photograph: four views of it that overlap."""
    frames = cropped(lab, "test")
    _, texts, links = captioned(lab)
    keep = links[:, 0] < len(frames)
    owner, asked = links[keep, 0], texts[links[keep, 1]]
    hits = {}
    for count in (1, 4):
        similar = asked @ l2_normalise(frames[:, :count].mean(1)).T
        hits[count] = (similar.argmax(1) == owner) * 100.0
    value, bounds = gain(hits[4], hits[1], owner)
    names = ("test_a_video_of_one_frame_is_that_image", "test_frames_are_pooled_by_their_mean")
    passed, total = pytest_passes("tests/service/test_videos.py", "-k", " or ".join(names))
    told = f"R@1 {hits[4].mean():.1f} of four frames, {hits[1].mean():.1f} of one, among {len(frames)}; "
    return Outcome(
        f"{told}{shown('gain', value, bounds)}; {passed} of {total} tests pass",
        bounds,
        holds(bounds[0] > 0 and passed == total),
    )


@dataclass(frozen=True)
class _Turns:
    """Films of two things one after the other, and the two sentences that tell the order."""

    frames: Floats
    """(N, 4, D): two of the first, two of the second."""
    things: Floats
    """(N, 2, D): the vectors of their names."""
    told: Floats
    """(N, 2, D): "first A, then B", and the other way round."""
    group: NDArray[np.int64]


@cache
def _turns(lab: Lab, split: Any, even: bool) -> _Turns:
    """Films of Caltech101's classes of even or of odd number."""
    vectors, labels, names = labelled(lab, "caltech101", split)
    classes, rng = lab.pairs["caltech101"]["test"].classes, np.random.default_rng(int(even))
    chosen = [label for label in range(len(classes)) if (label % 2 == 0) == even and (labels == label).sum() >= 2]
    frames, things, sentences, group = [], [], [], []
    for number in range(600 if even else 300):
        first, second = rng.choice(chosen, 2, replace=False)
        places = [rng.choice(np.flatnonzero(labels == label), 2, replace=False) for label in (first, second)]
        frames.append(vectors[np.concatenate(places)])
        things.append(names[[first, second]])
        a, b = classes[first], classes[second]
        sentences += [f"first a {a}, then a {b}", f"first a {b}, then a {a}"]
        group.append(number)
    told = lab.vectors("text", sentences, "turns").reshape(len(frames), 2, -1)
    return _Turns(np.stack(frames), np.stack(things), told, np.array(group))


def _by_moments(of: _Turns) -> NDArray[np.floating]:
    """Return whether each thing's best second says which came first: what `moments` of a search answer."""
    when = np.einsum("nfd,ntd->ntf", of.frames, of.things).argmax(2)
    return np.where(when[:, 0] == when[:, 1], 50.0, (when[:, 0] < when[:, 1]) * 100.0)


@row(
    62,
    "TVTS",
    "segments know their time: the order of two things in a film; a film run backwards gives the other order",
)
def order(lab: Lab) -> Outcome:
    of = _turns(lab, "test", even=False)
    hits = _by_moments(of)
    backwards = _by_moments(_Turns(of.frames[:, ::-1], of.things, of.told, of.group))
    bounds = interval(hits)
    passed, total = pytest_passes("tests/service/test_videos.py", "-k", "test_a_search_says_which_second")
    told = f"{hits.mean():.1f} % of 300 films in the right order, backwards {100 - backwards.mean():.1f} %, chance 50; "
    return Outcome(
        f"{told}{passed} of {total} tests pass",
        bounds,
        holds(bounds[0] > 50 and backwards.mean() < 50 and passed == total),
    )


@row(
    29,
    "X-CLIP",
    "a temporal head over frames against the mean of frames and against moments, on films where order counts",
)
def temporal(lab: Lab) -> Outcome:
    """The head is a ridge map of (second half - first half) to the difference of the sentences of both orders."""
    train, test = _turns(lab, "train", even=True), _turns(lab, "test", even=False)
    validation = (
        _turns(lab, "validation", even=True) if len(lab.pairs["caltech101"]["validation"].media) > 200 else train
    )
    halves = [turns.frames[:, 2:].mean(1) - turns.frames[:, :2].mean(1) for turns in (train, validation, test)]
    turned = [turns.told[:, 0] - turns.told[:, 1] for turns in (train, validation, test)]
    hits = {}
    for penalty in (0.01, 0.1, 1.0, 10.0):
        square = halves[0].T @ halves[0]
        weight = np.linalg.solve(
            square + penalty * np.trace(square) / len(square) * np.eye(len(square)), halves[0].T @ turned[0]
        )
        hits[penalty] = [((half @ weight) * turn).sum(1) > 0 for half, turn in zip(halves, turned, strict=True)]
    best = max(hits, key=lambda key: hits[key][1].mean())
    head, moments = hits[best][2] * 100.0, _by_moments(test)
    over_moments = gain(head, moments)
    told = f"head {head.mean():.1f} %, mean of frames 50 (it has no order), moments {moments.mean():.1f} %; "
    control = gain(moments, np.full(len(head), 50.0))
    told += f"{shown('over moments', *over_moments)}; {shown('control: moments over the mean', *control)}"
    return Outcome(
        told,
        over_moments[1],
        tried(over_moments[1], control[1]),
    )


@row(23, "SOLO", "panoramas by tiles that keep their shape, as one composed item, against the whole picture squashed")
def panoramas(lab: Lab) -> Outcome:
    """Three photographs side by side; its tiles are square."""
    images, texts, links = captioned(lab)
    photos = np.arange(600).reshape(-1, 3)
    media, folder = files_of(lab.pairs["flickr8k"]["test"]), lab.made("panoramas")

    def wide(three: NDArray[np.int64]) -> Image.Image:
        tiles = [Image.open(media[place]).convert("RGB") for place in three]
        return Image.fromarray(reduce(lambda a, b: np.concatenate([a, b], 1), [np.asarray(tile) for tile in tiles]))

    paths = [picture(folder / f"{number}.png", partial(wide, three)) for number, three in enumerate(photos)]
    squashed = lab.vectors("image", paths, "panoramas")
    tiled = together(*(images[photos[:, place]] for place in range(3)))
    keep = links[:, 0] < 600
    owner, asked = links[keep, 0] // 3, texts[links[keep, 1]]
    hits = [((asked @ gallery.T).argmax(1) == owner) * 100.0 for gallery in (tiled, squashed)]
    value, bounds = gain(hits[0], hits[1], owner)
    return Outcome(
        f"{shown('tiles', value, bounds)} R@1 on {hits[1].mean():.1f} squashed, 200 panoramas",
        bounds,
        holds(bounds[0] > 0),
    )
