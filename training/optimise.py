"""The training loop of a set of heads: draw, project, contrast, step, validate, keep the best; resumable.

One pair type per step (arXiv 2309.04646 calls it alternating; Uni-Perceiver v2 unmixed batches), unless the recipe
asks for mixed ones: a batch never holds negatives of another source. Read `optimise` top to bottom.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from service.contract.bundle import Modality
from training.concepts import Named, name_vectors, place, soft_caption_loss
from training.distributed import Ranks, joined
from training.errors import TrainingError
from training.losses import alignment, clamp_log_scale, contrast, nested, noise_robust, structure, uniformity
from training.projector import Head, Standardise
from training.recipe import ProjectorSpec, Recipe, TrainSpec
from training.sampling import Batches, Part, Prepared
from training.trained import Trained, init_hash, load_projectors
from training.validation import Data, calibrate, means, validate


class FitError(TrainingError):
    """Heads cannot be trained as the recipe asks: the message says what is missing."""


def optimise(
    recipe: Recipe,
    data: Data,
    work: Path,
    frozen: Mapping[Modality, Head] | None = None,
    names: Mapping[Modality, Named] | None = None,
) -> Trained:
    """Train one head per modality and return the best on validation; `frozen` ones are left as they are.

    A checkpoint in `work` is written at each validation; an interrupted run of the same recipe goes on from it and
    ends where an uninterrupted one would.
    """
    spec, ranks, device = recipe.train, joined(), device_of(recipe)
    torch.manual_seed(spec.seed)
    rng = np.random.default_rng(spec.seed)
    names = names or {}
    heads = new_heads(recipe, data, frozen or {}, recipe.projector, names)
    learning = {m: head for m, head in heads.items() if m not in (frozen or {})}
    _start(recipe, learning)
    model = nn.ModuleDict({str(modality): head for modality, head in learning.items()})
    init = init_hash(model.state_dict())
    nn.ModuleDict({str(modality): head for modality, head in heads.items()}).to(device)
    if ranks.index:
        torch.manual_seed(spec.seed + ranks.index)  # another dropout on other pairs; the weights are drawn by now
    # A temperature per source: labels are learned long before captions, and would sharpen the captions' softmax.
    sources = [splits["train"] for splits in data.values()]
    kinds = 1 if spec.objective.mixed else len(sources)
    log_scales = nn.Parameter(torch.full((kinds,), math.log(1 / spec.temperature), device=device))
    biases = nn.Parameter(torch.full((kinds,), spec.objective.bias, device=device))
    scalars = [log_scales, biases] if spec.objective.kind == "sigmoid" else [log_scales]
    optimiser = torch.optim.AdamW(_groups(model, scalars, spec), lr=spec.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _schedule(step, spec))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(spec.ema)) if spec.ema else None
    batches = Batches(recipe, sources, ranks)
    history: list[dict[str, float]] = []
    best, best_state, stale, first = -math.inf, _state(model), 0, 0

    checkpoint = work / "checkpoint.pt"
    # Where the run was made, and what it is compared with, change nothing of it.
    apart = {
        "data": True,
        "description": True,
        "licences": True,
        "terms": True,
        "notes": True,
        "train": {"baseline", "baseline_steps"},
    }
    signature = recipe.model_dump_json(exclude=apart)  # type: ignore[arg-type]
    if checkpoint.is_file() and (saved := torch.load(checkpoint, weights_only=True))["signature"] == signature:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        log_scales.data.copy_(saved["log_scales"])
        biases.data.copy_(saved["biases"])
        if average is not None:
            average.load_state_dict(saved["average"])
        if ranks.index == 0:
            torch.set_rng_state(saved["torch_rng"])
        rng.bit_generator.state = json.loads(saved["numpy_rng"])
        history, best, best_state = saved["history"], saved["best"], saved["best_state"]
        stale, first = saved["stale"], saved["step"]

    board = _board(spec, work) if ranks.index == 0 else None
    with tqdm(total=spec.steps, initial=first, desc=recipe.projector.kind, unit="step", disable=ranks.index > 0) as bar:
        for step in range(first, spec.steps):
            if stale >= spec.patience:
                break
            model.train()
            parts = batches.draw(step, rng)
            if any(sources[part.source].pairs.modality in names for part in parts):
                place(heads, names)
            loss = _loss(recipe, heads, parts, sources, log_scales, biases, ranks, names, step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            ranks.sum_gradients([*model.parameters(), *scalars])
            nn.utils.clip_grad_norm_([*model.parameters(), *scalars], 1.0)
            optimiser.step()
            schedule.step()
            clamp_log_scale(log_scales.data)
            if average is not None:
                average.update_parameters(model)
            bar.update(1)
            if (step + 1) % spec.validate_every == 0 or step + 1 == spec.steps:
                _settle(heads, names)
                figures = validate(recipe, heads, data)
                score = ranks.agree(float(np.mean(list(figures.values()))) if figures else 0.0)
                entry = {"step": step + 1, "loss": round(loss.item(), 4), "score": round(score, 3), **figures}
                kept: nn.Module = model
                averaged = False
                if average is not None:
                    smoothed = heads | _averaged(average, learning)
                    _settle(smoothed, names)
                    smooth = validate(recipe, smoothed, data)
                    entry["ema"] = ranks.agree(float(np.mean(list(smooth.values()))) if smooth else 0.0)
                    if entry["ema"] > score:
                        kept, averaged, score = average.module, True, entry["ema"]
                history.append(entry)
                bar.set_postfix(score=f"{score:.1f}")
                if board is not None:
                    for key, value in entry.items():
                        board.add_scalar(f"{recipe.projector.kind}/{key}", value, step + 1)
                # Without a validation split there is nothing to choose by: the last weights are kept.
                better = score > best or not figures
                stale = 0 if better else stale + 1
                if better:
                    best, best_state = score, {**_state(kept), "log_scales": log_scales.detach().clone()}
                    best_state["averaged"] = torch.tensor(averaged)
                if ranks.index == 0:
                    _save(
                        checkpoint,
                        {
                            "signature": signature,
                            "model": model.state_dict(),
                            "optimiser": optimiser.state_dict(),
                            "schedule": schedule.state_dict(),
                            "log_scales": log_scales.detach().clone(),
                            "biases": biases.detach().clone(),
                            "average": average.state_dict() if average is not None else {},
                            "torch_rng": torch.get_rng_state(),
                            "numpy_rng": json.dumps(rng.bit_generator.state),
                            "history": history,
                            "best": best,
                            "best_state": best_state,
                            "stale": stale,
                            "step": step + 1,
                        },
                    )
    if board is not None:
        board.close()
    best_state = dict(best_state)
    learned = torch.exp(-best_state.pop("log_scales", log_scales.detach())).tolist()
    averaged = bool(best_state.pop("averaged", torch.tensor(False)))
    model.load_state_dict(best_state)
    for head in heads.values():
        head.cpu().eval().requires_grad_(False)
    temperature = calibrate(recipe, heads, data, float(np.mean(learned)))
    ladder = {"head.ema": averaged} if spec.ema else {}
    return Trained(heads, temperature, means(heads, data), history, ladder, init)


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
            head.load_state_dict(earlier[modality].state_dict())
    except (ValueError, RuntimeError, KeyError) as error:
        raise FitError(f"train.start: {path} does not fit: {error}") from None


def _loss(
    recipe: Recipe,
    heads: Mapping[Modality, Head],
    parts: Sequence[Part],
    sources: Sequence[Prepared],
    log_scales: Tensor,
    biases: Tensor,
    ranks: Ranks,
    names: Mapping[Modality, Named],
    step: int,
) -> Tensor:
    """This process's share of the loss of one batch."""
    spec, device = recipe.train, log_scales.device.type
    soft = torch.zeros((), device=device)
    for part in parts:
        if not part.texts:
            modality = sources[part.source].pairs.modality
            pooled, vocabulary = part.media["pooled"].to(device), names[modality]
            scores = pooled[:, -vocabulary.count :] ** heads[modality].branch.root  # type: ignore[union-attr]
            vectors = name_vectors(heads["text"], vocabulary, step)
            scale = log_scales[0 if spec.objective.mixed else part.source]
            soft = soft + soft_caption_loss(heads[modality](pooled), vectors, scale, scores) / ranks.count
    parts = [part for part in parts if part.texts]
    if not parts:
        return soft
    sides = []
    with torch.autocast(device, torch.bfloat16, enabled=spec.precision == "bf16"):
        for part in parts:
            media = {key: value.to(device, non_blocking=True) for key, value in part.media.items()}
            texts = {key: value.to(device, non_blocking=True) for key, value in part.texts.items()}
            sides.append((heads[sources[part.source].pairs.modality](**media), heads["text"](**texts)))
    all_media, all_texts = (torch.cat(side) if len(parts) > 1 else side[0] for side in zip(*sides, strict=True))
    keys = tuple(torch.cat(key).to(device) for key in zip(*(part.keys for part in parts), strict=True))
    pick = 0 if spec.objective.mixed else parts[0].source
    bias = biases[pick] if spec.objective.kind == "sigmoid" else None
    lengths = (*recipe.projector.matryoshka, recipe.projector.dimensions)
    loss = soft
    for n in lengths:
        cut = nested(all_media, n), nested(all_texts, n)
        loss = loss + contrast(spec.objective, *cut, log_scales[pick], keys, bias=bias, ranks=ranks) / len(lengths)
    for part, own in zip(parts, sides, strict=True):
        loss = loss + _regulariser(spec, part, *own) / (len(parts) * ranks.count)
    return loss


