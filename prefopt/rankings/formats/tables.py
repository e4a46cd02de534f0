"""Tables of one's own: completions in a list or in columns, and a ranking, ranks or ratings next to them."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import PER_COMPLETION, shorten
from prefopt.rankings.formats.fields import number, rank
from prefopt.rankings.row import parse_ranking

_JUDGEMENTS = ("ranking", "ranks", "ratings")


def is_table(row: Mapping[str, Any]) -> bool:
    """It has a judgement of several completions."""
    return any(row.get(name) is not None for name in _JUDGEMENTS)


def table(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """`prompt`, `completions`, and one of `ranking` ("D > C > A = B"), `ranks` (1 = best) and `ratings` (more is better).

    Lists may be JSON in a cell, as CSV has no lists. Instead of `completions` each may stand in a column of its own,
    named as in the ranking: "B > A" ranks the columns A and B, or completion_A and completion_B. Letters are names of
    the entries of `completions`. Ratings next to a ranking or ranks are kept as they are. All other fields are kept.

    >>> next(table([{"prompt": "2 + 2 =", "A": " 5", "B": " 4", "ranking": "B > A"}], Counter()))
    {'prompt': '2 + 2 =', 'completions': [' 5', ' 4'], 'ranks': [2, 1], 'ratings': None, 'labeler': None}
    """
    for row in rows:
        ranking, used = row.get("ranking"), {"prompt", "completions", *_JUDGEMENTS}
        if not isinstance(ranking, str | None):
            raise UserError(
                f"field 'ranking': expected a text such as 'B > A = C', got {shorten(ranking)}; write it so, or as ranks"
            )
        ranks, ratings = (_list(row, name) for name in ("ranks", "ratings"))
        completions = _list(row, "completions")
        if isinstance(ranking, str) and completions is None:
            columns = {name: _column(row, name) for name in _names(ranking)}
            completions = [row[column] for column in columns.values()]
            ranks = parse_ranking(ranking, list(columns))
            used |= set(columns.values())
        elif completions is None:
            raise UserError("field 'completions': expected a list, got nothing; add it, or a ranking of columns")
        elif isinstance(ranking, str):
            ranks = parse_ranking(ranking)
        judged = ratings if ranks is None else ranks
        if judged is None:
            raise UserError(f"fields {', '.join(_JUDGEMENTS)}: expected one of them, got none; fill or delete the row")
        aligned = {name: _list(row, name) for name in PER_COMPLETION if row.get(name) and name not in used}
        for name, values in {"ranks": ranks, "ratings": ratings, **aligned}.items():
            if values is not None and len(values) != len(completions):
                raise UserError(
                    f"field {name!r}: expected one for each of the {len(completions)} completions, got {shorten(values)}; "
                    "mend or delete the row"
                )
        yield {
            **{name: value for name, value in row.items() if name not in used},
            "prompt": row.get("prompt") or "",
            "completions": completions,
            "ranks": None if ranks is None else [rank(value, "ranks") for value in ranks],
            "ratings": None if ratings is None else [number(value, "ratings") for value in ratings],
            "labeler": None if row.get("labeler") is None else str(row["labeler"]),
            **aligned,
        }


def _names(ranking: str) -> list[str]:
    return sorted({name.strip() for group in ranking.split(">") for name in group.split("=")})


def _column(row: Mapping[str, Any], name: str) -> str:
    for column in (name, f"completion_{name}", f"completion_{name.lower()}"):
        if column in row:
            return column
    raise UserError(
        f"field 'ranking': expected names of columns, got {shorten(name)}, but the columns are {', '.join(row)}; name the "
        "columns as in the ranking, or give a list of completions"
    )


def _list(row: Mapping[str, Any], name: str) -> list | None:
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list):
            raise UserError(
                f'field {name!r}: expected a list, in CSV as JSON like ["a", "b"], got {shorten(row[name])}; mend the cell'
            )
    if value is not None and not isinstance(value, list):
        raise UserError(f"field {name!r}: expected a list, got {shorten(value)}; mend or delete the row")
    return value
