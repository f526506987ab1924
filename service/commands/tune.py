"""`tune` measures how each tower of a bundle runs best on this machine, and keeps it as a profile that `serve` uses.

Every runtime and precision that is here is tried on real inputs, and taken only where its vectors pass the gates of
export; then lanes × threads × batch of the fastest. What is compared takes turns, so that other work slows all alike.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from isthmus_client.inputs import IMAGE_SUFFIXES
from service.commands import starters
from service.contract.bundle import GATE_COSINE, GATE_R1_LOSS, Bundle, BundleError, Modality
from service.contract.errors import InputError
from service.contract.vectors import Vectors
from service.engine import openvino, profile
from service.engine.batcher import Budget, Prepared
from service.engine.handling import Handling, handling
from service.engine.inputs import Media, Text, modality_of
from service.engine.profile import Choice, Profile
from service.engine.towers import Arrays, Tower, TowerError
from service.settings import Settings, SettingsError, read_settings

HELP = "measure how a bundle runs best on this machine, and keep that for `serve`"
FULL_COSINE = 0.9995
"""Least mean cosine to the tower's own vectors of what is called full precision."""
_MEDIA: tuple[Literal["image", "audio"], ...] = ("image", "audio")
_MOST_INPUTS, _MEDIA_TIMED = 256, 32
_MOST_LANES = 16
_ROUNDS = 3
_DRAWS = 16
"""Times that inputs are drawn anew and put into calls."""
_CLOSE = 0.97
"""Share of the highest rate from which on the quickest answer to a lone input decides."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="the folder of a bundle; else the one served")
    parser.add_argument("--media", type=Path, metavar="FOLDER", help="images and sounds like those to be embedded")
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="a text per line, perhaps after the path of its medium below FOLDER and a tab: then R@1 is of these pairs",
    )
    parser.add_argument("--full", action="store_true", help="full precision alone: neither int8 nor fp16")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement, of which there are about 100")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object at the end")


@dataclass
class _Tried:
    """Holds a tower as it was tried, and what was measured."""

    modality: Modality
    choice: Choice
    cosine: float = 1.0
    cosine_lowest: float = 1.0
    r1_loss: float = 0.0
    passes: bool = True
    rates: list[float] = field(default_factory=list)
    """Inputs per second, one number per round."""
    lone: list[float] = field(default_factory=list)
    """Milliseconds of a call of one input."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def lone_ms(self) -> float:
        return statistics.median(self.lone)

    def figures(self) -> dict[str, Any]:
        speed = {"per_second": round(self.rate, 1), "lone_ms": round(self.lone_ms, 2)} if self.rates else {}
        gates = {name: round(getattr(self, name), 5) for name in ("cosine", "cosine_lowest", "r1_loss")}
        return {"modality": self.modality, **asdict(self.choice), **gates, "passes": self.passes, **speed}


@dataclass(frozen=True)
class _Inputs:
    """Real inputs of one tower."""

    prepared: list[Prepared]
    partners: Vectors | None = None
    """The other side's vectors of the first inputs, where they are pairs."""


def run(
    bundle: str | None,
    media: Path | None = None,
    texts: Path | None = None,
    full: bool = False,
    seconds: float = 0.4,
    as_json: bool = False,
) -> int:
    settings = read_settings(bundle=starters.chosen(bundle))
    source = settings.read_bundle()
    try:
        tried, towers = tune(source, settings, media, texts, full=full, seconds=seconds)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    result = Profile(profile.machine(source), towers, {"tried": [trial.figures() for trial in tried]})
    try:
        path = profile.write(source, result)
    except OSError as error:
        raise SettingsError(f"the profile cannot be written: {error}; XDG_CACHE_HOME names another folder") from None
    print(json.dumps({"profile": str(path), **asdict(result)}) if as_json else f"{path}: `serve` uses it from now on")
    return 0


