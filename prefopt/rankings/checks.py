"""Bad rows stop early: every check names the source, the row, the field, what was expected and the remedy.

What a ranked row is: `prefopt.rankings.row`.
"""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeGuard

from prefopt.errors import UserError
from prefopt.rankings.prompts import OTHER_NAMES, with_prompt

if TYPE_CHECKING:
    from datasets import Dataset

PER_COMPLETION = ("completions", "completion_ids", "assistant_spans", "ranks", "ratings", "flags", "truncated")


def validate_comparisons(rows: Dataset | Sequence[Mapping[str, Any]], source: str = "dataset") -> None:
    """Check every row (ranked, or TRL preference) and stop at the first that is not as described above.

    Raises:
        UserError: naming the source, the row (counted from 0), the field, what was expected, and the remedy.
            Missing columns are reported before any row is read.

    >>> validate_comparisons([{"prompt": "2 + 2 =", "completions": [" 4", " 5"], "ranks": [1, 3]}])
    Traceback (most recent call last):
    prefopt.errors.UserError: dataset row 0: field 'ranks': expected dense ranks, got [1, 3]; write [1, 2] for the same order
    """
    if isinstance(rows, Mapping) or not (isinstance(rows, Sequence) or _is_dataset(rows)):
        raise UserError(
            f"{source}: expected a datasets.Dataset or a list of dicts, got {type(rows).__name__}; "
            "choose one split of a DatasetDict; the trainers take a stream as it is, and check its rows as they come"
        )
    if len(rows) == 0:
        raise UserError(f"{source}: expected at least one row, got none")
    if _is_dataset(rows):
        columns = set(rows.column_names)
    else:
        columns = {key for row in rows if isinstance(row, Mapping) for key in row}
    for _ in checked_comparisons(_iterate(rows), required_columns(columns, source), source):
        pass


def checked_comparisons(
    rows: Iterable[Mapping[str, Any]], required: tuple[str, ...], source: str = "dataset"
) -> Iterator[Mapping[str, Any]]:
    """The rows as they come, each checked before it goes on; `required` are the columns of their kind.

    Raises:
        UserError: at the first bad row, as `validate_comparisons`.

    >>> good = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    >>> rows = checked_comparisons([good, {**good, "chosen": ""}], ("prompt", "chosen", "rejected"))
    >>> next(rows) == good
    True
    >>> next(rows)
    Traceback (most recent call last):
    prefopt.errors.UserError: dataset row 1: field 'chosen': expected a non-empty string, got ''; drop it, or write the EOS token for an answer that ends at once
    """
    layout = None
    for index, row in enumerate(rows):
        problem = row_problem(row, required)
        if problem is None:
            row = with_prompt(row) if "chosen" in required else row
            completion = row["chosen"] if "chosen" in required else row["completions"][0]
            row_layout = (_kind(row["prompt"]), _kind(completion))
            layout = layout or row_layout
            if row_layout != layout:
                problem = (
                    f"field 'prompt': expected {layout[0]} with {layout[1]} completions as in row 0, got "
                    f"{row_layout[0]} with {row_layout[1]} completions; train on chat rows and plain rows separately"
                )
        if problem:
            raise UserError(f"{source} row {index}: {problem}")
        yield row


def validate_tokenized(rows: Dataset, source: str = "dataset") -> None:
    """Check the ranks of rows that have token ids already, as `validate_comparisons`: as many as `completion_ids`, dense, from 1."""
    names = ["prompt_ids", "completion_ids", "ranks"]
    for index, row in enumerate(rows.with_format(None).select_columns(names)):  # one at a time: ids are many
        if problem := tokenized_problem(row):
            raise UserError(f"{source} row {index}: {problem}")


