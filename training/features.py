"""Frozen features of every item, each encoded once and kept by what it holds (training.encode.store); resumable.

A cache has a folder for each encoder with its preprocessing, and in it one row for each item: the bytes of a file, or a
text. What is there is read, what is not is encoded; an item that cannot be read has no row, and is told of.
"""

import copy
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from service.contract.arrays import ArrayPreprocessing
from service.contract.audio import decode_audio
from service.contract.bundle import effective
from service.contract.endpoint import EndpointPreprocessing
from service.contract.errors import InputError
from service.contract.images import ImagePreprocessing, decode_image, preprocess_image, read_image
from service.contract.sounds import AudioPreprocessing
from service.contract.tokens import TextPreprocessing, TextTokenizer, pad_tokens
from training.data.shards import Medium, Member, identity
from training.encode.augment import GENERATION, View, augmented
from training.encode.store import KEY_BYTES, Keys, Ragged, Rows, Store, as_keys, places
from training.encoders import FrozenEncoder, Pooled, example_inputs, side_by_side
from training.errors import TrainingError
from training.graphs import onnx_bytes, session

Item = Medium | View | str
_CHUNK = {"image": 32, "audio": 32, "text": 128}
_ROWS = 4096
_RECORD = 48  # bytes: a file's name, size, inode and times as 16, the hash of its content as 32
_RECORDS = 1024  # written at a time
_NO_RECORD = np.zeros((0, 6), np.uint64)
_SETTLED_S = 2.0
_MANY = 1000
"""Items from which it pays to translate a convolution for ONNX Runtime, four times as fast on a CPU."""
_LARGE = 10_000_000
"""Parameters from which a text encoder's matrix products are made in bf16 on a CPU that has it: 3.6 times as fast with
all-mpnet-base-v2. Its lowest cosine to fp32 is 1.0000, all-MiniLM-L6-v2's 0.99998; no other encoder was measured."""


class FeatureError(TrainingError):
    """An item cannot be encoded: the message names it."""


@dataclass(frozen=True)
class Features:
    """Frozen features of a list of items. Token arrays are there only where they were asked for."""

    pooled: NDArray[np.float32] | Rows
    """(N, d): image CLS or pooled vector, mean over a sound's patches, sentence vector."""
    tokens: NDArray[np.float16] | Ragged | None = None
    """(N, T, d) local vectors: image cells, sound patches, text tokens; zeros past an item's own."""
    weights: NDArray[np.float32] | Ragged | None = None
    """(N, T): 1 / own tokens on an item's own tokens, else 0."""
    key: str = ""
    """Hash of the encoder, its preprocessing and the items; empty for features that are of no cache."""
    views: "Features | None" = None
    """The features of augmented views of the same items: all of the first view, all of the second, and so on."""
    online: "Online | None" = None
    """Encodes new views, and local vectors, in place of cached ones."""

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def identity(self) -> str:
        """The key, or a hash of the features themselves."""
        if self.key:
            return self.key
        digest = hashlib.sha256()
        for start in range(0, len(self), _ROWS):
            for array in (self.pooled, self.tokens, self.weights):
                if array is not None:
                    digest.update(np.ascontiguousarray(array[start : start + _ROWS]).data)
        return digest.hexdigest()

    def take(self, rows: NDArray[np.int64], tokens: bool, seed: int | None = None) -> dict[str, NDArray[Any]]:
        """Features of some items by the names of Head.forward; with a seed, of a random view of each.

        Local vectors may be float16: they become float32 where heads compute, on a GPU after the copy.
        """
        if self.online is not None and (seed is not None or tokens):
            return self.online(rows, seed)
        if self.views is not None and seed is not None:
            count = len(self.views) // len(self)
            return self.views.take(
                rows + len(self) * np.random.default_rng(seed).integers(count, size=len(rows)), tokens
            )
        result: dict[str, NDArray[Any]] = {"pooled": np.asarray(self.pooled[rows], np.float32)}
        if tokens and self.tokens is not None and self.weights is not None:
            result |= {"tokens": self.tokens[rows], "weights": self.weights[rows]}
        return result

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """The pooled features in order, some thousand rows (n, d) at a time."""
        for start in range(0, len(self), _ROWS):
            yield np.array(self.pooled[start : start + _ROWS], np.float32)


