"""A student that learns its teacher stage by stage.

A deep student that is trained on the teacher's last features alone sees one target per picture. Here it is cut where
the teacher has hidden states, and each stage learns to make the teacher's next map from the teacher's last one, at
every position (blockwise distillation, Li et al., 2020, arXiv 1911.13053); then the stages are chained, and what each
was off by is trained away together, on maps and on pooled features (hints: Romero et al., 2015, arXiv 1412.6550). Its
features are all that it learned: pooled maps of every stage, the last one's, the scores of the teacher's classes.

Pictures are kept once, in memory-mapped pixels, and sounds as spectra; each step makes its own views of them, and asks
the teacher.
"""

import hashlib
import itertools
import json
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from service.contract.images import ImagePreprocessing, decode_image
from service.contract.windows import LogMelWindows
from training.distill.fit import (
    TrainingState,
    batch_rows,
    checkpoint_path,
    learning_rate,
    measure,
    resumed,
)
from training.distill.graph import DistillError
from training.distill.recipe import DistillRecipe, StageSpec, load_distill_recipe
from training.distill.spectra import Spectra
from training.distill.spectra import batch as mixtures
from training.distill.student import Learner, student_inputs
from training.distill.views import Views, augmented
from training.encode import mobilenet_sounds
from training.encode.mobilenet_sounds import MobileNetSounds
from training.encoders import Classifier
from training.fit.loop import follow
from training.graphs import onnx_bytes
from training.preprocessors import LOCAL

Stored = NDArray[np.uint8] | Spectra
"""What views are made of: pictures (N, H, W, 3), or the spectra of sounds."""
_FREE = {"threads", "validate_every", "checkpoint_every"}
"""What may differ in a run that goes on."""
_AHEAD = 3  # batches that are prepared while the student is at its own
_SMALLEST = 0.1  # a channel's deviation against the median: one that hardly ever fires must not outweigh the others
_MAPS, _SCORES = 0.5, 0.3
_SAMPLE = 256  # pictures
_HEARD = 20.0
_MIXED = 0.2  # of the batches: two pictures on top of each other


