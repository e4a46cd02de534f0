"""Ranked comparisons as token ids in batches `[B, K, T]`: checked rows, nothing dropped without a count."""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, List, Value

from prefopt.errors import UserError
from prefopt.rankings.checks import (
    PER_COMPLETION,
    checked_comparisons,
    completions_of,
    contradictions,
    dense_ranks,
    margin_problem,
    margins_problem,
    required_columns,
    shorten,
    tokenized_problem,
    validate_comparisons,
    validate_ratings,
    validate_tokenized,
)
from prefopt.rankings.prompts import PARTS, columns_of, unread_in_words, unread_parts
from prefopt.rankings.row import from_preference
from prefopt.rankings.tokens import (
    ENDED_PROMPTS,
    SPELT_TOKENS,
    ends_texts,
    row_ids,
    spells_control_tokens,
    template_kwargs,
)

logger = logging.getLogger(__name__)
# Every process reads a whole stream; one of them says what it has dropped.
main_process_logger = get_logger(__name__)

NO_RATINGS = "have no ratings: the margin of their pairs is 0"
UNREAD_MARGINS = "have a margin, kept as ratings; the loss reads it if margin_coef > 0 (1 as in TRL)"
CONTRADICTING = " that stand in a row with two ranks"
_TIES = ("drop", "half")
_TOKENIZED = {"prompt_ids", "completion_ids", "ranks"}

RowCheck = Callable[[Mapping[str, Any]], str | None]


def prepare_comparisons(
    dataset: Dataset | Sequence[Mapping[str, Any]], *, ties: str = "drop", margins: bool = False, source: str = "train"
) -> Dataset:
    """A validated dataset of ranked rows, from ranked or TRL preference rows.

    Completions that stand in a row with two ranks teach nothing: they are dropped and counted in the log, as `convert` does.
    Rows in which all completions tie have no gradient under `ties="drop"`: they are dropped and counted in the log.
    Of a dataset that already has token ids, lengths and ranks are checked. With `margins`, the ratings will make margins:
    they are checked by `validate_ratings` and rows without are counted in the log.

    Raises:
        UserError: as `validate_comparisons` and `validate_ratings`, and when no row is left.

    >>> rows = prepare_comparisons([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    >>> rows[0]["completions"], rows[0]["ranks"]
    ([' 4', ' 5'], [1, 2])
    """
    check_ties(ties)
    if isinstance(dataset, Dataset) and _is_tokenized(dataset):
        validate_tokenized(dataset, source)
    else:
        dataset = _from_texts(dataset, source, margins)
    if dataset.features["ranks"] != List(Value("int64")):  # e.g. 1.0, which some writers make of 1
        dataset = dataset.cast_column("ranks", List(Value("int64")))
    if margins and (missing := validate_ratings(dataset, source)):
        logger.warning(f"{source}: {missing} of {len(dataset)} rows {NO_RATINGS}")
    kept = dataset
    columns = dataset.with_format(None).select_columns([completions_of(dataset.column_names), "ranks"])
    if any(contradictions(row) for row in columns):
        kept = dataset.map(without_contradictions)
    return _keep_rows_with_a_comparison(dataset, kept, ties, source, CONTRADICTING)


def _from_texts(dataset: Dataset | Sequence[Mapping[str, Any]], source: str, margins: bool) -> Dataset:
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # rows as Python objects, not tensors
    validate_comparisons(dataset, source)
    if unread := unread_parts(columns_of(dataset, PARTS)):
        logger.warning(f"{source}: {unread}")
    if not isinstance(dataset, Dataset):
        columns = dict.fromkeys(key for row in dataset for key in row)
        dataset = Dataset.from_dict({name: [row.get(name) for row in dataset] for name in columns})
    return dataset if "completions" in dataset.column_names else _from_preferences(dataset, source, margins)


