"""The ranked row: K completions of one prompt and the labeler's ranks; its notations and conversions.

A row is `{"prompt": ..., "completions": [...], "ranks": [...]}`. The prompt is a string, or a list of chat messages;
the completions are strings, or lists of chat messages when the prompt is one. `ranks` are integers, 1 = best,
equal = tie, dense (A = B > C is 1, 1, 2). Optional: `labeler` (str) and, one entry per completion, `ratings`,
`flags` and `truncated` (True: cut at a length limit). TRL preference rows (`prompt`, `chosen`, `rejected`) are the
case K = 2, and their optional `margin` is `ratings` of [margin, 0]. `prefopt.rankings.checks` holds rows to this;
`prefopt.rankings.dataset` has the public names of both modules too.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from prefopt.errors import UserError, UserTypeError
from prefopt.rankings.checks import PER_COMPLETION, ranks_problem, ratings_problem, row_problem, shorten
from prefopt.rankings.prompts import with_prompt


def parse_ranking(text: str, labels: Sequence[str] | None = None) -> list[int]:
    """Ranks of a ranking written with `>` (better than) and `=` (as good as), in the order of `labels` (default: A, B, C, ...).

    Raises:
        UserError: an unknown, repeated (which a cycle needs) or missing label, or fewer than two.

    >>> parse_ranking("D > C > A = B")
    [3, 3, 2, 1]
    >>> parse_ranking("right > left", labels=["left", "right"])
    [2, 1]
    """
    if not isinstance(text, str):
        raise UserTypeError(f"ranking: expected a text such as 'B > A = C', got {shorten(text)}")
    groups = [[name.strip() for name in group.split("=")] for group in text.split(">")]
    names = [name for group in groups for name in group]
    labels = _default_labels(len(names)) if labels is None else _checked_labels(labels)
    where = f"ranking {shorten(text)}"
    for name in names:
        if not name:
            raise UserError(f"{where}: a label is missing next to '>' or '='; write e.g. 'B > A = C'")
        if name not in labels:
            raise UserError(
                f"{where}: unknown label {shorten(name)}; the labels are {', '.join(labels)}, "
                "joined by '>' (better) and '=' (tie) only"
            )
        if names.count(name) > 1:
            raise UserError(
                f"{where}: label {name!r} appears {names.count(name)} times, but a ranking has no cycles and "
                "no repeats; write each label once"
            )
    if missing := [label for label in labels if label not in names]:
        raise UserError(f"{where}: {', '.join(missing)} not ranked; write each of {', '.join(labels)} once")
    if len(names) < 2:
        raise UserError(f"{where}: expected at least two labels, got {len(names)}")
    rank = {name: position for position, group in enumerate(groups, start=1) for name in group}
    return [rank[label] for label in labels]


def format_ranking(ranks: Sequence[int], labels: Sequence[str] | None = None) -> str:
    """The ranking as text: the inverse of `parse_ranking`, with tied labels in their row order.

    Raises:
        UserError: ranks that are not dense integers from 1, or another number of labels.

    >>> format_ranking([3, 3, 2, 1])
    'D > C > A = B'
    >>> format_ranking([2, 1], labels=["left", "right"])
    'right > left'
    """
    if not isinstance(ranks, Sequence) or len(ranks) < 2:
        raise UserTypeError(f"ranks: expected a list of two or more such as [2, 1, 2], got {shorten(ranks)}")
    labels = _default_labels(len(ranks)) if labels is None else _checked_labels(labels)
    if problem := ranks_problem(list(ranks), len(labels), "labels"):
        raise UserError(problem)
    groups = [[label for label, r in zip(labels, ranks, strict=True) if r == rank] for rank in sorted(set(ranks))]
    return " > ".join(" = ".join(group) for group in groups)


def ranks_from_ratings(ratings: Sequence[float], tie_margin: float = 0.0) -> list[int]:
    """Dense ranks from ratings such as a 1-7 Likert scale or scores: a higher rating is better, equal ratings tie.

    From the best on down, a rating that is at most `tie_margin` below the best of its group ties with it, so that no two
    of a group are further apart. One that is not a finite number is a UserError.

    >>> ranks_from_ratings([6, 2, 7, 6])
    [2, 3, 1, 2]
    >>> ranks_from_ratings([2.0, 1.4, 0.9, 2.5], tie_margin=0.5)
    [1, 2, 2, 1]
    """
    if problem := ratings_problem(ratings, len(ratings)):
        raise UserError(problem)
    ranks, rank, best = [0] * len(ratings), 0, math.inf
    for i in sorted(range(len(ratings)), key=lambda i: -ratings[i]):
        if best - ratings[i] > tie_margin:
            rank, best = rank + 1, ratings[i]
        ranks[i] = rank
    return ranks


def of_completions(row: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """The row with the completions of these places alone, and what it has for each of them.

    >>> of_completions({"prompt": "p", "completions": ["a", "b", "c"], "truncated": [True, False, False]}, [2, 0])
    {'prompt': 'p', 'completions': ['c', 'a'], 'truncated': [False, True]}
    """
    aligned = {name: [row[name][i] for i in places] for name in PER_COMPLETION if row.get(name) is not None}
    return {**row, **aligned}


def best_and_worst(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The pair that DPO on pairs takes of a ranking: the first of the best and the first of the worst; None if all tie.

    >>> best_and_worst({"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [2, 1, 3, 1]})
    {'prompt': 'p', 'completions': ['b', 'c'], 'ranks': [1, 2]}
    """
    ranks = row["ranks"]
    best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
    return None if best == worst else of_completions(row, [best, worst]) | {"ranks": [1, 2]}