def cached_features(
    encoder: FrozenEncoder,
    items: Sequence[Item],
    cache: Path,
    *,
    tokens: bool = False,
    lenient: bool = False,
    what: str = "",
    broken: dict[int, str] | None = None,
) -> Features:
    """Features of `items`, from the cache as far as they are there. Raises FeatureError naming a bad item.

    A lenient caller gets a row of NaN for a bad item instead, and in `broken` why, by the item's place.
    """
    if not len(items):
        return Features(np.zeros((0, encoder.width), np.float32))
    if encoder.parts and not tokens:
        parts = [cached_features(p, items, cache, lenient=lenient, what=what, broken=broken) for p in encoder.parts]
        vectors = [torch.from_numpy(np.asarray(part.pooled)) for part in parts]
        key = hashlib.sha256(f"{[part.identity for part in parts]}:{len(encoder.concepts)}".encode()).hexdigest()
        return Features(side_by_side(vectors, len(encoder.concepts)).numpy(), key=key)
    wrong: dict[int, str] = {} if broken is None else broken
    digests = content_hashes(items, cache, wrong)
    keys, folder = as_keys(digests), folder_of(cache, encoder, tokens)
    store = Store(cache / folder, encoder.width, stored_as(encoder), tokens)
    missing = store.missing(keys)
    missing = missing[[int(place) not in wrong for place in missing]]
    _encode(encoder, items, tokens, store, keys, missing, what, wrong if lenient else None)
    if wrong and lenient:  # the same bytes under another name are as wrong
        reasons = {keys[place].tobytes(): (str(items[place]), reason) for place, reason in wrong.items()}
        for place in store.absent(keys):
            if int(place) not in wrong:
                name, reason = reasons[keys[place].tobytes()]
                wrong[int(place)] = reason.replace(name, str(items[place]))
    if wrong and not lenient:
        raise FeatureError(wrong[min(wrong)])
    pooled, local, weights = store.read(keys)
    identity = hashlib.sha256(folder.encode() + keys.tobytes()).hexdigest()
    return Features(pooled, local, weights, identity)


def with_views(
    encoder: FrozenEncoder,
    media: Sequence[Medium],
    whole: Features,
    cache: Path,
    views: int | Literal["online"],
    *,
    tokens: bool = False,
    what: str = "",
) -> Features:
    """The features `whole` of media with augmented views: so many of each that are cached, or encoded when drawn."""
    if views == "online":
        return replace(whole, online=Online(encoder, media, tokens))
    items = [View(medium, view) for view in range(views) for medium in media]
    return replace(whole, views=cached_features(encoder, items, cache, tokens=tokens, what=f"{what} views"))


class Online:
    """Encodes pictures as they are drawn: as they are, or each in a view by a seed."""

    def __init__(self, encoder: FrozenEncoder, media: Sequence[Medium], tokens: bool) -> None:
        self._encoder, self._media, self._tokens = encoder, media, tokens
        self._size = _chunk(encoder, tokens)

    @cached_property
    def _prepare(self) -> Callable[[Item], Any]:
        return preparer(self._encoder)

    @cached_property
    def _run(self) -> Callable[[Sequence[Any]], dict[str, NDArray[np.float32]]]:
        return runner(self._encoder, self._tokens, many=len(self._media) >= _MANY, fast=True)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count() or 2, "views")

    def __call__(self, rows: NDArray[np.int64], seed: int | None) -> dict[str, NDArray[np.float32]]:
        media = [self._media[row] for row in rows]
        items: Sequence[Item] = media if seed is None else [View(medium, seed) for medium in media]
        chunks = ((start, items[start : start + self._size]) for start in range(0, len(items), self._size))
        parts = []
        for _, prepared in _ahead(self._pool, chunks, self._prepare):
            for one in prepared:
                if isinstance(one, FeatureError):
                    raise one
            parts.append(self._run(prepared))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _chunk(encoder: FrozenEncoder, tokens: bool) -> int:
    """Return how many items are encoded at a time."""
    return _CHUNK.get(encoder.modality, 128) * (8 if _fast(encoder, tokens)[0] == "cuda" else 1)


