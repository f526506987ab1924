"""The training of a set of heads: draw, project, contrast; `training.fit.loop` steps, judges and keeps the best.

One pair type per step (arXiv 2309.04646 calls it alternating; Uni-Perceiver v2 unmixed batches), unless the recipe
asks for mixed ones: a batch never holds negatives of another source. Read `optimise` top to bottom.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from service.contract.bundle import Modality
from training.distributed import Ranks, joined
from training.errors import TrainingError
from training.fit.ahead import Ahead
from training.fit.loop import Figures, Plan, Task, begin, run, warm_cosine
from training.fit.losses import alignment, clamp_log_scale, contrast, nested, noise_robust, uniformity
from training.fit.sampling import Batches, Part, epoch_steps, steps_of
from training.heads.concepts import Named, name_vectors, place, soft_caption_loss
from training.heads.projector import Head, NoHead, Standardise
from training.heads.trained import Trained, init_hash, load_projectors
from training.measure.prepared import Prepared
from training.measure.validation import Data, calibrate, means, overall, validate
from training.recipe import ProjectorSpec, Recipe, TrainSpec

_ELSEWHERE: Any = {
    "data": True,
    "description": True,
    "licences": True,
    "terms": True,
    "notes": True,
    "train": {"baseline", "baseline_steps"},
}
"""Fields of a recipe that change nothing of a run: where it was made, and what it is compared with."""


class FitError(TrainingError):
    """Heads cannot be trained as the recipe asks: the message says what is missing."""


class _Scales(nn.Module):
    """The factors of each source's cosines, as log(1 / temperature).

    A temperature per source: labels are learned long before captions, and would sharpen the captions' softmax.
    """

    def __init__(self, spec: TrainSpec, sources: int) -> None:
        super().__init__()
        kinds = 1 if spec.objective.mixed else sources
        self.log_scales = nn.Parameter(torch.full((kinds,), math.log(1 / spec.temperature)))


class Alignment(Task):
    """Heads of several modalities that learn to agree on pairs; `frozen` ones are aligned to."""

    def __init__(
        self,
        recipe: Recipe,
        heads: dict[Modality, Head],
        learning: Sequence[Modality],
        data: Data,
        names: Mapping[Modality, Named],
        ranks: Ranks,
    ) -> None:
        self.recipe, self.heads, self.data, self.names, self.ranks = recipe, heads, data, names, ranks
        self.sources = [splits["train"] for splits in data.values()]
        self.scales = _Scales(recipe.train, len(self.sources))
        self.model = nn.ModuleDict({**{str(m): heads[m] for m in learning}, "scales": self.scales})
        device = device_of(recipe)
        nn.ModuleDict({**{str(m): head for m, head in heads.items()}, "scales": self.scales}).to(device)
        self.sampler = Batches(recipe, self.sources, ranks)
        self.rng = np.random.default_rng(recipe.train.seed)
        self.drawn = self._drawn()

        def draw(step: int) -> tuple[list[Part], dict[str, Any]]:
            parts = self.sampler.draw(step, self.rng)
            return [part.pinned() for part in parts] if device == "cuda" else parts, self._drawn()

        self.batches = Ahead(draw, steps_of(recipe, self.sources, ranks))
        self.board: Any = None
        self.learning = [heads[modality] for modality in learning]
        self.common = heads["text"].common if isinstance(heads["text"], NoHead) else None
        self.after_step()

    @property
    def waited_s(self) -> float:
        return self.batches.waited_s

    def loss(self, step: int) -> Tensor:
        parts, self.drawn = self.batches.take(step)
        if any(self.sources[part.source].pairs.modality in self.names for part in parts):
            with _precision(self.recipe.train, self.scales.log_scales.device.type):
                place(self.heads, self.names)
        return _loss(self.recipe, self.heads, parts, self.sources, self.scales, self.ranks, self.names, step)

    def after_step(self) -> None:
        clamp_log_scale(self.scales.log_scales.data)
        if self.common is not None:
            for head in self.learning:
                head.leave_out(self.common.to(head.device))

    def judge(self, model: nn.Module) -> tuple[float, Figures]:
        assert isinstance(model, nn.ModuleDict)
        heads = self.heads | {m: cast(Head, model[m]) for m in self.heads if m in model}
        _settle(heads, self.names)
        figures = validate(self.recipe, heads, self.data, self.names)
        return overall(figures), figures

    def state(self) -> dict[str, Any]:
        return self.drawn  # as of the batch that was taken last, whatever was drawn ahead

    def restore(self, saved: dict[str, Any]) -> None:
        self.rng.bit_generator.state = saved["rng"]
        self.sampler.restore(saved["samplers"])
        self.drawn = saved

    def _drawn(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "samplers": self.sampler.state}

    def report(self, entry: Figures) -> None:
        if self.board is not None:
            for key, value in entry.items():
                self.board.add_scalar(f"{self.recipe.projector.kind}/{key}", value, entry["step"])


def optimise(
    recipe: Recipe,
    data: Data,
    work: Path,
    frozen: Mapping[Modality, Head] | None = None,
    names: Mapping[Modality, Named] | None = None,
) -> Trained:
    """Train one head per modality and return the best on validation; `frozen` ones are left as they are.

    A checkpoint in `work` is written at each validation; an interrupted run of the same recipe on the same features
    goes on from it and ends where an uninterrupted one would.
    """
    spec, ranks, frozen, names = recipe.train, joined(), frozen or {}, names or {}
    torch.manual_seed(spec.seed)
    heads = new_heads(recipe, data, frozen, recipe.projector, names)
    learning = {m: head for m, head in heads.items() if m not in frozen}
    _start(recipe, learning)
    init = init_hash(nn.ModuleDict({str(m): head for m, head in learning.items()}).state_dict())
    task = Alignment(recipe, heads, list(learning), data, names, ranks)
    ranks.spread(task.model)
    if ranks.index:
        torch.manual_seed(spec.seed + ranks.index)  # another dropout on other pairs; the weights are drawn by now
    signature = signature_of(recipe, data, frozen, names, ranks)
    state = begin(work / "checkpoint.pt", task.model, spec.weight_decay, signature)
    state.resume(task, ranks)
    task.board = _board(spec, work) if ranks.index == 0 else None
    try:
        run(state, task, _plan(recipe, task.sources, ranks), recipe.projector.kind, ranks)
    finally:
        task.batches.close()
        if task.board is not None:
            task.board.close()
    task.model.load_state_dict(state.best)
    for head in heads.values():
        head.cpu().eval().requires_grad_(False)
    learned = float(torch.exp(-task.scales.log_scales.detach()).mean())
    timing = {} if math.isnan(state.step_s) else {"step_s": state.step_s, "host_share": state.host_share}
    if ranks.index:  # the first process alone goes on
        return Trained(heads, learned, {}, state.history, init=init)
    if timing:
        kind, share = recipe.projector.kind, f"{state.host_share:.0%} of it waiting for its batch"
        print(f"{kind}: {state.step_s:.3f} s a step, {share}", file=sys.stderr)
    temperature, centres = calibrate(recipe, heads, data, learned), means(heads, data)
    return Trained(heads, temperature, centres, state.history, init=init, timing=timing)


def _plan(recipe: Recipe, sources: Sequence[Prepared], ranks: Ranks) -> Plan:
    spec, steps = recipe.train, steps_of(recipe, sources, ranks)
    hold = 1 if spec.epochs is None else epoch_steps(recipe, sources, ranks)
    return Plan(
        steps=steps,
        rate=lambda step: warm_cosine(step, steps, spec.warmup_steps, spec.learning_rate, spec.lowest_rate, hold),
        validate_every=spec.validate_every,
        patience=spec.patience,
    )


def signature_of(
    recipe: Recipe, data: Data, frozen: Mapping[Modality, Head], names: Mapping[Modality, Named], ranks: Ranks
) -> str:
    """Hash of all that the weights depend on: recipe, pairs, features (and with them encoders), what is aligned to."""
    digest = hashlib.sha256(recipe.model_dump_json(exclude=_ELSEWHERE).encode())
    digest.update(f"{ranks.count}".encode())
    for name, splits in data.items():
        for split in ("train", "validation"):
            digest.update(f"{name}.{split}:{splits[split].identity}".encode())
    for modality, head in frozen.items():
        digest.update(f"{modality}:{init_hash(head.state_dict())}".encode())
    for modality, vocabulary in names.items():
        digest.update(f"{modality}:{','.join(prompts.identity for prompts in vocabulary.prompts)}".encode())
    if recipe.train.start is not None:
        digest.update(recipe.path(recipe.train.start).read_bytes())
    return digest.hexdigest()


def new_heads(
    recipe: Recipe,
    data: Data,
    frozen: Mapping[Modality, Head],
    projector: ProjectorSpec,
    names: Mapping[Modality, Named] | None = None,
) -> dict[Modality, Head]:
    """A head for each modality of `data`, `frozen` ones as they are, the others new, fed standardised features."""
    widths: dict[Modality, int] = {}
    for splits in data.values():
        widths[splits["train"].pairs.modality] = splits["train"].media.pooled.shape[1]
        widths["text"] = splits["train"].texts.pooled.shape[1]
    counts = {modality: vocabulary.count for modality, vocabulary in (names or {}).items()}
    heads = {
        m: frozen[m] if m in frozen else Head(m, width, projector, counts.get(m, 0)) for m, width in widths.items()
    }
    for head in frozen.values():
        head.eval().requires_grad_(False)
    _standardise({m: head for m, head in heads.items() if m not in frozen}, data)
    return heads


def device_of(recipe: Recipe) -> str:
    """The device that the recipe's `train.device` means here. Raises FitError where there is no such one."""
    if recipe.train.device == "cuda" and not torch.cuda.is_available():
        raise FitError("train.device is cuda, and torch sees no CUDA device here")
    return "cuda" if recipe.train.device != "cpu" and torch.cuda.is_available() else "cpu"


