"""A store of one space → a store of another without the media: `isthmus upgrade`.

Of each modality some items, drawn by chance, are embedded again where their media are at hand: an adapter learns from
their old and new vectors, and is tested on them (mapping.py). It maps the vectors of all other items and says how far
each may be off; the worst are embedded again too. Where the bundle that filled the store is at hand, a map that
learns from texts, which both bundles embed, is mixed in. Where no media are at hand there is only that one, and it is
tested by the answers that stay the same.
"""

import asyncio
import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from service.contract.bundle import Bundle
from service.contract.vectors import Vectors
from service.engine.cache import MemoryCache
from service.engine.caller import BACKGROUND
from service.engine.inputs import Embedded, Text, raise_first
from service.engine.opening import open_engine
from service.retrieval import bank
from service.retrieval.chance import background_texts
from service.retrieval.indexing import NewItem, embed_items
from service.retrieval.mapping import MOST_PAIRS, Adapter, kept
from service.retrieval.reembedding import NOTHING_LEARNED, Filling, Found
from service.runtime.metrics import Metrics
from service.store import Entry, Moment, StoreError
from service.store.carry_over import OldItem

DRAWN = 0.95
"""Share of the items to be embedded again that is drawn by chance; the others are the worst. What is learned from one
more item is worth more, in all answers together, than the worst item is (docs/LOG.md)."""
_LEAST_EMBEDDED = 100
"""Items of a modality that are embedded again in any case: an adapter of fewer is worth little."""
_LEAST_PAIRS = 20
_TESTED = 1_000
"""Items by whose answers an adapter that learned from texts is tested."""
_TOGETHER = 64


@dataclass(frozen=True)
class Plan:
    share: float
    """Share of each modality's items that is embedded again, where media are at hand."""
    least: float
    """Share of answers that must stay the same, or nothing is done."""
    earlier: Bundle | None = None
    """The bundle that filled the store: it makes maps better, and is needed where media are not at hand."""


