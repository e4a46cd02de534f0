"""Tokenized ranked rows to padded batches `[B, K, T]`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class RankedCollator:
    """Tokenized rows to tensors `[B, K, T]`: B prompts, K completions, T tokens, padded on the right.

    `input_ids` and `attention_mask` (0/1) cover prompt and completion; `completion_mask` (bool) is True on the
    completion's tokens; `ranks [B, K]` is 0 where a row has fewer completions than the largest of the batch. Those
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
            for j, completion in enumerate(row["completion_ids"]):
                end = start + len(completion)
                input_ids[b, j, :end] = torch.tensor([*row["prompt_ids"], *completion])
                attention_mask[b, j, :end] = 1
                completion_mask[b, j, start:end] = True
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "ranks": ranks,
        }
        return {**batch, "ratings": ratings} if any("ratings" in row for row in rows) else batch
