"""One process of test_distributed: `python -m tests.training.ranks OUT`, with torchrun's variables set.

Every process makes the same eight pairs, keeps its share, and writes its loss and gradients.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.distributed import Ranks, joined, leave
from training.fit import loop
from training.fit.losses import contrast
from training.recipe import ObjectiveSpec

SPECS = {
    "info_nce": ObjectiveSpec(),
    "positive": ObjectiveSpec(repeats="positive"),
    "sdm": ObjectiveSpec(kind="sdm"),
    "chunked": ObjectiveSpec(chunk=3),
}
LABELS = torch.tensor([0, 1, 2, 0, 3, 3, 4, 0])


class Pairs(loop.Task):
    """Learns to bring the same eight pairs together."""

    def __init__(self, ranks: Ranks) -> None:
        torch.manual_seed(0)
        self.model, self.ranks = nn.Linear(6, 5), ranks
        self.x, self.y = torch.randn(8, 6), torch.randn(8, 5)

    def loss(self, step: int) -> Tensor:
        x, y, key = (self.ranks.share(rows) for rows in (self.x, self.y, torch.arange(8)))
        vectors = normalize(self.model(x), dim=-1), normalize(y, dim=-1)
        return contrast(ObjectiveSpec(), *vectors, torch.tensor(1.2), (key,), ranks=self.ranks)

    def judge(self, model: nn.Module) -> tuple[float, loop.Figures]:
        return 1.0, {}


def run(out: Path) -> None:
    ranks = joined("gloo")
    result = {}
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        media, texts = nn.Linear(6, 4), nn.Linear(5, 4)
        x, y = torch.randn(8, 6), torch.randn(8, 5)
        scale = nn.Parameter(torch.tensor(1.2))
        keys = (torch.arange(8), LABELS)
        ours = [ranks.share(rows) for rows in (x, y, *keys)]
        vectors = normalize(media(ours[0]), dim=-1), normalize(texts(ours[1]), dim=-1)
        loss = contrast(spec, *vectors, scale, tuple(ours[2:]), ranks)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [*media.parameters(), *texts.parameters(), scale]
        ranks.sum_gradients(parameters)
        gradients = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
        result[name] = {"loss": loss.item(), "gradients": gradients.tolist()}
    agreed = ranks.agree(float(ranks.index + 5))
    task = Pairs(ranks)
    state = loop.begin(out / f"{ranks.count}.pt", task.model, 0.0)
    loop.run(state, task, loop.Plan(4, lambda step: 0.1, validate_every=2), "pairs", ranks)
    told = {"agreed": agreed, "losses": result, "history": state.history}
    (out / f"{ranks.index}of{ranks.count}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    leave(0)
