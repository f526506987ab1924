"""Check that a machine has what a recipe asks for: encoders, room, memory, packages; and how long it will take here."""

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from service.contract.bundle import Modality
from training.doctor.data import Check
from training.encoders import FrozenEncoder, load_encoder
from training.features import Item, preparer, runner, stored_as
from training.heads.projector import Head
from training.recipe import EncoderSource, Recipe

_TIMED = {"image": 8, "audio": 8, "text": 64}
_REACH_S = 10.0
_CLASSES = ((60.0, "seconds"), (3600.0, "minutes"), (86_400.0, "hours"))
_OPTIONAL = {"ray": "only `curate --ray` needs it", "tensorboard": "only `train.tensorboard` needs it"}


def check_encoder(recipe: Recipe, modality: Modality, loaded: dict[Modality, FrozenEncoder]) -> Iterator[Check]:
    """Load an encoder; one that must be downloaded first is asked for at the hub, and not downloaded."""
    source, what = recipe.encoders[modality], f"encoders.{modality}"
    if source.hub is not None and not _cached(source):
        yield _reached(source, what)
        return
    try:
        encoder = loaded[modality] = load_encoder(recipe, modality)
    except Exception as error:  # what a library says of a broken file is a finding too
        yield Check(what, "missing", str(error).splitlines()[0] or type(error).__name__)
        return
    concepts = f", {len(encoder.concepts)} concepts" if encoder.concepts else ""
    yield Check(
        what, "ok", f"{encoder.source}: {encoder.width} features{concepts}, {_size(weight(encoder))} of weights"
    )


def _cached(source: EncoderSource) -> bool:
    from huggingface_hub import snapshot_download

    assert source.hub is not None
    try:
        snapshot_download(source.hub, revision=source.revision, local_files_only=True)
    except (OSError, ValueError):  # not there; or no hub id at all, which `_reached` says
        return False
    return True


def _reached(source: EncoderSource, what: str) -> Check:
    from huggingface_hub import HfApi

    assert source.hub is not None
    try:
        HfApi().model_info(source.hub, revision=source.revision, timeout=_REACH_S)
    except Exception as error:  # of several HTTP libraries, and of none in common
        reason = str(error).splitlines()[0] or type(error).__name__
        advice = "save it where there is a network, and give its `folder`"
        return Check(
            what, "missing", f"the hub model {source.hub} is not cached, and cannot be had: {reason}; {advice}"
        )
    return Check(what, "ok", f"the hub model {source.hub} can be had; it will be downloaded")


def weight(encoder: FrozenEncoder) -> int:
    """Bytes of an encoder's weights."""
    if encoder.module is not None:
        return sum(value.numel() * value.element_size() for value in encoder.module.state_dict().values())
    assert encoder.onnx is not None
    return encoder.onnx.stat().st_size