def tune(
    bundle: Bundle, settings: Settings, media: Path | None, texts: Path | None, *, full: bool, seconds: float
) -> tuple[list[_Tried], dict[Modality, Choice]]:
    """Try everything, and return it with the choice of each tower. Raises SettingsError, BundleError, TowerError."""
    ways = {
        name: handling(bundle, name, settings)
        for name in bundle.manifest.towers
        if name in (settings.modalities or bundle.manifest.towers)
    }
    given = _read(bundle, ways, media, texts)
    tried: list[_Tried] = []
    towers: dict[Modality, Choice] = {}
    for modality, how in ways.items():
        usual = how.budget(True, None)
        real = modality in given
        inputs = given.get(modality) or _Inputs([how.canary] * 8)
        say(f"{modality}: {len(inputs.prepared)} real inputs" if real else f"{modality}: none given, so nothing that "
            "changes its vectors is tried (--media, --texts)")  # fmt: skip
        trials = _gated(bundle, modality, how, inputs, usual, full=full, real=real)
        gated = [(trial, tower) for trial, tower in trials if trial.passes]
        tried += [trial for trial, _ in gated]
        _measure(how, inputs, usual, gated, seconds)
        best = max((trial for trial, _ in gated), key=lambda trial: trial.rate)
        shaped = [
            (replace(best, choice=choice, rates=[], lone=[]), tower) for choice, tower in _shapes(bundle, best, usual)
        ]
        _measure(how, inputs, usual, shaped, seconds)
        tried += [trial for trial, _ in shaped]
        quick = [trial for trial, _ in shaped if trial.rate >= _CLOSE * max(rival.rate for rival, _ in shaped)]
        towers[modality] = min(quick, key=lambda trial: trial.lone_ms).choice
        say(f"{modality}: {_named(towers[modality])}")
    return tried, towers


def _gated(
    bundle: Bundle, modality: Modality, how: Handling, inputs: _Inputs, usual: Budget, *, full: bool, real: bool
) -> Iterator[tuple[_Tried, Tower]]:
    """Yield every runtime and precision that is here, with the outcome of its gates; the tower's own comes first."""
    described = bundle.manifest.towers[modality]
    lanes = min(_MOST_LANES, len(os.sched_getaffinity(0)))
    kinds: list[tuple[Any, Any]] = [("onnxruntime", precision) for precision in described.precisions]
    # An audio tower's long calls go in pieces, by an input that may be left out, which OpenVINO does not know.
    if openvino.installed() and modality != "audio":
        smaller = [precision for precision in described.precisions if precision != "fp16"]
        bf16 = ["bf16"] if openvino.has_bf16() and "fp32" in described.precisions else []
        kinds += [("openvino", precision) for precision in (*smaller, *bf16)]
    reference: Vectors | None = None
    for runtime, precision in kinds:
        exact = precision == described.precision
        if (full and precision in ("int8", "fp16") and not exact) or not (exact or real):
            continue
        tried = _Tried(modality, Choice(runtime, precision, 1, lanes, usual.limit))
        try:
            tower = Tower(bundle, modality, "cpu", 1, choice=tried.choice)
            vectors = _vectors(tower, how, inputs.prepared)
        except (TowerError, RuntimeError, BundleError) as error:
            say(f"  {_named(tried.choice)}: {error}")
            continue
        reference = vectors if reference is None else reference
        cosines = np.sum(vectors * reference, axis=1)
        tried.cosine, tried.cosine_lowest = float(cosines.mean()), float(cosines.min())
        partners = reference if inputs.partners is None else inputs.partners
        tried.r1_loss = _r1(reference, partners) - _r1(vectors, partners)
        least = FULL_COSINE if precision in (described.precision, "bf16") else GATE_COSINE
        tried.passes = tried.cosine >= least and tried.r1_loss <= GATE_R1_LOSS
        verdict = "" if tried.passes else f": refused (cosine ≥ {least:g}, R@1 loss ≤ {GATE_R1_LOSS:g})"
        say(
            f"  {_named(tried.choice)}: cosine {tried.cosine:.5f} (lowest {tried.cosine_lowest:.5f}), "
            f"R@1 loss {tried.r1_loss:.2f}{verdict}"
        )
        yield tried, tower