class Block(nn.Module):
    """A dense 3 × 3 convolution to more channels and a 1 × 1 back (Fused-MBConv, Tan and Le, 2021), and a way round it.

    On a CPU quicker than the depthwise one that it stands for, which has a ninth of its multiplications.
    """

    def __init__(self, inputs: int, expanded: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, expanded, 3, stride),
            nn.Conv2d(expanded, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return x + made if self.around else made


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU6()


def image_stages(stages: Sequence[StageSpec], last: int) -> list[nn.Module]:
    """The stages of a student of pictures, whose last map has `last` channels."""
    built: list[nn.Module] = []
    width = 3
    for stage in stages:
        layers: list[nn.Module] = []
        if stage.stem:
            layers += _convolution(width, stage.stem, 3, 2)
            width = stage.stem
        for expanded, outputs, stride in stage.blocks:
            layers.append(Block(width, expanded, outputs, stride))
            width = outputs
        if stage.layer is None:
            layers.append(nn.Sequential(*_convolution(width, last, 1)))
        built.append(nn.Sequential(*layers))
    return built


def sound_stages(network: MobileNetSounds, ends: Sequence[int]) -> list[nn.Module]:
    """A network's blocks, cut behind those that `ends` counts."""
    blocks = list(network.features)
    cuts = [0, *(end + 1 for end in ends), len(blocks)]
    return [nn.Sequential(*blocks[start:end]) for start, end in itertools.pairwise(cuts)]


class Staged(Learner):
    """Inputs → (B, d): pooled maps of all stages but the last, the last's, and scores of C classes.

    Inputs are pixels (B, 3, H, W) or rows of sound (B, 1, frames, mels). `centres` and `spreads` are the teacher's
    means and deviations per channel of every map, over positions; `mean` and `deviation` those of its pooled features.
    Inside, maps but the last are in units of their spread. `head` gives the logits of the teacher's classes.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        head: nn.Module,
        kept: Sequence[int],
        centres: Sequence[Tensor],
        spreads: Sequence[Tensor],
        mean: Tensor,
        deviation: Tensor,
        sounds: bool = False,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head, self.sounds, self.width = head, sounds, len(centres[-1])
        self.scores = Classifier(self.head, kept, sounds=sounds)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())
        for index, (centre, spread) in enumerate(zip(centres, spreads, strict=True)):
            self.register_buffer(f"centre_{index}", centre.clone())
            self.register_buffer(f"spread_{index}", spread.clone())

    def standard(self, index: int, made: Tensor) -> Tensor:
        """A map of the teacher's in the units that stage `index` works in."""
        if index == len(self.stages) - 1:
            return made
        centre, spread = getattr(self, f"centre_{index}"), getattr(self, f"spread_{index}")
        return (made - centre[:, None, None]) / spread[:, None, None]

    def maps(self, inputs: Tensor, given: Sequence[Tensor] | None = None) -> list[Tensor]:
        """What each stage makes of what the one before it made, or of what is `given` for that."""
        made: list[Tensor] = []
        below = inputs.transpose(2, 3) if self.sounds else inputs
        for index, stage in enumerate(self.stages):
            made.append(stage(below))
            below = made[-1] if given is None else given[index]
        return made

    def pooled(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, d) without the scores, in the teacher's units."""
        parts = [each.float().mean((2, 3)) for each in maps]
        for index in range(len(parts) - 1):
            parts[index] = parts[index] * getattr(self, f"spread_{index}") + getattr(self, f"centre_{index}")
        return torch.cat(parts, 1)

    def last(self, pooled: Tensor) -> Tensor:
        return pooled[:, -self.width :]

    def standardised(self, inputs: Tensor) -> Tensor:
        return (self.pooled(self.maps(inputs)) - self.mean) / self.deviation

    def forward(self, inputs: Tensor) -> Tensor:
        pooled = self.pooled(self.maps(inputs))
        return torch.cat([pooled, self.scores(self.last(pooled))], 1)


class _ImageMaps(nn.Module):
    """The teacher's maps at the stages' ends, and its logits."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.model, self.layers = model, list(layers)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        output = self.model.base_model(pixels, output_hidden_states=True)
        maps = [output.hidden_states[layer] for layer in self.layers] + [output.last_hidden_state]
        return (*maps, self.model.classifier(output.pooler_output.flatten(1)))


class _SoundMaps(nn.Module):
    """The same of rows of sound (B, 1, frames, mels)."""

    def __init__(self, network: MobileNetSounds, ends: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(sound_stages(network, ends))
        self.classifier = network.classifier

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        maps, below = [], rows.transpose(2, 3)
        for stage in self.stages:
            below = stage(below)
            maps.append(below)
        return (*maps, self.classifier(below.mean((2, 3))))


class Teacher:
    """The frozen teacher as an ONNX Runtime session: inputs (B, …) as the student's → its maps and logits."""

    def __init__(self, recipe: DistillRecipe) -> None:
        folder = recipe.data.root / recipe.teacher.folder
        spec, count = recipe.preprocessing(), len(recipe.student.cuts)
        maps: nn.Module
        if isinstance(spec, ImagePreprocessing):
            model: Any = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, **LOCAL).eval()
            names = model.config.id2label
            self.kept = [index for index in sorted(names) if names[index] != "background"]
            self.labels = [names[index] for index in self.kept]
            self.classes = len(names)
            maps, example = _ImageMaps(model, recipe.student.cuts), torch.zeros(2, 3, spec.height, spec.width)
        else:
            assert isinstance(spec, LogMelWindows)
            network, self.labels = mobilenet_sounds.load(folder)
            self.classes, self.kept = len(self.labels), list(range(len(self.labels)))
            maps, example = _SoundMaps(network, recipe.student.cuts), torch.zeros(2, 1, spec.frames, spec.n_mels)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = recipe.train.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        outputs = [f"map_{index}" for index in range(count + 1)] + ["logits"]
        program = onnx_bytes(maps.eval(), example, "inputs", outputs)
        self._session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: NDArray[np.float32]) -> list[Tensor]:
        return [torch.from_numpy(array) for array in self._session.run(None, {"inputs": inputs})]

    def pooled(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, d): the means of its maps over positions, side by side."""
        *maps, _ = self(inputs)
        return np.concatenate([each.mean((2, 3)).numpy() for each in maps], 1)


def pictures(files: Sequence[Path], work: Path, side: int = 256) -> NDArray[np.uint8]:
    """Every picture squashed to (side, side, 3), memory-mapped; made where it is not there yet."""
    listed = json.dumps([side, *(f"{path} {path.stat().st_size}" for path in files)])
    path = work / f"pictures-{hashlib.sha256(listed.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial")
        stored = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(files), side, side, 3))
        for index, file in enumerate(tqdm(files, desc="pictures", disable=None)):
            image = decode_image(file.read_bytes())
            stored[index] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        stored.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def batch(stored: Stored, recipe: DistillRecipe, step: int) -> Tensor:
    """The inputs of one step's views: a function of the step."""
    if isinstance(stored, Spectra):
        return mixtures(stored, recipe, step)
    rng = np.random.default_rng([recipe.seed, 1, step])
    size = (recipe.student.preprocessing["width"], recipe.student.preprocessing["height"])
    rows = batch_rows(len(stored), recipe.train.batch_size, step, recipe.seed)
    shown = np.stack([np.asarray(augmented(Image.fromarray(stored[row]), rng, size)) for row in rows])
    pixels = student_inputs(shown, recipe.preprocessing())
    if rng.random() < _MIXED:
        share = rng.uniform()
        pixels = share * pixels + (1 - share) * pixels.flip(0)
    return pixels