def _from_preferences(dataset: Dataset, source: str, margins: bool) -> Dataset:
    if "margin" not in dataset.column_names:
        return dataset.map(from_preference, remove_columns=["chosen", "rejected"])
    given = dataset.with_format(None)["margin"][:]
    for index, margin in enumerate(given):
        if margins and (problem := margin_problem(margin)):
            raise UserError(f"{source} row {index}: {problem}")
    if (count := sum(margin is not None for margin in given)) and not margins:
        logger.warning(f"{source}: {count} rows {UNREAD_MARGINS}")
    # Not by `map`, which cannot tell the type of a column whose first rows are empty.
    rest = [name for name in dataset.column_names if name not in ("margin", "ratings")]
    dataset = dataset.select_columns(rest).map(from_preference, remove_columns=["chosen", "rejected"])
    ratings = [None if margin is None else [margin, 0.0] for margin in given]
    return dataset.add_column("ratings", ratings, feature=List(Value("float64")))


def tokenize_comparisons(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    ties: str = "drop",
    source: str = "train",
    num_proc: int | None = None,
) -> Dataset:
    """Add `prompt_ids` and `completion_ids` (K lists) to prepared rows.

    A completion that makes prompt + completion longer than `max_length` is dropped and the ranks of the others are
    made dense again; a row goes only if fewer than two completions, or under `ties="drop"` no strict pair, remain.
    One warning gives the counts. The chat template sees the row's `tools` and `chat_template_kwargs`, as in TRL.
    A second warning counts the prompts that the tokenizer ends with EOS: the completion comes after EOS, in generation
    too, until the tokenizer stops adding it. Applying it to its own result changes nothing. If any completion has several
    messages, `assistant_spans` says which of its tokens the assistant says.

    Raises:
        UserError: as `build_ids`, a `max_length` below 1, and when no row is left.
    """
    check_ties(ties)
    if max_length is not None and max_length < 1:
        raise UserError(
            f"max_length={max_length!r}: expected a number of tokens from 1, or None to drop nothing for its length"
        )
    if not _is_tokenized(dataset):
        texts = dataset.with_format(None).select_columns(["prompt", "completions"])
        dataset = dataset.map(
            tokenize_row,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "source": source, "has_turns": any(map(_has_turns, texts))},
            num_proc=num_proc,
            desc=f"Tokenizing {source}",
        )
        if spelt := sum(spells_control_tokens(tokenizer, row["prompt"], *row["completions"]) for row in texts):
            logger.warning(f"{source}: {spelt} of {len(dataset)} {SPELT_TOKENS}")
        ended = sum(ids[-1] == tokenizer.eos_token_id for ids in dataset.with_format(None)["prompt_ids"][:])
        if ended and isinstance(dataset[0]["prompt"], str) and ends_texts(tokenizer):
            logger.warning(f"{source}: {ended} of {len(dataset)} {ENDED_PROMPTS}")
    if max_length is None:
        return dataset
    fitting = dataset.map(fit_row, fn_kwargs={"max_length": max_length}, num_proc=num_proc, desc=f"Fitting {source}")
    return _keep_rows_with_a_comparison(dataset, fitting, ties, source, f" longer than max_length={max_length} tokens")


def _has_turns(row: Mapping[str, Any]) -> bool:
    """Whether a completion has several messages, of which others than the assistant may say some."""
    return any(isinstance(completion, list) and len(completion) > 1 for completion in row["completions"])


def tokenize_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: Any,
    source: str,
    of: str = " of the prepared rows",
    has_turns: bool = False,
) -> dict[str, Any]:
    """`prompt_ids` and `completion_ids` of one checked row, with `has_turns` also `assistant_spans`.

    A ValueError names `source` and the row's number.
    """
    cuts = row.get("truncated") or [False] * len(row["completions"])
    try:
        prompt_ids, completion_ids, said = row_ids(
            tokenizer, row["prompt"], row["completions"], cuts, template_kwargs(row)
        )
        if not prompt_ids:
            raise UserError("field 'prompt': expected at least one token, got none; drop the row")
    except Exception as error:  # a chat template may raise anything; say for which row
        prompt = shorten(row["prompt"])
        raise UserError(f"{source} row {index}{of} (prompt {prompt}): {error}") from error
    spans = {"assistant_spans": [[list(span) for span in one] for one in said]} if has_turns else {}
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, **spans}


