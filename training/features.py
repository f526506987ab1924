"""Encode every item once into a memory-mapped cache, keyed by what defines the features; resumable.

A cache is a folder named by the hash of encoder weights, preprocessing and items (the bytes of every file, or every
text). It holds the arrays and `progress`, the number of items that are safely written; an interrupted run goes on
from there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from service.contract.audio import decode_audio
from service.contract.errors import InputError
from service.contract.images import ImagePreprocessing, read_image
from service.contract.sounds import AudioPreprocessing
from service.contract.tokens import TextPreprocessing, TextTokenizer, pad_tokens
from training.cache import default_cache as default_cache
from training.encoders import FrozenEncoder, Pooled, example_inputs, side_by_side
from training.errors import TrainingError
from training.graphs import onnx_bytes, session

Item = Path | str
_CHUNK = {"image": 32, "audio": 32, "text": 128}
_ROWS = 4096
_MANY = 1000
"""Items from which it pays to start fast: a convolution is translated for ONNX Runtime, four times as fast on a CPU;
matrix products of texts are made in bf16 where the processor has it, 3.6 times as fast, with vectors of a cosine above
0.9999 to those of fp32."""


class FeatureError(TrainingError):
    """An item cannot be encoded: the message names it."""


@dataclass(frozen=True)
class Features:
    """Frozen features of a list of items. Token arrays are there only where they were asked for."""

    pooled: NDArray[np.float32]
    """(N, d): image CLS or pooled vector, mean over a sound's patches, sentence vector."""
    tokens: NDArray[np.float16] | None = None
    """(N, T, d) local vectors: image cells, sound patches, text tokens; zeros past an item's own."""
    weights: NDArray[np.float32] | None = None
    """(N, T): 1 / own tokens on an item's own tokens, else 0."""
    key: str = ""
    """Hash of the encoder, its preprocessing and the items; empty for features that are of no cache."""

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
) -> Features:
    """Features of `items`, from the cache as far as they are there. Raises FeatureError naming a bad item.

    A lenient caller gets a row of NaN for a bad item instead.
    """
    if not len(items):
        return Features(np.zeros((0, encoder.width), np.float32))
    if encoder.parts and not tokens:
        parts = [cached_features(part, items, cache, lenient=lenient, what=what).pooled for part in encoder.parts]
        vectors = [torch.from_numpy(np.asarray(part)) for part in parts]
        return Features(side_by_side(vectors, len(encoder.concepts)).numpy())
    prepare = preparer(encoder)
    folder = cache / _key(encoder, items, tokens)
    shapes = _shapes(encoder, items, prepare, tokens)
    arrays = _open(folder, shapes)
    done = int(_read(folder / "progress") or 0)
    run = runner(encoder, tokens, many=len(items) - done >= _MANY)
    size, order = _CHUNK[encoder.modality], _order(encoder, items)
    starts = range(done, len(items), size)
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=len(items), initial=done, desc=what or encoder.modality, disable=done == len(items)) as bar,
    ):
        chunks = ((start, [items[index] for index in order[start : start + size]]) for start in starts)
        for start, prepared in _ahead(pool, chunks, prepare):
            good = [index for index, one in enumerate(prepared) if not isinstance(one, FeatureError)]
            if len(good) < len(prepared) and not lenient:
                raise next(one for one in prepared if isinstance(one, FeatureError))
            own = order[start : start + size]
            arrays["pooled"][own] = np.nan
            for name, rows in run([prepared[index] for index in good]).items() if good else ():
                arrays[name][own[good], *(slice(n) for n in rows.shape[1:])] = rows
            for array in arrays.values():
                array.flush()
            _write(folder / "progress", str(start + len(prepared)))
            bar.update(len(prepared))
    if not lenient and len(bad := np.flatnonzero(np.isnan(arrays["pooled"][:, 0]))):  # left by a lenient caller
        prepare(items[bad[0]])
        raise FeatureError(f"{items[bad[0]]}: its features in {folder} are not numbers")
    return Features(**arrays)


def _order(encoder: FrozenEncoder, items: Sequence[Item]) -> NDArray[np.int64]:
    """The order in which items are encoded: texts by length, so that little of a batch is padding."""
    if encoder.modality != "text":
        return np.arange(len(items))
    return np.argsort([len(str(item)) for item in items], kind="stable")


