"""Fields of foreign rows: taken with an error that says what was expected."""

import math
from collections.abc import Mapping
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import shorten

_KINDS = {str: "a text", list: "a list", Mapping: "an object", int: "a whole number"}


def field(row: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    """The value of a field that must be there and of the kind given; whole floats pass as int.

    >>> field({"choice": 1.0}, "choice", int)
    1
    >>> field({"summaries": "one"}, "summaries", list)
    Traceback (most recent call last):
    prefopt.errors.UserError: field 'summaries': expected a list, got 'one'; mend or delete the row, or choose another format
    """
    value = row.get(name)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    got = shorten(value) if name in row else "nothing"
    raise UserError(
        f"field {where + name!r}: expected {_KINDS[kind]}, got {got}; mend or delete the row, or choose another format"
    )


def answer(row: Mapping[str, Any], name: str, where: str = "") -> str:
    """The text of an answer; of null an empty one, which is then dropped and counted like all empty ones."""
    return "" if name in row and row[name] is None else field(row, name, str, where)


def entries(row: Mapping[str, Any], name: str, text: str) -> list[Mapping[str, Any]]:
    """A list of objects with a `text` each; null in place of an object is one with the text null.

    >>> entries({"answers": [{"answer": "Plum."}, None]}, "answers", "answer")
    [{'answer': 'Plum.'}, {'answer': None}]
    """
    found = [{text: None} if one is None else one for one in field(row, name, list)]
    for i, one in enumerate(found):
        field({f"{name}[{i}]": one}, f"{name}[{i}]", Mapping)
    return found


def number(value: Any, name: str) -> float | None:
    """A finite number, also one written as text; None for what stands for no value (None, NaN, "", "N/A").

    >>> number("4", "Rating"), number(float("nan"), "Rating"), number("N/A", "Rating")
    (4, None, None)
    """
    found = value
    if isinstance(value, str):
        if value.strip().lower() in ("", "n/a", "nan", "none", "null"):
            return None
        try:
            found = float(value)
        except ValueError:
            found = math.inf
        found = int(found) if found.is_integer() else found
    if found is None or (isinstance(found, float) and math.isnan(found)):
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or math.isinf(found):
        raise UserError(f"field {name!r}: expected a number, got {shorten(value)}; mend or delete the row")
    return found


def rank(value: Any, name: str = "rank") -> float | None:
    """A rank as a number, whole where it is one: some writers make 1.0 of 1."""
    found = number(value, name)
    return int(found) if found is not None and found == int(found) else found


def user(text: str) -> list[dict[str, str]]:
    """A prompt of one message."""
    return [{"role": "user", "content": text}]