def fit_row(row: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """The lists of a tokenized row without the completions that are too long; `ranks` dense again, perhaps empty."""
    room = max_length - len(row["prompt_ids"])
    keep = [i for i, ids in enumerate(row["completion_ids"]) if len(ids) <= room]
    return _only(row, keep)


def without_contradictions(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without its `contradictions`; `ranks` dense again, perhaps empty."""
    out = set(contradictions(row))
    return {**row, **_only(row, [i for i in range(len(row["ranks"])) if i not in out])}


def _only(row: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """The lists of a row with these completions alone."""
    kept = {name: [row[name][i] for i in keep] for name in PER_COMPLETION if row.get(name) is not None}
    return {**kept, "ranks": dense_ranks(kept["ranks"])}


def _keep_rows_with_a_comparison(before: Dataset, after: Dataset, ties: str, source: str, why: str) -> Dataset:
    """Drop rows of `after` that compare nothing, and log what is gone since `before`."""
    ranks = after["ranks"][:]
    reasons = [_why_dropped(r, ties) for r in ranks]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    counts = Counter(filter(None, reasons))
    counts["completions"] = sum(map(len, before["ranks"][:])) - sum(map(len, ranks))
    if not counts.total():
        return after
    message = f"{source}: {_in_words(counts, why, len(kept), len(ranks))}"
    if not kept:
        is_short = why != CONTRADICTING and (counts["few"] or counts["completions"])
        remedy = "raise max_length" if is_short else "add rows with a preference"
        raise UserError(f"{message}; {remedy}")
    logger.warning(message)
    return after.select(kept) if len(kept) < len(ranks) else after


def _why_dropped(ranks: Sequence[int], ties: str) -> str | None:
    """Why a row compares nothing; None if it does."""
    if len(ranks) < 2:
        return "few"
    return "tied" if ties == "drop" and len(set(ranks)) < 2 else None


def _in_words(counts: Mapping[str, int], why: str, kept: int, read: int) -> str:
    """What is dropped; `why` it is of completions."""
    names = {
        "completions": f"completions{why}",
        "contradicting": f"completions{CONTRADICTING}",
        "few": "rows with fewer than two completions left",
        "tied": "rows in which all completions tie",
    }
    dropped = ", ".join(f"{counts[key]} {name}" for key, name in names.items() if counts[key])
    return f"dropped {dropped}; {kept} of {read} rows remain"


def _is_tokenized(dataset: Dataset) -> bool:
    return set(dataset.column_names) >= _TOKENIZED


def check_ties(ties: str) -> None:
    """Raise ValueError for what is no way to treat ties."""
    if ties not in _TIES:
        raise UserError(f"ties: expected one of {', '.join(_TIES)}, got {ties!r}")


class ComparisonStream(torch.utils.data.IterableDataset):
    """What `prepare_comparisons` and `tokenize_comparisons` make of the same rows in the same order, one by one.

    The stream has no end: after its last row it begins again, and its own shuffling, if it has one, draws another
    order. So every optimizer step has its full number of prompts, and Trainer, which goes on from a checkpoint by
    passing over the batches that were trained on, finds the place also after the first pass. Each process reads every
    row and keeps its share of each batch. What is dropped is counted and logged at the end of each pass, and by `report`.

    Rows, tokenizer and options are as for these two functions. A UserError comes while iterating, at the first bad row,
    and when a whole pass leaves no row.

    >>> from datasets import Dataset
    >>> ids = {"prompt_ids": [[5], [6]], "completion_ids": [[[7], [8]], [[7], [9]]], "ranks": [[1, 2], [1, 1]]}
    >>> stream = ComparisonStream(Dataset.from_dict(ids).to_iterable_dataset(), tokenizer=None)
    >>> next(iter(stream))
    {'prompt_ids': [5], 'completion_ids': [[7], [8]], 'ranks': [1, 2]}
    """

    # As errors and the log call the rows.
    SOURCE = "train"

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        ties: str = "drop",
        margins: bool = False,
    ) -> None:
        check_ties(ties)
        self.rows, self.tokenizer = rows.with_format(None), tokenizer
        self.max_length, self.ties, self.margins = max_length, ties, margins
        # What else may be wrong with a tokenized row.
        self.checks: list[RowCheck] = []
        # Of the current pass, also by field that is not read.
        self.counts: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self._pass = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for self._pass in itertools.count():
            self.rows.set_epoch(self._pass)
            self.counts.clear()
            self.unread.clear()
            yield from self._one_pass()
            if not self.counts["kept"]:
                problem = self._summary() if self.counts["read"] else "expected at least one row, got none"
                raise UserError(f"{self.SOURCE}: {problem}; raise max_length, or add rows with a preference")
            self.report()

    def _one_pass(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self._checked()):
            self.counts["read"] += 1
            row = self._fitting(self._tokenized(row, number), number)
            if row is not None:
                self.counts["kept"] += 1
                yield row

    def _checked(self) -> Iterator[Mapping[str, Any]]:
        columns = self.rows.column_names or list(next(iter(self.rows), {}))
        if not columns:
            return iter(())
        if self.margins and self.rows.column_names and not {"ratings", "margin"} & set(columns):
            raise UserError(
                f"{self.SOURCE}: field 'ratings': expected ratings to make margins of, got the columns "
                f"{', '.join(sorted(columns))}; add them, or train without margins"
            )
        if set(columns) >= _TOKENIZED:
            return iter(self.rows)
        return checked_comparisons(self.rows, required_columns(set(columns), self.SOURCE), self.SOURCE)

    def _tokenized(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The ranked row with token ids, and with ratings that can be margins if it must have them."""
        problem = None
        self.unread.update(name for name in PARTS if row.get(name))
        if "prompt_ids" in row:
            problem = tokenized_problem(row)
        elif "completions" not in row:
            self.counts["margin"] += row.get("margin") is not None
            problem = margin_problem(row.get("margin")) if self.margins else None
            row = from_preference(row)
        if self.margins and not problem:
            self.counts["unrated"] += row.get("ratings") is None
            problem = row.get("ratings") and margins_problem(row["ratings"], row["ranks"])
        if problem:
            raise UserError(f"{self.SOURCE} row {number}: {problem}")
        row = {**row, "ranks": [int(rank) for rank in row["ranks"]]}
        if out := contradictions(row):
            self.counts["contradicting"] += len(out)
            row = without_contradictions(row)
        if "prompt_ids" in row:
            return row
        self.counts["spelt"] += spells_control_tokens(self.tokenizer, row["prompt"], *row["completions"])
        row |= tokenize_row(row, number, self.tokenizer, self.SOURCE, of="", has_turns=_has_turns(row))
        is_first = self._pass == number == 0
        if is_first and row["prompt_ids"][-1] == self.tokenizer.eos_token_id and ends_texts(self.tokenizer):
            main_process_logger.warning(f"{self.SOURCE}: {ENDED_PROMPTS}")
        return row

    def _fitting(self, row: dict[str, Any], number: int) -> dict[str, Any] | None:
        """The row without completions that are too long; None, counted, if it then compares nothing."""
        reason = _why_dropped(row["ranks"], self.ties)
        if not reason and self.max_length is not None:
            completions = len(row["ranks"])
            row = {**row, **fit_row(row, self.max_length)}
            self.counts["completions"] += completions - len(row["ranks"])
            reason = _why_dropped(row["ranks"], self.ties)
        if reason:
            self.counts[reason] += 1
            return None
        for check in self.checks:
            if problem := check(row):
                raise UserError(f"{self.SOURCE} row {number}: {problem}")
        return row

    def report(self) -> None:
        """Log what the current pass has dropped; a warning on the first one, which the others repeat."""
        log = main_process_logger.info if self._pass else main_process_logger.warning
        if self.counts["kept"] < self.counts["read"] or self.counts["completions"] or self.counts["contradicting"]:
            log(f"{self.SOURCE}, pass {self._pass + 1} over the stream: {self._summary()}")
        if self.counts["unrated"]:
            log(f"{self.SOURCE}: {self.counts['unrated']} of {self.counts['read']} rows {NO_RATINGS}")
        if self.unread:
            log(f"{self.SOURCE}: {unread_in_words(self.unread)}")
        if self.counts["spelt"]:
            log(f"{self.SOURCE}: {self.counts['spelt']} of {self.counts['read']} {SPELT_TOKENS}")
        if self.counts["margin"] and not self.margins:
            log(f"{self.SOURCE}: {self.counts['margin']} rows {UNREAD_MARGINS}")

    def _summary(self) -> str:
        why = f" longer than max_length={self.max_length} tokens"
        return _in_words(self.counts, why, self.counts["kept"], self.counts["read"])


@dataclass
class RankedCollator:
    """Tokenized rows to tensors `[B, K, T]`: B prompts, K completions, T tokens, padded on the right.

    `input_ids` and `attention_mask` (0/1) cover prompt and completion; `completion_mask` (bool) is True on the
    completion's tokens, of rows with `assistant_spans` on those alone that the assistant says; `ranks [B, K]` is 0 where a row has fewer completions than the largest of the batch. Those
    absent completions are all padding: run the model on `ranks > 0` only. Rows with the field `ratings` also give
    `ratings [B, K]` (float, 0 for absent completions and throughout a row whose ratings are None).

    Args:
        pad_token_id: fills `input_ids`.
        pad_to_multiple_of: makes T a multiple of this number.

    >>> collate = RankedCollator(pad_token_id=0)
    >>> batch = collate([
    ...     {"prompt_ids": [5, 6], "completion_ids": [[7, 1], [8, 9, 1], [1]], "ranks": [2, 1, 2]},
    ...     {"prompt_ids": [5], "completion_ids": [[9, 1], [7, 1]], "ranks": [1, 2]},
    ... ])
    >>> batch["input_ids"]
    tensor([[[5, 6, 7, 1, 0],
             [5, 6, 8, 9, 1],
             [5, 6, 1, 0, 0]],
    <BLANKLINE>
            [[5, 9, 1, 0, 0],
             [5, 7, 1, 0, 0],
             [0, 0, 0, 0, 0]]])
    >>> batch["attention_mask"][0]
    tensor([[1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1],
            [1, 1, 1, 0, 0]])
    >>> batch["completion_mask"][0].int()
    tensor([[0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 0, 0]], dtype=torch.int32)
    >>> batch["ranks"]
    tensor([[2, 1, 2],
            [1, 2, 0]])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not rows or any(not row.keys() >= _TOKENIZED for row in rows):
            raise UserError(f"expected one or more rows with {', '.join(sorted(_TOKENIZED))}, got {shorten(rows)}")
        k = max(len(row["ranks"]) for row in rows)
        t = max(len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["completion_ids"])
        if self.pad_to_multiple_of:
            t = math.ceil(t / self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), k, t), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(len(rows), k, t, dtype=torch.long)
        completion_mask = torch.zeros(len(rows), k, t, dtype=torch.bool)
        ranks = torch.zeros(len(rows), k, dtype=torch.long)
        ratings = torch.zeros(len(rows), k)
        for b, row in enumerate(rows):
            ranks[b, : len(row["ranks"])] = torch.tensor(row["ranks"])
            if row.get("ratings") is not None:
                ratings[b, : len(row["ratings"])] = torch.tensor(row["ratings"], dtype=ratings.dtype)
            start = len(row["prompt_ids"])
            spans = row.get("assistant_spans") or [[(0, len(ids))] for ids in row["completion_ids"]]
            for j, completion in enumerate(row["completion_ids"]):
                end = start + len(completion)
                input_ids[b, j, :end] = torch.tensor([*row["prompt_ids"], *completion])
                attention_mask[b, j, :end] = 1
                for first, last in spans[j]:
                    completion_mask[b, j, start + first : start + last] = True
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "ranks": ranks,
        }
        return {**batch, "ratings": ratings} if any("ratings" in row for row in rows) else batch
