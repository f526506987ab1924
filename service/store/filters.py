"""A filter over metadata has one grammar for search and for deletion.

    {"year": 2020}                                   equal (1 is 1.0, and neither true nor "1"; integers are exact)
    {"year": [2020, 2021, null]}                     one of
    {"year": {"$gte": 2000, "$lt": 2010}}            a range, of numbers or of texts
    {"title": {"$contains": "harbour"}}              a text that contains it (case counts), or a list that holds it
    {"place": {"$exists": false}}                    the key is absent; a stored null is there
    {"$or": [{"year": 2020}, {"$not": {"place": "Paris"}}], "set": "train"}

Keys beside one another are all to hold; so are operators. Every condition is true or false of an item, so that $not
also finds the items that lack the key. decisions/0012 says how filters are evaluated.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = str | int | float | bool | None

MAX_NODES = 64
MAX_DEPTH = 8
MAX_VALUES = 1_000
_OPERATOR = re.compile(r"\$[A-Za-z]+")
_BOUNDS: Mapping[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


@dataclass(frozen=True)
class Is:
    """The key holds one of the values."""

    name: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Bound:
    """The key holds something of the bound's type, number or text, on the right side of it."""

    name: str
    operator: str
    value: str | float


@dataclass(frozen=True)
class Exists:
    name: str


@dataclass(frozen=True)
class Contains:
    name: str
    text: str


@dataclass(frozen=True)
class All:
    of: tuple["Filter", ...]


@dataclass(frozen=True)
class Some:
    of: tuple["Filter", ...]


@dataclass(frozen=True)
class Not:
    of: "Filter"


Filter = Is | Bound | Exists | Contains | All | Some | Not


def parse(raw: Any) -> Filter:
    """Parse a client's filter. Raises ValueError, which names the wrong key."""
    budget = [MAX_NODES]
    return _filter(raw, "filter", 0, budget)


def _filter(raw: Any, where: str, depth: int, budget: list[int]) -> Filter:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: an object of conditions is expected")
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    parts: list[Filter] = []
    for name, condition in raw.items():
        inside = f"{where}.{_shown(name)}"
        if name in ("$and", "$or"):
            if not isinstance(condition, list) or not condition:
                raise ValueError(f"{inside}: a list of at least one filter is expected")
            of = tuple(_whole(part, f"{inside}[{place}]", depth, budget) for place, part in enumerate(condition))
            parts.append(All(of) if name == "$and" else Some(of))
        elif name == "$not":
            parts.append(Not(_whole(condition, inside, depth, budget)))
        elif _OPERATOR.fullmatch(name):
            raise ValueError(f"{inside}: no such operator here; there are $and, $or, $not")
        else:
            parts += _conditions(name, condition, inside)
    budget[0] -= len(parts)
    if budget[0] < 0:
        raise ValueError(f"{where}: more than {MAX_NODES} conditions")
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _whole(raw: Any, where: str, depth: int, budget: list[int]) -> Filter:
    """Parse a filter inside another. An empty one is a slip, and would let everything through."""
    if isinstance(raw, Mapping) and not raw:
        raise ValueError(f"{where}: a filter of no conditions")
    return _filter(raw, where, depth + 1, budget)


def _conditions(name: str, raw: Any, where: str) -> Iterator[Filter]:
    if isinstance(raw, Mapping):
        if not raw:
            raise ValueError(f'{where}: an object of operators is expected, such as {{"$gte": 1}}')
        kinds = {kind_of(raw[name_of_bound]) for name_of_bound in _BOUNDS if name_of_bound in raw}
        if len(kinds) > 1:
            raise ValueError(f"{where}: the bounds of a range are all numbers or all texts")
        for operator, value in raw.items():
            yield _operator(name, operator, value, f"{where}.{_shown(operator)}")
    elif isinstance(raw, list):
        yield Is(name, _values(raw, where))
    else:
        yield Is(name, (_scalar(raw, where),))


def _operator(name: str, operator: str, value: Any, where: str) -> Filter:
    if operator == "$eq":
        return Is(name, (_scalar(value, where),))
    if operator == "$in":
        if not isinstance(value, list):
            raise ValueError(f"{where}: a list is expected")
        return Is(name, _values(value, where))
    if operator in _BOUNDS:
        if kind_of(value) not in ("number", "text"):
            raise ValueError(f"{where}: a number or a text is expected")
        return Bound(name, operator, value)
    if operator == "$exists":
        if not isinstance(value, bool):
            raise ValueError(f"{where}: true or false is expected")
        return Exists(name) if value else Not(Exists(name))
    if operator == "$contains":
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where}: a text is expected, not an empty one")
        return Contains(name, value)
    operators = ", ".join(("$eq", "$in", *_BOUNDS, "$exists", "$contains"))
    raise ValueError(f"{where}: no such operator; there are {operators}")


def _values(raw: Sequence[Any], where: str) -> tuple[Scalar, ...]:
    if len(raw) > MAX_VALUES:
        raise ValueError(f"{where}: more than {MAX_VALUES} values")
    return tuple(_scalar(value, f"{where}[{place}]") for place, value in enumerate(raw))


def _scalar(value: Any, where: str) -> Scalar:
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where}: a text, a number, true, false or null is expected")
    return value


def kind_of(value: Any) -> str:
    """Return what a value of the metadata is: constant (true, false, null), number, text, list or object."""
    if value is None or isinstance(value, bool):
        return "constant"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else "object"


def _shown(name: str) -> str:
    return name if len(name) <= 64 else name[:64] + "…"


def passes(filter: Filter, metadata: Mapping[str, Any]) -> bool:
    """Return whether an item passes. The columns say the same of many items at once; here it is said of one."""
    match filter:
        case Is(name, values):
            return name in metadata and any(_equal(metadata[name], value) for value in values)
        case Bound(name, operator, value):
            content = metadata.get(name)
            kind = kind_of(content)
            # Python compares integers and doubles as the numbers that they are.
            return kind == kind_of(value) and kind in ("number", "text") and _BOUNDS[operator](content, value)
        case Exists(name):
            return name in metadata
        case Contains(name, text):
            content = metadata.get(name)
            return isinstance(content, str | list) and text in content
        case All(of):
            return all(passes(part, metadata) for part in of)
        case Some(of):
            return any(passes(part, metadata) for part in of)
        case Not(of):
            return not passes(of, metadata)


def _equal(content: Any, value: Scalar) -> bool:
    kind = kind_of(content)
    if kind != kind_of(value):
        return False
    return content is value if kind == "constant" else bool(content == value)