def _regulariser(spec: TrainSpec, part: Part, media: Tensor, texts: Tensor) -> Tensor:
    weights = spec.regularise
    total = torch.zeros((), device=media.device)
    for side, vectors in ((part.media, media), (part.texts, texts)):
        features = side["pooled"].to(media.device)
        if weights.structure:
            near = structure(features, vectors, levels=weights.structure_levels)
            total = total + weights.structure * near / 2
        if weights.noise_robust:
            total = total + weights.noise_robust * noise_robust(features, vectors) / 2
        if weights.uniformity:
            total = total + weights.uniformity * uniformity(vectors) / 2
    return total + weights.alignment * alignment(media, texts) if weights.alignment else total


def _averaged(average: AveragedModel, learning: Mapping[Modality, Head]) -> dict[Modality, Head]:
    return {modality: average.module[modality] for modality in learning}  # type: ignore[index]


def _standardise(heads: Mapping[Modality, Head], data: Data) -> None:
    for modality, head in heads.items():
        if head.needs_tokens:
            continue
        rows = [
            (split["train"].texts if modality == "text" else split["train"].media).pooled
            for split in data.values()
            if modality in ("text", split["train"].pairs.modality) and split["train"].pairs.weight
        ]
        standardise = head.pooled.standardise
        assert isinstance(standardise, Standardise)
        standardise.fit(torch.from_numpy(np.concatenate(rows)[:, : head.width]))


@torch.no_grad()
def _settle(heads: Mapping[Modality, Head], names: Mapping[Modality, Named]) -> None:
    """The names' vectors as the text head gives them without dropout: what is validated, and what ships."""
    training = heads["text"].training
    heads["text"].eval()
    place(heads, names)
    heads["text"].train(training)


def _groups(model: nn.Module, scalars: list[nn.Parameter], spec: TrainSpec) -> list[dict[str, Any]]:
    """No weight decay on biases, norms and the scales."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": [*others, *scalars], "weight_decay": 0.0},
    ]


def _schedule(step: int, spec: TrainSpec) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _board(spec: TrainSpec, work: Path) -> Any:
    if not spec.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise FitError("train.tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(work / "tensorboard"))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