def preparer(encoder: FrozenEncoder) -> Callable[[Item], Any]:
    """The contract's preprocessing of one item, as the service does it. The callable raises FeatureError."""
    spec = encoder.preprocessing
    tokenizer = None
    if isinstance(spec, TextPreprocessing):
        assert encoder.tokenizer is not None
        try:
            tokenizer = TextTokenizer(encoder.tokenizer, spec)
        except ValueError as error:
            raise FeatureError(f"{encoder.source}: {error}") from None

    def prepare(item: Item) -> Any:
        try:
            if isinstance(spec, ImagePreprocessing):
                return read_image(Path(item).read_bytes(), spec)
            if isinstance(spec, AudioPreprocessing):
                return spec.prepare(decode_audio(Path(item).read_bytes(), spec.sampling_rate))
            assert tokenizer is not None
            return tokenizer.encode(spec.prefixed(str(item), "query"))
        except InputError as error:
            raise FeatureError(f"{item}: {error}") from None

    return prepare


def collate(spec: Any, prepared: Sequence[Any]) -> list[NDArray[Any]]:
    """Prepared items → the inputs of their tower's graph, in the order of its preprocessing's `inputs`."""
    if isinstance(spec, ImagePreprocessing):
        return [np.stack(prepared)]
    if isinstance(spec, AudioPreprocessing):
        return spec.collate(prepared)
    return list(pad_tokens(prepared, spec.pad_id))


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


def runner(
    encoder: FrozenEncoder, tokens: bool, *, many: bool = False
) -> Callable[[Sequence[Any]], dict[str, NDArray[np.float32]]]:
    """A function from prepared items to their feature rows; `many` says that taking time to start will pay."""
    spec = encoder.preprocessing
    compiled = None
    if encoder.modality == "text" and encoder.module is not None and many and not tokens and _has_bf16():
        encoder = replace(encoder, module=_Bf16(encoder.module))
    pooled_by = None if encoder.module is None else Pooled(encoder).eval()
    example = example_inputs(spec, 2) if many and not tokens and encoder.module is not None else []
    if len(example) == 1:
        assert encoder.module is not None
        compiled = session(onnx_bytes(_Whole(encoder.module).eval(), torch.from_numpy(example[0]), "inputs", "vectors"))
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
            vectors = compiled.run(["vectors"], {"inputs": inputs[0]})[0]
            return {"pooled": inputs[-1] @ vectors if encoder.modality == "audio" else vectors}
        assert pooled_by is not None
        whole, local, weights = pooled_by(*[torch.from_numpy(array) for array in inputs])
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


def _shapes(
    encoder: FrozenEncoder, items: Sequence[Item], prepare: Callable[[Item], Any], tokens: bool
) -> dict[str, tuple[tuple[int, ...], type]]:
    shapes: dict[str, tuple[tuple[int, ...], type]] = {"pooled": ((len(items), encoder.width), np.float32)}
    if tokens:
        if encoder.modality == "image":
            longest = runner(encoder, True)([prepare(items[0])])["tokens"].shape[1]
        elif encoder.modality == "audio":
            longest = max(len(prepare(item)) for item in items)
        else:
            longest = max(len(prepare(item).ids) for item in items)
        shapes["tokens"] = ((len(items), longest, encoder.width), np.float16)
        shapes["weights"] = ((len(items), longest), np.float32)
    return shapes


def _open(folder: Path, shapes: dict[str, tuple[tuple[int, ...], type]]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        path = folder / f"{name}.npy"
        if not path.is_file():
            # Sparse until written; a torn creation is renamed into place only when whole.
            partial = path.with_suffix(".partial")
            np.lib.format.open_memmap(partial, "w+", dtype, shape).flush()
            os.replace(partial, path)
            (folder / "progress").unlink(missing_ok=True)
        arrays[name] = np.lib.format.open_memmap(path, "r+")
    return arrays


_FRONT_ENDS = 2
"""The generation of the front ends' code. Raise it when the same file and settings give other values than before:
features that are cached under the former number are then not used any more."""


def _key(encoder: FrozenEncoder, items: Sequence[Item], tokens: bool) -> str:
    digest = hashlib.sha256(encoder.weights_sha256.encode())
    digest.update(json.dumps(encoder.preprocessing.model_dump(mode="json"), sort_keys=True).encode())
    # An interrupted run of texts in the order of before cannot go on in the order of their lengths.
    order = ":by length" if encoder.modality == "text" else ""
    digest.update(f"{encoder.pooling}:{tokens}:{_FRONT_ENDS}{order}".encode())
    for item in items:
        content = item.read_bytes() if isinstance(item, Path) else item.encode()
        digest.update(hashlib.sha256(content).digest())
    return f"{encoder.modality}-{digest.hexdigest()[:24]}"


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
