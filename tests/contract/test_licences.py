"""Licences of parts say what a whole may be used for: an unknown one allows nothing, and plain words are unknown."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.licences import (
    Licence,
    Terms,
    allows_commercial_use,
    combined,
    commercial_use,
    markdown,
    parts,
    weights_line,
)

FREE = Licence(of="COCO captions", licence="CC-BY-4.0")
BARRED = Licence(of="Flickr8k", licence="non-commercial research", commercial=False)
UNKNOWN = Licence.model_validate("Caltech101: as found")


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("Apache-2.0", True),
        ("apache-2.0", True),
        ("CC0-1.0", True),
        ("CC-BY-SA-3.0", True),
        ("CC-BY-NC-3.0", False),
        ("CC-BY-NC-SA-4.0", False),
        ("MIT AND CC-BY-NC-4.0", False),
        ("MIT AND something", None),
        ("MIT OR CC-BY-NC-4.0", True),
        ("CC-BY-NC-4.0 OR something", None),
        ("CC-BY-NC-4.0 OR CC-BY-NC-3.0", False),
        ("Apache-2.0; not stated", None),
        ("CC BY 4.0", None),
        ("free for commercial use, Apache-2.0 they say", None),
        ("CC-BY-4.0-modified", None),
        ("", None),
    ],
)
def test_only_an_identifier_that_is_known_says_anything(licence: str, allowed: bool | None) -> None:
    assert allows_commercial_use(licence) is allowed


def test_plain_words_are_read_and_nothing_is_known_of_their_use() -> None:
    assert (UNKNOWN.of, UNKNOWN.licence, UNKNOWN.commercial) == ("Caltech101", "as found", None)
    assert Licence.model_validate("ESC-50: CC-BY-4.0").commercial is None, "words are no statement"
    assert Licence.model_validate("made by hand") == Licence(of="made by hand", licence="not stated")


def test_what_is_stated_counts_and_is_kept_over_a_manifest() -> None:
    assert Licence(of="a", licence="own words", commercial=True).commercial is True
    assert Licence(of="a", licence="Apache-2.0", commercial=False).commercial is False
    unknown = Licence.model_validate({"of": "a", "licence": "MIT", "commercial": "unknown"})
    assert unknown.commercial is None
    for each in (FREE, BARRED, UNKNOWN, unknown):
        assert Licence.model_validate_json(each.model_dump_json()) == each


@pytest.mark.parametrize(
    "wrong",
    [
        {"of": "a", "licence": "CC-BY-NC-4.0", "commercial": True},
        {"of": "a", "licence": "MIT", "commercial": "perhaps"},
        {"of": "a"},
        {"licence": "MIT"},
        {"of": "", "licence": "MIT"},
        "",
        7,
    ],
)
def test_what_contradicts_itself_or_is_incomplete_is_refused(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        Licence.model_validate(wrong)


def test_encoders_are_parts_unless_they_are_named_and_data_that_is_not_stated_is_one() -> None:
    both = parts([BARRED], {"efficientnet": "Apache-2.0", "yamnet": None})
    assert [str(each) for each in both] == [str(BARRED), "efficientnet (Apache-2.0)", "yamnet (not stated)"]
    stated = Licence(of="yamnet", licence="in our own words", commercial=True)
    assert parts([stated], {"yamnet": None, "yamnet+yamnet": "x"}) == (stated,)
    nothing = parts([], {"efficientnet": "Apache-2.0"})
    assert commercial_use(nothing) is None and "the training data (not stated)" in weights_line(nothing)


def test_the_line_names_what_stands_in_the_way() -> None:
    assert weights_line([FREE, BARRED]) == "weights: non-commercial, because of Flickr8k (non-commercial research)"
    assert weights_line([UNKNOWN, FREE]) == "weights: commercial use not known, because of Caltech101 (as found)"
    assert weights_line([UNKNOWN, BARRED]).endswith(
        "Flickr8k (non-commercial research); not known of Caltech101 (as found)"
    )
    assert weights_line([FREE, FREE]) == "weights: commercial use allowed (CC-BY-4.0)"


def test_of_two_statements_on_one_part_the_stricter_counts() -> None:
    strict = Licence(of="ESC-50", licence="CC-BY-NC-3.0")
    free = Licence(of="ESC-50", licence="CC0-1.0", note="its CC0 clips alone")
    assert combined([free, FREE], [strict]) == (strict, FREE)
    assert combined([strict], [free], [FREE]) == (strict, FREE)


def test_the_page_has_the_terms_apart() -> None:
    page = markdown([FREE], [Terms(of="ImageNet", terms="research and education")])
    licences, terms = page.split("Terms of access")
    assert "| COCO captions | CC-BY-4.0 | allowed |" in licences and "ImageNet" not in licences
    assert "- ImageNet: research and education" in terms
