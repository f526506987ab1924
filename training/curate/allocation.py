"""Share rows out among concepts: the rarest concept chooses first, each its best rows that no other has taken."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from training.curate.blocks import Record
from training.curate.candidates import Candidates, Heap
from training.curate.recipe import CurateSpec, DuplicateSpec
from training.data.duplicates import Images, Texts


@dataclass(frozen=True)
class Taken:
    """A row of the output."""

    record: Record
    concept: str | None = None
    """The concept that it was chosen for; None where the fit of the pair alone chose it."""
    score: float | None = None
    """Cosine of its text and the concept."""


@dataclass(frozen=True)
class Allocation:
    taken: list[Taken] = field(default_factory=list)
    """What was chosen: by concept, in the order of the file, each from best to worst; then what was chosen by
    similarity."""
    of_concept: dict[str, int] = field(default_factory=dict)
    """How many rows each concept got."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """Candidates that were refused as repetitions: exact or near."""
    capped: Counter[int] = field(default_factory=Counter)
    """How many candidates of each source were refused since it had given its share."""


def allocate(names: list[str], candidates: Candidates, spec: CurateSpec) -> Allocation:
    """Rarest first, so that what few rows fit is not spent on a concept that has many (arXiv 2409.19425)."""
    choice = _Choice(spec)
    by_concept: dict[str, list[Taken]] = {name: [] for name in names}
    rarest = sorted(range(len(names)), key=lambda place: (candidates.matching[place], place))
    for place in rarest:
        assert spec.concepts is not None
        for score, record in choice.best(candidates.concepts[place], spec.concepts.each):
            by_concept[names[place]].append(Taken(record, names[place], score))
    sources = list(spec.pool.values())
    fitting = []
    for source, heap in sorted(candidates.sources.items()):
        fitting += [Taken(record) for _, record in choice.best(heap, sources[source].cap or 0)]
    return Allocation(
        [*(row for rows in by_concept.values() for row in rows), *fitting],
        {name: len(rows) for name, rows in by_concept.items()},
        choice.duplicates,
        choice.capped,
    )


class _Choice:
    """Holds what has been taken so far, and what may still be."""

    def __init__(self, spec: CurateSpec) -> None:
        self._caps = [source.cap for source in spec.pool.values()]
        self._given: Counter[int] = Counter()
        self._distinct = Distinct(spec.duplicates)
        self._settled: set[int] = set()
        """Keys of what was taken or refused as a repetition."""
        self.duplicates: Counter[str] = Counter()
        self.capped: Counter[int] = Counter()

    def best(self, heap: Heap, count: int) -> Iterator[tuple[float, Record]]:
        """Returns at most `count` rows of a heap with their scores, from best to worst."""
        for score, key, record in heap.ranked():
            if not count:
                return
            if key in self._settled:
                continue
            cap = self._caps[record.source]
            if cap is not None and self._given[record.source] >= cap:
                self.capped[record.source] += 1
                continue
            self._settled.add(key)
            repeats = self._distinct.refuse(record)
            if repeats is not None:
                self.duplicates[repeats] += 1
                continue
            self._given[record.source] += 1
            count -= 1
            yield score, record


class Distinct:
    """Admits a record unless one that it repeats was admitted before; says how it repeats it.

    Without a medium a repeated text is enough; with one, text and medium must both repeat the other's, since several
    captions of one image are not the same pair.
    """

    def __init__(self, spec: DuplicateSpec) -> None:
        self._texts, self._images = Texts(spec.text), Images(spec.image)
        self._of_medium: dict[str, set[int]] = {}
        """Texts admitted with a medium, by its hash; without one, under the empty hash."""
        self._of_image: dict[int, str] = {}

    def refuse(self, record: Record) -> str | None:
        """`exact`, `near`, or None for a record that is admitted now."""
        media = {record.content}
        if record.fingerprint >= 0:
            media |= {self._of_image[number] for number in self._images.resembled(record.fingerprint)}
        same = self._texts.repeated(record.text)
        shown: set[int] = set().union(*(self._of_medium.get(medium, ()) for medium in media))
        if shown:
            if same is not None and same in self._of_medium.get(record.content, ()):
                return "exact"
            if same in shown or any(number in shown for number in self._texts.resembled(record.text)):
                return "near"
        if record.fingerprint >= 0 and record.content not in self._of_medium:
            self._of_image[self._images.add(record.fingerprint)] = record.content
        number = self._texts.add(record.text) if same is None else same
        self._of_medium.setdefault(record.content, set()).add(number)
        return None
