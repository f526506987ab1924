"""Text baselines without a network: static word vectors, as a frozen encoder like any other.

GloVe-like vectors come from files. Latent semantic analysis is one too: the SVD of a TF-IDF matrix maps a text to the
mean of its words' rows of diag(idf) V, up to the text's length.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import svds
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from service.contract.tokens import TextPreprocessing
from training.encoders import FrozenEncoder, weights_sha256
from training.files import write
from training.measure.select.candidates import LatentSemantics, SelectError, WordVectors

_PAD, _UNKNOWN = "[PAD]", "[UNK]"
_MAX_LENGTH = 512
_TEXTS, _WORDS = 100_000, 50_000
"""Upper bounds of what the SVD is fitted on."""


class WordTable(nn.Module):
    """input_ids, attention_mask (B, L) → word vectors (B, L, d); padding and unknown words are zero."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.from_numpy(np.pad(vectors, ((2, 0), (0, 0)))))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors: Tensor = self.table(input_ids)
        return vectors


def word_encoder(name: str, source: WordVectors | LatentSemantics, texts: Sequence[str], cache: Path) -> FrozenEncoder:
    """The encoder of a baseline; its tokenizer is written into `cache`. `texts` are what LSA is fitted on.

    Raises SelectError naming the candidate.
    """
    where = f"candidates.text.{name}"
    if isinstance(source, LatentSemantics):
        words, vectors = _latent_semantics(where, source.lsa, texts)
    else:
        words, vectors = _read(where, source)
    table = WordTable(vectors)
    tokenizer = _tokenizer(words)
    # The same numbers for other words are another encoder.
    identity = hashlib.sha256(f"{weights_sha256(table)}:{tokenizer.to_str()}".encode()).hexdigest()
    return FrozenEncoder(
        modality="text",
        source=name,
        width=vectors.shape[1],
        weights_sha256=identity,
        preprocessing=TextPreprocessing(max_length=_MAX_LENGTH),
        licence=None,
        module=table.eval().requires_grad_(False),
        tokenizer=_write(tokenizer, cache),
    )


def _read(where: str, source: WordVectors) -> tuple[list[str], NDArray[np.float32]]:
    try:
        lines = source.words.read_text(encoding="utf-8").rstrip("\n").split("\n")
        stored = None if source.vectors is None else np.load(source.vectors, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SelectError(f"{where}: {error}") from None
    if stored is None:
        lines = lines[1:] if lines and len(lines[0].split()) == 2 else lines  # word2vec's header: words, dimensions
        rows = [line.rstrip().split(" ") for line in lines if line.strip()]
        words = [row[0] for row in rows]
        try:
            stored = np.array([row[1:] for row in rows], np.float32)
        except ValueError:
            raise SelectError(f"{where}: {source.words} does not hold a word and equally many numbers a line") from None
    else:
        words = lines
    if stored.ndim != 2 or len(words) != len(stored) or not stored.size:
        raise SelectError(f"{where}: {len(words)} words and vectors of shape {stored.shape} do not fit")
    first = {word: row for row, word in reversed(list(enumerate(words))) if word not in (_PAD, _UNKNOWN)}
    kept = sorted(first.values())
    return [words[row] for row in kept], np.asarray(stored[kept], np.float32)


def _latent_semantics(where: str, dimensions: int, texts: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
    if len(texts) > _TEXTS:
        drawn = np.random.default_rng(0).choice(len(texts), _TEXTS, replace=False)
        texts = [texts[index] for index in np.sort(drawn)]
    # Words as the tokenizer below parts them; those of one text alone say nothing.
    weighting = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]+", min_df=2, max_features=_WORDS, smooth_idf=False)
    try:
        matrix = weighting.fit_transform(texts)
        words = list(weighting.get_feature_names_out())
    except ValueError:  # no word is in two texts
        words = []
    if min(len(words), len(texts)) <= dimensions:
        raise SelectError(f"{where}: {len(texts)} texts of {len(words)} words allow no {dimensions} dimensions")
    # Seeded twice: ARPACK starts from v0, and draws again where it meets an invariant subspace.
    start = np.random.default_rng(0).normal(size=min(matrix.shape))
    _, _, axes = svds(matrix, k=dimensions, v0=start, rng=np.random.default_rng(0))
    return words, np.ascontiguousarray(weighting.idf_[:, None] * axes.T, np.float32)


def _tokenizer(words: Sequence[str]) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([_PAD, _UNKNOWN, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    if all(word == word.lower() for word in words):
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _write(tokenizer: Tokenizer, cache: Path) -> Path:
    content = tokenizer.to_str()
    folder = cache / f"words-{hashlib.sha256(content.encode()).hexdigest()[:24]}"
    path = folder / "tokenizer.json"
    if not path.is_file():
        write(path, content)
    return path
