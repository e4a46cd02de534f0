"""Labels that people gave to models' completions: ranks, ratings and flags, or plain pairwise preferences.

A file has one JSON object per line, of either kind:

    {"id": 3, "models": ["sft", "ppo"], "ranks": [2, 1], "ratings": [4, 6], "flags": [{...}, {...}], "labeler": "ann"}
    {"id": 3, "a": "ppo", "b": "sft", "preference": 1, "labeler": "ann"}

`id` is the number of the prompt; `prompt`, its text, does as well. The first kind is a ranked comparison whose
`models` say who wrote each completion; of `ranks`, `ratings` and `flags` any may be absent. With `completions` in it,
labels of a text that is not the one generated now are left out and counted.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, compress
from typing import Any

from prefopt.errors import UserError

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
Completions = Mapping[str, Sequence[Row]]  # of every model, one row per prompt
COLUMNS = ("ranks", "ratings", "flags", "completions")  # of a label, one entry per model


def check_labels(rows: Iterable[Row], completions: Completions, source: str) -> tuple[list[dict[str, Any]], int]:
    """The rows with their `id`, and how many labels were left out because they are of other completions.

    Raises:
        UserError: "SOURCE row 12: field 'ranks': expected ..., got ...".
    """
    ids = {prompt_key(row["prompt"]): row["id"] for one in completions.values() for row in one}
    texts = {(model, row["id"]): row["completion"] for model, one in completions.items() for row in one}
    known, kept, stale = set(ids.values()), [], 0
    for number, row in enumerate(rows):
        field, expected = _mistake(row, ids) or (None, "")
        if field is not None:
            raise UserError(f"{source} row {number}: field {field!r}: expected {expected}, got {row.get(field)!r:.80}")
        label = {**row, "id": row["id"] if "id" in row else ids[prompt_key(row["prompt"])]}
        if label["id"] not in known:
            stale += 1
            continue
        if "preference" not in row and row.get("completions") is not None:
            said = zip(row["models"], row["completions"], strict=True)
            current = [texts.get((model, label["id"]), text) == text for model, text in said]
            stale += current.count(False)
            for field in ("models", *(column for column in COLUMNS if row.get(column) is not None)):
                label[field] = list(compress(row[field], current))
        kept.append(label)
    if stale:
        logger.warning(
            "%s: %d labels left out, which are of other prompts or completions than the generated ones", source, stale
        )
    return kept, stale


def _mistake(row: Row, prompts: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first field that is wrong, and what is expected there."""
    if "id" in row and not isinstance(row["id"], (int, str)):
        return "id", "the number of a prompt"
    if "id" not in row and prompt_key(row.get("prompt")) not in prompts:
        return "prompt", "`id`, or the text of a prompt that was generated for"
    if "preference" in row:
        a, b = row.get("a"), row.get("b")
        if not (isinstance(a, str) and isinstance(b, str) and a != b):
            return "b" if isinstance(a, str) else "a", "the names of two models in a and b"
        is_share = _is_number(row["preference"]) and 0 <= row["preference"] <= 1
        return None if is_share else ("preference", "1 (a is better), .5 (a tie) or 0 (b is better)")
    models = row.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(m, str) for m in models):
        return "models", "the list of models that wrote the completions"
    if len(set(models)) < len(models):
        return "models", "every model once"
    for field in COLUMNS:
        if row.get(field) is not None and (not isinstance(row[field], list) or len(row[field]) != len(models)):
            return field, f"a list of {len(models)}, one per model"
    if not any(row.get(field) is not None for field in ("ranks", "ratings", "flags")):
        return "ranks", "`ranks`, `ratings` or `flags`"
    if any(not _is_number(x) or x < 1 for x in row.get("ranks") or []):
        return "ranks", "numbers from 1 on"
    if any(not _is_number(x) or not 1 <= x <= 7 for x in row.get("ratings") or []):
        return "ratings", "numbers from 1 to 7"
    if any(not isinstance(flags, Mapping) for flags in row.get("flags") or []):
        return "flags", "one object of name: true, false or null per completion"
    return None


def preferences(labels: Iterable[Row]) -> list[dict[str, Any]]:
    """Judgements from labels: every pair of a ranking (by `ranks`, else by `ratings`), and the pairwise ones.

    Example:
        >>> preferences([{"id": 0, "models": ["x", "y"], "ratings": [3, 5], "labeler": "ann"}])
        [{'id': 0, 'a': 'x', 'b': 'y', 'preference': 0.0, 'labeler': 'ann'}]
    """
    found = []
    for row in labels:
        who = {"labeler": row["labeler"]} if row.get("labeler") is not None else {}
        if "preference" in row:
            pair = {"a": row["a"], "b": row["b"]}
            found.append({"id": row["id"], **pair, "preference": float(row["preference"]), **who})
            continue
        better = [-x for x in row["ranks"]] if row.get("ranks") is not None else row.get("ratings")
        for i, j in combinations(range(len(row["models"])) if better is not None else (), 2):
            preference = 0.5 * (1 + (better[i] > better[j]) - (better[i] < better[j]))
            pair = {"a": row["models"][i], "b": row["models"][j]}
            found.append({"id": row["id"], **pair, "preference": preference, **who})
    return found


class HumanJudge:
    """People's labels of the samples. `stale` counts those left out because they are of other completions."""

    def __init__(self, labels: Sequence[Row], source: str = "human_judgements") -> None:
        self.labels, self.source, self.stale = labels, source, 0

    def judgements(self, completions: Completions, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        sampled = {m: [r for r in rows if r["decoding"] == "sampled"] for m, rows in completions.items()}
        labels, self.stale = check_labels(self.labels, sampled, self.source)
        compared = {frozenset(pair) for pair in pairs}
        every = preferences(labels)
        found = [{"decoding": "sampled", **row} for row in every if {row["a"], row["b"]} in compared]
        if len(found) < len(every):
            left = len(every) - len(found)
            logger.warning(
                "%s: %d of %d judgements are of models that are not compared here", self.source, left, len(every)
            )
        return found


def prompt_key(prompt: Any) -> str:
    """A prompt, text or messages, as a key."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x == x