def tokenized_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row that has token ids, as `row_problem` says it."""
    prompt_ids, completion_ids = row["prompt_ids"], row["completion_ids"]
    if not prompt_ids:
        return _problem("prompt_ids", "at least one token", prompt_ids, "drop the row")
    if not completion_ids or not all(completion_ids):
        expected = "at least one token in each completion"
        return _problem("completion_ids", expected, completion_ids, "drop the empty completion")
    if len(completion_ids) < 2:
        return _too_few_problem("completion_ids", completion_ids)
    return ranks_problem(row["ranks"], len(completion_ids), "completions")


def validate_demonstrations(rows: Sequence[Mapping[str, Any]], source: str = "dataset") -> None:
    """Check rows of `prompt` and `completion`, texts or chat messages, as `validate_comparisons` checks rankings.

    >>> validate_demonstrations([{"prompt": "2 + 2 =", "completion": None}])
    Traceback (most recent call last):
    prefopt.errors.UserError: dataset row 0: field 'completion': expected a value, got None; fill it or drop the row
    """
    for index, row in enumerate(rows):
        if problem := _demonstration_problem(row):
            raise UserError(f"{source} row {index}: {problem}")


def _demonstration_problem(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return f"expected a dict with prompt and completion, got {shorten(row)}; write one dict per demonstration"
    if "completion" not in row and (other := {"completions", "chosen"} & set(row)):
        remedy = "give the demonstrations rather than rankings, or make rows of the one completion to center on"
        return _problem("completion", "one completion", f"the field {min(other)!r}", remedy, as_is=True)
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            return f"field {name!r}: expected a value, got {'None' if name in row else 'nothing'}; fill it or drop the row"
        if problem := _text_problem(row[name], name):
            return problem
    if isinstance(row["prompt"], str) and not isinstance(row["completion"], str):
        remedy = "give both in one format"
        return _problem("completion", "a string, because the prompt is one", row["completion"], remedy)
    return None


def validate_ratings(rows: Dataset, source: str = "dataset") -> int:
    """Check that the ratings of ranked rows can serve as margins; the number of rows without, whose pairs have the margin 0.

    A labeler may rate a completion higher than another and still rank it below. As data that is harmless, but as a
    margin it would pull against the ranks. Completions that tie have no margin, whatever their ratings.

    Raises:
        UserError: no row has ratings, or naming the first row (counted from 0) in which they contradict the ranks.

    >>> from datasets import Dataset
    >>> validate_ratings(Dataset.from_dict({"ranks": [[1, 2], [2, 1]], "ratings": [[7, 4], None]}))
    1
    """
    rows = rows.with_format(None)
    ratings = rows["ratings"][:] if "ratings" in rows.column_names else [None] * len(rows)
    for index, (rated, ranks) in enumerate(zip(ratings, rows["ranks"][:], strict=True)):
        if rated is not None and (problem := margins_problem(rated, ranks)):
            raise UserError(f"{source} row {index}: {problem}")
    if (missing := sum(rated is None for rated in ratings)) == len(ratings):
        raise UserError(
            f"{source}: field 'ratings': expected ratings to make margins of, got none in any of the {missing} rows; "
            "add them, or train without margins"
        )
    return missing


def required_columns(columns: Set[str], source: str) -> tuple[str, ...]:
    """The columns that rows of this kind, ranked or TRL preference, must have; a UserError if one is missing.

    Preference rows without `prompt` have it in both answers.

    >>> required_columns({"prompt", "completions", "ranks", "labeler"}, "train")
    ('prompt', 'completions', 'ranks')
    """
    is_ranked = bool(columns & {"completions", "ranks"}) or not columns & {"chosen", "rejected"}
    required = ("prompt", "completions", "ranks")
    if not is_ranked:
        required = ("prompt", "chosen", "rejected") if "prompt" in columns else ("chosen", "rejected")
    if missing := [name for name in required if name not in columns]:
        raise UserError(
            f"{source}: field {missing[0]!r}: expected the columns {', '.join(required)}, "
            f"got {', '.join(sorted(columns)) or 'none'}; rename or add it"
        )
    return required


def _is_dataset(rows: Any) -> TypeGuard[Dataset]:
    """Lists are told apart without `datasets`, whose import takes seconds."""
    if isinstance(rows, Sequence):
        return False
    from datasets import Dataset

    return isinstance(rows, Dataset)


def _iterate(rows: Dataset | Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if not _is_dataset(rows):
        yield from rows
        return
    if rows.format["type"] != "custom":  # a custom transform may need its other columns; others make tensors
        known = {"prompt", "chosen", "rejected", "margin", "labeler", *PER_COMPLETION, *OTHER_NAMES}
        rows = rows.with_format(None).select_columns([name for name in rows.column_names if name in known])
    for batch in rows.iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def row_problem(row: Any, required: tuple[str, ...]) -> str | None:
    """What is wrong with a row, as "field ...: expected ..., got ...; remedy", or None."""
    if not isinstance(row, Mapping):
        return f"expected a dict with {', '.join(required)}, got {shorten(row)}; load the file as one dict per row"
    for name in required:
        if row.get(name) is None:
            return f"field {name!r}: expected a value, got {'None' if name in row else 'nothing'}; fill it or drop the row"
    if "chosen" in required:
        try:
            row = with_prompt(row)
        except UserError as error:
            return str(error)
    prompt = row.get("prompt")
    if problem := _text_problem(prompt, "prompt"):
        return problem
    if "chosen" in required:
        completions = {"chosen": row["chosen"], "rejected": row["rejected"]}
    else:
        if not isinstance(row["completions"], list | tuple):
            return _problem("completions", "a list of completions", row["completions"], "write one list entry each")
        if len(row["completions"]) < 2:
            return _too_few_problem("completions", row["completions"])
        completions = {f"completions[{i}]": completion for i, completion in enumerate(row["completions"])}
    first = _kind(next(iter(completions.values())))
    for name, completion in completions.items():
        if problem := _text_problem(completion, name):
            return problem
        if _kind(completion) == "messages" and isinstance(prompt, str):
            return _problem(
                name, "a string, because the prompt is one", completion, "give prompt and completions in one format"
            )
        if _kind(completion) != first:
            return _problem(name, f"{first} like the other completions", completion, "give all in one format")
    k = len(completions)
    if "chosen" in required and "margin" in row:
        if row["margin"] is not None and not is_finite_number(row["margin"]):
            return _problem("margin", "a finite number", row["margin"], "convert, empty or rename the field")
        if row.get("ratings") is not None:
            return _problem("ratings", "none next to 'margin'", row["ratings"], "remove one of the two")
    if "ranks" in required and (problem := ranks_problem(row["ranks"], k, "completions")):
        return problem
    if not isinstance(row.get("labeler"), str | None):
        return _problem("labeler", "a string", row["labeler"], "convert it with str()")
    if row.get("ratings") is not None and (problem := ratings_problem(row["ratings"], k)):
        return problem
    if problem := unaligned_problem(row, k, ("flags", "truncated")):
        return problem
    if not all(isinstance(cut, bool) for cut in row.get("truncated") or ()):
        return _problem("truncated", "true or false for each completion", row["truncated"], "fill the gaps")
    return None


def unaligned_problem(row: Mapping[str, Any], k: int, names: Iterable[str] = PER_COMPLETION) -> str | None:
    """Which of the fields that have one entry for each of the k completions of a row has more or fewer.

    >>> unaligned_problem({"completions": ["a", "b"], "truncated": [True]}, 2)
    "field 'truncated': expected a list with one entry for each of the 2 completions, got [True]; align it or drop it"
    """
    for name in names:
        value = row.get(name)
        if value is not None and not (isinstance(value, list | tuple) and len(value) == k):
            expected = f"a list with one entry for each of the {k} completions"
            return _problem(name, expected, value, "align it or drop it")
    return None


def _too_few_problem(name: str, completions: Sequence[Any]) -> str:
    remedy = "one alone carries no comparison: drop the row"
    return _problem(name, "at least 2 completions", len(completions), remedy)


def lone_surrogate(value: Any) -> str | None:
    r"""The first text in a value, or in what it holds, that has half of a character and so no form in UTF-8.

    >>> lone_surrogate([{"role": "user", "content": "Nice \ud83d"}]), lone_surrogate("Nice \U0001f600")
    ('Nice \ud83d', None)
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value
        return None
    held = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next(filter(None, map(lone_surrogate, held)), None)