def from_preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """A TRL preference row (`prompt`, `chosen`, `rejected`) as a ranked row with K = 2; other fields are kept.

    Without `prompt` it is what both answers begin with (`prefopt.rankings.prompts`). A `margin` becomes `ratings`, whose difference it is: TRL's loss has `margin_coef` = 1. Raises as `row_problem` finds.

    >>> from_preference({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"})
    {'prompt': '2 + 2 =', 'completions': [' 4', ' 5'], 'ranks': [1, 2]}
    >>> from_preference({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "margin": 3})["ratings"]
    [3, 0]
    """
    required = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    if problem := row_problem(row, required):
        raise UserError(problem)
    row = with_prompt(row)
    ranked = {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "ranks": [1, 2]}
    if "margin" in row:
        ranked["ratings"] = None if row["margin"] is None else [row["margin"], 0]
    converted = ("prompt", "chosen", "rejected", "margin")
    return {**{key: value for key, value in row.items() if key not in converted}, **ranked}


def to_preferences(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All strict pairs of a ranked row as TRL preference rows; ties give none, so the list may be empty.

    >>> pairs = to_preferences({"prompt": "2 + 2 =", "completions": [" 5", " 4", " four"], "ranks": [2, 1, 1]})
    >>> [(pair["chosen"], pair["rejected"]) for pair in pairs]
    [(' 4', ' 5'), (' four', ' 5')]
    """
    if problem := row_problem(row, ("prompt", "completions", "ranks")):
        raise UserError(problem)
    pairs = []
    for (a, rank_a), (b, rank_b) in combinations(zip(row["completions"], row["ranks"], strict=True), 2):
        if rank_a != rank_b:
            chosen, rejected = (a, b) if rank_a < rank_b else (b, a)
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def _default_labels(k: int) -> list[str]:
    if k > 26:
        raise UserError(f"ranking of {k} completions: the letters end at 26; pass labels")
    return [chr(ord("A") + i) for i in range(k)]


def _checked_labels(labels: Sequence[str]) -> list[str]:
    if not isinstance(labels, Sequence) or not all(isinstance(label, str) for label in labels):
        raise UserTypeError(f"labels {shorten(labels)}: expected a list of names")
    if len(set(labels)) != len(labels) or any(not s.strip() or s != s.strip() or set(s) & set(">=") for s in labels):
        raise UserError(f"labels {shorten(list(labels))}: expected distinct names without '>', '=' or outer spaces")
    return list(labels)
