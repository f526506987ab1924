import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.curate.allocation import Distinct
from training.curate.blocks import Record
from training.curate.recipe import DuplicateSpec
from training.data.duplicates import Images, Texts, banding, content_hash, normalised, perceptual_hash, shingles

words = st.lists(
    st.sampled_from(
        ["a", "dog", "cat", "runs", "sleeps", "on", "the", "green", "red", "grass", "ball", "with", "two", "men"]
    ),
    max_size=12,
)


def record(text: str, content: bytes = b"", fingerprint: int = -1) -> Record:
    return Record(0, "", text, "{}", content_hash(content).hex() if content else "", fingerprint, None)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A dog runs.", "a  DOG runs", True),
        ("ﬁne café", "fine CAFÉ!", True),
        ("😀", "😀", True),
        ("😀", "🎉", False),
        ("dog", "dogs", False),
    ],
)
def test_what_is_exactly_a_duplicate(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) is same


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(words.map(" ".join), max_size=25), query=words.map(" ".join))
def test_near_texts_are_those_of_the_exact_jaccard_similarity(texts: list[str], query: str) -> None:
    index = Texts(0.7)
    for text in texts:
        index.add(text)
    own = shingles(query)
    true = {n for n, text in enumerate(texts) if len(own & shingles(text)) >= 0.7 * len(own | shingles(text))}
    # MinHash may overlook one in 1,000 at the threshold, and none that is the same; it never finds too many.
    found = set(index.resembled(query))
    assert found <= true
    assert found >= {n for n in true if shingles(texts[n]) == own}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_bands_overlook_at_most_one_in_a_thousand_at_the_threshold(threshold: float) -> None:
    bands, rows = banding(threshold)
    assert bands * rows <= 128
    assert (1 - threshold**rows) ** bands <= 1e-3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**128 - 1), max_size=20), st.integers(0, 2**128 - 1), st.integers(0, 127), st.data())
def test_near_images_are_all_those_within_the_distance(
    hashes: list[int], query: int, bit: int, data: st.DataObject
) -> None:
    flips = data.draw(st.lists(st.integers(0, 127), max_size=20))
    for flip in flips:
        hashes = [*hashes, query ^ (1 << bit) ^ (1 << flip)]
    index = Images(2)
    for one in hashes:
        index.add(one)
    low = 2**64 - 1
    true = [
        n for n, h in enumerate(hashes) if ((h ^ query) >> 64).bit_count() <= 2 and ((h ^ query) & low).bit_count() <= 2
    ]
    assert list(index.resembled(query)) == true


def test_a_resized_and_recompressed_photograph_is_a_near_duplicate_and_another_is_not() -> None:
    rng = np.random.default_rng(0)
    first, second = (
        Image.fromarray(np.clip(rng.normal(128, 90, (9, 12, 3)), 0, 255).astype(np.uint8)).resize((240, 180), 3)
        for _ in range(2)
    )
    buffer = io.BytesIO()
    first.resize((200, 150)).save(buffer, "JPEG", quality=40)
    copy = Image.open(buffer)
    index = Images(8)
    index.add(perceptual_hash(first))
    assert list(index.resembled(perceptual_hash(copy))) == [0]
    assert list(index.resembled(perceptual_hash(second))) == []


def test_a_pair_repeats_another_where_medium_and_text_both_do() -> None:
    distinct = Distinct(DuplicateSpec(text=0.7, image=2))
    assert distinct.refuse(record("a dog runs on the grass", b"one", 0)) is None
    assert distinct.refuse(record("A dog runs on the grass!", b"one", 0)) == "exact"
    assert distinct.refuse(record("a dog runs on the grasses", b"one", 0)) == "near"
    assert distinct.refuse(record("a dog runs on the grass", b"smaller copy", 1)) == "near"
    assert distinct.refuse(record("two men with a ball", b"one", 0)) is None
    assert distinct.refuse(record("a dog runs on the grass", b"another", 2**127 - 1)) is None
    assert distinct.refuse(record("A dog runs on the grass", b"another", 2**127 - 1)) == "exact"


def test_a_text_without_medium_repeats_another_by_itself() -> None:
    distinct = Distinct(DuplicateSpec())
    assert distinct.refuse(record("a dog runs on the grass")) is None
    assert distinct.refuse(record("A dog runs on the grass.")) == "exact"
    assert distinct.refuse(record("a dog runs on the grasses")) == "near"
    assert distinct.refuse(record("two men with a ball")) is None
