"""What a chunk of a job costs the key that sent it."""

import pytest

from service.jobs.embedding import costs_of_work
from service.jobs.pieces import Work
from service.jobs.plan import Piece
from service.settings import Limits
from tests.service.films import colours, silence_then_tone


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