def timed(encoder: FrozenEncoder, items: Sequence[Item], tokens: bool) -> tuple[float, int, int]:
    """Seconds of one item, bytes of its features in the cache, and the most local vectors that one has.

    Raises TrainingError for an item it cannot read.
    """
    prepare, run = preparer(encoder), runner(encoder, tokens, fast=True)
    count = _TIMED.get(encoder.modality, 64)
    items = items[:: max(1, len(items) // count)][:count]
    run([prepare(items[0])])
    started = time.perf_counter()
    rows = run([prepare(item) for item in items])
    seconds = (time.perf_counter() - started) / len(items)
    size = rows["pooled"].shape[1] * np.dtype(stored_as(encoder)).itemsize
    if not tokens:
        return seconds, size, 0
    counts = (rows["weights"] > 0).sum(1)
    return seconds, size + round(counts.mean() * (2 * rows["tokens"].shape[2] + 4)), int(counts.max())


def training_memory(recipe: Recipe, loaded: Mapping[Modality, FrozenEncoder], counts: Mapping[Modality, int]) -> int:
    """Bytes of the heads with their gradients and moments, and of what one step holds for the backward pass."""
    spec, projector = recipe.train, recipe.projector
    heads = {m: Head(m, e.width, projector, len(e.concepts)) for m, e in loaded.items()}
    weights = 20 * sum(value.numel() for head in heads.values() for value in head.parameters())
    logits = 3 * 4 * min(spec.objective.chunk or spec.batch_size, spec.batch_size) * spec.batch_size
    inner = projector.dimensions if projector.needs_tokens else projector.hidden
    rows = {m: spec.batch_size * max(1, counts.get(m, 1)) * (3 * e.width + 5 * inner) * 4 for m, e in loaded.items()}
    media = max((size for m, size in rows.items() if m != "text"), default=0)
    return weights + logits + media + rows.get("text", 0)


def epochs(recipe: Recipe, media: int) -> float:
    """Return how often so many media are drawn, if they were drawn alone."""
    spec = recipe.train
    return spec.epochs or spec.steps * spec.batch_size / spec.objective.captions / max(1, media)


def training_seconds(recipe: Recipe, loaded: Mapping[Modality, FrozenEncoder]) -> float:
    """Floating-point operations of the trained heads, the linear baseline's too, at the measured rate of a matmul.

    Forward and backward are six per weight and pair; validation is not counted.
    """
    spec, asked = recipe.train, recipe.projector
    left, right = torch.randn(512, 1024), torch.randn(1024, 1024)
    left @ right
    started = time.perf_counter()
    for _ in range(4):
        left @ right
    rate = 4 * 2 * 512 * 1024 * 1024 / (time.perf_counter() - started)
    rungs = [] if asked.closed else [(asked, spec.steps)]
    if spec.baseline and not asked.linear:
        rungs.append((asked.model_copy(update={"kind": "linear"}), min(spec.steps, spec.baseline_steps)))
    total = 0.0
    for projector, steps in rungs:
        heads = [Head(m, e.width, projector, len(e.concepts)) for m, e in loaded.items()]
        weights = sum(value.numel() for head in heads for value in head.parameters()) / max(1, len(heads) - 1)
        total += 6.0 * spec.batch_size * steps * (weights + spec.batch_size * projector.dimensions)
    return total / rate


def check_room(cache: Path, needed: int) -> Check:
    folder = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    state = f"{_size(needed)} for the cache at most, {_size(free)} free at {folder}"
    return Check("disk", "ok" if free > needed else "missing", state)


def check_memory(needed: int) -> Check:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with Path("/proc/meminfo").open() as stream:  # what the kernel would give back counts as free
        free = next((int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable")), free)
    return Check("memory", "ok" if free > needed else "missing", f"about {_size(needed)}, {_size(free)} available")


def check_packages(recipe: Recipe) -> Iterator[Check]:
    needed = {"tensorboard"} if recipe.train.tensorboard else set()
    for name, use in _OPTIONAL.items():
        if importlib.util.find_spec(name) is not None:
            yield Check(name, "ok", "installed")
        elif name in needed:
            yield Check(name, "missing", f"train.tensorboard needs it: pip install {name}")
        else:
            yield Check(name, "absent", f"not installed; {use}")


def check_training(recipe: Recipe) -> Iterator[Check]:
    if recipe.train.device == "cuda" or (recipe.train.device == "auto" and torch.cuda.is_available()):
        there = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if there else "train.device is cuda, and torch sees no CUDA device here"
        yield Check("device", "ok" if there else "missing", name)
    else:
        yield Check("device", "ok", f"cpu, {torch.get_num_threads()} threads")
    if recipe.train.start is not None:
        path = recipe.path(recipe.train.start)
        there = path.is_file()
        yield Check("train.start", "ok" if there else "missing", f"{path}{'' if there else ' is not there'}")


def time_class(seconds: float) -> str:
    return next((name for bound, name in _CLASSES if seconds < bound), "days")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.{unit == 'GB':d}f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