def _encode(
    encoder: FrozenEncoder,
    items: Sequence[Item],
    tokens: bool,
    store: Store,
    keys: Keys,
    missing: NDArray[np.int64],
    what: str,
    wrong: dict[int, str] | None,
) -> None:
    """Add the rows that are missing. What cannot be read is put into `wrong`, or raised where there is none."""
    if not len(missing):
        return
    missing = missing[_order(encoder, [items[place] for place in missing])]
    prepare, run = preparer(encoder), runner(encoder, tokens, many=len(missing) >= _MANY, fast=True)
    size = _chunk(encoder, tokens)

    def refuse(place: int, error: FeatureError) -> None:
        if wrong is None:
            raise error
        wrong[place] = str(error)

    with (
        store.writer() as writer,
        ThreadPoolExecutor(os.cpu_count() or 2) as pool,
        tqdm(total=len(missing), desc=what or encoder.modality) as bar,
    ):
        chunks = (
            (start, [items[place] for place in missing[start : start + size]]) for start in range(0, len(missing), size)
        )
        for start, prepared in _ahead(pool, chunks, prepare):
            good = []
            for place, one in zip(missing[start : start + size].tolist(), prepared, strict=True):
                if isinstance(one, FeatureError):
                    refuse(place, one)
                else:
                    good.append((place, one))
            batches = [good] if good else []
            while batches:
                batch = batches.pop()
                places_of = [place for place, _ in batch]
                rows = run([one for _, one in batch])
                if _held(rows, store.largest):
                    writer.add(keys[places_of], _own_tokens(rows))
                elif len(batch) > 1:  # one item's NaN reaches the others of its batch
                    batches = [[one] for one in batch]
                else:
                    reason = f"{encoder.source} gives it features that are no numbers, or beyond ±{store.largest:.5g}"
                    refuse(places_of[0], FeatureError(f"{items[places_of[0]]}: {reason}"))
            bar.update(len(prepared))


def _held(rows: Mapping[str, NDArray[np.float32]], largest: float) -> bool:
    """Return whether the store's types hold the rows: pooled features up to `largest`, local vectors in float16."""
    local = rows.get("tokens")
    fits = local is None or bool((np.abs(local) <= np.finfo(np.float16).max).all())
    return fits and bool((np.abs(rows["pooled"]) <= largest).all())


