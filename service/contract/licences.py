"""The licences of the parts of a bundle's weights say whether the weights may be used commercially.

A part is a data set that the weights learned from, or an encoder that is in them. A recipe states its parts, the
manifest carries them, and the service says and enforces what follows. What is not known counts as not allowed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

NOT_STATED = "not stated"
_ALLOWING = frozenset(
    {
        *(
            "0bsd",
            "apache-2.0",
            "bsd-2-clause",
            "bsd-3-clause",
            "bsl-1.0",
            "isc",
            "mit",
            "mit-0",
            "mpl-2.0",
            "unlicense",
        ),
        *("cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "odbl-1.0", "odc-by-1.0", "pddl-1.0", "zlib"),
    }
)
"""SPDX identifiers, in lower case, of licences that allow commercial use; beside CC BY and CC BY-SA in any version."""
_CREATIVE_COMMONS = re.compile(r"cc-by(-sa)?-\d\.\d")
_NON_COMMERCIAL = re.compile(r"cc-by-nc(-sa|-nd)?-\d\.\d")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Licence(_Model):
    """Names the licence of one part of a bundle's weights."""

    of: str = Field(min_length=1)
    """The data set or the encoder."""
    licence: str = Field(min_length=1)
    """Its SPDX identifier, or expression, where there is one; else in words."""
    commercial: bool | None = None
    """Whether it allows commercial use; null: not known. Where it is left out, a known SPDX identifier says it."""
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        """Read plain words, as recipes and bundles had them before, as a part whose commercial use is not known."""
        if isinstance(data, str):
            of, _, licence = data.partition(": ")
            return {"of": of, "licence": licence or NOT_STATED, "commercial": None}
        if not isinstance(data, dict):
            return data
        if "commercial" not in data:
            return data | {"commercial": allows_commercial_use(str(data.get("licence")))}
        return data | {"commercial": None} if data["commercial"] == "unknown" else data

    @model_validator(mode="after")
    def _not_against_its_licence(self) -> "Licence":
        if self.commercial and allows_commercial_use(self.licence) is False:
            raise ValueError(f"{self.of}: {self.licence} forbids commercial use, and commercial is true")
        return self

    def __str__(self) -> str:
        return f"{self.of} ({self.licence})"


class Terms(_Model):
    """Terms that are stated apart: they are of the access to data, and no licence of the weights."""

    of: str = Field(min_length=1)
    """The data set."""
    terms: str = Field(min_length=1)


def allows_commercial_use(licence: str) -> bool | None:
    """Return what an SPDX identifier or an expression of AND and OR says; None where it is none that is known here."""
    choices = [_all(re.split(r"\s+AND\s+|;\s*", choice)) for choice in re.split(r"\s+OR\s+", licence)]
    if True in choices:
        return True
    return None if None in choices else False


def _all(identifiers: Iterable[str]) -> bool | None:
    verdicts = [_one(identifier.strip().lower()) for identifier in identifiers]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _one(identifier: str) -> bool | None:
    if identifier in _ALLOWING or _CREATIVE_COMMONS.fullmatch(identifier):
        return True
    return False if _NON_COMMERCIAL.fullmatch(identifier) else None


def parts(licences: Sequence[Licence], encoders: Mapping[str, str | None]) -> tuple[Licence, ...]:
    """Return every part: the stated ones, then the encoders (licence by source) that they do not name.

    Where nothing is stated, the training data is a part that nothing is known of. The source of several encoders side
    by side joins theirs by `+`.
    """
    part_names = {part.of for part in licences}
    data = () if licences else (Licence(of="the training data", licence=NOT_STATED),)
    encoder_licences = [
        Licence(of=of, licence=licence or NOT_STATED)
        for of, licence in encoders.items()
        if of not in part_names and not part_names.issuperset(of.split("+"))
    ]
    return (*licences, *data, *encoder_licences)


def combined(*groups: Iterable[Licence]) -> tuple[Licence, ...]:
    """Return the parts of several wholes. Of two entries for one part the first counts, unless the other allows
    less."""
    by_part: dict[str, Licence] = {}
    for part in (part for group in groups for part in group):
        before = by_part.get(part.of)
        if before is None or _permission(part) < _permission(before):
            by_part[part.of] = part
    return tuple(by_part.values())


def _permission(part: Licence) -> int:
    return {False: 0, None: 1, True: 2}[part.commercial]


def commercial_use(every: Sequence[Licence]) -> bool | None:
    """Return whether all parts allow commercial use; None where none forbids it and of some it is not known."""
    verdicts = {part.commercial for part in every}
    if False in verdicts:
        return False
    return None if None in verdicts else True


def obstacles(every: Sequence[Licence]) -> str:
    """Return the parts that stand in the way of commercial use, by name; empty where none does."""
    forbidding = ", ".join(str(part) for part in every if part.commercial is False)
    unknown = ", ".join(str(part) for part in every if part.commercial is None)
    if forbidding and unknown:
        return f"{forbidding}; not known of {unknown}"
    return forbidding or unknown


def weights_line(every: Sequence[Licence]) -> str:
    """Return a line that says how weights may be used: `weights: non-commercial, because of Flickr8k (…)`."""
    verdict = commercial_use(every)
    if verdict:
        return f"weights: commercial use allowed ({', '.join(sorted({part.licence for part in every}))})"
    return (
        f"weights: {'commercial use not known' if verdict is None else 'non-commercial'}, because of {obstacles(every)}"
    )


def markdown(every: Sequence[Licence], terms: Sequence[Terms]) -> str:
    """Return the licences as a part of a Markdown page: the line, a table, the terms."""
    words = {True: "allowed", False: "forbidden", None: "not known"}
    lines = [f"W{weights_line(every)[1:]}.", "", "| of | licence | commercial use | |", "|---|---|---|---|"]
    lines += [f"| {part.of} | {part.licence} | {words[part.commercial]} | {part.note} |" for part in every]
    if terms:
        lines += ["", "Terms of access to data, which are no licences of the weights:", ""]
        lines += [f"- {term.of}: {term.terms}" for term in terms]
    return "\n".join(lines) + "\n"
