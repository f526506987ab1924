"""Work and what comes of it, as bytes and back."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.jobs.embedding import costs_of_work
from service.jobs.ledger import Refusal
from service.jobs.pieces import Work, decode_outcomes, decode_work, encode_outcomes, encode_work
from service.jobs.plan import Piece
from service.settings import Limits
from service.store import Entry, Moment, Preview
from tests.service.films import colours, silence_then_tone

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PIECE = st.builds(
    Piece,
    line=st.integers(1, 10**9),
    kind=st.sampled_from(["line", "media", "text", "refused"]),
    name=TEXT,
    data=st.binary(max_size=50),
    metadata=st.lists(st.binary(max_size=20), max_size=2).map(tuple),
    detail=TEXT,
)
PREVIEW = st.builds(
    Preview,
    st.sampled_from(["image/webp", "audio/mpeg"]),
    st.binary(max_size=20),
    st.dictionaries(TEXT, st.integers(0, 9), max_size=2),
)
REFUSAL = st.builds(Refusal, line=st.integers(1, 10**9), id=st.none() | TEXT, code=TEXT, detail=TEXT)


def entry(id: str, seed: int, tokens: int | None, moments: int = 0, preview: Preview | None = None) -> Entry:
    rng = np.random.default_rng(seed)
    vector = l2_normalise(rng.standard_normal(4))
    kept = None if tokens is None else l2_normalise(rng.standard_normal((tokens, 4)))
    of = tuple(Moment("audio", n, n + 0.5, l2_normalise(rng.standard_normal(4))) for n in range(moments))
    return Entry("c", id, "text", {"n": seed}, vector, text=id, tokens=kept, moments=of, preview=preview)


@settings(deadline=None)
@given(
    pieces=st.lists(PIECE, max_size=5),
    keeping=st.frozensets(TEXT, max_size=2),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_work_comes_back_as_it_was(pieces: list[Piece], keeping: frozenset[str], flags: tuple[bool, bool]) -> None:
    work = Work("default", keeping, pieces, *flags, meter="key items=3/day" if flags[0] else None)
    assert decode_work(encode_work(work)) == work


@settings(deadline=None)
@given(
    outcomes=st.lists(
        REFUSAL
        | st.builds(
            entry, TEXT, st.integers(0, 99), st.none() | st.integers(1, 3), st.integers(0, 2), st.none() | PREVIEW
        ),
        max_size=5,
    )
)
def test_outcomes_come_back_as_they_were(outcomes: list[Any]) -> None:
    found = decode_outcomes(encode_outcomes(outcomes), 4)
    assert len(found) == len(outcomes)
    for given_, got in zip(outcomes, found, strict=True):
        if isinstance(given_, Refusal):
            assert got == given_
            continue
        assert isinstance(got, Entry)
        assert (got.collection, got.id, got.modality, got.metadata, got.text) == (
            "c",
            given_.id,
            "text",
            given_.metadata,
            given_.text,
        )
        assert np.array_equal(got.vector, given_.vector.astype(np.float32))
        assert (got.tokens is None) == (given_.tokens is None)
        if got.tokens is not None:
            assert np.array_equal(got.tokens, given_.tokens.astype(np.float32))
        assert got.preview == given_.preview
        assert [replace(each, vector=None) for each in got.moments] == [
            replace(each, vector=None) for each in given_.moments
        ]
        for mine, theirs in zip(got.moments, given_.moments, strict=True):
            assert mine.vector is not None
            assert np.array_equal(mine.vector, theirs.vector.astype(np.float32))


@settings(deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 400))
def test_bytes_of_anybody_else_are_refused_and_never_stored(data: bytes, cut: int) -> None:
    whole = encode_outcomes([entry("a", 1, 2)])
    for bad in (data, whole[: cut % len(whole)], b'{"outcomes": [{"shapes": [[-1]]}]}\n' + data):
        with pytest.raises(ValueError):  # noqa: PT011
            decode_outcomes(bad, 4)
        with pytest.raises(ValueError):  # noqa: PT011
            decode_work(bad)


def test_vectors_that_are_no_unit_vectors_of_the_space_are_refused() -> None:
    good = entry("a", 1, None)
    for vector in (good.vector * 2, np.full(4, np.nan, np.float32), np.zeros(4, np.float32), l2_normalise(np.ones(5))):
        with pytest.raises(ValueError, match="vectors"):
            decode_outcomes(encode_outcomes([Entry("c", "a", "text", {}, vector)]), 4)


def test_what_a_chunk_costs() -> None:
    lines = [b'{"id": "a", "text": "four"}', b'{"id": "b", "vector": [1.0]}', b"nonsense"]
    pieces = [Piece(number, "line", "", line) for number, line in enumerate(lines, 1)]
    costs = costs_of_work(Limits(), Work("default", frozenset(), [*pieces, Piece(4, "text", "c.txt", b"sixsix")]))
    assert (costs["items"], costs["characters"]) == (2, 10)


def test_what_a_video_costs_is_what_is_looked_at_in_it() -> None:
    film = colours("red", "blue", seconds=1.5, sound=silence_then_tone(2, 1))
    [piece] = [Piece(1, "media", "a.mkv", film)]
    costs = costs_of_work(Limits(video_frames=2), Work("default", frozenset(), [piece]))
    assert (costs["items"], costs["pixels"]) == (3, 2 * 32 * 32)
    assert costs["seconds"] == pytest.approx(3, abs=0.1)


def test_previews_and_moments_of_other_kinds_are_refused() -> None:
    for bad in (
        entry("a", 1, None, preview=Preview("text/html", b"", {})),
        replace(entry("a", 1, None), moments=(Moment("text", 0, 1, entry("b", 2, None).vector),)),
    ):
        with pytest.raises(ValueError, match="of another kind"):
            decode_outcomes(encode_outcomes([bad]), 4)