def _start(recipe: Recipe, learning: Mapping[Modality, Head]) -> None:
    if recipe.train.start is None:
        return
    path = recipe.path(recipe.train.start)
    if not path.is_file():
        raise FitError(f"train.start: {path} is not there")
    try:
        earlier = load_projectors(path, recipe).heads
        for modality, head in learning.items():
            banks = {key: value for key, value in head.state_dict().items() if key.startswith("reserve.")}
            head.load_state_dict(earlier[modality].state_dict() | banks)  # banks are filled anew after training
    except (ValueError, RuntimeError, KeyError) as error:
        raise FitError(f"train.start: {path} does not fit: {error}") from None


def _loss(
    recipe: Recipe,
    heads: Mapping[Modality, Head],
    parts: Sequence[Part],
    sources: Sequence[Prepared],
    scales: _Scales,
    ranks: Ranks,
    names: Mapping[Modality, Named],
    step: int,
) -> Tensor:
    """This process's share of the loss of one batch."""
    spec, log_scales = recipe.train, scales.log_scales
    device = log_scales.device.type
    soft = torch.zeros((), device=device)
    for part in parts:
        if not part.texts:
            modality = sources[part.source].pairs.modality
            pooled, vocabulary = part.media["pooled"].to(device), names[modality]
            scores = pooled[:, -vocabulary.count :] ** heads[modality].branch.root  # type: ignore[union-attr]
            with _precision(spec, device):
                media, vectors = heads[modality](pooled), name_vectors(heads["text"], vocabulary, step)
            scale = log_scales[0 if spec.objective.mixed else part.source]
            soft = soft + soft_caption_loss(media, vectors, scale, scores) / ranks.count
    parts = [part for part in parts if part.texts]
    if not parts:
        return soft
    sides, others = [], []
    with _precision(spec, device):
        for part in parts:
            media = {key: value.to(device, non_blocking=True).float() for key, value in part.media.items()}
            texts = {key: value.to(device, non_blocking=True).float() for key, value in part.texts.items()}
            sides.append((heads[sources[part.source].pairs.modality](**media), heads["text"](**texts)))
            if part.others:
                texts = {key: value.to(device, non_blocking=True).float() for key, value in part.others.items()}
                others.append(heads["text"](**texts))
    all_media, all_texts = (torch.cat(side) if len(parts) > 1 else side[0] for side in zip(*sides, strict=True))
    keys = tuple(torch.cat(key).to(device) for key in zip(*(part.keys for part in parts), strict=True))
    other_keys = tuple(torch.cat(key).to(device) for key in zip(*(part.other_keys for part in parts), strict=True))
    pick = 0 if spec.objective.mixed else parts[0].source
    lengths = (*recipe.projector.matryoshka, recipe.projector.dimensions)
    loss = soft
    for n in lengths:
        cut = nested(all_media, n), nested(all_texts, n)
        more = (nested(torch.cat(others), n), other_keys) if others else None
        loss = loss + contrast(spec.objective, *cut, log_scales[pick], keys, ranks, more) / len(lengths)
    for part, own in zip(parts, sides, strict=True):
        loss = loss + _regulariser(spec, part, *own) / (len(parts) * ranks.count)
    return loss


