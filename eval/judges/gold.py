"""Judges that score: the completion with the higher score is preferred. The gold reward is a function of one's own."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.judges.people import Completions, Row

Gold = Callable[[Any, str], Any]
Scores = Callable[[str, Sequence[Row]], list[dict[str, Any]]]


class ScoreJudge:
    """The completion with the higher score is preferred; an equal score is a tie.

    Args:
        score: (model, its rows of completions) -> rows `id`, `decoding`, `score`, and `parts` where it has any.
    """

    def __init__(self, score: Scores) -> None:
        self.score = score
        self.scores: dict[str, list[dict[str, Any]]] = {}

    def judgements(self, completions: Completions, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        for model, rows in completions.items():
            self.scores[model] = self.score(model, rows)
        found = []
        for a, b in pairs:
            theirs = {(row["id"], row["decoding"]): row["score"] for row in self.scores[b]}
            for row in self.scores[a]:
                key, score = (row["id"], row["decoding"]), row["score"]
                if key in theirs:
                    other = theirs[key]
                    preference = 0.5 * (1 + (score > other) - (score < other))
                    pair = {"a": a, "b": b, "preference": preference, "score_a": score, "score_b": other}
                    found.append({"id": row["id"], "decoding": row["decoding"], **pair})
        return found


def gold_scores(gold: Gold, called: str = "gold reward of ") -> Scores:
    """Scores of a function of prompt and text, for `ScoreJudge`; `called` and the model stand in its errors."""

    def score(model: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            place = f"{called}{model}, prompt {row['id']}"
            try:
                given = gold(row["prompt"], row["completion"])
            except Exception as error:
                said = f"{place}: {type(error).__name__}: {error}"
                raise UserError(f"{said} (PREFOPT_TRACEBACK=1 shows where it happened)") from error
            names = [f.name for f in fields(given) if f.name != "total"] if is_dataclass(given) else []
            value = _finite(getattr(given, "total", given), place)
            parts = (
                {"parts": {name: _finite(getattr(given, name), f"{place}, {name}") for name in names}} if names else {}
            )
            found.append({"id": row["id"], "decoding": row["decoding"], "score": value, **parts})
        return found

    return score


def _finite(given: Any, place: str) -> float:
    try:
        # A text is none, even where it could be read as one.
        value = math.nan if isinstance(given, str) else float(given)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place}: {given!r:.80} is not a finite number")
    return value


def load_callable(name: str) -> Callable[..., Any]:
    """The function called "package.module:name".

    >>> load_callable("math:sqrt")(9.0)
    3.0
    """
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'cannot import {name!r}: expected "package.module:function" ({error})') from error
    if not callable(found):
        raise UserError(f"{name!r} is no function but {type(found).__name__}")
    return found


def gold_function(gold: str | Gold) -> Gold:
    """The gold reward, from its name or, from Python, as it is."""
    return load_callable(gold) if isinstance(gold, str) else gold
