"""A store of one space → a store of another, for `python -m service reembed`.

Vectors of one space mean nothing in another, and no map between two spaces is as good as embedding again. So this needs
the originals. The store has the texts of text items; images, sounds and videos are looked for in a folder, under the
path that a metadata key holds or else the item's id. Where there is no file, the preview that the store keeps of an
image or a sound is embedded: it is smaller than the file was, and the item says so. What was given as a vector has no
original. What cannot be embedded again stays in the old store, which is never changed.
"""

import asyncio
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

from service.contract.bundle import MODALITIES, Bundle, front_end_of
from service.contract.errors import InputError
from service.engine.cache import MemoryCache
from service.engine.caller import BACKGROUND
from service.engine.inputs import Text, read, sent_to, sniff
from service.engine.opening import open_engine
from service.errors import InputFailed, InvalidRequest, IsthmusError
from service.retrieval.classify import Classifier, stored_labels
from service.retrieval.indexing import NewItem, embed_items
from service.runtime.metrics import Metrics
from service.settings import Settings
from service.store import Entry, Moment, Preview, SpaceMismatch, SqliteStore, StoreError, StoreInUse, carry_over
from service.store.carry_over import EMBEDDED, Dates, OldItem, OldLabelSet, OldStore
from service.store.files import hold

LEFT_OUT = "left-out.jsonl"
_BATCH = 64
_BATCH_BYTES = 32_000_000

Source = Literal["text", "file", "preview", "mapped"]


def command(store: Path, bundle: Path, new: Path | None = None) -> str:
    """Return the shell command that carries a store over to a bundle with the current interpreter."""
    stores = [str(folder) for folder in (store, new) if folder is not None]
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "service", "reembed", *stores, "--bundle", str(bundle)])


@contextmanager
def naming_the_way_out(settings: Settings) -> Iterator[None]:
    """Add the command that carries the store over to the error of a store that another bundle filled."""
    try:
        yield
    except SpaceMismatch as error:
        if settings.store == Path("milvus"):
            raise
        raise SpaceMismatch(
            f"{error}\nTo carry it over to this bundle, run this command. It embeds the items again and keeps the old "
            f"store:\n\n    {command(settings.store, settings.bundle)}\n\nAdd --media FOLDER where you have the files "
            "of its images and sounds; without it their previews are embedded."
        ) from None


NO_PREVIEW, NOTHING_LEARNED = "and no preview of it is kept", "there is nothing to learn an adapter from"
"""Ends of reasons for which an item is left out, where its file would help."""