def _sample(stored: Stored, recipe: DistillRecipe) -> Tensor:
    """Inputs from which the units of the teacher's maps are taken: pictures as they are, and mixtures of sounds."""
    if isinstance(stored, Spectra):
        steps = range(-(-_SAMPLE // recipe.train.batch_size))
        return torch.cat([mixtures(stored, recipe, step) for step in steps])[:_SAMPLE]
    rows = np.unique(np.linspace(0, len(stored) - 1, _SAMPLE, dtype=int))
    size = (recipe.student.preprocessing["width"], recipe.student.preprocessing["height"])
    shown = [np.asarray(Image.fromarray(stored[row]).resize(size, Image.Resampling.BICUBIC)) for row in rows]
    return student_inputs(np.stack(shown), recipe.preprocessing())


def _spread(values: Tensor) -> Tensor:
    deviation = values.std(0)
    return torch.maximum(deviation, _SMALLEST * deviation.median() + 0.01 * values.abs().mean() + 1e-6)


def begin(recipe: DistillRecipe, teacher: Teacher, stored: Stored, work: Path) -> TrainingState:
    """A fresh student, in units of what the teacher makes of some of the media; or the checkpoint of this recipe.

    The number of steps is a part of the recipe: the stages are chained after a share of them. A student that starts
    from another run's has that one's best weights and units.
    """
    torch.manual_seed(recipe.seed)
    *maps, _ = teacher(_sample(stored, recipe).numpy())
    columns = [each.permute(0, 2, 3, 1).flatten(0, 2) for each in maps]
    features = torch.cat([each.mean((2, 3)) for each in maps], 1)
    last = maps[-1].shape[1]
    head: nn.Module
    if recipe.modality == "image":
        stages, head = image_stages(recipe.student.stages, last), nn.Linear(last, teacher.classes)
    else:
        assert recipe.student.width is not None
        network = MobileNetSounds.of_width(recipe.student.width, teacher.classes)
        stages, head = sound_stages(network, recipe.student.cuts), network.classifier
    student = Staged(
        stages,
        head,
        teacher.kept,
        [each.mean(0) for each in columns],
        [_spread(each) for each in columns],
        features.mean(0),
        _spread(features),
        sounds=recipe.modality == "audio",
    )
    if recipe.train.start is not None:
        student.load_state_dict(
            _best_of(load_distill_recipe(recipe.train.start, [f"data.root={recipe.data.root}"]), work)
        )
    return resumed(recipe, student, work, _FREE)


def _best_of(recipe: DistillRecipe, work: Path) -> dict[str, Tensor]:
    """The best weights of another recipe's finished run. Raises DistillError where there is none."""
    path = checkpoint_path(recipe, work, _FREE)
    saved: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {"step": 0}
    if saved["step"] < recipe.train.steps:
        raise DistillError(
            f"train.start: {recipe.name} has {saved['step']} of its {recipe.train.steps} steps: run it first"
        )
    best: dict[str, Tensor] = saved["best"]
    return best


def loss(student: Staged, inputs: Tensor, taught: Sequence[Tensor], chained: bool, bfloat16: bool) -> Tensor:
    """Of maps, per channel in units of its spread; of pooled features; of logits in units of theirs."""
    *maps, logits = taught
    wanted = [student.standard(index, each) for index, each in enumerate(maps)]
    given = None if chained else [each.contiguous(memory_format=torch.channels_last) for each in wanted]
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        made = student.maps(inputs.contiguous(memory_format=torch.channels_last), given)
    errors = [(own.float() - other).square() for own, other in zip(made[:-1], wanted[:-1], strict=True)]
    spread = getattr(student, f"spread_{len(maps) - 1}")[:, None, None]
    errors.append(((made[-1].float() - maps[-1]) / spread).square())
    of_maps = torch.stack([error.mean() for error in errors]).sum()
    pooled = student.last(student.pooled(made))
    target = maps[-1].mean((2, 3))
    mean, deviation = student.last(student.mean[None]), student.last(student.deviation[None])
    own, other = (pooled - mean) / deviation, (target - mean) / deviation
    of_features = (own - other).square().mean() + (1 - nn.functional.cosine_similarity(own, other)).mean()
    scored = student.head(pooled)
    of_scores = (scored - logits).square().mean() / logits.var()
    if student.sounds:
        # What is heard: the error of hundreds of classes that are never there must not outweigh the few that are.
        taught_scores = torch.sigmoid(logits)
        of_scores = of_scores + _HEARD * nn.functional.binary_cross_entropy_with_logits(scored, taught_scores)
    if chained:
        return _MAPS * of_maps + of_features + _SCORES * of_scores
    return of_maps + _SCORES * (of_features + of_scores)


def train(recipe: DistillRecipe, state: TrainingState, stored: Stored, teacher: Teacher, validation: Views) -> bool:
    """Train to the recipe's last step. True when it was reached; False after Ctrl-C, which keeps a checkpoint."""
    spec, student = recipe.train, state.student
    chained_from = spec.chain_from * (spec.restarts[0].at if spec.restarts else spec.steps)
    assert isinstance(student, Staged)
    ready: queue.Queue[tuple[Tensor, list[Tensor]] | Exception] = queue.Queue(_AHEAD)
    ended = threading.Event()

    def prepare() -> None:
        try:
            for step in range(state.step, spec.steps):
                inputs = batch(stored, recipe, step)
                _offer(ready, (inputs, teacher(inputs.numpy())), ended)
                if ended.is_set():
                    return
        except Exception as error:
            _offer(ready, error, ended)

    threading.Thread(target=prepare, name="views", daemon=True).start()
    with tqdm(total=spec.steps, initial=state.step, desc=recipe.name, disable=None) as bar:
        try:
            while state.step < spec.steps:
                given = ready.get()
                if isinstance(given, Exception):
                    raise given
                for group in state.optimiser.param_groups:
                    group["lr"] = learning_rate(spec, state.step)
                student.train()
                error = loss(student, *given, state.step >= chained_from, spec.bfloat16)
                state.optimiser.zero_grad()
                error.backward()
                nn.utils.clip_grad_norm_(student.parameters(), 2.0)
                state.optimiser.step()
                follow(state.averaged, student, min(spec.ema, (1 + state.step) / (10 + state.step)))
                state.step += 1
                bar.update()
                if state.step % spec.validate_every == 0 or state.step == spec.steps:
                    figures = measure(state.averaged, validation, recipe)
                    tqdm.write(json.dumps({"step": state.step, "train_loss": round(error.item(), 4), **figures}))
                    state.keep_if_best(figures["loss"])
                if state.step % spec.checkpoint_every == 0 or state.step == spec.steps:
                    state.save()
        except KeyboardInterrupt:
            state.save()
            tqdm.write(f"interrupted at step {state.step}; the same command goes on from {state.path}")
            return False
        finally:
            ended.set()
    return True


def _offer(ready: "queue.Queue[Any]", given: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            ready.put(given, timeout=0.2)
            return
        except queue.Full:
            continue