def _shapes(bundle: Bundle, best: _Tried, usual: Budget) -> Iterator[tuple[Choice, Tower]]:
    """Yield lanes × threads × batch of what was fastest."""
    cores = len(os.sched_getaffinity(0))
    limit = usual.limit
    limits = {"audio": [limit], "image": [1, 2, 4, 8, 16]}.get(
        best.modality, [limit // 4, limit // 2, limit, 2 * limit]
    )
    for lanes in (lanes for lanes in range(1, min(cores, _MOST_LANES) + 1) if cores % lanes == 0):
        choice = replace(best.choice, lanes=lanes, threads=cores // lanes)
        tower = Tower(bundle, best.modality, "cpu", 1, choice=choice)
        yield from ((replace(choice, batch=max(1, limit)), tower) for limit in limits)


def _measure(
    how: Handling, inputs: _Inputs, usual: Budget, contenders: Sequence[tuple[_Tried, Tower]], seconds: float
) -> None:
    """Measure the rates and times of contenders, which take turns."""
    timed = inputs.prepared[: _MOST_INPUTS if contenders[0][0].modality == "text" else _MEDIA_TIMED]
    calls = {
        batch: [(how.collate(values), len(values)) for values in _drawn(timed, replace(usual, limit=batch))]
        for batch in {trial.choice.batch for trial, _ in contenders}
    }
    single = how.collate([inputs.prepared[len(inputs.prepared) // 2].value])
    for turn in range(_ROUNDS):
        for trial, tower in contenders if turn % 2 == 0 else reversed(contenders):
            trial.rates.append(_rate(tower, calls[trial.choice.batch], trial.choice.lanes, seconds))
            trial.lone.append(_lone_ms(tower, single, seconds / 4))
    for trial, _ in contenders:
        say(f"  {_named(trial.choice)}: {trial.rate:,.1f} a second, {trial.lone_ms:.2f} ms alone")


def _drawn(inputs: Sequence[Prepared], budget: Budget) -> list[list[Any]]:
    """Return calls of as many sizes and lengths as a server has: some runtimes prepare each new shape anew."""
    random = np.random.default_rng(0)
    draws = [random.choice(len(inputs), random.integers(1, len(inputs) + 1), replace=False) for _ in range(_DRAWS)]
    return [call for draw in draws for call in _calls([inputs[place] for place in draw], budget)]


def _calls(inputs: Sequence[Prepared], budget: Budget) -> list[list[Any]]:
    """Split inputs, by size, into calls as the batcher does."""
    calls: list[list[Prepared]] = []
    for input in sorted(inputs, key=lambda input: input.size):
        sizes = [member.size for member in calls[-1]] + [input.size] if calls else []
        fits = sizes and budget.cost(len(sizes), sum(sizes), max(sizes)) <= budget.limit
        if fits and budget.together(len(sizes), sum(sizes), min(sizes), max(sizes)):
            calls[-1].append(input)
        else:
            calls.append([input])
    return [[input.value for input in call] for call in calls]


def _rate(tower: Tower, calls: Sequence[tuple[Arrays, int]], lanes: int, seconds: float) -> float:
    """Return the inputs per second, with as many threads as lanes."""
    upcoming, counts = itertools.cycle(calls), [0] * lanes
    began = time.perf_counter()

    def work(lane: int) -> None:
        while time.perf_counter() < began + seconds:
            arrays, count = next(upcoming)  # of a cycle: atomic
            tower.run(arrays)
            counts[lane] += count

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def _lone_ms(tower: Tower, arrays: Arrays, seconds: float) -> float:
    times_s: list[float] = []
    began = time.perf_counter()
    while not times_s or time.perf_counter() < began + seconds:
        start_s = time.perf_counter()
        tower.run(arrays)
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times_s)


def _vectors(tower: Tower, how: Handling, inputs: Sequence[Prepared]) -> Vectors:
    """Return unit vectors, each of a call of its own: what stands beside an input must not be what differs."""
    return np.concatenate([tower.run(how.collate([input.value])) for input in inputs])


def _r1(vectors: Vectors, partners: Vectors) -> float:
    """Return the recall of each one's partner as the nearest of all partners, in per cent."""
    paired = vectors[: len(partners)]
    return 100 * float(np.mean(np.argmax(paired @ partners.T, axis=1) == np.arange(len(partners))))


def _read(
    bundle: Bundle, ways: Mapping[Modality, Handling], media: Path | None, texts: Path | None
) -> dict[Modality, _Inputs]:
    """Prepare the inputs that are given; in place of texts, the sentences of the bundle's own pages.

    Raises SettingsError where none can be read.
    """
    lines, names = _lines(bundle, texts)
    by_kind: dict[Modality, list[Prepared]] = {"text": _prepared(ways, map(Text, lines), strict=bool(names))}
    if media is not None:
        files = [media / name for name in names] or sorted(path for path in media.rglob("*") if path.is_file())
        for kind in _MEDIA:
            media_of_kind = (Media(kind, path.read_bytes()) for path in files if _kind(path) == kind)
            by_kind[kind] = _prepared(ways, media_of_kind, strict=bool(names))
        if not any(by_kind[kind] for kind in _MEDIA):
            raise SettingsError(f"--media {media}: it holds no image and no sound that can be read")
    inputs = {modality: _Inputs(items) for modality, items in by_kind.items() if items}
    kinds = {_kind(Path(name)) for name in names}
    if media is not None and len(kinds) == 1 and len(inputs) == 2:  # texts, and the media that they are of
        pair: tuple[Modality, Modality] = (kinds.pop(), "text")
        vectors = {
            side: _vectors(
                Tower(bundle, side, "cpu", 0, bundle.manifest.towers[side].precision), ways[side], by_kind[side]
            )
            for side in pair
        }
        return {pair[0]: _Inputs(by_kind[pair[0]], vectors["text"]), "text": _Inputs(by_kind["text"], vectors[pair[0]])}
    return inputs


def _kind(path: Path) -> Literal["image", "audio"]:
    return "image" if path.suffix.lower() in IMAGE_SUFFIXES else "audio"


def _prepared(ways: Mapping[Modality, Handling], inputs: Iterable[Media | Text], *, strict: bool) -> list[Prepared]:
    """Prepare the first inputs; `strict`: each must be readable, else it is left out. Raises SettingsError."""
    prepared: list[Prepared] = []
    for input in inputs:
        way = ways.get(modality_of(input))
        if way is None or len(prepared) == _MOST_INPUTS:
            break
        try:
            prepared.append(way.prepare(input))
        except InputError as error:
            if strict:
                raise SettingsError(f"--texts: the {modality_of(input)} of pair {len(prepared)}: {error}") from None
    return prepared


def _lines(bundle: Bundle, texts: Path | None) -> tuple[list[str], list[str]]:
    """Return the texts, and the names of their media where they are pairs. Raises SettingsError."""
    if texts is None:
        return sentences(bundle), []
    try:
        rows = [line.rpartition("\t") for line in texts.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--texts {texts} cannot be read: {error}") from None
    if not rows:
        raise SettingsError(f"--texts {texts} holds no text")
    return [text for _, _, text in rows], [name for name, tab, _ in rows if tab]


def sentences(bundle: Bundle) -> list[str]:
    """Return the sentences of the bundle's own pages."""
    pages = [(bundle.path / name).read_text("utf-8") for name in bundle.manifest.files if name.endswith(".md")]
    parts = (part.strip() for page in pages for part in re.split(r"[.|\n]", page))
    return [text for text in dict.fromkeys(parts) if text.count(" ") >= 2]


def _named(choice: Choice) -> str:
    return f"{choice.runtime} {choice.precision}, {choice.lanes} lanes × {choice.threads} threads, batch {choice.batch}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