def half_a_character(name: str, value: Any) -> str | None:
    """What is wrong with a field that has a `lone_surrogate`."""
    if (text := lone_surrogate(value)) is None:
        return None
    remedy = "the text was cut inside a character: mend it or drop the row"
    return _problem(name, "text", f"half of a character (a lone surrogate) in {shorten(text)}", remedy, as_is=True)


def _text_problem(value: Any, name: str) -> str | None:
    if problem := half_a_character(name, value):
        return problem
    if isinstance(value, str):
        if value:
            return None
        remedy = "drop it" + (", or write the EOS token for an answer that ends at once" if name != "prompt" else "")
        return _problem(name, "a non-empty string", value, remedy)
    if not isinstance(value, list | tuple):
        return _problem(name, "a string or a list of chat messages", value, "convert it or drop the row")
    if not value:
        return _problem(name, "a non-empty list of chat messages", value, "drop it")
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            return _problem(name, "chat messages with 'role' and 'content'", message, "convert the messages")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return _problem(name, "messages with text in 'content'", message, "fill 'content' or drop the row")
        if isinstance(content, list):
            try:
                joined_parts(content)
            except UserError as error:
                return f"field {name!r}: {error}"
    if not any(message.get("content") or message.get("tool_calls") for message in value):
        return _problem(name, "a message that says something", value, "drop it")
    if name != "prompt" and value[0]["role"] in ("user", "system", "developer"):
        remedy = "leave the prompt out of the completion"
        return _problem(name, "a completion that starts with the assistant", value[0], remedy)
    return None


