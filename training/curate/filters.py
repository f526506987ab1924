"""Metadata and safety filters: why a row of a pool is left out before anything is computed (LAION-5B, 2210.08402)."""

import re
from collections.abc import Callable
from typing import Any

from training.curate.recipe import Condition, PoolSource
from training.curate.rows import Row


def row_filter(source: PoolSource) -> Callable[[Row], str | None]:
    """A function from a row to the reason for leaving it out, as in the report; None keeps it."""
    unwanted = "|".join(re.escape(word) for word in source.without)
    forbidden = re.compile(rf"\b(?:{unwanted})\b", re.IGNORECASE) if source.without else None

    def reason(row: Row) -> str | None:
        if not row.text:
            return "no text"
        if source.media is not None and row.media is None:
            return "no medium"
        words = len(row.text.split())
        if words < source.least_words or (source.most_words is not None and words > source.most_words):
            return "words"
        if forbidden is not None and forbidden.search(row.text):
            return "without"
        return next(
            (f"where.{key}" for key, one in source.where.items() if not fulfils(row.fields.get(key), one)), None
        )

    return reason


def fulfils(value: Any, condition: Condition) -> bool:
    """Return whether a column's value meets every part of a condition. Absent values and NaN meet none."""
    if value is None or value != value:
        return False
    if condition.least is not None or condition.most is not None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            return False
        if not (-float("inf") if condition.least is None else condition.least) <= number:
            return False
        if not number <= (float("inf") if condition.most is None else condition.most):
            return False
    text = str(value)  # tables have texts where JSON has numbers
    if condition.one_of is not None and text not in map(str, condition.one_of):
        return False
    if condition.none_of is not None and text in map(str, condition.none_of):
        return False
    return condition.matches is None or re.search(condition.matches, text) is not None