class Upgrading(Filling):
    """One run that fills a store mostly with mapped vectors."""

    cache_bytes = 64_000_000

    def __init__(self, *arguments: Any, alone: bool, plan: Plan) -> None:
        super().__init__(*arguments, alone=alone)
        self._plan = plan
        self._adapters: dict[str, Adapter] = {}
        self._again: set[int] = set()
        """Slots of the items that are embedded again."""

    async def prepare(self) -> None:
        """Draw, learn, test, and choose the worst. What is drawn is kept beside the new store: a later run goes on."""
        slots = {kind: of_kind for kind, of_kind in self.old.slots().items() if kind != "vector"}
        # Slots are of this store, and vectors of these two spaces: a run between others draws its own.
        name = f"pairs.{self.old.id}.{self.old.space}.{self.bundle.manifest.space}"
        pairs = {kind: _Pairs(self.new / f"{name}.{kind}") for kind in slots if kind != "video"}
        queries = None
        if "text" in self.bundle.manifest.towers:
            queries = await _texts(self.embedder, background_texts())
        for kind, drawn in pairs.items():
            await self._draw(kind, slots[kind], drawn)
            self._again.update(drawn.slots)
        needed = {_adapter_of(kind) for kind, of_kind in slots.items() if not self._again.issuperset(of_kind)}
        of_texts, old_queries = None, np.empty((0, 0), np.float32)
        if needed and self._plan.earlier is not None and queries is not None:
            of_texts, old_queries = await self._learn_from_texts(self._plan.earlier, len(queries))
        for kind, drawn in pairs.items():
            if kind in needed and len(drawn.slots) >= _LEAST_PAIRS:
                known = drawn.old[:MOST_PAIRS], drawn.new[:MOST_PAIRS]
                adapter = await asyncio.to_thread(Adapter, *known, of_texts)
                self._adapters[kind] = adapter
                self.outcome.learned[kind] = {
                    "pairs": len(adapter.new),
                    "share_of_texts": adapter.texts_share,
                    "error": float(adapter.errors.mean()),
                    "correlation": adapter.correlation,
                    "kept": kept(adapter.new if queries is None else queries, adapter.new, adapter.left_out),
                }
        without = [kind for kind in pairs if kind in needed and kind not in self._adapters]
        if of_texts is not None:
            for kind in without:
                _, tested = self.old.vectors(list(islice(_by_chance(slots[kind]), _TESTED)))
                self._adapters[kind] = of_texts
                self.outcome.learned[kind] = {
                    "texts": len(of_texts.new),
                    "kept": kept(old_queries, tested, of_texts(tested)[0], queries),
                }
        self._judge({kind: len(slots[kind]) for kind in without})
        for kind, of_kind in slots.items():
            await asyncio.to_thread(self._choose, kind, of_kind)

    def _budget(self, count: int) -> int:
        return max(math.ceil(self._plan.share * count), min(count, _LEAST_EMBEDDED))

    async def _draw(self, kind: str, slots: Sequence[int], pairs: "_Pairs") -> None:
        budget = self._budget(len(slots))
        count = min(budget if budget <= _LEAST_EMBEDDED else math.ceil(DRAWN * budget), MOST_PAIRS)
        missing = count - len(pairs.slots.intersection(slots))
        found = self._found(slot for slot in _by_chance(slots) if slot not in pairs.slots)
        with tqdm(total=missing, desc=f"learning {kind}", disable=None, dynamic_ncols=True) as bar:
            while missing > 0:
                batch = await asyncio.to_thread(lambda n: list(islice(found, n)), min(missing, _TOGETHER))
                if not batch:
                    break
                entries = await embed_items(self.embedder, [one.new for one in batch], caller=BACKGROUND)
                done = [(one.item, to.vector) for one, to in zip(batch, entries, strict=True) if isinstance(to, Entry)]
                pairs.add(done)
                missing -= len(done)
                bar.update(len(done))

    def _found(self, slots: Iterable[int]) -> Iterator[Found]:
        for item in self.old.items(slots):
            if isinstance(original := self.originals.of(item), Found):
                yield original

    async def _learn_from_texts(self, earlier: Bundle, count: int) -> tuple[Adapter, Vectors]:
        """Return an adapter that learned from everyday texts, and the old bundle's vectors of the first of them."""
        if earlier.manifest.space != self.old.space or "text" not in earlier.manifest.towers:
            raise StoreError(f"--from {earlier.path}: it is not the bundle that filled the store, or embeds no texts")
        settings = self.settings.model_copy(update={"bundle": earlier.path, "modalities": ("text",)})
        opened = await asyncio.to_thread(open_engine, settings, earlier)
        embedder = opened.embedder(MemoryCache(0), settings, Metrics())
        try:
            old = await _texts(embedder, practice_texts())
        finally:
            await embedder.close()
        new = await _texts(self.embedder, practice_texts())
        return await asyncio.to_thread(Adapter, old, new), old[:count]

    def _judge(self, without: dict[str, int]) -> None:
        """Raises StoreError where an adapter is not as good as it has to be, or there is none."""
        for kind, count in without.items():
            if kind not in self._adapters and self._plan.least > 0:
                raise StoreError(
                    f"{count:,} items of the modality {kind}: media of fewer than {_LEAST_PAIRS} are at hand to learn "
                    "from. Name the folder of their files (--media), or the bundle that filled the store (--from); "
                    "--least 0 leaves them in the old store"
                )
        for kind, figures in self.outcome.learned.items():
            if figures["kept"] < self._plan.least:
                raise StoreError(
                    f"{kind}: of the first ten answers to everyday words {figures['kept']:.0%} stay the same, and "
                    f"--least asks for {self._plan.least:.0%}. Name media to learn from (--media), have more embedded "
                    "again (--share), embed all of them (isthmus reembed), or ask for less (--least)"
                )

    def _choose(self, kind: str, slots: Sequence[int]) -> None:
        """Choose what else is embedded again: the worst by the estimate, of which there are media."""
        adapter = self._adapters.get(_adapter_of(kind))
        others = [slot for slot in slots if slot not in self._again]
        if adapter is None or not others:
            return
        errors: list[NDArray[np.float64]] = []
        present: list[int] = []
        for start in range(0, len(others), 16 * _TOGETHER):
            part, vectors = self.old.vectors(others[start : start + 16 * _TOGETHER])
            present += part
            errors.append(adapter(vectors)[1])
        worst = [present[place] for place in np.argsort(-np.concatenate(errors), kind="stable")]
        if "pairs" in self.outcome.learned.get(_adapter_of(kind), {}):
            more = self._budget(len(slots)) - (len(slots) - len(others))
            self._again.update(found.item.slot for found in islice(self._found(worst), max(more, 0)))

    def original(self, item: OldItem) -> Found | str:
        if item.slot in self._again and isinstance(original := self.originals.of(item), Found):
            return original
        if item.modality == "vector":
            return "vector: it was given as a vector, of no known modality"
        if any(_adapter_of(kind) not in self._adapters for kind, _ in _vectors(item)):
            return f"{item.modality}: {NOTHING_LEARNED}"
        return Found(item, "mapped")

    def improves(self, item: OldItem, from_preview: bool, mapped: bool) -> Found | None:
        if mapped and item.slot not in self._again:
            return None
        return super().improves(item, from_preview, mapped)

    def new_items(self, batch: Sequence[Found]) -> list[tuple[NewItem, float | None, Sequence[Moment]]]:
        old = [(_adapter_of(kind), v) for one in batch if one.source == "mapped" for kind, v in _vectors(one.item)]
        places = {name: [place for place, (kind, _) in enumerate(old) if kind == name] for name, _ in old}
        new: dict[int, tuple[Vectors, float]] = {}
        for name, of_name in places.items():
            vectors, errors = self._adapters[name](np.stack([old[place][1] for place in of_name]))
            new |= zip(of_name, zip(vectors, errors.tolist(), strict=True), strict=True)
        following = iter(new[place] for place in range(len(old)))
        result: list[tuple[NewItem, float | None, Sequence[Moment]]] = []
        for one in batch:
            item = one.item
            if one.source != "mapped":
                result.append((one.new, None, ()))
                continue
            vector, error = next(following)
            moments = [Moment(m.modality, m.start, m.end, next(following)[0]) for m in item.moments]
            new_item = NewItem(item.id, vector, item.metadata, item.collection, item.modality)
            result.append((new_item, error, moments))
        return result


