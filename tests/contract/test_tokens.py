"""Text to ids: the manifest's truncation and padding, not those saved in the tokenizer's file."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from service.contract.errors import InputError
from service.contract.tokens import TextPreprocessing, TextTokenizer, Tokens, pad_tokens

VOCABULARY = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "b", "c"]
PAD, BOS, EOS, UNK, A, B, C = range(len(VOCABULARY))


def write(path: Path, *, special: bool = True) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        ends = [("[BOS]", BOS), ("[EOS]", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing("[BOS] $A [EOS]", special_tokens=ends)
    # What a file from a hub often holds, and what must not count.
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = write(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return TextTokenizer(path, TextPreprocessing(max_length=6))


def test_ids_with_their_special_tokens(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("A b zebra") == Tokens((BOS, A, B, UNK, EOS), False, unknown=0.3333)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a b", 0.0),
        ("zebra", 1.0),
        ("日本語 🎉", 1.0),
        ("a zebra", 0.5),
        ("a b c a zebra a", 0.0),
        ("x y z w v a", 1.0),
    ],
)
def test_the_share_that_is_unknown_is_of_what_is_read(tokenizer: TextTokenizer, text: str, unknown: float) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.unknown == unknown
    assert tokenizer.accept(tokens.ids).unknown == unknown


def test_an_instruction_makes_no_text_known(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("zebra", prefix="a b ") == Tokens((BOS, A, B, UNK, EOS), False, unknown=1.0)
    assert tokenizer.encode("a zebra", prefix="b ").unknown == 0.5


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", "\0\0", "\u202e \u202c", "\ufe0f", "\ue000"])
@pytest.mark.parametrize("prefix", ["", "a b "])
def test_a_text_of_what_shows_nothing_is_empty(tokenizer: TextTokenizer, text: str, prefix: str) -> None:
    with pytest.raises(InputError, match="empty"):
        tokenizer.encode(text, prefix)
    assert tokenizer.encode(f"{text}a{text} b", prefix).ids == tokenizer.encode("a b", prefix).ids


@pytest.mark.parametrize("text", ["ａ ｂ", "𝐚 𝖇", "ⓐ 𝓫"])
def test_letters_of_another_form_are_read_as_letters_where_they_are_not_known(
    tokenizer: TextTokenizer, text: str
) -> None:
    assert tokenizer.encode(text) == tokenizer.encode("a b")
    assert tokenizer.encode(text + " zebra").unknown == tokenizer.encode("a b zebra").unknown


def of_model(path: Path, model: models.Model, pre: pre_tokenizers.PreTokenizer | None) -> TextTokenizer:
    tokenizer = Tokenizer(model)
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if tokenizer.token_to_id("[SEP]") is not None:
        ends = [(each, tokenizer.token_to_id(each)) for each in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(path))
    return TextTokenizer(path, TextPreprocessing(max_length=16))


def test_every_kind_of_tokenizer_says_what_it_does_not_know(tmp_path: Path) -> None:
    pieces = ["[UNK]", "[CLS]", "[SEP]", "a", "##b", "!", ","]
    words = of_model(
        tmp_path / "wordpiece.json",
        models.WordPiece({each: place for place, each in enumerate(pieces)}, unk_token="[UNK]"),
        pre_tokenizers.BertPreTokenizer(),
    )
    sentence = of_model(
        tmp_path / "unigram.json",
        models.Unigram([("<s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.0), ("!", -1.0)], unk_id=1),
        pre_tokenizers.Metaspace(),
    )
    for each in (words, sentence):
        assert each.encode("a!").unknown == 0
        # Punctuation, and the mark of a word's beginning, do not make an unknown text known.
        assert each.encode("日本!").unknown == 1
        assert each.encode("a 日本").unknown == 0.5
    # The unknown token of a tokenizer of bytes is its end as well (CLIP's), and is never met.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {each: place for place, each in enumerate(["[CLS]", "[SEP]", *alphabet])}
    of_bytes = of_model(
        tmp_path / "bytes.json", models.BPE(vocabulary, [], unk_token="[SEP]"), pre_tokenizers.ByteLevel()
    )
    tokens = of_bytes.encode("日本")
    assert tokens.unknown == 0 == of_bytes.accept(tokens.ids).unknown


def test_truncation_is_said(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("a b c a") == Tokens((BOS, A, B, C, A, EOS), False)
    assert tokenizer.encode("a b c a b") == Tokens((BOS, A, B, C, A, EOS), True)


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000"])
def test_an_empty_text_is_an_error(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(InputError, match="empty"):
        tokenizer.encode(text)


def test_a_text_of_no_tokens_is_an_error(tmp_path: Path) -> None:
    # Control characters are dropped by the normaliser, and this tokenizer adds nothing of its own.
    bare = TextTokenizer(write(tmp_path / "bare.json", special=False), TextPreprocessing(max_length=6))
    assert bare.encode("a").ids == (A,)
    with pytest.raises(InputError, match="empty"):
        bare.encode("\x01\x02")


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b"])
def test_a_lone_surrogate_is_an_error(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode(text)


def test_ids_of_a_client_are_taken_as_they_are(tokenizer: TextTokenizer) -> None:
    assert tokenizer.accept([BOS, C, EOS]) == Tokens((BOS, C, EOS), False)
    assert tokenizer.accept([A] * 6) == Tokens((A,) * 6, False)
    assert tokenizer.accept([A] * 7) == Tokens((A,) * 6, True)


@pytest.mark.parametrize("ids", [[-1], [A, len(VOCABULARY)], [2**70]])
def test_ids_outside_the_vocabulary_are_an_error(tokenizer: TextTokenizer, ids: list[int]) -> None:
    assert tokenizer.accept([0, len(VOCABULARY) - 1]).ids == (0, len(VOCABULARY) - 1)
    with pytest.raises(InputError, match="vocabulary of 7"):
        tokenizer.accept(ids)


def test_no_ids_are_an_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="empty"):
        tokenizer.accept([])


def test_a_length_without_room_for_text_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer.json")
    assert TextTokenizer(path, TextPreprocessing(max_length=3)).encode("a b").ids == (BOS, A, EOS)
    with pytest.raises(ValueError, match="max_length 2 leaves no room for text beside 2 special tokens"):
        TextTokenizer(path, TextPreprocessing(max_length=2))


def test_padding_is_masked() -> None:
    ids, mask = pad_tokens([Tokens((5, 6, 7), False), Tokens((8,), False)], pad_id=1)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_gives_ids_that_accept_takes_or_a_named_error(tokenizer: TextTokenizer, text: str) -> None:
    try:
        tokens = tokenizer.encode(text)
    except InputError:
        # Controls, spaces and marks leave nothing; a lone surrogate is no Unicode.
        assert all(unicodedata.category(character)[0] in "CZM" for character in text) or any(
            "\ud800" <= character <= "\udfff" for character in text
        )
        return
    assert 2 <= len(tokens.ids) <= 6
    assert tokenizer.accept(tokens.ids) == Tokens(tokens.ids, False, tokens.unknown)
    assert (tokens.unknown == 1) == (UNK in tokens.ids and not {A, B, C} & set(tokens.ids))


@pytest.mark.parametrize("values", [{"max_length": 0}, {"max_length": 8, "tokenizer": "../tokenizer.json"}])
def test_a_spec_is_checked(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=list(values)[-1]):
        TextPreprocessing.model_validate(values)


def test_an_instruction_goes_before_words_and_not_before_nothing() -> None:
    spec = TextPreprocessing(max_length=8, query_prefix="query: ", passage_prefix="passage: ")
    assert spec.prefixed("a dog", "query") == "query: a dog"
    assert spec.prefixed("a dog", "passage") == "passage: a dog"
    assert spec.prefixed(" ", "query") == " "
    assert TextPreprocessing(max_length=8).prefixed("a dog", "passage") == "a dog"
