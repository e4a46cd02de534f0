"""Ranked rows from a stream: checked, tokenized, dropped with a count as they come, for training."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from prefopt.errors import UserError
from prefopt.rankings.checks import (
    checked_comparisons,
    margin_problem,
    margins_problem,
    required_columns,
    tokenized_problem,
)
from prefopt.rankings.dataset import check_ties, fit_row, tokenize_row
from prefopt.rankings.row import from_preference
from prefopt.rankings.tokens import ENDED_PROMPTS, ends_texts

logger = get_logger(__name__)

RowCheck = Callable[[Mapping[str, Any]], str | None]


class ComparisonStream(torch.utils.data.IterableDataset):
    """What `prepare_comparisons` and `tokenize_comparisons` make of the same rows in the same order, one by one.

    The stream has no end: after its last row it begins again, and its own shuffling, if it has one, draws another
    order. So every optimizer step has its full number of prompts, and Trainer, which goes on from a checkpoint by
    passing over the batches that were trained on, finds the place also after the first pass. Each process reads every
    row and keeps its share of each batch.

    What is dropped is counted and logged at the end of each pass, and by `report`.

    Args:
        rows: ranked rows, TRL preference rows, or rows that have token ids.
        tokenizer: as in `tokenize_comparisons`, and so are `max_length` and `ties`.
        margins: the ratings will make margins, and are checked for it.
        source: names the rows in errors and in the log.

    Raises:
        UserError: while iterating, at the first bad row; when a whole pass leaves no row.

    Example:
        >>> from datasets import Dataset
        >>> ids = {"prompt_ids": [[5], [6]], "completion_ids": [[[7], [8]], [[7], [9]]], "ranks": [[1, 2], [1, 1]]}
        >>> stream = ComparisonStream(Dataset.from_dict(ids).to_iterable_dataset(), tokenizer=None)
        >>> next(iter(stream))
        {'prompt_ids': [5], 'completion_ids': [[7], [8]], 'ranks': [1, 2]}
    """

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_length: int | None = None,
        ties: str = "drop",
        margins: bool = False,
        source: str = "train",
    ) -> None:
        check_ties(ties)
        self.rows, self.tokenizer = rows.with_format(None), tokenizer
        self.max_length, self.ties, self.margins, self.source = max_length, ties, margins, source
        self.checks: list[RowCheck] = []  # what else may be wrong with a tokenized row
        self.counts: Counter[str] = Counter()  # of the current pass
        self._pass = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for self._pass in count():
            self.rows.set_epoch(self._pass)
            self.counts.clear()
            yield from self._one_pass()
            if not self.counts["kept"]:
                problem = self._summary() if self.counts["read"] else "expected at least one row, got none"
                raise UserError(f"{self.source}: {problem}; raise max_length, or add rows with a preference")
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
                f"{self.source}: field 'ratings': expected ratings to make margins of, got the columns "
                f"{', '.join(sorted(columns))}; add them, or train without margins"
            )
        if {"prompt_ids", "completion_ids", "ranks"} <= set(columns):
            return iter(self.rows)
        return checked_comparisons(self.rows, required_columns(set(columns), self.source), self.source)

    def _tokenized(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The ranked row with token ids, and with ratings that can be margins if it must have them."""
        problem = None
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
            raise UserError(f"{self.source} row {number}: {problem}")
        row = {**row, "ranks": [int(rank) for rank in row["ranks"]]}
        if "prompt_ids" in row:
            return row
        row |= tokenize_row(row, number, self.tokenizer, self.source, of="")
        is_first = self._pass == number == 0
        if is_first and row["prompt_ids"][-1] == self.tokenizer.eos_token_id and ends_texts(self.tokenizer):
            logger.warning(f"{self.source}: {ENDED_PROMPTS}")
        return row

    def _fitting(self, row: dict[str, Any], number: int) -> dict[str, Any] | None:
        """The row without completions that are too long; None, counted, if it then compares nothing."""
        if self.ties == "drop" and len(set(row["ranks"])) < 2:
            self.counts["tied"] += 1
            return None
        if self.max_length is not None:
            completions = len(row["ranks"])
            row = {**row, **fit_row(row, self.max_length)}
            self.counts["completions"] += completions - len(row["ranks"])
            if len(row["ranks"]) < 2:
                self.counts["few"] += 1
                return None
            if self.ties == "drop" and len(set(row["ranks"])) < 2:
                self.counts["tied"] += 1
                return None
        for check in self.checks:
            if problem := check(row):
                raise UserError(f"{self.source} row {number}: {problem}")
        return row

    # ---- counts ----

    def report(self) -> None:
        """Log what the current pass has dropped; a warning on the first one, which the others repeat."""
        log = logger.info if self._pass else logger.warning
        if self.counts["kept"] < self.counts["read"] or self.counts["completions"]:
            log(f"{self.source}, pass {self._pass + 1} over the stream: {self._summary()}")
        if self.counts["unrated"]:
            log(
                f"{self.source}: {self.counts['unrated']} of {self.counts['read']} rows have no ratings: the margin of "
                "their pairs is 0"
            )
        if self.counts["margin"] and not self.margins:
            log(
                f"{self.source}: {self.counts['margin']} rows have a margin, kept as ratings; the loss reads it if "
                "margin_coef > 0 (1 as in TRL)"
            )

    def _summary(self) -> str:
        names = {
            "completions": f"completions longer than max_length={self.max_length} tokens",
            "few": "rows with fewer than two completions left",
            "tied": "rows in which all completions tie",
        }
        dropped = [f"{self.counts[key]} {name}" for key, name in names.items() if self.counts[key]]
        return f"dropped {', '.join(dropped)}; {self.counts['kept']} of {self.counts['read']} rows remain"


def check_stream_options(args: TrainingArguments) -> None:
    """Raise for what a training set without a length cannot have."""
    if args.max_steps <= 0:
        raise UserError(
            "the train dataset is a stream, which has no length: set max_steps (number of rows x epochs / prompts per "
            "optimizer step)"
        )
    if args.dataloader_num_workers:
        raise UserError(
            f"dataloader_num_workers={args.dataloader_num_workers}: expected 0 with a stream, whose rows are checked and "
            "counted in one place; tokenize them beforehand if this is slow"
        )
    if getattr(args, "precompute_ref_log_probs", False):
        raise UserError(
            "precompute_ref_log_probs=True would read the stream to its end before training: leave it off, or load "
            "the rows without streaming"
        )