def _precision(spec: TrainSpec, device: str) -> torch.autocast:
    """The context in which heads run, also that of texts on names."""
    return torch.autocast(device, torch.bfloat16, enabled=spec.precision == "bf16")


def _regulariser(spec: TrainSpec, part: Part, media: Tensor, texts: Tensor) -> Tensor:
    weights = spec.regularise
    total = torch.zeros((), device=media.device)
    for side, vectors in ((part.media, media), (part.texts, texts)):
        features = side["pooled"].to(media.device)
        if weights.noise_robust:
            total = total + weights.noise_robust * noise_robust(features, vectors) / 2
        if weights.uniformity:
            total = total + weights.uniformity * uniformity(vectors) / 2
    return total + weights.alignment * alignment(media, texts) if weights.alignment else total


def _standardise(heads: Mapping[Modality, Head], data: Data) -> None:
    if joined().index:
        return  # the first process reads the features once for all
    for modality, head in heads.items():
        if head.needs_tokens:
            continue
        features = [
            split["train"].texts if modality == "text" else split["train"].media
            for split in data.values()
            if modality in ("text", split["train"].pairs.modality) and split["train"].pairs.weight
        ]
        standardise = head.pooled.standardise
        assert isinstance(standardise, Standardise)
        standardise.fit(torch.from_numpy(block[:, : head.width]) for part in features for block in part.blocks())
        if standardise.constant:
            what, why = (
                ("texts", "Does it know none of their words?") if modality == "text" else ("media", "Are all one?")
            )
            raise FitError(
                f"nothing can be learned: encoders.{modality} gives all {sum(map(len, features)):,} {what} of the "
                f"train split the same features. {why}"
            )


@torch.no_grad()
def _settle(heads: Mapping[Modality, Head], names: Mapping[Modality, Named]) -> None:
    """The names' vectors as the text head gives them without dropout: what is validated, and what ships."""
    training = heads["text"].training
    heads["text"].eval()
    place(heads, names)
    heads["text"].train(training)


def _board(spec: TrainSpec, work: Path) -> Any:
    if not spec.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise FitError("train.tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(work / "tensorboard"))
