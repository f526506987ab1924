"""The cast of the first run: recorded from a shell, and drawn."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from examples.photos import write_photos
from tests.docs import cast

RECORDED = cast.ROOT / "docs/recordings/first-run"


def text_of(lines) -> list[str]:
    return ["".join(cell[0] for cell in row).rstrip() for _, row in lines]


def test_a_session_is_recorded_with_its_times(tmp_path: Path) -> None:
    """Every line that stays is there; what was written over is not."""
    commands = ("echo ~", "printf 'half\\r'; printf 'whole\\n\\033[38;2;1;2;3;48;5;9m▀▀\\033[0m<\\n'")
    events = cast.record(tmp_path, commands)
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)
    assert cast.from_cast(cast.as_cast(events)) == events
    assert json.loads(cast.as_cast(events).splitlines()[0])["version"] == 2
    lines = cast.lines_of(events)
    typed = [line.removeprefix("$ ") for line in text_of(lines)]
    assert typed == [commands[0], str(tmp_path), commands[1], "whole", "▀▀<", "$"]
    assert [seconds for seconds, _ in lines] == sorted(seconds for seconds, _ in lines)
    drawn = ElementTree.fromstring(cast.as_svg(lines))
    assert "".join(drawn.itertext()).count("<") == 2
    assert {"#010203", "#ff0000"} <= {element.get("fill") for element in drawn.iter()}


def test_a_shell_that_ends_is_said(tmp_path: Path) -> None:
    with pytest.raises(cast.CastError, match="the shell ended"):
        cast.record(tmp_path, ["exit"])


def test_the_picture_of_the_docs_is_that_of_its_cast() -> None:
    """`python -m tests.docs.cast docs/recordings/first-run` makes both."""
    lines = cast.lines_of(cast.from_cast(RECORDED.with_suffix(".cast").read_text()))
    assert RECORDED.with_suffix(".svg").read_text() == cast.as_svg(lines)
    text = text_of(lines)
    for command in cast.COMMANDS:
        assert f"$ {command}" in text
    found = [line.split()[2] for line in text if line[:2] == "0."]
    assert (found[0], found[2]) == ("cat.jpg", "hubble_deep_field.jpg") and "11 indexed" in text


@pytest.mark.full
def test_the_first_run_is_as_recorded(tmp_path: Path) -> None:
    if not (cast.ROOT / "build/starter/manifest.json").exists():
        pytest.skip("build/starter is not there: `make starter` builds it")
    write_photos(tmp_path / "Pictures")
    text = text_of(cast.lines_of(cast.record(tmp_path)))
    recorded = text_of(cast.lines_of(cast.from_cast(RECORDED.with_suffix(".cast").read_text())))
    assert [line for line in text if not line.startswith("[1]")] == [
        line for line in recorded if not line.startswith("[1]")
    ]
