"""The items of a job cost the key that sent it."""

import pytest

from service.jobs.input import Piece, read_piece
from service.jobs.run import costs_of_items
from service.settings import Limits
from tests.service.films import colours, silence_then_tone


def test_what_items_cost() -> None:
    lines = [
        b'{"id": "a", "text": "four"}',
        b'{"id": "b", "vector": [1.0]}',
        b"nonsense",
        b'{"id": "d", "image": "https://example.org/d.png"}',
    ]
    pieces = [Piece(number, "line", "", line) for number, line in enumerate(lines, 1)]
    items = [read_piece(piece, "default", Limits()) for piece in [*pieces, Piece(5, "text", "e.txt", b"sixsix")]]
    for fetched in (False, True):
        costs = costs_of_items(items, Limits(), fetched=fetched)
        assert (costs["items"], costs["characters"]) == (3 + fetched, 10)


def test_what_a_video_costs_is_what_is_looked_at_in_it() -> None:
    film = colours("red", "blue", seconds=1.5, sound=silence_then_tone(2, 1))
    limits = Limits(video_frames=2)
    costs = costs_of_items([read_piece(Piece(1, "media", "a.mkv", film), "default", limits)], limits, fetched=False)
    assert (costs["items"], costs["pixels"]) == (3, 2 * 32 * 32)
    assert costs["seconds"] == pytest.approx(3, abs=0.1)