def _adapter_of(modality: str) -> str:
    """Return which adapter maps the items of a modality. A video's vector is mostly that of its pictures."""
    return "image" if modality == "video" else modality


class _Pairs:
    """Old and new vectors of the items that were drawn, in a file of records that only grows.

    A record that a killed process left unfinished is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.slots: set[int] = set()
        self.old = self.new = np.empty((0, 0), np.float32)
        if path.exists():
            with path.open("rb") as file:
                widths = np.fromfile(file, "<i8", 2)
                if len(widths) == 2:
                    self._keep(np.fromfile(file, self._record(*widths)))
        if not self.slots:
            path.unlink(missing_ok=True)

    def _record(self, old: int, new: int) -> np.dtype[Any]:
        return np.dtype([("slot", "<i8"), ("old", "<f4", (int(old),)), ("new", "<f4", (int(new),))])

    def _keep(self, records: NDArray[Any]) -> None:
        self.slots.update(records["slot"].tolist())
        self.old = np.concatenate([self.old, records["old"]]) if self.old.size else records["old"]
        self.new = np.concatenate([self.new, records["new"]]) if self.new.size else records["new"]

    def add(self, pairs: Sequence[tuple[OldItem, Vectors]]) -> None:
        if not pairs:
            return
        widths = len(pairs[0][0].vector), len(pairs[0][1])
        record = self._record(*widths)
        records = np.array([(item.slot, item.vector, new) for item, new in pairs], record)
        start = 16 + len(self.old) * record.itemsize
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.write(np.array(widths, "<i8").tobytes())
            file.seek(start)
            file.write(records.tobytes())
            file.truncate()
        self._keep(records)


def practice_texts() -> list[str]:
    """Return texts to learn from, always the same: everyday words, and then sentences such as captions are."""
    draw, texts = random.Random(0), dict.fromkeys(background_texts())
    things, sounds = bank.listed(bank.SIGHTS), bank.listed(bank.SOUNDS)
    lists = [bank.listed(words) for words in (bank.WHO, bank.DOING, bank.LOOKS, bank.WEAR, bank.WHERE)]
    while len(texts) < MOST_PAIRS:
        (thing, other), (sound, noise) = draw.sample(things, 2), draw.sample(sounds, 2)
        who, doing, look, wear, where = map(draw.choice, lists)
        forms = (
            f"{who} {doing} {where}",
            f"{who} in a {look} {wear} {doing}",
            f"{who} with a {look} {thing} {where}",
            f"{who} and a {thing}",
            f"a {look} {thing} and a {other} {where}",
            f"{sound} and then {noise} {where}",
        )
        texts[draw.choices(forms, (5, 5, 3, 2, 3, 2))[0]] = None
    return list(texts)


def _vectors(item: OldItem) -> list[tuple[str, Vectors]]:
    """Return the item's vector and those of its moments, each with its modality."""
    parts = [(moment.modality, moment.vector) for moment in item.moments if moment.vector is not None]
    return [(item.modality, item.vector), *parts]


def _by_chance(slots: Iterable[int]) -> Iterator[int]:
    """Yield the slots in an order that means nothing and is the same in every run."""
    return iter(sorted(slots, key=lambda slot: hashlib.blake2b(slot.to_bytes(8, "little"), digest_size=8).digest()))


async def _texts(embedder: Any, texts: Sequence[str]) -> Vectors:
    results = await embedder.embed(list(map(Text, texts)), BACKGROUND, admit_unknown=True)
    raise_first(results)
    return np.stack([result.vector for result in results if isinstance(result, Embedded)])
