"""`publish` writes a collection, its bundle and a page as files for any host of files; the browser searches them."""

import argparse
import gzip
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson

from service.api.responses import previewed
from service.commands import starters
from service.commands.tune import sentences
from service.contract.bundle import Bundle, BundleError, Manifest
from service.contract.errors import InputError
from service.contract.licences import weights_line
from service.contract.tokens import TextPreprocessing
from service.engine.handling import handling
from service.engine.inputs import Media, Text
from service.engine.packing import packed_tower
from service.settings import Settings, SettingsError, read_settings
from service.store import DEFAULT_COLLECTION, StoreError
from service.store.export import Export
from service.store.items import Moment

HELP = "write a collection, its bundle and a page that searches it, as files that need no server of ours"

PLAYGROUND, PAGE = (Path(__file__).parents[1] / name for name in ("playground", "published"))
SHARED = (
    *("app.css", "cards.js", "deleting.js", "detail.js", "dom.js", "gallery.js", "icon.svg", "icons.svg", "items.js"),
    *("player.js", "previews.js", "toast.js", "why.js", "zooming.js"),
)
"""Files of the playground that the published page uses as they are."""
RUNTIME = {
    "ort.wasm.min.mjs": "ort.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm.wasm",
}
"""Files of onnxruntime-web, and their names in a publication: some hosts send .mjs as no JavaScript."""
MARK = "published.json"
MOST_VECTORS = 250_000
"""Vectors of items and moments in a publication: a browser holds 1.5 kB of each."""
_A_FOLDER = 1_000
"""Previews in a folder: listings of more are slow."""
_SAMPLES = 24
"""Texts and pictures by which a packed tower is compared with the whole one."""
_PARTS = {
    "the runtime": ("runtime",),
    "texts": ("bundle/text.tower", "bundle/tokenizer"),
    "pictures": ("bundle/image.tower",),
    "page": ("playground", "index.html"),
    "index": (MARK, "items.json", "vectors.f16"),
    "previews": ("previews",),
}
"""Files by what they are fetched for."""
_DIALOG = re.compile(r'<dialog id="detail".*?</dialog>', re.DOTALL)
_ENDINGS = {"image/jpeg": ".jpg", "image/webp": ".webp", "audio/mpeg": ".mp3"}
_TOKENIZER = {
    "model": ("WordPiece",),
    "normalizer": ("BertNormalizer",),
    "pre_tokenizer": ("BertPreTokenizer",),
    "post_processor": ("TemplateProcessing", None),
}
"""What the page's own tokenizer reads: kinds of the parts of a tokenizer.json."""