def _own_tokens(rows: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Padded local vectors (n, T, d) and weights (n, T) → those of each item alone."""
    if "tokens" not in rows:
        return {"pooled": rows["pooled"]}
    counts = (rows["weights"] > 0).sum(1)
    tokens = [row[:count] for row, count in zip(rows["tokens"], counts, strict=True)]
    weights = [row[:count] for row, count in zip(rows["weights"], counts, strict=True)]
    return {"pooled": rows["pooled"], "tokens": tokens, "weights": weights}


def content_hashes(items: Sequence[Item], cache: Path, wrong: dict[int, str]) -> list[bytes]:
    """sha256 of what each item holds. A file that has not changed since it was read is not read again.

    A file that cannot be read has zeros, and is in `wrong` by its place. What lies on another machine is not fetched
    for it: where it lies, and what its host says of the shard, stand for it.
    """

    def told(item: Item) -> bytes:
        item = item.medium if isinstance(item, View) else item
        if isinstance(item, Member) and item.is_remote:
            item = item.identity
        return hashlib.sha256(item.encode()).digest() if isinstance(item, str) else b""

    result = [told(item) for item in items]
    files = [place for place, digest in enumerate(result) if not digest]
    if not files:
        return result
    cache.mkdir(parents=True, exist_ok=True)
    contents, records = cache / "contents", list[bytes]()
    size = contents.stat().st_size // _RECORD * _RECORD if contents.is_file() else 0
    known = np.memmap(contents, np.uint64, "r", shape=(size // 8,)).reshape(-1, 6) if size else _NO_RECORD
    stated = [_stated(items[place]) for place in files]
    at = places(known[:, :2], as_keys([key for key, _ in stated]))
    unread = []
    for place, row, (key, age) in zip(files, at, stated, strict=True):
        if row >= 0:
            result[place] = known[row, 2:].tobytes()
        else:
            unread.append((place, key, age))

    def read(entry: tuple[int, bytes, float]) -> bytes | str:
        try:
            return hashlib.sha256(item_bytes(items[entry[0]])).digest()
        except OSError as error:
            return f"{items[entry[0]]}: {error.strerror or error}"

    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        blocks = (unread[start : start + _ROWS] for start in range(0, len(unread), _ROWS))
        for (place, key, age), digest in chain.from_iterable(zip(b, pool.map(read, b), strict=True) for b in blocks):
            if isinstance(digest, str):
                wrong[place], digest = digest, bytes(32)
            elif age > _SETTLED_S:  # a file that was written just now may change at the same time and size
                records.append(key + digest)
                if len(records) == _RECORDS:
                    _append(contents, records)
                    records.clear()
            result[place] = digest
    _append(contents, records)
    for place, item in enumerate(items):
        if isinstance(item, View) and place not in wrong:
            view = f":view {item.seed} of generation {GENERATION}"
            result[place] = hashlib.sha256(result[place] + view.encode()).digest()
    return result


def _append(contents: Path, records: Sequence[bytes]) -> None:
    """Add whole records behind the last whole one: a process that was killed may have left a part of one."""
    with contents.open("ab", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(stream.seek(0, os.SEEK_END) // _RECORD * _RECORD)
        stream.write(b"".join(records))


def _stated(item: Item) -> tuple[bytes, float]:
    """Return what changes where a file may have changed, as 16 bytes, and the seconds since it last did."""
    item = item.medium if isinstance(item, View) else item
    assert not isinstance(item, str)
    try:
        name = identity(item).encode()
        state = None if isinstance(item, Member) else item.stat()
    except OSError:
        return bytes(KEY_BYTES), 0.0
    age_s = np.inf if state is None else time.time() - max(state.st_mtime, state.st_ctime)
    return hashlib.sha256(name).digest()[:KEY_BYTES], age_s


def item_bytes(item: Item) -> bytes:
    """The file of an image or a sound. Raises OSError."""
    assert not isinstance(item, str)
    return item.read_bytes()


def stored_as(encoder: FrozenEncoder) -> Any:
    """float16 holds what a network computes; scores of classes can be too small for it, and a served graph is exact."""
    exact = encoder.concepts or encoder.onnx is not None or encoder.remote is not None
    return np.float32 if exact else np.float16


def _order(encoder: FrozenEncoder, items: Sequence[Item]) -> NDArray[np.int64]:
    """The order in which items are encoded: texts by length, so that little of a batch is padding."""
    if encoder.modality != "text":
        return np.arange(len(items))
    return np.argsort([len(str(item)) for item in items], kind="stable")


def preparer(encoder: FrozenEncoder, role: Literal["query", "passage"] = "query") -> Callable[[Item], Any]:
    """The contract's preprocessing of one item, as the service does it. The callable raises FeatureError."""
    spec = encoder.preprocessing
    tokenizer = None
    if isinstance(spec, ImagePreprocessing):
        at_size = spec.model_copy(update={"resize": "squash", "shortest_edge": None, "squashed": None})
    if isinstance(spec, EndpointPreprocessing):
        return lambda item: spec.prefixed(str(item), role)
    if isinstance(spec, TextPreprocessing):
        assert encoder.tokenizer is not None
        try:
            tokenizer = TextTokenizer(encoder.tokenizer, spec)
        except ValueError as error:
            raise FeatureError(f"{encoder.source}: {error}") from None

    def prepare(item: Item) -> Any:
        try:
            if isinstance(spec, ImagePreprocessing):
                data = item_bytes(item)
                if not isinstance(item, View):
                    return read_image(data, spec)
                view = augmented(decode_image(data), (spec.width, spec.height), data, item.seed)
                return preprocess_image(view, at_size)
            if isinstance(spec, AudioPreprocessing):
                return spec.prepare(decode_audio(item_bytes(item), spec.sampling_rate))
            if isinstance(spec, ArrayPreprocessing):
                return spec.read(item_bytes(item))
            assert tokenizer is not None
            return tokenizer.encode(spec.prefixed(str(item), role))
        except (InputError, OSError) as error:
            raise FeatureError(f"{item}: {error}") from None

    return prepare


def collate(spec: Any, prepared: Sequence[Any]) -> list[NDArray[Any]]:
    """Prepared items → the inputs of their tower's graph, in the order of its preprocessing's `inputs`."""
    if isinstance(spec, ImagePreprocessing | ArrayPreprocessing):
        return [np.stack(prepared)]
    if isinstance(spec, AudioPreprocessing):
        return spec.collate(prepared)
    return list(pad_tokens(prepared, spec.pad_id))


def feeds(spec: Any, prepared: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Prepared items → what their tower's graph is given, by the names of its inputs."""
    return dict(zip(spec.inputs, collate(spec, prepared), strict=True))


class _Whole(nn.Module):
    """The one vector of each input, without the local ones."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.encoder(inputs)
        return output[0] if isinstance(output, tuple) else output


class _Bf16(nn.Module):
    """A text encoder whose matrix products are made in bf16; its token states are float32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states: Tensor = self.encoder(input_ids, attention_mask)
        return states.float()


def _has_bf16() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _fast(encoder: FrozenEncoder, tokens: bool) -> tuple[str, torch.dtype]:
    """The device and the arithmetic of an encoder's features on this machine, however many items are encoded.

    bf16 on a GPU; on a CPU that has it, of a large text encoder without its local vectors.
    """
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    if tokens or encoder.modality != "text" or encoder.module is None or not _has_bf16():
        return "cpu", torch.float32
    large = sum(parameter.numel() for parameter in encoder.module.parameters()) >= _LARGE
    return "cpu", torch.bfloat16 if large else torch.float32


def runner(
    encoder: FrozenEncoder, tokens: bool, *, many: bool = False, fast: bool = False
) -> Callable[[Sequence[Any]], dict[str, NDArray[np.float32]]]:
    """A function from prepared items to their feature rows; `many` says that taking time to start will pay.

    With `fast` it runs in the arithmetic that `_fast` chooses; else in float32, as towers are checked.
    """
    spec = encoder.preprocessing
    if encoder.remote is not None:
        remote = encoder.remote
        return lambda prepared: {"pooled": remote(prepared)}
    compiled = None
    device, dtype = _fast(encoder, tokens) if fast else ("cpu", torch.float32)
    if device == "cpu" and dtype == torch.bfloat16:
        assert encoder.module is not None
        encoder, dtype = replace(encoder, module=_Bf16(encoder.module)), torch.float32
    pooled_by = None if encoder.module is None else Pooled(encoder).eval()
    if pooled_by is not None and device != "cpu":
        pooled_by = copy.deepcopy(pooled_by).to(device)
    example = example_inputs(spec, 2) if many and device == "cpu" and not tokens and encoder.module is not None else []
    if len(example) == 1:
        assert encoder.module is not None
        program = onnx_bytes(_Whole(encoder.module).eval(), torch.from_numpy(example[0]), "inputs", "vectors")
        # Parts of a batch beside one another take a fifth less than one whole batch by all cores (docs/LOG.md).
        compiled, cores = session(program, threads=1), os.cpu_count() or 2
        pool = ThreadPoolExecutor(cores, "encoder")
    if encoder.onnx is not None:
        if tokens:
            raise FeatureError(f"{encoder.source} is an ONNX encoder with pooled features only: no token projector")
        given = session(encoder.onnx)
        names = [value.name for value in given.get_inputs()]
        output = given.get_outputs()[0].name

    @torch.inference_mode()
    def run(prepared: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
        inputs = collate(spec, prepared)
        if encoder.onnx is not None:
            feeds = dict(zip(names, inputs, strict=False))
            pooled = given.run([output], feeds)[0]
            # A bundle's tower takes the weights too, and averages a sound's rows itself.
            rows_of_sounds = encoder.modality == "audio" and len(names) < len(inputs)
            return {"pooled": inputs[-1] @ pooled if rows_of_sounds else pooled}
        if compiled is not None:
            parts = np.array_split(inputs[0], min(cores, len(inputs[0])))
            vectors = np.concatenate(list(pool.map(lambda part: compiled.run(["vectors"], {"inputs": part})[0], parts)))
            return {"pooled": inputs[-1] @ vectors if encoder.modality == "audio" else vectors}
        assert pooled_by is not None
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            outputs = pooled_by(*[torch.from_numpy(array).to(device) for array in inputs])
        whole, local, weights = (output.float().cpu() for output in outputs)
        if encoder.modality == "audio":
            local = torch.nn.utils.rnn.pad_sequence(list(local.split([len(i) for i in prepared])), batch_first=True)
            shares = [torch.from_numpy(item.shares) for item in prepared]
            weights = torch.nn.utils.rnn.pad_sequence(shares, batch_first=True)
        rows = {"pooled": whole.numpy()}
        return rows | ({"tokens": local.numpy(), "weights": weights.numpy()} if tokens else {})

    return run


def _ahead(
    pool: ThreadPoolExecutor, chunks: Iterator[tuple[int, Sequence[Item]]], prepare: Callable[[Item], Any]
) -> Iterator[tuple[int, list[Any]]]:
    """Prepare the next chunk in threads while the encoder runs on this one. What fails is its FeatureError."""

    def attempt(item: Item) -> Any:
        try:
            return prepare(item)
        except FeatureError as error:
            return error

    def begin() -> tuple[int, list[Any]] | None:
        step = next(chunks, None)
        return None if step is None else (step[0], [pool.submit(attempt, item) for item in step[1]])

    following = begin()
    while following is not None:
        current, following = following, begin()
        yield current[0], [future.result() for future in current[1]]


_FRONT_ENDS = 2
"""The generation of the front ends' code. Raise it when the same file and settings give other values than before:
features that are cached under the former number are then not used any more."""


def folder_of(cache: Path, encoder: FrozenEncoder, tokens: bool) -> str:
    """The name of the folder of an encoder's rows, by all that defines them but the items."""

    def named(settings: Mapping[str, Any]) -> str:
        described = json.dumps(settings, sort_keys=True)
        parts = f"{encoder.weights_sha256}:{described}:{encoder.pooling}:{encoder.unit}:{tokens}:{_FRONT_ENDS}"
        parts += f":{np.dtype(stored_as(encoder))}:{_fast(encoder, tokens)[1]}"
        if encoder.tokenizer is not None:
            parts += f":{hashlib.sha256(encoder.tokenizer.read_bytes()).hexdigest()}"
        return f"{encoder.modality}-{hashlib.sha256(parts.encode()).hexdigest()[:24]}"

    # What an API gives for one text, such as its probe, differs in the last digits each time.
    settings = {key: value for key, value in effective(encoder.preprocessing).items() if key != "probe"}
    name, former = named(settings), named(encoder.preprocessing.model_dump(mode="json"))
    if not (cache / name).exists() and (cache / former).is_dir():
        with suppress(OSError):  # another process does the same
            (cache / former).rename(cache / name)  # its name while settings counted that change nothing
    return name