def joined_parts(parts: list) -> str:
    """The text of a message's content that is written in parts, as chat APIs have it.

    >>> joined_parts([{"type": "text", "text": "2 + 2"}, {"type": "text", "text": " ="}])
    '2 + 2 ='
    """
    texts = [part if isinstance(part, str) else isinstance(part, Mapping) and _text_of(part) for part in parts]
    for part, text in zip(parts, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"expected parts of text in 'content', got {shorten(part)}; leave it out or drop the row")
    return "".join(texts)


def _text_of(part: Mapping[str, Any]) -> Any:
    """LLaMA-Factory has it in `value`."""
    return part.get("value") if part.get("text") is None and part.get("type") == "text" else part.get("text")


def contradictions(row: Mapping[str, Any]) -> list[int]:
    """Positions of completions that are equal but ranked differently, from which nothing can be learned.

    >>> contradictions({"completions": ["Plum.", "No.", "Plum."], "ranks": [1, 2, 3]})
    [0, 2]
    """
    ranks_of: dict[str, set[int]] = defaultdict(set)
    keys = [repr(completion) for completion in row[completions_of(row)]]
    for key, rank in zip(keys, row["ranks"], strict=True):
        ranks_of[key].add(rank)
    return [i for i, key in enumerate(keys) if len(ranks_of[key]) > 1]


def completions_of(names: Container[str]) -> str:
    """The column of a ranked row's completions: their texts, or their token ids where there are no texts."""
    return "completions" if "completions" in names else "completion_ids"


def ranks_problem(ranks: Any, k: int, things: str) -> str | None:
    if not isinstance(ranks, list | tuple):
        return _problem("ranks", "a list of integers", ranks, "write one rank per completion, 1 = best")
    if len(ranks) != k:
        remedy = f"write one rank for each of the {k} {things}"
        return _problem("ranks", f"{k} ranks", f"{len(ranks)}: {shorten(ranks)}", remedy, as_is=True)
    expected = "integers from 1 (1 = best, equal = tie)"
    for rank in ranks:
        if not is_finite_number(rank):
            if rank is None or isinstance(rank, float):
                remedy = f"rank every one of the {things}, or drop the unranked ones"
            else:
                remedy = "convert ratings with ranks_from_ratings and text with parse_ranking"
            return _problem("ranks", expected, f"{rank!r} in {shorten(ranks)}", remedy, as_is=True)
    dense = dense_ranks(ranks)
    if any(rank != int(rank) or rank < 1 for rank in ranks):
        return _problem("ranks", expected, ranks, f"write {dense} for the same order")
    if list(ranks) != dense:
        return _problem("ranks", "dense ranks", ranks, f"write {dense} for the same order")
    return None


def ratings_problem(ratings: Any, k: int) -> str | None:
    if not isinstance(ratings, list | tuple) or len(ratings) != k:
        return _problem("ratings", f"a list with a number for each of the {k} completions", ratings, "align it")
    for rating in ratings:
        if not is_finite_number(rating):
            got = f"{rating!r} in {shorten(ratings)}"
            remedy = "rate every completion or drop the field"
            return _problem("ratings", "finite numbers", got, remedy, as_is=True)
    return None


def margins_problem(ratings: Any, ranks: Sequence[int]) -> str | None:
    """What keeps the ratings of a ranked row from being margins."""
    if problem := ratings_problem(ratings, len(ranks)):
        return problem
    both = list(zip(ranks, ratings, strict=True))
    if any(a[0] < b[0] and a[1] < b[1] for a in both for b in both):
        expected = "no rating above that of a better ranked completion, as margins are differences of ratings"
        got = f"{shorten(ratings)} for the ranks {shorten(ranks)}"
        remedy = "correct the row, empty its ratings, or train without margins"
        return _problem("ratings", expected, got, remedy, as_is=True)
    return None


def margin_problem(margin: float | None) -> str | None:
    """What keeps the field `margin` of a preference row from being a margin."""
    if margin is None or margin >= 0:
        return None
    expected = "a number from 0, as it is how much better 'chosen' is"
    return _problem("margin", expected, margin, "swap chosen and rejected, empty the field, or train without margins")


def is_finite_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _problem(field: str, expected: str, got: Any, remedy: str, as_is: bool = False) -> str:
    return f"field {field!r}: expected {expected}, got {got if as_is else shorten(got)}; {remedy}"


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "messages"


def dense_ranks(values: Sequence[float]) -> list[int]:
    """Dense ranks, smallest value first."""
    rank = {value: position for position, value in enumerate(sorted(set(values)), start=1)}
    return [rank[value] for value in values]