@dataclass
class Outcome:
    """Holds what was written."""

    folder: Path
    collection: str
    items: Counter[str] = field(default_factory=Counter)
    """Number of items by modality."""
    previews: int = 0
    texts: int = 0
    """Number of items whose text, or its beginning, is in the folder."""
    keys: set[str] = field(default_factory=set)
    """Metadata keys."""
    cosines: dict[str, float] = field(default_factory=dict)
    """Lowest cosine of a packed tower's vectors to the tower's own, by modality."""
    megabytes: dict[str, float] = field(default_factory=dict)
    """Size of what a browser fetches to search by words and by pictures, and of the rest."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the files go: new, or published before")
    parser.add_argument("--collection", default=DEFAULT_COLLECTION, metavar="NAME", help="what is published")
    parser.add_argument(
        "--runtime",
        type=Path,
        default=Path("node_modules/onnxruntime-web/dist"),
        metavar="DIST",
        help="the folder dist of onnxruntime-web, which `npm install onnxruntime-web` makes",
    )
    parser.add_argument("--without-metadata", action="store_true", help="leave out the metadata of the items")
    for name in ("bundle", "store"):
        parser.add_argument(f"--{name}", metavar=name.upper(), help="as for serve")
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object, in place of text")


def run(
    folder: Path,
    collection: str,
    runtime: Path,
    bundle: str | None,
    store: str | None,
    without_metadata: bool = False,
    as_json: bool = False,
) -> int:
    settings = read_settings(bundle=starters.chosen(bundle), store=store)
    outcome = publish(folder, collection, runtime, settings, metadata=not without_metadata)
    if as_json:
        print(json.dumps({**vars(outcome), "folder": str(folder), "keys": sorted(outcome.keys)}))
        return 0
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(outcome.items.items()))
    print(f"{folder}: {outcome.items.total():,} items of the collection {collection} ({kinds or 'none'})")
    print("Whoever can fetch these files can read:")
    print(f"  ids, dates and vectors of all items, {outcome.previews:,} previews, {outcome.texts:,} texts")
    print(f"  metadata: {', '.join(sorted(outcome.keys)) or 'none'}")
    print(f"  the bundle; {weights_line(settings.read_bundle().manifest.parts)}")
    for modality, cosine in outcome.cosines.items():
        print(f"{modality}: cosine {cosine:.6f} or more to the tower's own vectors")
    print(", ".join(f"{what} {size:.1f} MB" for what, size in outcome.megabytes.items()))
    print(f"To see it: python -m http.server -d {folder}")
    return 0


def publish(folder: Path, collection: str, runtime: Path, settings: Settings, *, metadata: bool = True) -> Outcome:
    """Write the files, in place of those that were published there before.

    Raises SettingsError, StoreError, BundleError and TowerError, and then leaves the folder as it was.
    """
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder} is there, and was not written by `publish`: name another folder")
    for name in RUNTIME:
        if not (runtime / name).is_file():
            raise SettingsError(
                f"--runtime {runtime} has no {name}: `npm install onnxruntime-web` makes the folder "
                "node_modules/onnxruntime-web/dist, which is to be named"
            )
    if settings.store == Path("milvus"):
        raise SettingsError("publish reads a store in a folder (--store), and not Milvus")
    bundle = settings.read_bundle()
    manifest = bundle.manifest
    if not {"text", "image"} & manifest.towers.keys():
        raise BundleError(f"{bundle.path} has neither a text nor an image tower, by which a page could be searched")
    if "text" in manifest.towers:
        _check_tokenizer(bundle)
    outcome = Outcome(folder, collection)
    try:
        beside = folder.absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".publish-", dir=beside) as name:
            staged = Path(name, "new")
            _write_page(staged, runtime)
            about, pictures = _write_items(staged, settings.store, manifest, outcome, metadata)
            about |= _write_bundle(staged, bundle, settings, outcome, pictures)
            (staged / MARK).write_bytes(orjson.dumps(about))
            for what, names in _PARTS.items():
                outcome.megabytes[what] = round(sum(_size(staged / name) for name in names) / 1e6, 2)
            _put_in_place(staged, folder)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error}") from None
    return outcome


def _write_page(staged: Path, runtime: Path) -> None:
    for name in ("playground", "runtime", "bundle", "previews"):
        (staged / name).mkdir(parents=True)
    for source in [PLAYGROUND / name for name in SHARED] + sorted(PAGE.glob("*.js")):
        shutil.copyfile(source, staged / "playground" / source.name)
    [dialog] = _DIALOG.findall((PLAYGROUND / "index.html").read_text("utf-8"))
    page = (PAGE / "index.html").read_text("utf-8").replace("<!-- dialog -->", dialog)
    (staged / "index.html").write_text(page, encoding="utf-8")
    for name, renamed in RUNTIME.items():
        shutil.copyfile(runtime / name, staged / "runtime" / renamed)


def _write_items(
    staged: Path, store: Path, manifest: Manifest, outcome: Outcome, metadata: bool
) -> tuple[dict[str, Any], list[bytes]]:
    """Write items, vectors and previews; return what the page is to know of them, and some of the pictures.

    Raises StoreError.
    """
    items: list[Mapping[str, Any]] = []
    moments: list[tuple[int, Moment]] = []
    pictures: list[bytes] = []
    with closing(Export(store, outcome.collection)) as export, (staged / "vectors.f16").open("wb") as vectors:
        if not manifest.accepts(export.space):
            raise StoreError(f"{store} is of space {export.space}, and the bundle {manifest.name} of {manifest.space}")
        if export.vector_count > MOST_VECTORS:
            raise StoreError(
                f"{outcome.collection} has {export.vector_count:,} vectors, more than the {MOST_VECTORS:,} of a page"
            )
        for place, (stored, stored_shown) in enumerate(export.exported()):
            shown = previewed(stored_shown)
            item: dict[str, Any] = {"id": stored.id, "modality": stored.modality, "created": stored.created}
            item |= {"updated": stored.updated, "metadata": stored.metadata if metadata else {}, "preview": shown}
            if stored.preview is not None:
                file = f"previews/{place // _A_FOLDER}/{place}{_ENDINGS[stored.preview.media_type]}"
                (staged / file).parent.mkdir(exist_ok=True)
                (staged / file).write_bytes(stored.preview.data)
                item["file"] = file
                outcome.previews += 1
                if stored.modality == "image" and len(pictures) < _SAMPLES:
                    pictures.append(stored.preview.data)
            outcome.items[stored.modality] += 1
            outcome.texts += bool(shown and "text" in shown)
            outcome.keys.update(item["metadata"])
            items.append(item)
            moments += [(place, moment) for moment in stored.moments]
            vectors.write(np.asarray(stored.vector, "<f2").tobytes())
        for _, moment in moments:
            vectors.write(np.asarray(moment.vector, "<f2").tobytes())
        size = vectors.tell()
    ranges = [{"modality": moment.modality, "start": moment.start, "end": moment.end} for _, moment in moments]
    (staged / "items.json").write_bytes(orjson.dumps({"items": items, "moments": ranges}))
    owners = [place for place, _ in moments]
    return {"collection": outcome.collection, "items": len(items), "owners": owners, "vectors": size}, pictures


def _write_bundle(
    staged: Path, bundle: Bundle, settings: Settings, outcome: Outcome, pictures: list[bytes]
) -> dict[str, Any]:
    """Write the towers that the page uses and the pages about them; return what the page is to know of them.

    Raises BundleError, TowerError.
    """
    described: dict[str, Any] = {}
    for name in bundle.manifest.files:
        if name.endswith(".md"):
            with bundle.checked(name) as path:
                shutil.copyfile(path, staged / "bundle" / name)
    for modality in ("text", "image"):
        if modality not in bundle.manifest.towers:
            continue
        how = handling(bundle, modality, settings)
        given = map(Text, sentences(bundle)) if modality == "text" else (Media("image", data) for data in pictures)
        samples = [how.canary]
        for one in given:
            if len(samples) < _SAMPLES:
                try:
                    samples.append(how.prepare(one))
                except InputError:
                    continue
        packed, cosine = packed_tower(bundle, modality, [how.collate([sample.value]) for sample in samples])
        file = f"bundle/{modality}.tower"
        (staged / file).write_bytes(packed)
        outcome.cosines[modality] = round(cosine, 6)
        preprocessing = bundle.manifest.towers[modality].preprocessing
        if isinstance(preprocessing, TextPreprocessing):
            with bundle.checked(preprocessing.tokenizer) as path:
                (staged / "bundle/tokenizer").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        described[modality] = {
            "file": file, "bytes": len(packed), "preprocessing": preprocessing.model_dump(mode="json")
        }  # fmt: skip
    line = weights_line(bundle.manifest.parts)
    licence = line[0].upper() + line[1:]
    about = {"name": bundle.manifest.name, "dimensions": bundle.manifest.dimensions, "licence": licence}
    return about | {"towers": described}


def _check_tokenizer(bundle: Bundle) -> None:
    """Raises BundleError for a tokenizer that the page cannot read."""
    preprocessing = bundle.manifest.towers["text"].preprocessing
    if not isinstance(preprocessing, TextPreprocessing):
        raise BundleError(f"{bundle.path}: an embedding API makes vectors of its texts, which a page cannot ask")
    with bundle.checked(preprocessing.tokenizer) as path:
        described = json.loads(path.read_text("utf-8"))
    kinds = {part: (described.get(part) or {}).get("type") for part in _TOKENIZER}
    plain = not any(
        token["normalized"] or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in described["added_tokens"]
    )
    if not plain or any(kinds[part] not in fitting for part, fitting in _TOKENIZER.items()):
        said = ", ".join(f"{part} {kind}" for part, kind in kinds.items())
        raise BundleError(
            f"{bundle.path / preprocessing.tokenizer}: the published page reads BERT's tokenizers (WordPiece), and not "
            f"this one ({said})"
        )


def _put_in_place(staged: Path, folder: Path) -> None:
    old = staged.with_name("old")
    try:
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
    except BaseException:  # an interrupt, too: what is staged or old goes with the temporary folder
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
