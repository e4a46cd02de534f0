"""Tables of one's own: completions in a list or in columns, and a ranking, ranks or ratings next to them."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prefopt.errors import UserError
from prefopt.rankings.checks import PER_COMPLETION, shorten
from prefopt.rankings.formats.fields import entries, number, rank
from prefopt.rankings.formats.pairs import with_one_prompt
from prefopt.rankings.prompts import OTHER_NAMES
from prefopt.rankings.row import parse_ranking

_JUDGEMENTS = ("ranking", "ranks", "ratings")
# What other tools call the lists: RLHFlow responses and rewards, distilabel generations and ratings, best-of-n scores.
_COMPLETIONS = ("completions", "responses", "generations", "candidates", "answers")
_RATINGS = ("ratings", "scores", "rewards")
# Of answers that are objects: where the text stands, and how it is judged.
_TEXTS = ("text", "response", "completion", "generation", "answer", "content", "output")
_RATED = ("rating", "score", "reward", "overall_score")
# What `prefopt best-of-n --keep_samples` says of the completion that it keeps, next to all of them.
_OF_ONE = ("completion", "truncated", "ids", "score", "mean_score")
# And which of them all are cut.
_CUT = "completions_truncated"
# Where a prompt stands in fields of other tools.
_ASKED = (*OTHER_NAMES, "history", "conversations", "messages")


def is_table(row: Mapping[str, Any]) -> bool:
    """It has a judgement of several completions."""
    return is_scored(row) or any(row.get(name) is not None for name in _JUDGEMENTS) or _have(row, ("rank",))


def is_scored(row: Mapping[str, Any]) -> bool:
    """Its answers have scores: in a list next to theirs, or each its own."""
    answers = any(_is_list(row.get(name)) for name in _COMPLETIONS)
    return (answers and any(_is_list(row.get(name)) for name in _RATINGS)) or _have(row, _RATED)


def _have(row: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    answers = next((row[name] for name in _COMPLETIONS if _are_objects(row.get(name))), ())
    return any(isinstance(one, Mapping) and name in one for one in answers for name in names)


def is_ranked(row: Mapping[str, Any]) -> bool:
    """Trainers take it as it is."""
    completions = row.get("completions")
    return isinstance(completions, list) and not _are_objects(completions) and isinstance(row.get("ranks"), list)


def table(rows: Iterable[Mapping[str, Any]], counts: Counter[str]) -> Iterator[dict]:
    """`prompt`, `completions`, and one of `ranking` ("D > C > A = B"), `ranks` (1 = best) and `ratings` (more is better).

    Lists may be JSON in a cell, as CSV has no lists. Instead of `completions` each may stand in a column of its own,
    named as in the ranking: "B > A" ranks the columns A and B, or completion_A and completion_B. Letters are names of
    the entries of `completions`. Ratings next to a ranking or ranks are kept as they are. All other fields are kept.

    The completions may be called `responses`, `generations`, `candidates` or `answers`, their ratings `scores` or `rewards`; or
    each is an object with its text and its `score`, `rating`, `reward` or `rank`. What other tools have of the prompt in fields
    of its own becomes part of it, as in `chosen_rejected`.

    >>> next(table([{"prompt": "2 + 2 =", "A": " 5", "B": " 4", "ranking": "B > A"}], Counter()))
    {'prompt': '2 + 2 =', 'completions': [' 5', ' 4'], 'ranks': [2, 1], 'ratings': None, 'labeler': None}
    """
    for row in rows:
        row = _with_own_names(row)
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


def without_choice(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of `prefopt best-of-n --keep_samples` as the samples that it is; any other as it is.

    >>> without_choice({"prompt": "p", "completion": "b", "truncated": False, "score": 2.0, "completions": ["a", "b"],
    ...                 "completions_truncated": [True, False], "scores": [1.0, 2.0]})
    {'prompt': 'p', 'completions': ['a', 'b'], 'scores': [1.0, 2.0], 'truncated': [True, False]}
    """
    if row.get("completion") is None:
        return row
    cut = {"truncated": row[_CUT]} if row.get(_CUT) is not None else {}
    return {name: value for name, value in row.items() if name not in (*_OF_ONE, _CUT)} | cut


def _with_own_names(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with its prompt in one field, and its lists under the names that are read here."""
    asked = {name: row[name] for name in ("prompt", "system", *_ASKED) if row.get(name)}
    prompt = with_one_prompt(asked).get("prompt")
    used = {"prompt"} | ({"system"} if row.get("system") else set()) | (set() if "prompt" in asked else set(_ASKED))
    row = {**{name: value for name, value in row.items() if name not in used}, "prompt": prompt}
    row = without_choice(row)
    lists = {"completions": _COMPLETIONS}
    if all(row.get(name) is None for name in _JUDGEMENTS):
        lists["ratings"] = _RATINGS
    for own, names in lists.items():
        name = own if row.get(own) is not None else next((name for name in names if _is_list(row.get(name))), None)
        if name is not None:
            row = {**{key: value for key, value in row.items() if key != name}, own: _list(row, name)}
    if not _are_objects(row.get("completions")):
        return row
    objects = entries(row, "completions", "text")
    texts = [next((one[name] for name in _TEXTS if one.get(name) is not None), "") for one in objects]
    row = {**row, "completions": texts}
    for own, names in (("ratings", _RATED), ("ranks", ("rank",))):
        name = next((name for name in names if any(one.get(name) is not None for one in objects)), None)
        if name is not None and row.get(own) is None:
            row[own] = [one.get(name) for one in objects]
    return row


def _is_list(value: Any) -> bool:
    """It is a list, or a cell that may hold one."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:1] == "[")


def _are_objects(answers: Any) -> bool:
    return isinstance(answers, list) and any(isinstance(one, Mapping) for one in answers)


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
