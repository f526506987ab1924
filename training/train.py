"""Train projectors on cached frozen features: one space for all modalities, the text projector shared.

One pair type per step (arXiv 2309.04646 calls it alternating; Uni-Perceiver v2 unmixed batches): a batch never holds
negatives of another source. Read `train` top to bottom.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from service.contract.bundle import MODALITIES, Modality
from training.evaluate import class_vectors, retrieval, top1
from training.features import Features
from training.losses import MAX_TEMPERATURE, MIN_TEMPERATURE, clamp_log_scale, info_nce, same_pairs
from training.pairs import Pairs, Split
from training.projector import Head, Standardise
from training.recipe import Recipe, TrainSpec

_VALIDATED_MEDIA = 2000  # bounds the cost of one validation


@dataclass(frozen=True)
class Prepared:
    """The pairs of one source and split with the frozen features of both sides."""

    pairs: Pairs
    media: Features
    texts: Features


@dataclass(frozen=True)
class Trained:
    heads: dict[Modality, Head]
    temperature: float
    means: dict[Modality, list[float]]
    """Mean unit vector of each modality over the training pairs."""
    history: list[dict[str, float]]


def train(
    recipe: Recipe,
    data: Mapping[str, Mapping[Split, Prepared]],
    work: Path,
    frozen: Mapping[Modality, Head] | None = None,
) -> Trained:
    """Train one head per modality and return the best on validation.

    `frozen` heads belong to a space that is there already: they are aligned to, and left as they are.

    A checkpoint in `work` is written at each validation; an interrupted run of the same recipe goes on from it and
    ends where an uninterrupted one would.
    """
    spec = recipe.train
    torch.manual_seed(spec.seed)
    rng = np.random.default_rng(spec.seed)
    widths = _widths(data)
    frozen = frozen or {}
    heads = {m: frozen[m] if m in frozen else Head(m, width, recipe.projector) for m, width in widths.items()}
    learning = {m: head for m, head in heads.items() if m not in frozen}
    for head in frozen.values():
        head.eval().requires_grad_(False)
    _standardise(learning, data)
    # A temperature per source: labels are learned long before captions, and would sharpen the captions' softmax.
    log_scales = nn.Parameter(torch.full((len(data),), math.log(1 / spec.temperature)))
    model = nn.ModuleDict({str(modality): head for modality, head in learning.items()})
    optimiser = torch.optim.AdamW(_groups(model, log_scales, spec), lr=spec.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _schedule(step, spec))

    sources = [splits["train"] for splits in data.values()]
    shares = np.array([source.pairs.weight for source in sources])
    samplers = [Sampler(source.pairs, spec.batch_size) for source in sources]
    history: list[dict[str, float]] = []
    best, best_state, stale, first = -math.inf, _state(model), 0, 0

    checkpoint = work / "checkpoint.pt"
    signature = recipe.model_dump_json(exclude={"data", "description", "licences", "notes"})
    if checkpoint.is_file() and (saved := torch.load(checkpoint, weights_only=True))["signature"] == signature:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        log_scales.data.copy_(saved["log_scales"])
        torch.set_rng_state(saved["torch_rng"])
        rng.bit_generator.state = json.loads(saved["numpy_rng"])
        history, best, best_state = saved["history"], saved["best"], saved["best_state"]
        stale, first = saved["stale"], saved["step"]

    with tqdm(total=spec.steps, initial=first, desc="projectors", unit="step") as bar:
        for step in range(first, spec.steps):
            if stale >= spec.patience:
                break
            pick = int(rng.choice(len(sources), p=shares / shares.sum()))
            source, links = sources[pick], samplers[pick].draw(rng)
            media, texts = _tensors(source.media, links[:, 0]), _tensors(source.texts, links[:, 1])
            same = _same(source.pairs, links)
            model.train()
            loss = info_nce(heads[source.pairs.modality](**media), heads["text"](**texts), log_scales[pick], same)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*model.parameters(), log_scales], 1.0)
            optimiser.step()
            schedule.step()
            clamp_log_scale(log_scales.data)
            bar.update(1)
            if (step + 1) % spec.validate_every == 0 or step + 1 == spec.steps:
                figures = validate(recipe, heads, data)
                score = float(np.mean(list(figures.values())))
                history.append({"step": step + 1, "loss": round(loss.item(), 4), "score": round(score, 3), **figures})
                bar.set_postfix(score=f"{score:.1f}")
                stale = 0 if score > best else stale + 1
                if score > best:
                    best, best_state = score, {**_state(model), "log_scales": log_scales.detach().clone()}
                _save(
                    checkpoint,
                    {
                        "signature": signature,
                        "model": model.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "schedule": schedule.state_dict(),
                        "log_scales": log_scales.detach().clone(),
                        "torch_rng": torch.get_rng_state(),
                        "numpy_rng": json.dumps(rng.bit_generator.state),
                        "history": history,
                        "best": best,
                        "best_state": best_state,
                        "stale": stale,
                        "step": step + 1,
                    },
                )
    learned = torch.exp(-best_state.pop("log_scales", log_scales.detach())).tolist()
    model.load_state_dict(best_state)
    model.eval().requires_grad_(False)
    return Trained(heads, calibrate(recipe, heads, data, float(np.mean(learned))), _means(heads, data), history)


class Sampler:
    """Draws batches of links with each medium at most once until every medium was drawn; captions at random."""

    def __init__(self, pairs: Pairs, batch_size: int) -> None:
        order = np.argsort(pairs.links[:, 0], kind="stable")
        self._links = pairs.links[order]
        counts = np.bincount(self._links[:, 0], minlength=len(pairs.media))
        self._starts, self._counts = np.cumsum(counts) - counts, counts
        self._media = np.flatnonzero(counts)
        self._batch = min(batch_size, len(self._media))

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(batch, 2) links."""
        media = rng.choice(self._media, self._batch, replace=False)
        return self._links[self._starts[media] + rng.integers(0, self._counts[media])]


