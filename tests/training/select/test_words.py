from pathlib import Path

import numpy as np
import pytest

from training.features import cached_features
from training.measure.select.candidates import LatentSemantics, SelectError, WordVectors
from training.measure.select.words import word_encoder

TEXTS = ["a dog runs", "a dog sleeps", "a cat sleeps", "the cat runs", "a boat sails", "the boat sails", "a boat"]


def vectors(source: WordVectors | LatentSemantics, texts: list[str], cache: Path) -> np.ndarray:
    return np.array(cached_features(word_encoder("x", source, TEXTS, cache), texts, cache).pooled)


def written(folder: Path) -> WordVectors:
    (folder / "w.txt").write_text("dog\ncat\n,\n")
    np.save(folder / "v.npy", np.array([[1, 0], [0, 1], [4, 4]], np.float16))
    return WordVectors(words=folder / "w.txt", vectors=folder / "v.npy")


def test_a_text_is_the_mean_of_its_words(tmp_path: Path) -> None:
    source = written(tmp_path)
    assert vectors(source, ["dog", "Dog cat", "cat, dog"], tmp_path).tolist() == pytest.approx(
        np.array([[1, 0], [0.5, 0.5], [5 / 3, 5 / 3]]), rel=2**-11
    )


def test_unknown_words_add_nothing(tmp_path: Path) -> None:
    source = written(tmp_path)
    assert vectors(source, ["dog zebra", "zebra"], tmp_path).tolist() == [[0.5, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("header", ["", "2 2\n"])
def test_the_text_format_is_read(tmp_path: Path, header: str) -> None:
    (tmp_path / "glove.txt").write_text(f"{header}dog 1 0\ncat 0 1.5\n")
    assert vectors(WordVectors(words=tmp_path / "glove.txt"), ["cat"], tmp_path).tolist() == [[0.0, 1.5]]


def test_words_in_capitals_are_kept_apart_where_the_file_does(tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("Dog 1 0\ndog 0 1\n")
    assert vectors(WordVectors(words=tmp_path / "glove.txt"), ["Dog", "dog"], tmp_path).tolist() == [[1, 0], [0, 1]]


def test_the_same_numbers_for_other_words_are_another_encoder(tmp_path: Path) -> None:
    source = written(tmp_path)
    assert vectors(source, ["dog"], tmp_path).tolist() == [[1.0, 0.0]]
    (tmp_path / "w.txt").write_text("cat\ndog\n,\n")
    assert vectors(source, ["dog"], tmp_path).tolist() == [[0.0, 1.0]]


def test_latent_semantics_spans_the_leading_part_of_tf_idf(tmp_path: Path) -> None:
    found = vectors(LatentSemantics(lsa=3), TEXTS, tmp_path)
    words = ["a", "dog", "cat", "boat", "the", "runs", "sleeps", "sails"]
    counts = np.array([[text.split().count(word) for word in words] for text in TEXTS], float)
    weighted = counts * (np.log(len(TEXTS) / (counts > 0).sum(0)) + 1)
    axes = np.linalg.svd(weighted / np.linalg.norm(weighted, axis=1, keepdims=True))[2][:3].T
    expected = weighted @ axes / counts.sum(1, keepdims=True)
    # Axes are found up to sign and order: inner products are not. Features are kept in float16.
    assert found @ found.T == pytest.approx(expected @ expected.T, abs=1e-3)
    again = vectors(LatentSemantics(lsa=3), TEXTS, tmp_path / "other")
    assert np.array_equal(found, again)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("dog 1 2\ncat 1\n")
    with pytest.raises(SelectError, match=r"candidates\.text\.x: .*bad\.txt does not hold a word"):
        vectors(WordVectors(words=tmp_path / "bad.txt"), ["dog"], tmp_path)
    with pytest.raises(SelectError, match=r"candidates\.text\.x: .*absent"):
        vectors(WordVectors(words=tmp_path / "absent"), ["dog"], tmp_path)
    source = written(tmp_path)
    (tmp_path / "w.txt").write_text("dog\n")
    with pytest.raises(SelectError, match="1 words and vectors of shape"):
        vectors(source, ["dog"], tmp_path)
    with pytest.raises(SelectError, match="7 texts of 8 words allow no 7 dimensions"):
        vectors(LatentSemantics(lsa=7), ["dog"], tmp_path)