@dataclass
class Outcome:
    embedded: Counter[Source] = field(default_factory=Counter)
    """Number of items by what was embedded."""
    beginnings: int = 0
    """Number of sounds whose preview, and so the vector, covers the beginning only."""
    already: int = 0
    """Number of items that the new store has from an interrupted run."""
    label_sets: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of items left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """An id for each reason."""
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of an upgrade, by modality: what its adapter was learned from, and how good it is."""

    @property
    def carried(self) -> int:
        """Return the number of items in the new store."""
        return self.embedded.total() + self.already

    @property
    def files_would_help(self) -> bool:
        """Return whether there are items that are made of files, and whose files were not at hand."""
        return self.embedded["preview"] + self.embedded["mapped"] > 0 or any(
            reason.endswith((NO_PREVIEW, NOTHING_LEARNED)) and not reason.startswith("text:")
            for reason in self.left_out
        )

    def count(self, original: "Found") -> None:
        self.embedded[original.source] += 1
        self.beginnings += original.source == "preview" and _is_beginning(original.item.preview)

    def leave_out(self, reason: str, id: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, id)


@dataclass(frozen=True)
class Found:
    """An item, and what it can be embedded from."""

    item: OldItem
    source: Source
    data: bytes = b""
    """Content of the file or preview."""

    @property
    def new(self) -> NewItem:
        """Return the item with an input for the tower that made its vector."""
        item = self.item
        part = Text(item.text or "") if self.source == "text" else read("file", self.data)
        return NewItem(item.id, sent_to(part, item.modality), item.metadata, item.collection)


@dataclass(frozen=True)
class Originals:
    """The folder with the files of images, sounds and videos, if any. Raises StoreError where it does not exist."""

    folder: Path | None = None
    key: str | None = None
    """The metadata key that holds a path inside the folder."""
    most_bytes: int = 100_000_000
    """Largest file that is read, in bytes."""
    bundle: Bundle | None = None
    """The bundle that is to serve the store: it says how what is of a further modality is read."""

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise StoreError(f"--media {self.folder} is no folder")

    def of(self, item: OldItem) -> Found | str:
        """Return what the item can be embedded from, or why it cannot be. Reads the file."""
        if item.modality == "vector":
            return "vector: it was given as a vector"
        kind = self._kind_of(item.modality)
        if kind is None:
            return f"{item.modality}: the bundle has no tower of this modality"
        if kind == "text":
            return f"{item.modality}: its text was not stored" if item.text is None else Found(item, "text")
        if item.text is not None:
            return f"{item.modality}: its vector is that of several parts, which are not kept"
        data = self._file_of(item, kind)
        if isinstance(data, bytes):
            return Found(item, "file", data)
        if item.preview is not None and item.preview.media_type.startswith(f"{kind}/"):
            return Found(item, "preview", item.preview.data)
        return f"{item.modality}: {data}, {NO_PREVIEW}"

    def _kind_of(self, modality: str) -> str | None:
        """Return what the inputs of a modality are: text, image, audio, array or video; None where no tower says so."""
        if modality == "video" or modality in MODALITIES:
            return modality
        tower = None if self.bundle is None else self.bundle.manifest.towers.get(modality)
        return None if tower is None else front_end_of(tower.preprocessing)

    def _file_of(self, item: OldItem, kind: str) -> bytes | str:
        from isthmus_client import folder as files  # which no server has to load

        if self.folder is None:
            return "no folder of media was named (--media)"
        name = item.id if self.key is None else item.metadata.get(self.key)
        if not isinstance(name, str):
            return f"its metadata have no path under {self.key!r}"
        try:
            path = (self.folder / name).resolve()
            if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
                return f"its file is not in {self.folder}"
            if path.stat().st_size > self.most_bytes:
                return f"its file is larger than {self.most_bytes:,} bytes"
            if not files.unchanged(path, item.metadata):
                return f"its file in {self.folder} was changed since"
            data = path.read_bytes()
            return data if sniff(data) == kind else "its file is of another kind"
        except InputError:
            return "its file is of another kind"
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return "its file cannot be read"


def survey(path: Path, originals: Originals) -> Outcome:
    """Return what could be embedded again and what could not, without doing it. Raises StoreError."""
    outcome = Outcome()
    with closing(OldStore(path, alone=False)) as old:
        for item in old.items():
            original = originals.of(item)
            if isinstance(original, str):
                outcome.leave_out(original, item.id)
            else:
                outcome.count(original)
    return outcome


async def reembed(
    path: Path, new: Path, settings: Settings, originals: Originals, filling: "Callable[..., Filling]"
) -> Outcome:
    """Fill a store at `new`, or add what it lacks, for the bundle of the settings; the old one may be served meanwhile.

    Raises StoreError, BundleError, TowerError.
    """
    bundle = settings.read_bundle()
    with closing(OldStore(path, alone=False)) as old:
        return await filling(old, new, bundle, settings, originals, alone=False).run()


async def replace_store(
    path: Path, settings: Settings, originals: Originals, filling: "Callable[..., Filling]"
) -> tuple[Outcome, Path | None]:
    """Carry the store at `path` over to the bundle of the settings, so that it has that bundle's space.

    Ends with the folder where the old store is kept; None where there was nothing to do. Raises StoreError, BundleError
    and TowerError, and leaves the store as it was.
    """
    bundle = settings.read_bundle()
    carry_over.file_of(path)
    try:
        lock = hold(path)
    except StoreInUse:
        raise StoreInUse(
            f"the store {path} is open in another process: stop that server first, or name a NEW_STORE to be filled "
            "while it serves"
        ) from None
    try:
        with closing(OldStore(path, alone=True)) as old:
            space = old.space
            if bundle.manifest.accepts(space) or old.empty:
                carry_over.clear(path)
                return Outcome(), None
            staged = carry_over.stage(path, bundle.manifest.space, old)
            filled = filling(old, staged, bundle, settings, originals, alone=True)
            outcome, count = await filled.run(), old.count
        if count and not outcome.carried:
            raise StoreError(
                f"nothing in {path} can be embedded again, so it is left as it was: "
                + "; ".join(f"{count} × {reason}" for reason, count in outcome.left_out.most_common())
            )
        beside = [staged / LEFT_OUT] if outcome.left_out else []
        return outcome, await asyncio.to_thread(carry_over.put_in_place, path, staged, space, beside)
    finally:
        os.close(lock)


class Filling:
    """One run that fills a store. `alone` means that nobody else writes to it, so that it ends with the
    old one's items alone; otherwise newer items in it stay."""

    cache_bytes = 0
    """Memory for vectors of what was embedded in this run."""

    def __init__(
        self, old: OldStore, new: Path, bundle: Bundle, settings: Settings, originals: Originals, *, alone: bool
    ) -> None:
        self.old, self.new, self.bundle, self.settings = old, new, bundle, settings
        self.originals, self._alone = replace(originals, bundle=bundle), alone
        self.outcome = Outcome()

    async def run(self) -> Outcome:
        settings, bundle = self.settings, self.bundle
        opened = open_engine(settings.model_copy(update={"modalities": ()}), bundle)
        self.embedder = opened.embedder(MemoryCache(self.cache_bytes), settings, Metrics())
        try:
            self._store = SqliteStore.open(self.new, bundle.manifest)
            try:
                with (
                    closing(Dates(self.new)) as self._dates,
                    (self.new / LEFT_OUT).open("w", encoding="utf-8") as self._list,
                ):
                    await self.prepare()
                    await self._fill()
            finally:
                await self._store.close()
        except (IsthmusError, *carry_over.ERRORS) as error:
            raise StoreError(f"stopped: {error}. What is embedded is kept: the same command goes on") from error
        finally:
            await self.embedder.close()
        if not self.outcome.left_out:
            (self.new / LEFT_OUT).unlink()
        return self.outcome

    async def prepare(self) -> None:
        """Do what comes before the first item."""

    def original(self, item: OldItem) -> Found | str:
        """Return what the item's new vector is made from, or why there is none."""
        return self.originals.of(item)

    def improves(self, item: OldItem, from_preview: bool, mapped: bool) -> Found | None:
        """Return what the vector of an item that is there already is made from anew, if from anything better."""
        if not mapped and not (from_preview and self.originals.folder is not None):
            return None
        original = self.originals.of(item)
        return original if isinstance(original, Found) and (mapped or original.source == "file") else None

    def new_items(self, batch: Sequence[Found]) -> list[tuple[NewItem, float | None, Sequence[Moment]]]:
        """Return what is to be embedded and stored of each, and of a vector that was mapped its error and moments."""
        return [(original.new, None, ()) for original in batch]

    async def _fill(self) -> None:
        await self._collections()
        batch: list[Found] = []
        with tqdm(total=self.old.count, unit=" items", disable=None, dynamic_ncols=True) as bar:
            for item in self.old.items():
                bar.update()
                found = await asyncio.to_thread(self._look, item)
                if found is None:
                    self.outcome.already += 1
                elif isinstance(found, str):
                    self._leave_out(found, item.id, item.collection, item.modality)
                else:
                    batch.append(found)
                    if len(batch) == _BATCH or sum(len(original.data) for original in batch) > _BATCH_BYTES:
                        await self._move(batch)
                        batch = []
            if batch:
                await self._move(batch)
        classifier = Classifier(self.embedder, self._store)
        for label_set in self.old.label_sets():
            await self._label_set(label_set, classifier)

    def _look(self, item: OldItem) -> Found | str | None:
        """Return what the item can be embedded from, or why it cannot be; None where it is already there."""
        updated, from_preview, mapped = self._dates.of_item(item)
        if not self._is_there(updated, item.updated):
            return self.original(item)
        if updated != item.updated:  # changed since it was carried over
            return None
        return self.improves(item, from_preview, mapped)

    def _is_there(self, updated: str | None, old: str) -> bool:
        return updated is not None and (updated == old if self._alone else updated >= old)

    async def _move(self, batch: Sequence[Found]) -> None:
        new = await asyncio.to_thread(self.new_items, batch)
        outcomes = await embed_items(self.embedder, [item for item, *_ in new], caller=BACKGROUND)
        done: list[Entry] = []
        for found, (_, error, moments), result in zip(batch, new, outcomes, strict=True):
            item = found.item
            if isinstance(result, InputError):
                self._leave_out(f"{item.modality}: {result}", item.id, item.collection, item.modality)
            else:
                preview = _marked(item.preview, found.source == "preview")
                if error is not None:
                    result = replace(result, text=item.text, moments=moments, mapped=error)
                done.append(replace(result, preview=preview, dates=(item.created, item.updated)))
                self.outcome.count(found)
        # One part at a time, so that items keep their order.
        for _, part in groupby(done, key=lambda entry: (entry.collection, entry.modality)):
            await self._store.upsert(list(part))

    async def _collections(self) -> None:
        for collection, fields in self.old.collections():
            name = collection.name
            if not self._alone and self._dates.of_collection(name) == collection.created:
                continue  # carried over before, and perhaps changed since
            await self._store.create_collection(name, collection.index_request)
            await self._store.set_keyword_fields(name, fields)
            self._dates.set_collection(name, collection.created)

    async def _label_set(self, label_set: OldLabelSet, classifier: Classifier) -> None:
        if any(not isinstance(label, str) and label.get("examples") for label in label_set.definition["labels"]):
            self._leave_out("label set: what examples taught it; save it again with them", label_set.name)
        if not self._is_there(self._dates.of_label_set(label_set.name), label_set.updated):
            try:
                labels, templates = stored_labels(label_set.definition), label_set.definition.get("templates")
                await classifier.save_label_set(label_set.name, labels, templates)
            except (InputFailed, InvalidRequest) as error:
                self._leave_out(f"label set: {error}", label_set.name)
                return
            self._dates.set_label_set(label_set)
        self.outcome.label_sets += 1

    def _leave_out(self, reason: str, id: str, collection: str | None = None, modality: str | None = None) -> None:
        self.outcome.leave_out(reason, id)
        _write(self._list, {"id": id, "collection": collection, "modality": modality, "why": reason})


def _write(file: IO[str], line: dict[str, str | None]) -> None:
    file.write(json.dumps({name: value for name, value in line.items() if value is not None}) + "\n")


def _marked(preview: Preview | None, embedded: bool) -> Preview | None:
    """Return the preview, which says whether the item's vector was made from it."""
    if preview is None:
        return None
    about = {name: value for name, value in preview.about.items() if name != EMBEDDED}
    return replace(preview, about=about | {EMBEDDED: True} if embedded else about)


def _is_beginning(preview: Preview | None) -> bool:
    about = {} if preview is None else preview.about
    return bool(about.get("whole_seconds", 0) > about.get("seconds", 0))