@torch.inference_mode()
def project(head: Head, features: Features, batch: int = 4096) -> NDArray[np.float32]:
    """Unit vectors (N, D) of frozen features."""
    training = head.training
    head.eval()
    parts = []
    for start in range(0, len(features), batch):
        rows = np.arange(start, min(start + batch, len(features)))
        parts.append(head(**_tensors(features, rows)).numpy())
    head.train(training)
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def validate(
    recipe: Recipe, heads: Mapping[Modality, Head], data: Mapping[str, Mapping[Split, Prepared]]
) -> dict[str, float]:
    """Mean R@1 of the two directions for captions, top-1 for labels, per source with a validation split."""
    figures = {}
    for name, splits in data.items():
        held = splits["validation"]
        if not len(held.pairs.media):
            continue
        media = project(heads[held.pairs.modality], held.media)
        if held.pairs.labels is not None:
            figures[name], _ = top1(media, _classes(recipe, heads["text"], splits), held.pairs.labels)
        else:
            keep = held.pairs.links[:, 0] < _VALIDATED_MEDIA
            recall = retrieval(media[:_VALIDATED_MEDIA], project(heads["text"], held.texts), held.pairs.links[keep])
            figures[name] = (recall["m2t.r1"] + recall["t2m.r1"]) / 2
    return figures


def calibrate(
    recipe: Recipe,
    heads: Mapping[Modality, Head],
    data: Mapping[str, Mapping[Split, Prepared]],
    learned: float,
) -> float:
    """The temperature that makes label scores most likely on the labelled validation splits (arXiv 1706.04599).

    Without such a split it is `learned`, the mean of the training temperatures.
    """
    sets = []
    for splits in data.values():
        held = splits["validation"]
        if held.pairs.labels is not None and len(held.pairs.media):
            media = project(heads[held.pairs.modality], held.media)
            similarity = media @ _classes(recipe, heads["text"], splits).T
            sets.append((torch.from_numpy(similarity).double(), torch.from_numpy(held.pairs.labels)))
    if not sets:
        return learned
    candidates = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 200)
    losses = [sum(cross_entropy(scores / t, labels).item() for scores, labels in sets) for t in candidates]
    return float(candidates[int(np.argmin(losses))])


def _classes(recipe: Recipe, text: Head, splits: Mapping[Split, Prepared]) -> NDArray[np.float32]:
    """One vector per class of a labelled source, from the caption features of all its splits together."""
    vectors: dict[str, NDArray[np.float32]] = {}
    for split in splits.values():
        vectors |= dict(zip(split.pairs.texts, project(text, split.texts), strict=True))
    prompts = label_prompts(recipe, splits["train"].pairs)
    templates = len(prompts) // len(splits["train"].pairs.classes)
    return class_vectors(np.stack([vectors[prompt] for prompt in prompts]), templates)


