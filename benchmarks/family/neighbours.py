"""Rows of generative neighbours: the smallest slice of each that can be measured here."""

import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.family.lab import SEEDS, Lab
from benchmarks.family.rows import Outcome, gain, holds, row, shown
from benchmarks.family.served import captioned

_VOCABULARY, _WIDTH, _LONGEST = 1000, 128, 14


class _Language(nn.Module):
    """A small language model of captions; `start` (B, width) is its first state, a soft token in place of a word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, _WIDTH)
        self.memory = nn.GRU(_WIDTH, _WIDTH, batch_first=True)
        self.out = nn.Linear(_WIDTH, _VOCABULARY)
        self.plain = nn.Parameter(torch.zeros(1, _WIDTH))
        """The soft token of no picture."""

    def forward(self, start: Tensor, words: Tensor) -> Tensor:
        """Logits (B, L, V) of each word from the soft token and the words before it."""
        states, _ = self.memory(torch.cat([start[:, None], self.words(words[:, :-1])], 1))
        logits: Tensor = self.out(states)
        return logits


def _numbers(texts: list[str], known: dict[str, int]) -> Tensor:
    """Word numbers (N, L); 0 ends a text and fills the rest, 1 is a word that is not known."""
    result = torch.zeros(len(texts), _LONGEST, dtype=torch.long)
    for place, text in enumerate(texts):
        words = [known.get(word, 1) for word in re.findall(r"[a-z]+", text.lower())][: _LONGEST - 1]
        result[place, : len(words)] = torch.tensor(words)
    return result


def _losses(logits: Tensor, words: Tensor) -> Tensor:
    """Mean loss of each text's words and its end, in nats a word (B,)."""
    present = (words > 0) | (torch.cumsum((words == 0).long(), 1) == 1)
    nats = cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none").view_as(words)
    return (nats * present).sum(1) / present.sum(1)


def _descend(model: nn.Module, loss: Any, steps: int, rate: float) -> None:
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], rate)
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()


@row(2, "eP-ALM", "one linear map makes a picture the soft token of a frozen language model; another picture's fails")
def captioning(lab: Lab) -> Outcome:
    """The language model learns captions of Flickr8k's training split without pictures, and is frozen then.

    The map learns on the starter's vectors of the validation split's first 800 photographs; the last 200 choose how
    long.
    """
    texts = lab.pairs["flickr8k"]["train"].texts
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    known = {word: place + 2 for place, (word, _) in enumerate(counts.most_common(_VOCABULARY - 2))}
    corpus = _numbers(texts, known)
    sets: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for split in ("validation", "test"):
        vectors, _, pairs = captioned(lab, split)
        captions = _numbers(lab.pairs["flickr8k"][split].texts, known)
        sets[split] = torch.from_numpy(vectors), torch.from_numpy(pairs), captions[torch.from_numpy(pairs[:, 1])]
    losses: list[list[NDArray[np.floating]]] = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        language = _learned(corpus)
        prefix = _prefix(language, *sets["validation"])
        images, links, words = sets["test"]
        with torch.inference_mode():
            starts = (
                language.plain.expand(len(words), -1),
                prefix(images[links[:, 0]]),
                prefix(images.roll(1, 0)[links[:, 0]]),
            )
            losses.append([_losses(language(start, words), words).numpy() for start in starts])
    alone, with_picture, other = np.mean(losses, axis=0)
    owner = sets["test"][1][:, 0].numpy()
    value, bounds = gain(100 * alone, 100 * with_picture, owner)
    control = gain(100 * alone, 100 * other, owner)
    told = f"{shown('its picture saves', value, bounds, 'centinats a word')} of {100 * alone.mean():.0f}; "
    told += shown("another's", *control, "centinats a word")
    return Outcome(told, bounds, holds(bounds[0] > 0 and control[1][1] < bounds[0]))


def _learned(corpus: Tensor) -> _Language:
    """A language model of the corpus, frozen."""
    language = _Language()

    def loss() -> Tensor:
        some = corpus[torch.randint(0, len(corpus), (128,))]
        return _losses(language(language.plain.expand(128, -1), some), some).mean()

    _descend(language, loss, 500, 5e-3)
    return language.requires_grad_(False)


def _prefix(language: _Language, images: Tensor, links: Tensor, words: Tensor) -> nn.Linear:
    """The linear map from images to the model's soft token, as it was when held-out photographs did best."""
    prefix = nn.Linear(images.shape[1], _WIDTH)
    learning = links[:, 0] < 800

    def cost(rows: Tensor) -> Tensor:
        return _losses(language(prefix(images[links[rows, 0]]), words[rows]), words[rows]).mean()

    rows, validating = torch.nonzero(learning)[:, 0], torch.nonzero(~learning)[:, 0]
    best, kept = float("inf"), prefix.state_dict()
    for _ in range(6):
        _descend(prefix, lambda: cost(rows[torch.randint(0, len(rows), (128,))]), 60, 3e-3)
        with torch.inference_mode():
            score = float(cost(validating))
        if score < best:
            best, kept = score, {key: value.clone() for key, value in prefix.state_dict().items()}
    prefix.load_state_dict(kept)
    return prefix
