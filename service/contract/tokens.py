"""The bundle's own tokenizer.json turns a text into token ids and an attention mask."""

import json
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Encoding, Tokenizer

from service.contract.errors import InputError

Role = Literal["query", "passage"]


class Prefixed(BaseModel):
    """Adds the instructions that a text encoder wants before texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    query_prefix: str = Field(default="", max_length=4_096)
    """Instruction that the encoder wants before what is asked: search queries, labels, and the texts of training."""
    passage_prefix: str = Field(default="", max_length=4_096)
    """And before what is found: stored texts."""

    def prefix(self, role: Role) -> str:
        """Return the instruction that goes before a text."""
        return self.query_prefix if role == "query" else self.passage_prefix

    def prefixed(self, text: str, role: Role) -> str:
        """Return the text as the encoder wants it. One without a word stays as it is, to be refused as empty."""
        return self.prefix(role) + text if text.strip() else text


class TextPreprocessing(Prefixed):
    """Says how a text tower wants its tokens: completely, together with the tokenizer file that it names."""

    kind: Literal["text"] = "text"
    tokenizer: str = Field(default="tokenizer.json", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    max_length: int = Field(gt=0, le=32_768)
    pad_id: int = Field(default=0, ge=0)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs, from `pad_tokens`: int64 (B, L) each."""
        return ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Tokens:
    ids: tuple[int, ...]
    truncated: bool
    unknown: float = 0.0
    """The share of the text's tokens that the tokenizer does not know, 0 to 1; those that say nothing (punctuation,
    special tokens) are not counted. All texts that have 1 look alike to the tower."""


class TextTokenizer:
    """Wraps a tokenizers.Tokenizer with the truncation and padding of the manifest, not those saved in its file.

    Raises ValueError where the file is none, or max_length leaves no room for a text beside the special tokens.
    """

    def __init__(self, path: Path, spec: TextPreprocessing) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"it is no tokenizer: {error}") from None
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if spec.max_length <= special:
            raise ValueError(f"max_length {spec.max_length} leaves no room for text beside {special} special tokens")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=spec.max_length)
        self._max_length = spec.max_length
        self._vocabulary_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._unknown = _unknown_id(self._tokenizer)
        self._special = frozenset(self._tokenizer.encode("").ids)

    def encode(self, text: str, prefix: str = "") -> Tokens:
        """Return one text's ids after an instruction, special tokens included, cut to max_length.

        Raises InputError where there is nothing in it. What is unknown is told of the text alone.
        """
        if not text.strip():
            raise InputError("the text is empty")
        try:
            encoding = self._tokenizer.encode(prefix + text)
            plain = encoding if not prefix or self._unknown not in encoding.ids else self._tokenizer.encode(text)
        except (UnicodeEncodeError, TypeError):  # which of them depends on the version of tokenizers
            raise InputError("the text is not valid Unicode: it holds a lone surrogate") from None
        if self._reads_nothing(text, encoding, prefix):
            raise InputError("the text is empty: its characters are none that the tokenizer reads")
        # An encoding says which tokens the template added: the unknown token of some is the end of a text as well.
        ids = [id for id, special in zip(plain.ids, plain.special_tokens_mask, strict=True) if not special]
        tokens = Tokens(tuple(encoding.ids), bool(encoding.overflowing), self._share_unknown(ids))
        if tokens.unknown and (plain_text := unicodedata.normalize("NFKC", text)) != text:
            # Full-width letters, and letters of mathematics, which people write as a fancy font.
            with suppress(InputError):  # what becomes of a macron that stands alone
                return min(tokens, self.encode(plain_text, prefix), key=attrgetter("unknown"))
        return tokens

    def _reads_nothing(self, text: str, encoding: Encoding, prefix: str) -> bool:
        """Return whether a text leaves no token of its own: of characters that show nothing (zero-width ones, marks of
        direction, NUL), all texts have the vector of none."""
        if prefix and not any(map(str.isalnum, text)):
            encoding = self._tokenizer.encode(text)
        return all(encoding.special_tokens_mask)

    def accept(self, ids: Sequence[int]) -> Tokens:
        """Check ids that a client made with this very tokenizer, special tokens included. Raises InputError."""
        if not ids:
            raise InputError("the list of token ids is empty")
        if min(ids) < 0 or max(ids) >= self._vocabulary_size:
            raise InputError(f"a token id is outside the vocabulary of {self._vocabulary_size}")
        kept_ids = tuple(ids[: self._max_length])
        plain = [id for id in kept_ids if id not in self._special]
        return Tokens(kept_ids, len(ids) > self._max_length, self._share_unknown(plain))

    def _share_unknown(self, ids: Sequence[int]) -> float:
        unknown = ids.count(self._unknown) if self._unknown is not None else 0
        if not unknown:
            return 0.0
        known_tokens = sum(_says_something(self._tokenizer.id_to_token(id) or "") for id in ids if id != self._unknown)
        # Four decimals, which a cache holds as they are; 1 is kept for what is wholly unknown.
        return min(round(unknown / (unknown + known_tokens), 4), 0.9999) if known_tokens else 1.0


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of whatever is not in the vocabulary; None where a tokenizer has none, as one of bytes."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    return cast("int | None", model.get("unk_id")) if token is None else tokenizer.token_to_id(token)


def _says_something(token: str) -> bool:
    """Return whether a known token is more than punctuation and SentencePiece's mark of where a word begins: a letter,
    a digit or a symbol."""
    categories = map(unicodedata.category, token.replace("\u2581", ""))
    return any(category[0] in "LN" or category == "So" for category in categories)


def pad_tokens(texts: Sequence[Tokens], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad token sequences to input_ids and attention_mask, int64 (B, longest)."""
    longest = max(len(text.ids) for text in texts)
    ids = np.full((len(texts), longest), pad_id, np.int64)
    mask = np.zeros((len(texts), longest), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = text.ids
        mask[row, : len(text.ids)] = 1
    return ids, mask
