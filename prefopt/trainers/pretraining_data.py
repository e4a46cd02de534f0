"""Pretraining text for PPO-ptx: packed blocks, shuffled once per epoch, with a position that can be saved."""

import logging

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

logger = logging.getLogger(__name__)


def pack_documents(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Documents -> blocks of `max_length` token ids. Every document ends in EOS; no token is lost.

    Blocks are cut from the concatenated documents, as in GPT's own pretraining: a block may hold the end of one
    document and the beginning of the next. The last block of each thousand documents may be shorter.

    Args:
        dataset: rows `{"text": str}` or `{"input_ids": list[int]}`.
        tokenizer: the policy's.
        max_length: tokens per block, at least 2.

    Returns:
        Rows `{"input_ids": list[int]}`.

    Raises:
        ValueError: a row is not a text or token list; the column is missing; nothing is left.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"pretrain_dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
    column = next((name for name in ("input_ids", "text") if name in dataset.column_names), None)
    if column is None:
        raise ValueError(
            f"pretrain_dataset: expected a column 'text' or 'input_ids', got {dataset.column_names}"
        )
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("pretrain_dataset: the tokenizer has no EOS token to end documents with")

    def to_ids(batch: dict, numbers: list[int]) -> dict:
        for number, document in zip(numbers, batch[column], strict=True):
            if document is None:
                raise ValueError(f"pretrain_dataset row {number}: field '{column}' is missing; drop the row")
        if column == "text":
            documents = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        else:
            documents = batch["input_ids"]
        documents = [ids if ids[-1] == eos else [*ids, eos] for ids in documents if len(ids)]
        return {"input_ids": documents}

    documents = dataset.select_columns(column).map(
        to_ids, batched=True, with_indices=True, remove_columns=[column]
    )
    if len(documents) == 0:
        raise ValueError("pretrain_dataset: no text in it")
    if empty := len(dataset) - len(documents):
        logger.warning("pretrain_dataset: dropped %d empty of %d documents", empty, len(dataset))
    return pack_dataset(documents, max_length, strategy="wrapped")


class PretrainingStream:
    """An endless stream over the blocks, in a new order each epoch; `position` counts the blocks taken so far.

    The order depends on `seed` and the epoch alone, so setting `position` resumes the stream exactly.

    Example:
        >>> stream = PretrainingStream(Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]}), seed=0)
        >>> first = stream.take(2)
        >>> rest = stream.take(2)
        >>> sorted(first + rest[:1])
        [[1, 2], [3, 4], [5, 6]]
        >>> stream.position = 2
        >>> stream.take(2) == rest
        True
    """

    def __init__(self, blocks: Dataset, seed: int) -> None:
        self.blocks, self.seed, self.position = blocks, seed, 0
        self._order_of: tuple[int, list[int]] = (-1, [])

    def take(self, count: int) -> list[list[int]]:
        """The next `count` blocks."""
        numbers = []
        for position in range(self.position, self.position + count):
            epoch, offset = divmod(position, len(self.blocks))
            if self._order_of[0] != epoch:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                self._order_of = (epoch, torch.randperm(len(self.blocks), generator=generator).tolist())
            numbers.append(self._order_of[1][offset])
        self.position += count
        return [self.blocks[number]["input_ids"] for number in numbers]


def share_of_process(
    blocks: list[list[int]], process: int, processes: int, batch_size: int, pad_token_id: int
) -> tuple[list[dict[str, torch.Tensor]], int]:
    """One process's micro-batches of the blocks of an optimizer step, and the target tokens of ALL of them.

    Every process gets the same number of micro-batches, as each backward is a collective act: where the blocks do
    not divide evenly, a process repeats the first block with every label ignored.

    Returns:
        Micro-batches `{"input_ids", "attention_mask", "labels"}` (each `[b, T]`, right-padded; -100 = ignored), and
        the number of predicted tokens over all processes (the first token of a block is not predicted).

    Example:
        >>> batches, num_tokens = share_of_process([[1, 2, 3], [4, 5], [6, 7]], 1, 2, batch_size=4, pad_token_id=0)
        >>> batches[0]["labels"]  # the second block is this process's; the filler counts nowhere
        tensor([[   4,    5, -100],
                [-100, -100, -100]])
        >>> num_tokens
        4
    """
    num_tokens = sum(len(block) - 1 for block in blocks)
    rows = [(block, True) for block in blocks[process::processes]]
    rows += [(blocks[0], False)] * (-(-len(blocks) // processes) - len(rows))
    batches = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        length = max(len(block) for block, _ in chunk)
        ids = torch.full((len(chunk), length), pad_token_id)
        real = torch.zeros_like(ids, dtype=torch.bool)
        counts = torch.zeros_like(real)
        for i, (block, is_own) in enumerate(chunk):
            ids[i, : len(block)] = torch.tensor(block)
            real[i, : len(block)] = True
            counts[i, : len(block)] = is_own
        batches.append(
            {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~counts, -100)}
        )
    return batches, num_tokens