def label_prompts(recipe: Recipe, pairs: Pairs) -> list[str]:
    """Every class of a labelled source in every template of its modality, class by class."""
    return [template.format(name) for name in pairs.classes for template in recipe.templates[pairs.modality]]


def save_projectors(path: Path, trained: Trained) -> None:
    """projectors.safetensors: every tensor under `<modality>.`; temperature and means in its metadata."""
    tensors = {
        f"{modality}.{key}": value.contiguous()
        for modality, head in trained.heads.items()
        for key, value in head.state_dict().items()
    }
    save_file(tensors, path, {"temperature": repr(trained.temperature), "means": json.dumps(trained.means)})


def load_projectors(path: Path, recipe: Recipe) -> Trained:
    """Rebuild what `save_projectors` wrote, for a recipe. Raises ValueError where the two do not fit."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        metadata = file.metadata()
    heads: dict[Modality, Head] = {}
    for modality in MODALITIES:
        state = {k.removeprefix(f"{modality}."): v for k, v in tensors.items() if k.startswith(f"{modality}.")}
        if not state:
            continue
        first = state.get("local.norm.weight", state.get("pooled.standardise.mean"))
        if first is None:
            raise ValueError(f"{path} holds no {modality} projector of a known kind")
        head = Head(modality, len(first), recipe.projector)
        try:
            head.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the recipe's projector: {error}") from None
        heads[modality] = head.eval().requires_grad_(False)
    if not heads:
        raise ValueError(f"{path} holds no projectors")
    return Trained(heads, float(metadata["temperature"]), json.loads(metadata["means"]), [])


def _means(heads: Mapping[Modality, Head], data: Mapping[str, Mapping[Split, Prepared]]) -> dict[Modality, list[float]]:
    parts: dict[Modality, list[NDArray[np.float32]]] = {modality: [] for modality in heads}
    for splits in data.values():
        source = splits["train"]
        parts[source.pairs.modality].append(project(heads[source.pairs.modality], source.media))
        parts["text"].append(project(heads["text"], source.texts))
    return {modality: np.concatenate(rows).mean(0).round(6).tolist() for modality, rows in parts.items()}


def _widths(data: Mapping[str, Mapping[Split, Prepared]]) -> dict[Modality, int]:
    widths: dict[Modality, int] = {}
    for splits in data.values():
        widths[splits["train"].pairs.modality] = splits["train"].media.pooled.shape[1]
        widths["text"] = splits["train"].texts.pooled.shape[1]
    return widths


def _standardise(heads: Mapping[Modality, Head], data: Mapping[str, Mapping[Split, Prepared]]) -> None:
    for modality, head in heads.items():
        if head.kind == "token":
            continue
        rows = [
            (split["train"].texts if modality == "text" else split["train"].media).pooled
            for split in data.values()
            if modality in ("text", split["train"].pairs.modality)
        ]
        standardise = head.pooled.standardise
        assert isinstance(standardise, Standardise)
        standardise.fit(torch.from_numpy(np.concatenate(rows)))


def _groups(model: nn.Module, log_scales: nn.Parameter, spec: TrainSpec) -> list[dict[str, Any]]:
    """No weight decay on biases, norms and the scale."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": [*others, log_scales], "weight_decay": 0.0},
    ]


def _schedule(step: int, spec: TrainSpec) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _tensors(features: Features, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    tensors = {"pooled": torch.from_numpy(features.pooled[rows])}
    if features.tokens is not None and features.weights is not None:
        tensors["tokens"] = torch.from_numpy(features.tokens[rows].astype(np.float32))
        tensors["weights"] = torch.from_numpy(features.weights[rows])
    return tensors


def _same(pairs: Pairs, links: NDArray[np.int64]) -> Tensor:
    keys = [torch.from_numpy(links[:, 0]), torch.from_numpy(links[:, 1])]
    if pairs.labels is not None:
        keys.append(torch.from_numpy(pairs.labels[links[:, 0]]))
    return same_pairs(*keys)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
