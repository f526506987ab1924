"""Filters as Milvus expressions, and the fields that are stored of metadata for them.

Milvus's own conditions on JSON mean other things than ours (a missing key and a stored null are one there, true is 1
in some versions, `not` of an unknown is unknown), and differ between its versions. So an item has, beside its metadata
as a text, an array of *terms*, one number for each thing that is so of it (decisions/0015):

    is     a key with its value         kind   a key with the type of what it holds         holds  a text in a list

Equality, membership and existence are then questions after terms, which are true or false of every item. Ranges and
parts of texts compare `fields`, where numbers are doubles, and only under a term that says what type is there. `not` is
taken inside to the terms first, so that no unknown is ever negated.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.store.filters import All, Bound, Contains, Exists, Filter, Is, Not, Some, kind_of

MAX_TERMS = 4_096
"""Largest number of elements of an array in Milvus."""
_KINDS = ("constant", "number", "text", "list", "object")
_OPPOSITE = {"$gt": "<=", "$gte": "<", "$lt": ">=", "$lte": ">"}
_OPERATOR = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_SIMPLE_KEY = re.compile(r"[A-Za-z0-9_]{1,64}")


@dataclass(frozen=True)
class Expression:
    """Holds a condition that every item which passes the filter meets."""

    text: str | bool
    """The expression; True: no condition; False: no item passes."""
    exact: bool
    """Whether only items that pass meet it."""


def translate(filter: Filter) -> Expression:
    return _translate(filter, negated=False)


def terms(metadata: Mapping[str, Any]) -> list[int]:
    """Return the numbers of what is so of an item with these metadata, each once."""
    numbers: set[int] = set()
    for name, value in metadata.items():
        kind = kind_of(value)
        numbers.add(_term("kind", name, kind))
        if kind == "list":
            numbers.update(_term("holds", name, text) for text in value if isinstance(text, str))
        elif kind != "object":
            numbers.add(_is(name, value))
    return sorted(numbers)


def fields(metadata: Mapping[str, Any]) -> dict[str, float | str]:
    """Return the fields that ranges are compared with and that parts of texts are looked for in."""
    comparable = {name: value for name, value in metadata.items() if kind_of(value) in ("number", "text")}
    return {_key(name): value if isinstance(value, str) else float(value) for name, value in comparable.items()}


def _translate(filter: Filter, *, negated: bool) -> Expression:
    match filter:
        case All(of):
            return _joined([_translate(part, negated=negated) for part in of], every=not negated)
        case Some(of):
            return _joined([_translate(part, negated=negated) for part in of], every=negated)
        case Not(of):
            return _translate(of, negated=not negated)
        case Is(name, values):
            if any(map(_wide, values)):  # a term stands for several integers, which the metadata tell apart
                return Expression(True if negated else _having([_is(name, value) for value in values]), exact=False)
            return Expression(_having([_is(name, value) for value in values], negated), exact=True)
        case Exists(name):
            return Expression(_having([_term("kind", name, kind) for kind in _KINDS], negated), exact=True)
        case Bound(name, operator, value):
            return _bound(name, operator, value, negated)
        case Contains(name, text):
            return _contains(name, text, negated)


def _bound(name: str, operator: str, value: str | float, negated: bool) -> Expression:
    guard = _term("kind", name, kind_of(value))
    if isinstance(value, str) and not _plain(value):
        return Expression(True if negated else _having([guard]), exact=False)
    if _wide(value):  # compared as doubles, of which one may stand for several integers: the nearest ones pass, too
        operator = operator if operator.endswith("e") else f"{operator}e"
        nearest = f"fields[{json.dumps(_key(name))}] {_OPERATOR[operator]} {float(value)!r}"
        return Expression(True if negated else _guarded(guard, nearest, negated), exact=False)
    literal = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(float(value))
    compared = f"fields[{json.dumps(_key(name))}] {(_OPPOSITE if negated else _OPERATOR)[operator]} {literal}"
    return Expression(_guarded(guard, compared, negated), exact=True)


def _contains(name: str, text: str, negated: bool) -> Expression:
    guard = _term("kind", name, "text")
    listed = Expression(_having([_term("holds", name, text)], negated), exact=True)
    if not _plain(text):
        return _joined([listed, Expression(True if negated else _having([guard]), exact=False)], every=negated)
    inside = f"fields[{json.dumps(_key(name))}] like {json.dumps(f'%{text}%', ensure_ascii=False)}"
    in_text = _guarded(guard, f"not ({inside})" if negated else inside, negated)
    return _joined([listed, Expression(in_text, exact=True)], every=negated)


def _guarded(guard: int, compared: str, negated: bool) -> str:
    condition = f"({_having([guard])} and {compared})"
    return f"({_having([guard], negated=True)} or {condition})" if negated else condition


def _joined(parts: Sequence[Expression], *, every: bool) -> Expression:
    """Join expressions by "and" (`every`) or "or". An inexact part lets more items through."""
    decisive = not every
    if any(part.text is decisive and part.exact for part in parts):
        return Expression(decisive, exact=True)
    exact = all(part.exact for part in parts)
    if any(part.text is decisive for part in parts):
        return Expression(decisive, exact)
    texts = [part.text for part in parts if isinstance(part.text, str)]
    if not texts:
        return Expression(every, exact)
    return Expression(texts[0] if len(texts) == 1 else f"({(' and ' if every else ' or ').join(texts)})", exact)


def _having(terms: Iterable[int], negated: bool = False) -> str | bool:
    """Return the expression for items that have any of the terms, or none of them (`negated`)."""
    numbers = sorted(set(terms))
    if not numbers:
        return negated
    single = len(numbers) == 1
    condition = f"array_contains(terms, {numbers[0]})" if single else f"array_contains_any(terms, {numbers})"
    return f"not {condition}" if negated else condition


def _is(name: str, value: Any) -> int:
    # As doubles: 1 is 1.0, and -0.0 is 0.0. Where two integers are one double, _wide() asks the metadata too.
    return _term("is", name, value if kind_of(value) != "number" else float(value) + 0.0)


def _wide(value: Any) -> bool:
    """Return whether it is a number of a size where one double stands for several integers."""
    return kind_of(value) == "number" and 2**53 <= abs(value) <= 2**63


def _term(*of: Any) -> int:
    """Return a hash of 63 bits: with a hundred million terms, a collision has a chance of one in a thousand."""
    digest = hashlib.blake2b(json.dumps(of, ensure_ascii=False).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _key(name: str) -> str:
    """Return a metadata key as it stands in an expression; what is no plain word is a hash there."""
    if _SIMPLE_KEY.fullmatch(name):
        return name
    return "#" + hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def _plain(text: str) -> bool:
    """Return whether a text means itself in an expression and in a pattern, in every version of Milvus."""
    return text.isprintable() and not set(text) & set("%_\\\"'{}")
